"""Distribution matching distillation, DMD2 (Yin et al. 2024), with one or several steps.

There are three networks: the frozen `teacher`, the `student` that generates images, and the critic,
a `fake_score` that denoises the student's images, with a `discriminator` head on its encoder.
Settings that are described as "the reference" reproduce the released code, quirks included.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from fewstep.data.batch import Batch
from fewstep.distributed import to_device
from fewstep.logs import Logged, by_group, by_sigma, mean_of
from fewstep.method import Method, Networks
from fewstep.networks.denoiser import Denoiser
from fewstep.params.fields import (
    Amount,
    Betas,
    Count,
    KimgOrZero,
    Natural,
    Positive,
    ProperShare,
    Several,
    Share,
    asks,
    block,
    one_of,
)
from fewstep.params.methods import OwnGrid, Problem
from fewstep.params.methods import Settings as MethodSettings
from fewstep.theory.ema import update_average
from fewstep.theory.losses import (
    DIVERGENCES,
    distribution_matching,
    divergence_factor,
    fake_score_loss,
    gan_critic_loss,
    gan_student_loss,
    score_identity,
)
from fewstep.theory.noise import Schedule, lognormal_sigmas, per_image
from fewstep.theory.solve import ConditionalDenoise


@block(kw_only=True)
class Settings(OwnGrid):
    """A switch that is absent is off."""

    steps: Count
    """denoising steps of the student"""
    backward_simulation: bool
    """later steps start from the student's own images; false: from real images, noised"""
    fake_score_lr: Positive
    """learning rate of the fake score"""
    fake_score_betas: Betas | None = None
    """Adam's decay rates for the fake score; absent = the block's `betas`"""
    update_ratio: Count
    """fake-score updates per student update"""
    noise_levels: Several
    """sigmas in the grid that scores are compared on"""
    critic_levels: (
        Annotated[tuple[float, Positive], asks("a list of two numbers, the second > 0")] | None
    ) = None
    """mean and standard deviation of ln(sigma) where the fake score learns; absent = the grid of
    `noise_levels`, uniformly. Half of that grid lies where small images are gone. SiD and
    Diff-Instruct have -1.2 and 1.2"""
    critic_warmup_kimg: KimgOrZero | None = None
    """the student waits so long for its critic; absent = 0. SiDA has 100"""
    dm_levels: Annotated[
        tuple[Share, Share], asks("a list of two numbers in [0, 1], lowest and highest")
    ]
    """part of the noise levels that distribution matching draws from"""
    dm_epsilon: Amount
    """added to the distribution-matching weight. 0 is the reference, and can end a run with 0/0"""
    dm_nan_to_num: bool | None = None
    """replaces 0/0 in the matching direction by 0; absent = false. True is the reference; with
    false, a step with 0/0 is skipped"""
    matching: Literal["dmd", "sid"] | None = None
    """loss that matches the distributions; absent = dmd. `sid` is score identity distillation,
    whose gradient also runs through both denoisers"""
    sid_alpha: Amount | None = None
    """alpha of `sid`; absent = 1.2. SiDA has 1 beside an adversarial loss"""
    divergence: Annotated[str, one_of(DIVERGENCES)] | None = None
    """what `dmd` minimises, by the discriminator's estimate of the density ratio; absent =
    reverse_kl. Others need `gan_critic_weight`; js and forward_kl seek fewer modes"""
    assimilate: ProperShare | None = None
    """share of the student's weights that is mixed into the fake score after each student update;
    absent = 0. SenseFlow has 0.02 to 0.03"""
    levels_by_step: bool | None = None
    """re-noises images of a step only to noise levels between that step and the next; absent =
    false. As Phased DMD and moment matching do. `dm_levels` then does nothing"""
    real_share: Share | None = None
    """share of a backward simulation's inputs that are noised real images; absent = 0. SenseFlow
    has a half"""
    gan_student_weight: Amount
    """weight of the student's adversarial loss; 0 = off. That loss is a mean over images, while
    those of the scores are means over elements: for images of n times as many elements, divide by
    n, or by its root, for the same balance. DMD2 has 3e-3 for 64x64x3, which is 0.021 (root) or
    0.144 for 16x16x1"""
    gan_critic_weight: Amount
    """weight of the critic's adversarial loss; 0 = off. Units as above; DMD2 has 1e-2, which is
    0.069 or 0.48"""
    gan_from_kimg: KimgOrZero | None = None
    """adversarial losses begin here; absent = 0. SiDA and DMD2's best add them to a student that
    has converged"""
    gan_lr_factor: Positive | None = None
    """factor of all learning rates from `gan_from_kimg` on; absent = 1. DMD2's best has 1/4"""
    gan_real_batch: Count | None = None
    """real images that the discriminator sees for each generated one; absent = 1. The further ones
    come from other orders of the data"""
    gan_levels: Natural
    """number of lowest noise levels that the adversarial loss draws from; 0 = no noise. At most
    `noise_levels`"""
    gan_groups: Count
    """groups in the discriminator's group normalisation. Must divide its channels; the reference
    has 32, too many for narrow networks"""
    label_dropout: Share
    """probability of training without the label. Guidance needs more than 0"""
    shared_label_drop: bool
    """student, teacher and fake score drop the same labels. False is the reference, where each
    drops its own"""
    teacher_eval: bool
    """runs the frozen teacher in evaluation mode. False is the reference, where the teacher drops
    labels too"""
    separate_labels: bool | None = None
    """several steps use other labels (and images) than the GAN's real ones; absent = false. They
    come from a second, independent order of the data. True is the reference"""
    save_critic: bool | None = None
    """saves fake score and discriminator for a student that continues them; absent = false. In
    `artifacts/snapshots/<name>/critic.safetensors`"""
    continue_critic: bool | None = None
    """starts from the critic of init_from instead of the teacher; absent = false. `init_from` must
    be a student with `save_critic`. If it had no discriminator, a new one is made"""
    all_stops: bool | None = None
    """trains on every step of a backward simulation; absent = false. A few roll-outs then give all
    their steps, instead of many roll-outs only their last: (N − 1) / N network calls an image
    instead of (N − 1) / 2. False is the reference"""

    @property
    def sampling(self) -> tuple[str, int]:
        return "renoise", self.steps

    @property
    def trains_unconditional(self) -> bool:
        return self.label_dropout > 0

    @property
    def by_ratio(self) -> str | None:
        """The divergence that asks the discriminator, if there is one."""
        return None if self.divergence == "reverse_kl" else self.divergence

    def check(self, at: str) -> Iterator[Problem]:
        low, high = self.dm_levels
        if not low < high:
            message = f"need 0 <= lowest < highest <= 1 in dm_levels, got {low} and {high}"
            yield f"{at}.dm_levels", message
        if self.gan_levels > self.noise_levels:
            message = f"need gan_levels <= noise_levels, got {self.gan_levels}"
            yield f"{at}.gan_levels", f"{message} and {self.noise_levels}"
        if not self.gan_critic_weight:
            if self.gan_student_weight:
                message = "need gan_critic_weight > 0 when gan_student_weight > 0, got 0"
                yield f"{at}.gan_critic_weight", message
            if self.by_ratio:
                message = f"need gan_critic_weight > 0 for divergence {self.divergence}, got 0"
                yield f"{at}.gan_critic_weight", message
        if self.levels_by_step and self.critic_levels is not None:
            yield f"{at}.critic_levels", "need no critic_levels beside levels_by_step, got both"
        if self.matching == "sid" and self.divergence is not None:
            yield f"{at}.divergence", "need matching: dmd for a divergence, got sid"
        if self.real_share and not (self.backward_simulation and self.steps > 1):
            message = "need backward_simulation and several steps for a real_share"
            without = "" if self.backward_simulation else " without"
            yield f"{at}.real_share", f"{message}, got steps of {self.steps}{without}"

    def check_origin(
        self, name: str, model: str, origin: MethodSettings | None
    ) -> Iterator[Problem]:
        if not self.continue_critic:
            return
        if not isinstance(origin, Settings):
            message = f"need a student of method dmd2, to continue its critic, got {model}"
            yield f"students.{name}.init_from", message
        elif not origin.save_critic:
            message = f"need save_critic: true, because {name} continues this critic, got false"
            yield f"students.{model}.settings.save_critic", message


