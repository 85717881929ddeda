"""Training of a teacher: EDM's denoising loss (Karras et al. 2022), and EDM2's where it applies."""

from typing import ClassVar

from torch import Tensor

from fewstep.data.batch import Batch
from fewstep.logs import Logged, by_sigma, mean_of
from fewstep.method import Method, Networks
from fewstep.networks.denoiser import Denoiser
from fewstep.params.fields import Positive, Share, block
from fewstep.params.methods import Settings as MethodSettings
from fewstep.theory.losses import denoising_loss, uncertainty_loss
from fewstep.theory.noise import Schedule, lognormal_sigmas, per_image


@block()
class Settings(MethodSettings):
    needs_teacher: ClassVar[bool] = False

    P_mean: float
    """mean of ln(sigma) in training. EDM uses -1.2"""
    P_std: Positive
    """standard deviation of ln(sigma) in training. EDM uses 1.2"""
    label_dropout: Share
    """probability of training without the label. Guidance needs more than 0"""

    @property
    def trains_unconditional(self) -> bool:
        return self.label_dropout > 0


class Denoising(Method):
    """`student`, here the future teacher, learns to remove noise of any sigma.

    Dropping labels with probability settings.label_dropout trains the unconditional denoiser that
    classifier-free guidance needs. A network that estimates its loss, as EDM2's, is trained by
    `uncertainty_loss`; the log has both.
    """

    def __init__(self, student: Denoiser, settings: Settings) -> None:
        super().__init__(student)
        self.settings = settings

    def loss(
        self, phase: str, batch: Batch, prepared: None = None
    ) -> tuple[Tensor, dict[str, Logged]]:
        y, s = batch.images, self.settings
        sigma = lognormal_sigmas(batch.normal(), s.P_mean, s.P_std)
        x = y + per_image(sigma) * batch.normal_like(y)
        labels = batch.labels * batch.keep_labels(s.label_dropout)
        D_x = self.student(x, sigma, labels)
        loss = denoising_loss(D_x, y, sigma, self.student.sigma_data).flatten(1).mean(dim=1)
        logs: dict[str, Logged] = {"loss": mean_of(loss), **by_sigma("loss", loss, sigma)}
        if (u := self.student.log_variance(sigma)) is not None:
            loss = uncertainty_loss(loss, u)
            logs["loss_uncertainty"] = mean_of(loss.detach())
        return loss.mean(), logs

    def forwards(self, encoder: float) -> float:
        return 3.0  # forward 1, backward 2


def build(networks: Networks, settings: Settings, schedule: Schedule) -> Denoising:
    return Denoising(networks.student(uncertainty=True), settings)
