"""Training of a teacher: EDM's denoising loss (Karras et al. 2022)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fewstep.batch import Batch
from fewstep.denoiser import Denoiser
from fewstep.losses import denoising_loss
from fewstep.meter import Logged, by_sigma, mean_of
from fewstep.noise import lognormal_sigmas, per_image
from fewstep.params import DenoisingSettings


@dataclass
class Denoising:
    """The method: `student` (here the teacher to be) learns to remove noise of any sigma.

    Labels are dropped with probability settings.label_dropout, which trains the unconditional
    branch that classifier-free guidance needs.
    """

    student: Denoiser
    settings: DenoisingSettings

    def __post_init__(self) -> None:
        self.trained: dict[str, nn.Module] = {"student": self.student}
        self.kept: dict[str, nn.Module] = {}

    def phases(self, iteration: int) -> tuple[str, ...]:
        return ("student",)

    def loss(self, phase: str, batch: Batch) -> tuple[Tensor, dict[str, Logged]]:
        """Mean loss of a micro-batch, and what to log."""
        y, s = batch.images, self.settings
        z = torch.randn(len(y), device=y.device, generator=batch.generator)
        sigma = lognormal_sigmas(z, s.P_mean, s.P_std)
        x = y + per_image(sigma) * batch.normal_like(y)
        labels = batch.labels * batch.keep_labels(s.label_dropout)
        D_x = self.student(x, sigma, labels)
        loss = denoising_loss(D_x, y, sigma, self.student.sigma_data).flatten(1).mean(dim=1)
        return loss.mean(), {"loss": mean_of(loss), **by_sigma("loss", loss, sigma)}

    def forwards(self, encoder: float) -> float:
        """What an image costs, in forward passes of the network; backward counts two."""
        return 3.0
