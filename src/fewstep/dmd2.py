"""Distribution matching distillation, DMD2 (Yin et al. 2024), with one or several steps.

Three networks: the frozen `teacher`, the `student` that generates, and the critic: a `fake_score`
that denoises the student's images, with a `discriminator` head on its encoder.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from fewstep.batch import Batch
from fewstep.denoiser import ConditionalDenoise, Denoiser
from fewstep.distributed import to_device
from fewstep.losses import (
    distribution_matching,
    fake_score_loss,
    gan_critic_loss,
    gan_student_loss,
)
from fewstep.meter import Logged, by_group, by_sigma, mean_of
from fewstep.noise import karras_sigmas, per_image
from fewstep.params import Dmd2Settings
from fewstep.params import Noise as NoiseParams


class Discriminator(nn.Sequential):
    """Logit of being real, (B, 1), from the bottleneck (B, C, 8, 8) of the fake score's encoder.

    `groups` of channels are normalised together, 32 in the reference. The second normalisation sees
    one pixel: with 2 channels a group it gives 1 and -1, and hardly passes a gradient.

    Raises:
        ValueError: groups that do not divide the channels.
    """

    def __init__(self, channels: int, groups: int = 32) -> None:
        if channels % groups:
            raise ValueError(
                f"need gan_groups that divide the {channels} channels of the bottleneck, got "
                f"{groups} (params.yaml: students.<name>.settings.gan_groups)"
            )
        super().__init__(
            nn.Conv2d(channels, channels, 4, stride=2, padding=1),
            nn.GroupNorm(groups, channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 4, stride=4),
            nn.GroupNorm(groups, channels),
            nn.SiLU(),
            nn.Conv2d(channels, 1, 1),
        )

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).flatten(1)


class Critic(nn.Module):
    """Fake score and, where there is an adversarial loss, discriminator, trained together."""

    def __init__(self, fake_score: Denoiser, discriminator: Discriminator | None = None) -> None:
        super().__init__()
        self.fake_score, self.discriminator = fake_score, discriminator

    def logits(self, x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        assert self.discriminator is not None, "logits need a discriminator"
        return self.discriminator(self.fake_score.bottleneck(x, sigma, labels))


@torch.no_grad()
def backward_simulation(
    student: ConditionalDenoise,
    sigmas: Tensor,
    stop: int,
    labels: Tensor,
    noise: Callable[[], Tensor],
) -> list[Tensor]:
    """The student's own clean images after 0 to `stop` steps of its sampler (DMD2, section 4.4).

    Args:
        sigmas: the student's steps, (N,), descending.
        stop: number of steps made, 0 <= stop < N.
        noise: gives standard normal images (B, C, H, W), one draw a step.

    Returns:
        stop + 1 batches (B, C, H, W), the first of which is sigmas[0] times noise.
    """
    x = sigmas[0] * noise()
    images = [x]
    for i in range(stop):
        images.append(student(x, sigmas[i], labels))
        if i < stop - 1:
            x = images[-1] + sigmas[i + 1] * noise()
    return images


@dataclass
class Dmd2:
    """The method. An iteration trains the critic; every `update_ratio`-th the student before it."""

    student: Denoiser
    teacher: Denoiser
    critic: Critic
    settings: Dmd2Settings
    noise: NoiseParams

    def __post_init__(self) -> None:
        s, n = self.settings, self.noise
        device = next(self.student.parameters()).device
        grid = (n.sigma_min, n.sigma_max, n.rho)
        self.levels = karras_sigmas(s.noise_levels, *grid).flip(0).to(device, torch.float32)
        self.steps = karras_sigmas(s.steps, *grid).to(device, torch.float32)
        self.trained: dict[str, nn.Module] = {"student": self.student, "critic": self.critic}
        self.kept: dict[str, nn.Module] = {"critic": self.critic} if s.save_critic else {}
        self.teacher.train(not s.teacher_eval).requires_grad_(False)

    def phases(self, iteration: int) -> tuple[str, ...]:
        return ("student", "critic") if iteration % self.settings.update_ratio == 0 else ("critic",)

    def forwards(self, encoder: float) -> float:
        """What an image costs on average, in forward passes of the network; backward counts two.

        `encoder` is the share of the encoder, which is all that the discriminator needs.
        """
        s = self.settings
        simulated = (s.steps - 1) / 2 if s.backward_simulation else 0.0
        if s.all_stops:
            simulated = (s.steps - 1) / s.steps
        critic = 3 + (6 * encoder if s.gan_critic_weight else 0.0)
        student = 2 + 2 + (2 * encoder if s.gan_student_weight else 0.0)  # backward, two scores
        return 1 + simulated + critic + student / s.update_ratio

    def loss(self, phase: str, batch: Batch) -> tuple[Tensor, dict[str, Logged]]:
        """Mean loss of a micro-batch for the network of that phase, and what to log."""
        return self.student_loss(batch) if phase == "student" else self.critic_loss(batch)

    def generate(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """The student's images (B, C, H, W) for one step of its sampler, labels, step numbers (B,).

        Its input is pure noise at the first step; later steps start from its own images (backward
        simulation) or from real ones, noised. The step is shared by all ranks under backward
        simulation and drawn for each image without it. Labels are drawn uniformly for one step; for
        several they come with real images.
        """
        s, z = self.settings, batch.normal_like(batch.images)
        clean, labels = batch.images, batch.labels
        if s.steps == 1:
            classes = batch.labels.shape[1]
            labels = nn.functional.one_hot(batch.uniform_ints(0, classes), classes).to(z)
            k = torch.zeros(len(z), dtype=torch.int64, device=z.device)
        else:
            clean, labels = batch.another() if s.separate_labels else (clean, labels)
            k = batch.uniform_ints(0, s.steps)
        if s.shared_label_drop and s.label_dropout:
            labels = labels * batch.keep_labels(s.label_dropout)
        if s.backward_simulation and s.steps > 1:
            clean, labels, k = self.simulate(batch, labels)
        sigma = self.steps[k]
        clean = torch.where(per_image(k == 0), 0.0, clean)
        return self.student(clean + per_image(sigma) * z, sigma, labels), labels, k

    def simulate(self, batch: Batch, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images (B, C, H, W) of the student's own sampler, their labels, and their steps (B,).

        With `all_stops` an image is taken from each step of a few roll-outs, in place of the last
        step of B: (N - 1) / N calls an image, not (N - 1) / 2, but images that are related.
        """
        n, steps = len(labels), self.settings.steps
        if not self.settings.all_stops:
            stop = int(torch.randint(steps, (1,), generator=batch.shared_generator))
            draw = partial(batch.normal_like, batch.images)
            clean = backward_simulation(self.student, self.steps, stop, labels, draw)[-1]
            return clean, labels, torch.full((n,), stop, device=labels.device)
        rollouts = -(-n // steps)
        draw = partial(batch.normal_like, batch.images[:rollouts])
        every = backward_simulation(self.student, self.steps, steps - 1, labels[:rollouts], draw)
        order = torch.randperm(rollouts * steps, generator=batch.cpu_generator)[:n]
        order = to_device(order, labels.device)
        k, rollout = order // rollouts, order % rollouts
        return torch.cat(every)[order], labels[rollout], k

    def student_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Logged]]:
        s = self.settings
        x, labels, k = self.generate(batch)
        batch.memory = {"x": x.detach(), "labels": labels, "k": k}
        low, high = (int(share * s.noise_levels) for share in s.dm_levels)
        t = batch.uniform_ints(low, min(high + 1, s.noise_levels))
        loss, direction = self.matching_loss(x, labels, t, batch.normal_like(x))
        each = direction.flatten(1).square().mean(dim=1) / 2
        logs = {
            "loss_dm": mean_of(loss),
            "dm_direction_norm": mean_of(direction.flatten(1).norm(dim=1)),
            **self.by_step("loss_dm", each, k),
            **by_sigma("loss_dm", each, self.levels[t]),
        }
        if s.gan_student_weight:
            gan = gan_student_loss(*self.logits(batch, (x, labels)))
            loss = loss + s.gan_student_weight * gan
            logs["loss_gan_student"] = mean_of(gan)
        return loss, logs

    def matching_loss(
        self, x: Tensor, labels: Tensor, t: Tensor, n: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Distribution matching at noise levels t (B,) with noise n: loss and direction."""
        sigma = self.levels[t]
        with torch.no_grad():
            x_t = x + per_image(sigma) * n
            D_teacher = self.teacher(x_t, sigma, labels)
            D_fake = self.critic.fake_score(x_t, sigma, labels)
        s = self.settings
        return distribution_matching(x, D_teacher, D_fake, s.dm_epsilon, bool(s.dm_nan_to_num))

    def critic_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Logged]]:
        s = self.settings
        if not batch.memory:
            with torch.no_grad():
                x, labels, k = self.generate(batch)
            batch.memory = {"x": x, "labels": labels, "k": k}
        x, labels, k = (batch.memory[name] for name in ("x", "labels", "k"))
        sigma = self.levels[batch.uniform_ints(0, s.noise_levels)]
        D_x = self.critic.fake_score(x + per_image(sigma) * batch.normal_like(x), sigma, labels)
        each = fake_score_loss(D_x, x, sigma, self.student.sigma_data)
        loss = each.mean()
        logs = {
            "loss_fake": mean_of(loss),
            **self.by_step("loss_fake", each, k),
            **by_sigma("loss_fake", each, sigma),
        }
        if s.gan_critic_weight:
            fake, real = self.logits(batch, (x, labels), (batch.images, batch.labels))
            gan = gan_critic_loss(fake, real)
            loss = loss + s.gan_critic_weight * gan
            logs |= {
                "loss_gan_critic": mean_of(gan),
                "realism_real": mean_of(real.sigmoid()),
                "realism_fake": mean_of(fake.sigmoid()),
            }
        return loss, logs

    def by_step(self, name: str, values: Tensor, k: Tensor) -> dict[str, Logged]:
        """Means of the values (B,) by the step k (B,) that made the images."""
        steps = self.settings.steps
        return {f"step/{name}": by_group(values, k, steps)} if steps > 1 else {}

    def logits(self, batch: Batch, *pairs: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        """The discriminator's answers (B, 1) to pairs of images and labels, in one call for all.

        The images are noised when `gan_levels` is above 0.
        """
        seen, sigmas = [], []
        for x, _ in pairs:
            sigma = self.levels[:1].expand(len(x))
            if self.settings.gan_levels:
                sigma = self.levels[batch.uniform_ints(0, self.settings.gan_levels)]
                x = x + per_image(sigma) * batch.normal_like(x)
            seen.append(x)
            sigmas.append(sigma)
        labels = torch.cat([labels for _, labels in pairs])
        return self.critic.logits(torch.cat(seen), torch.cat(sigmas), labels).chunk(len(pairs))