class Discriminator(nn.Sequential):
    """Logit of being real, (B, 1), from the bottleneck (B, C, 8, 8) of the fake score's encoder.

    The second normalisation sees a single pixel. With 2 channels per group, as 32 groups would give
    in a narrow network, its outputs are always 1 and -1, and it passes almost no gradient.

    Raises:
        ValueError: groups does not divide channels.
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

    @classmethod
    def of(cls, denoiser: Denoiser, groups: int) -> "Discriminator":
        """A discriminator for the bottleneck of that network.

        Raises:
            ValueError: the bottleneck is not 8x8.
        """
        side = denoiser.model.bottleneck_resolution
        if side != 8:
            raise ValueError(
                f"need an 8x8 bottleneck for the discriminator, got {side}x{side} (params.yaml: "
                "network.channel_mult; or students.<name>.settings.gan_*_weight: 0.0)"
            )
        return cls(denoiser.model.bottleneck_channels, groups)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).flatten(1)


class Critic(nn.Module):
    """The fake score and, if there is an adversarial loss, a discriminator, trained together."""

    def __init__(self, fake_score: Denoiser, discriminator: Discriminator | None = None) -> None:
        super().__init__()
        self.fake_score, self.discriminator = fake_score, discriminator

    def logits(self, x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        assert self.discriminator is not None, "only an adversarial loss asks for logits"
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
        stop: number of steps to make, 0 <= stop < N.
        noise: draws standard normal images (B, C, H, W), once per step.

    Returns:
        stop + 1 batches (B, C, H, W); the first, of no step, is sigmas[0] times noise.
    """
    x = sigmas[0] * noise()
    images = [x]
    for i in range(stop):
        images.append(student(x, sigmas[i], labels))
        if i < stop - 1:
            x = images[-1] + sigmas[i + 1] * noise()
    return images


