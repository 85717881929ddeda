"""Training of a teacher: EDM's denoising loss (Karras et al. 2022)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fewstep.batch import Batch
from fewstep.denoiser import Denoiser
from fewstep.losses import denoising_loss
from fewstep.noise import lognormal_sigmas
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

    def phases(self, iteration: int) -> tuple[str, ...]:
        return ("student",)

    def loss(self, phase: str, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss of a micro-batch, and values to log, whose mean counts."""
        y, s = batch.images, self.settings
        z = torch.randn(len(y), device=y.device, generator=batch.generator)
        sigma = lognormal_sigmas(z, s.P_mean, s.P_std)
        x = y + sigma.reshape(-1, 1, 1, 1) * batch.normal_like(y)
        labels = batch.labels * batch.keep_labels(s.label_dropout)
        D_x = self.student(x, sigma, labels)
        loss = denoising_loss(D_x, y, sigma, self.student.sigma_data).mean()
        return loss, {"loss": loss.detach()}
