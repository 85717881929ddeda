"""Multistep moment matching (Salimans et al. 2024, arXiv:2406.04103), the alternating variant.

The student's clean images should have, at every noise level and given the noised image, the same
mean as the data. A frozen `teacher` knows the data's; an `auxiliary` denoiser learns the student's.
The two are trained in turn, and the student samples ancestrally.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.data.batch import Batch
from fewstep.logs import Logged, by_group, by_sigma, mean_of
from fewstep.method import Method, Networks
from fewstep.networks.denoiser import Denoiser
from fewstep.params.fields import Count, Positive, Share, block
from fewstep.params.methods import OwnGrid, Problem
from fewstep.theory.losses import distribution_matching, fake_score_loss
from fewstep.theory.noise import Schedule, per_image
from fewstep.theory.solve import posterior_step

MOST_STEPS = 16  # beyond them the teacher itself is as good, and segments get too few images
EPSILON = 1e-3  # added to the weight of the direction, which is 0 for a perfect student


@block(kw_only=True)
class Settings(OwnGrid):
    steps: Count
    """steps of the student, at most 16. Below 4 the method is weak, and distribution matching
    better"""
    auxiliary_lr: Positive
    """learning rate of the auxiliary denoiser"""
    normalise: bool
    """divides each image's direction by its mean distance from the teacher's, as DMD does. Without
    it a student learns more slowly and drifts less"""
    label_dropout: Share
    """probability of training without the label. Guidance needs more than 0"""

    @property
    def sampling(self) -> tuple[str, int]:
        return "ancestral", self.steps

    @property
    def trains_unconditional(self) -> bool:
        return self.label_dropout > 0

    def check(self, at: str) -> Iterator[Problem]:
        if self.steps > MOST_STEPS:
            yield f"{at}.steps", f"need at most {MOST_STEPS} steps, got {self.steps}"


@dataclass(frozen=True)
class Noised:
    """Noised real images for a step of the student, and where its answer is looked at.

    Attributes:
        x, t, step: images (B, C, H, W), their sigma and the number of the step, both (B,).
        s: sigma between the step and the next one, (B,), s <= t.
        labels: one-hot, (B, classes).
    """

    x: Tensor
    t: Tensor
    step: Tensor
    s: Tensor
    labels: Tensor


class MomentMatching(Method):
    """Even iterations train the auxiliary denoiser, odd ones the student."""

    main_loss = "loss_moments"

    def __init__(
        self,
        student: Denoiser,
        teacher: Denoiser,
        auxiliary: Denoiser,
        settings: Settings,
        schedule: Schedule,
    ) -> None:
        super().__init__(student, teacher.eval().requires_grad_(False))
        self.teacher, self.auxiliary, self.settings = teacher, auxiliary, settings
        device = next(student.parameters()).device
        nodes = Schedule.of(settings.grid(schedule)).nodes(settings.steps)
        self.nodes = nodes.to(device, torch.float32)
        self.lowest, self.rho = schedule.sigma_min, schedule.rho
        self.trained["auxiliary"] = auxiliary
        self.rates = {"auxiliary": settings.auxiliary_lr}

    def phases(self, iteration: int, kimg: float) -> tuple[str, ...]:
        # The student's first gradient would be 0: both denoisers start as the teacher.
        return ("student",) if iteration % 2 else ("auxiliary",)

    def forwards(self, encoder: float) -> float:
        # student's turn: 1 + 2, teacher and auxiliary 2; the other: student 1, teacher 1, and 1 + 2
        return 5.0

    def loss(self, phase: str, batch: Batch, prepared: None) -> tuple[Tensor, dict[str, Logged]]:
        noised = self.noised(batch)
        of_phase = self.student_loss if phase == "student" else self.auxiliary_loss
        return of_phase(noised, batch.normal_like(noised.x))

    def noised(self, batch: Batch) -> Noised:
        """Real images noised to a random step, and a sigma from there to the next step.

        The sigma is uniform in sigma^(1/rho), as the Karras grid, and not below its lowest.
        """
        step = batch.uniform_ints(0, self.settings.steps)
        t = self.nodes[step]
        power = 1 / self.rho
        low = self.nodes[step + 1].clamp(min=self.lowest) ** power
        s = (low + batch.uniform() * (t**power - low)) ** self.rho
        labels = batch.labels
        if self.settings.label_dropout:
            labels = labels * batch.keep_labels(self.settings.label_dropout)
        x = batch.images + per_image(t) * batch.normal_like(batch.images)
        return Noised(x, t, step, torch.minimum(s, t), labels)  # a power can round upwards

    def student_loss(self, at: Noised, n: Tensor) -> tuple[Tensor, dict[str, Logged]]:
        """The gradient of the student's images x is, up to its weight, phi(z_s) - theta(z_s)."""
        x = self.student(at.x, at.t, at.labels)
        with torch.no_grad():
            z = posterior(at, x, n)
            D_teacher = self.teacher(z, at.s, at.labels)
            D_auxiliary = self.auxiliary(z, at.s, at.labels)
        weighted = self.settings.normalise
        loss, direction = distribution_matching(
            x, D_teacher, D_auxiliary, EPSILON, weighted=weighted
        )
        each = direction.flatten(1).square().mean(dim=1) / 2
        return loss, {
            "loss_moments": mean_of(loss),
            "moments_direction_norm": mean_of(direction.flatten(1).norm(dim=1)),
            **self.by_step("loss_moments", each, at.step),
            **by_sigma("loss_moments", each, at.s),
        }

    def auxiliary_loss(self, at: Noised, n: Tensor) -> tuple[Tensor, dict[str, Logged]]:
        """Denoising of the student's images, and staying near the teacher, with EDM's weight."""
        with torch.no_grad():
            x = self.student(at.x, at.t, at.labels)
            z = posterior(at, x, n)
            D_teacher = self.teacher(z, at.s, at.labels)
        D_x = self.auxiliary(z, at.s, at.labels)
        sigma_data = self.student.sigma_data
        learnt = fake_score_loss(D_x, x, at.s, sigma_data)
        near = fake_score_loss(D_x, D_teacher, at.s, sigma_data)
        loss = (learnt + near).mean()
        return loss, {
            "loss_auxiliary": mean_of(learnt),
            "loss_near_teacher": mean_of(near),
            **self.by_step("loss_auxiliary", learnt, at.step),
            **by_sigma("loss_auxiliary", learnt, at.s),
        }

    def by_step(self, name: str, values: Tensor, step: Tensor) -> dict[str, Logged]:
        """Means of values (B,) grouped by the step (B,) that made the images."""
        steps = self.settings.steps
        return {f"step/{name}": by_group(values, step, steps)} if steps > 1 else {}


def posterior(at: Noised, x: Tensor, n: Tensor) -> Tensor:
    """z_s, given z_t and the student's images x, both (B, C, H, W); n is standard normal."""
    return posterior_step(at.x, x, per_image(at.t), per_image(at.s), n)


def build(networks: Networks, settings: Settings, schedule: Schedule) -> MomentMatching:
    student, teacher = networks.student(), networks.teacher()
    auxiliary = networks.like(student, teacher).to(networks.device)
    return MomentMatching(student, teacher, auxiliary, settings, schedule)