def segments(levels: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
    """First and last place, in ascending levels (L,), of those between each step and the next.

    Args:
        steps: descending, (N,); the last segment reaches down to the lowest level. A segment
            between two levels has the one above it.
    """
    bounds = steps.to(levels)
    last = torch.searchsorted(levels, bounds, right=True) - 1
    first = torch.searchsorted(levels, bounds[1:])
    first = torch.cat([first, torch.zeros_like(last[:1])]).clamp(max=len(levels) - 1)
    return first, torch.maximum(last, first)


@dataclass
class Generated:
    """What the phases of an iteration share: the student's input for one step of its sampler.

    Attributes:
        x, sigma, labels: noised images (B, C, H, W), their sigma (B,), one-hot labels.
        step: the number of that step, (B,).
        keep: 0 where the label was dropped, else 1, (B, 1). Real images get the same mask:
            otherwise the discriminator recognises fakes by their missing labels.
        images: the student's output, without gradient, once a phase has computed it.
    """

    x: Tensor
    sigma: Tensor
    labels: Tensor
    step: Tensor
    keep: Tensor | None
    images: Tensor | None = None


class Dmd2(Method):
    """Every iteration trains the critic; every `update_ratio`-th trains the student first."""

    main_loss = "loss_dm"

    def __init__(
        self,
        student: Denoiser,
        teacher: Denoiser,
        critic: Critic,
        settings: Settings,
        schedule: Schedule,
    ) -> None:
        super().__init__(student, teacher.train(not settings.teacher_eval).requires_grad_(False))
        self.teacher, self.critic, self.settings = teacher, critic, settings
        device, s = next(student.parameters()).device, settings
        levels = schedule.sigmas(s.noise_levels).flip(0).to(torch.float32)  # ascending
        self.levels = levels.to(device)
        steps = Schedule.of(s.grid(schedule)).sigmas(s.steps)
        self.steps, self.phased = steps.to(device, torch.float32), bool(s.levels_by_step)
        self.first, self.last = (part.to(device) for part in segments(levels, steps))
        self.trained["critic"] = critic
        self.kept = {"critic": critic} if s.save_critic else {}
        self.rates = {"critic": s.fake_score_lr}
        self.betas = {} if s.fake_score_betas is None else {"critic": s.fake_score_betas}
        own_labels = bool(s.separate_labels) and s.steps > 1
        self.other_images = own_labels + (s.gan_real_batch or 1) - 1
        # the critic's phase runs the encoder on fakes and reals, the student's on fakes
        self.encoders = max(2 * bool(s.gan_critic_weight), int(bool(s.gan_student_weight)))

    def phases(self, iteration: int, kimg: float) -> tuple[str, ...]:
        # As in the reference: student first, so the critic then trains on images that are already
        # there. Without a warm-up, iteration 0 trains the student before its critic has learned.
        waits = kimg < (self.settings.critic_warmup_kimg or 0.0)
        own_turn = iteration % self.settings.update_ratio == 0 and not waits
        return ("student", "critic") if own_turn else ("critic",)

    def adversarial(self, kimg: float) -> bool:
        return kimg >= (self.settings.gan_from_kimg or 0.0)

    def rate_factor(self, kimg: float) -> float:
        begun = self.settings.gan_from_kimg is not None and self.adversarial(kimg)
        return (self.settings.gan_lr_factor or 1.0) if begun else 1.0

    def after_update(self, phase: str) -> None:
        if phase == "student" and (share := self.settings.assimilate):
            scores = self.critic.fake_score.parameters()
            update_average(scores, self.student.parameters(), 1 - share)

    def forwards(self, encoder: float) -> float:
        s = self.settings
        simulated = (s.steps - 1) / 2 if s.backward_simulation else 0.0  # stops are uniform
        if s.all_stops:
            simulated = (s.steps - 1) / s.steps
        # critic: fake score 1 + 2, encoder on fakes and reals 1 + 2 each; student: backward 2, two
        # scores 2, and the encoder forward and back to its input
        pairs = 1 + (s.gan_real_batch or 1)
        critic = 3 + (3 * pairs * encoder if s.gan_critic_weight else 0.0)
        student = 4 + (2 * encoder if s.gan_student_weight else 0.0)
        student += 2 * (s.matching == "sid")  # back to the input of both scores
        student += encoder * bool(s.by_ratio)
        return 1 + simulated + critic + student / s.update_ratio

    def loss(
        self, phase: str, batch: Batch, prepared: Generated
    ) -> tuple[Tensor, dict[str, Logged]]:
        of_phase = self.student_loss if phase == "student" else self.critic_loss
        return of_phase(batch, prepared)

    def prepare(self, batch: Batch) -> Generated:
        """The student's input for one step of its sampler, chosen at random.

        The first step starts from pure noise. Later steps start from noised images: the student's
        own (backward simulation) or real ones. A one-step student gets uniform labels, as in the
        reference; for several steps, labels come with real images.
        """
        s, z = self.settings, batch.normal_like(batch.images)
        clean, labels = batch.images, batch.labels
        if s.steps == 1:
            classes = batch.labels.shape[1]
            labels = nn.functional.one_hot(batch.uniform_ints(0, classes), classes).to(z)
            k = torch.zeros(len(z), dtype=torch.int64, device=z.device)
        else:
            clean, labels = batch.other_images() if s.separate_labels else (clean, labels)
            k = batch.uniform_ints(0, s.steps)
        keep = None
        if s.shared_label_drop and s.label_dropout:  # otherwise each network drops its own
            keep = batch.keep_labels(s.label_dropout)
            labels = labels * keep
        if s.backward_simulation and s.steps > 1:
            made, of, stops = self.simulate(batch, labels)
            real = batch.uniform() < s.real_share if s.real_share else torch.zeros_like(k).bool()
            clean = torch.where(per_image(real), clean, made)
            labels, k = torch.where(real[:, None], labels, of), torch.where(real, k, stops)
        sigma = self.steps[k]
        clean = torch.where(per_image(k == 0), 0.0, clean)  # sampling starts without an image
        return Generated(clean + per_image(sigma) * z, sigma, labels, k, keep)

    def simulate(self, batch: Batch, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images (B, C, H, W) of the student's own sampler, their labels, and their steps (B,).

        With `all_stops`, each step of a few roll-outs gives an image, instead of the last step of B
        roll-outs: (N - 1) / N calls an image, not (N - 1) / 2, but images in a batch are related.
        """
        n, steps = len(labels), self.settings.steps
        if not self.settings.all_stops:
            # one stop for all ranks: otherwise every rank would wait for the longest roll-out
            stop = int(torch.randint(steps, (1,), generator=batch.shared_generator))
            draw = partial(batch.normal_like, batch.images)
            clean = backward_simulation(self.student, self.steps, stop, labels, draw)[-1]
            return clean, labels, torch.full((n,), stop, device=labels.device)
        rollouts = -(-n // steps)  # rounded up; the surplus is left out at random
        draw = partial(batch.normal_like, batch.images[:rollouts])
        every = backward_simulation(self.student, self.steps, steps - 1, labels[:rollouts], draw)
        order = torch.randperm(rollouts * steps, generator=batch.cpu_generator)[:n]
        order = to_device(order, labels.device)
        k, rollout = order // rollouts, order % rollouts
        return torch.cat(every)[order], labels[rollout], k

    def student_loss(self, batch: Batch, made: Generated) -> tuple[Tensor, dict[str, Logged]]:
        s, labels = self.settings, made.labels
        x = self.student(made.x, made.sigma, labels)
        made.images = x.detach()  # for the critic, which then needs no forward pass of the student
        if self.phased:
            t = self.levels_of(batch, made.step)
        else:
            low, high = (int(share * s.noise_levels) for share in s.dm_levels)
            t = batch.uniform_ints(low, min(high + 1, s.noise_levels))
        begun = self.adversarial(batch.kimg)
        loss, direction = self.matching_loss(x, labels, t, batch.normal_like(x), begun)
        each = direction.flatten(1).square().mean(dim=1) / 2
        logs = {
            "loss_dm": mean_of(loss),
            "dm_direction_norm": mean_of(direction.flatten(1).norm(dim=1)),
            **self.by_step("loss_dm", each, made.step),
            **by_sigma("loss_dm", each, self.levels[t]),
        }
        if s.gan_student_weight and begun:
            gan = gan_student_loss(*self.logits(batch, (x, labels)))
            loss = loss + s.gan_student_weight * gan
            logs["loss_gan_student"] = mean_of(gan)
        return loss, logs

    def matching_loss(
        self, x: Tensor, labels: Tensor, t: Tensor, n: Tensor, adversarial: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Loss and direction of distribution matching, at noise levels t (B,) with noise n.

        Args:
            adversarial: the discriminator is trained, so a divergence may ask it.
        """
        s, sigma = self.settings, self.levels[t]
        with torch.set_grad_enabled(s.matching == "sid"):
            x_t = x + per_image(sigma) * n
            D_teacher = self.teacher(x_t, sigma, labels)
            D_fake = self.critic.fake_score(x_t, sigma, labels)
        fixed = x, D_teacher.detach(), D_fake.detach(), s.dm_epsilon, bool(s.dm_nan_to_num)
        if s.matching == "sid":
            alpha = 1.2 if s.sid_alpha is None else s.sid_alpha
            loss = score_identity(x, D_teacher, D_fake, alpha, s.dm_epsilon)
            return loss, distribution_matching(*fixed)[1]
        factor: Tensor | float = 1.0
        if s.by_ratio and adversarial:
            with torch.no_grad():
                logits = self.critic.logits(x_t, sigma, labels)[:, 0]
                factor = per_image(divergence_factor(s.by_ratio, logits, t / s.noise_levels))
        return distribution_matching(*fixed, factor)

    def levels_of(self, batch: Batch, step: Tensor) -> Tensor:
        """A noise level between each image's step and the next one, as its place in the grid."""
        first, last = self.first[step], self.last[step]
        return first + (batch.uniform() * (last - first + 1)).long()

    def critic_loss(self, batch: Batch, made: Generated) -> tuple[Tensor, dict[str, Logged]]:
        s, labels = self.settings, made.labels
        x = made.images
        if x is None:
            with torch.no_grad():
                x = made.images = self.student(made.x, made.sigma, labels)
        if self.phased:
            sigma = self.levels[self.levels_of(batch, made.step)]
        elif s.critic_levels is not None:
            sigma = lognormal_sigmas(batch.normal(), *s.critic_levels)
        else:
            sigma = self.levels[batch.uniform_ints(0, s.noise_levels)]
        D_x = self.critic.fake_score(x + per_image(sigma) * batch.normal_like(x), sigma, labels)
        each = fake_score_loss(D_x, x, sigma, self.student.sigma_data)
        loss = each.mean()
        logs = {
            "loss_fake": mean_of(loss),
            **self.by_step("loss_fake", each, made.step),
            **by_sigma("loss_fake", each, sigma),
        }
        if s.gan_critic_weight and not self.adversarial(batch.kimg):
            # all weights get a gradient at every step, as the exchange between ranks asks
            assert self.critic.discriminator is not None
            loss = loss + 0.0 * sum(w.sum() for w in self.critic.discriminator.parameters())
        elif s.gan_critic_weight:
            fake, real = self.logits(batch, (x, labels), self.real(batch, made.keep))
            gan = gan_critic_loss(fake, real)
            loss = loss + s.gan_critic_weight * gan
            logs |= {
                "loss_gan_critic": mean_of(gan),
                "realism_real": mean_of(real.sigmoid()),
                "realism_fake": mean_of(fake.sigmoid()),
            }
        return loss, logs

    def real(self, batch: Batch, keep: Tensor | None) -> tuple[Tensor, Tensor]:
        """Real images for the discriminator and their labels, dropped as the generated ones'."""
        more = range(self.other_images - (self.settings.gan_real_batch or 1) + 1, self.other_images)
        pairs = [(batch.images, batch.labels), *map(batch.other_images, more)]
        images, labels = (torch.cat(each) for each in zip(*pairs, strict=True))
        return images, labels if keep is None else labels * keep.repeat(len(pairs), 1)

    def by_step(self, name: str, values: Tensor, k: Tensor) -> dict[str, Logged]:
        """Means of values (B,) grouped by the step k (B,) that made the images."""
        steps = self.settings.steps
        return {f"step/{name}": by_group(values, k, steps)} if steps > 1 else {}

    def logits(self, batch: Batch, *pairs: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        """The discriminator's logits (B, 1) for each pair of images and labels, from a single call.

        With `gan_levels` above 0 the images are noised, fakes and reals independently.
        """
        seen, sigmas, sizes = [], [], [len(x) for x, _ in pairs]
        for x, _ in pairs:
            sigma = self.levels[:1].expand(len(x))
            if self.settings.gan_levels:
                sigma = self.levels[batch.uniform_ints(0, self.settings.gan_levels, len(x))]
                x = x + per_image(sigma) * batch.normal_like(x)
            seen.append(x)
            sigmas.append(sigma)
        labels = torch.cat([labels for _, labels in pairs])
        return self.critic.logits(torch.cat(seen), torch.cat(sigmas), labels).split(sizes)


def build(networks: Networks, settings: Settings, schedule: Schedule) -> Dmd2:
    """The method; its fake score starts from the teacher, or the critic from that of `init_from`.

    Raises:
        ValueError: the bottleneck fits no discriminator, or the saved critic does not belong.
    """
    s = settings
    own_drop = 0.0 if s.shared_label_drop else s.label_dropout
    student, teacher = networks.student(own_drop), networks.teacher()
    fake_score = networks.like(student, teacher)
    # the reference trains with the teacher in train mode, which drops labels there too
    teacher.model.label_dropout = own_drop
    head = Discriminator.of(student, s.gan_groups) if s.gan_critic_weight else None
    critic = Critic(fake_score, head)
    if s.continue_critic and networks.device.type != "meta":
        own, saved = critic.state_dict(), networks.kept("critic")
        # a discriminator that was not saved stays as initialised; a superfluous one is ignored
        critic.load_state_dict({name: saved.get(name, before) for name, before in own.items()})
    return Dmd2(student, teacher, critic.to(networks.device), s, schedule)
