"""DMD2: what each network is asked, what each loss moves, and the student's own steps."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import CLASSES, EDM, Gaussian, small_denoiser
from fewstep.data.batch import Batch
from fewstep.methods.dmd2 import (
    Critic,
    Discriminator,
    Dmd2,
    Generated,
    Settings,
    backward_simulation,
)
from fewstep.networks.denoiser import Denoiser
from fewstep.theory.losses import fake_score_loss, gan_critic_loss
from fewstep.theory.noise import per_image, with_zero
from fewstep.theory.sample import sample_renoise

SETTINGS = Settings(
    steps=4,
    backward_simulation=True,
    fake_score_lr=1e-4,
    update_ratio=5,
    noise_levels=1000,
    dm_levels=(0.02, 0.98),
    dm_epsilon=1e-6,
    gan_student_weight=0.0,
    gan_critic_weight=0.0,
    gan_levels=1000,
    gan_groups=8,
    label_dropout=0.0,
    shared_label_drop=True,
    teacher_eval=True,
)


def gaussian_method(**changes: Any) -> Dmd2:  # noqa: ANN401
    """Student, teacher and fake score are Gaussian denoisers of other widths."""
    critic = Critic(Gaussian(0.6), Discriminator(4, groups=1))
    settings = replace(SETTINGS, **changes)
    return Dmd2(Gaussian(0.4), Gaussian(0.5), critic, settings, EDM)


def network_method(own_drop: float = 0.0, **changes: Any) -> Dmd2:  # noqa: ANN401
    """Student, teacher and fake score are small networks that drop labels with own_drop."""
    student, teacher, fake_score = (small_denoiser(i, 0.0, own_drop) for i in range(3))
    settings = replace(SETTINGS, **changes)
    critic = Critic(fake_score, Discriminator(32, settings.gan_groups))
    return Dmd2(student.train(), teacher, critic.train(), settings, EDM)


def batch(n: int = 6, nimg: int = 0, step_nimg: int = 0, size: int = 8) -> Batch:
    generator = torch.Generator().manual_seed(nimg)
    images = torch.randn(n, 1, size, size, generator=generator).clamp(-1, 1)
    labels = torch.eye(CLASSES)[torch.arange(n) % CLASSES]
    return Batch(images, labels, nimg, step_nimg, seed=0)


def asked(network: nn.Module) -> list[tuple[Tensor, Tensor, Tensor]]:
    """A list that each call of a denoiser extends by its (x, sigma, labels)."""
    calls: list[tuple[Tensor, Tensor, Tensor]] = []
    network.register_forward_pre_hook(lambda module, args: calls.append(args))
    return calls


def gradients(network: nn.Module) -> list[Tensor]:
    return [p.grad for p in network.parameters() if p.grad is not None and bool(p.grad.any())]


def generate(method: Dmd2, b: Batch) -> Tensor:
    """The student's images of a batch, with their gradient."""
    made = method.prepare(b)
    return method.student(made.x, made.sigma, made.labels)


def critic_loss(method: Dmd2, b: Batch) -> tuple[Tensor, dict[str, Any], Generated]:
    """Of an iteration without the student's phase; what was prepared for it, too."""
    made = method.prepare(b)
    return *method.critic_loss(b, made), made


def backward(method: Dmd2, phase: str, b: Batch, made: Generated | None = None) -> Tensor:
    """One phase as the trainer runs it: the other networks need no gradient."""
    for name, network in method.trained.items():
        network.requires_grad_(name == phase).zero_grad()
    loss, _ = method.loss(phase, b, made or method.prepare(b))
    loss.backward()
    return loss.detach()


# --- turns and noise levels --------------------------------------------------------------------


def test_student_trains_in_every_fifth_iteration_before_the_critic() -> None:
    phases = [gaussian_method(update_ratio=5).phases(i, 0.0) for i in range(11)]
    assert [i for i, p in enumerate(phases) if p == ("student", "critic")] == [0, 5, 10]
    assert all(p == ("critic",) for i, p in enumerate(phases) if i % 5)
    assert all("student" in gaussian_method(update_ratio=1).phases(i, 0.0) for i in range(3))


def test_matching_draws_levels_20_to_980_and_the_fake_score_all() -> None:
    method, b = gaussian_method(steps=1), batch(20_000, size=1)
    teacher, fake = asked(method.teacher), asked(method.critic.fake_score)
    made = method.prepare(b)
    method.student_loss(b, made)
    method.critic_loss(b, made)
    used = [torch.searchsorted(method.levels, sigma) for _, sigma, _ in (teacher[0], fake[1])]
    assert [(int(t.min()), int(t.max())) for t in used] == [(20, 980), (0, 999)]
    assert float(method.levels[500]) == pytest.approx(2.52651, rel=1e-5)


@pytest.mark.parametrize(("levels", "highest"), [(1000, 999), (100, 99)])
def test_gan_noises_up_to_its_own_level(levels: int, highest: int) -> None:
    method, b = gaussian_method(gan_levels=levels), batch(20_000, size=1)
    sigmas: list[Tensor] = []
    method.critic.logits = lambda x, sigma, labels: sigmas.append(sigma) or x.flatten(1)
    method.logits(b, (b.images, b.labels))
    used = torch.searchsorted(method.levels, sigmas[0])
    assert (int(used.min()), int(used.max())) == (0, highest)


def test_gan_without_levels_sees_clean_images_at_the_lowest_sigma() -> None:
    method, b = gaussian_method(gan_levels=0), batch()
    seen: list[Tensor] = []
    method.critic.logits = lambda x, sigma, labels: seen.extend((x, sigma)) or x.flatten(1)
    method.logits(b, (b.images, b.labels))
    assert torch.equal(seen[0], b.images)
    assert seen[1].tolist() == pytest.approx([0.002] * len(b.images))


# --- distribution matching ---------------------------------------------------------------------


def test_gradient_vanishes_where_the_fake_score_is_the_teacher() -> None:
    method, b = network_method(), batch()
    method.critic.fake_score.load_state_dict(method.teacher.state_dict())
    assert float(backward(method, "student", b)) == 0
    assert not gradients(method.student)
    method.critic.fake_score.load_state_dict(method.student.state_dict())
    assert float(backward(method, "student", b)) > 0
    assert gradients(method.student)


def test_matching_gradient_is_the_direction_over_the_number_of_elements() -> None:
    method, b = network_method(), batch()
    x = b.images.clone().requires_grad_()
    t = torch.full((len(x),), 500)
    loss, direction = method.matching_loss(x, b.labels, t, torch.ones_like(x))
    loss.backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, direction / x.numel())
    assert not gradients(method.teacher)
    assert not gradients(method.critic)


@pytest.mark.parametrize(("epsilon", "finite"), [(0.0, False), (1e-6, True)])
def test_epsilon_guards_images_that_the_teacher_agrees_with(epsilon: float, finite: bool) -> None:
    method, b = gaussian_method(dm_epsilon=epsilon), batch(2)
    x, t = torch.zeros_like(b.images), torch.tensor([500, 500])
    _, direction = method.matching_loss(x, b.labels, t, torch.zeros_like(x))
    assert bool(torch.isfinite(direction).all()) is finite


@pytest.mark.parametrize(("std", "sign"), [(0.8, 1), (0.25, -1)])
def test_student_learns_the_teachers_width(std: float, sign: int) -> None:
    """With a fake score that is exact for the student, descent changes its gain the right way."""
    method, b = gaussian_method(steps=1), batch(4000, size=1)
    exact = method.critic.fake_score
    assert isinstance(exact, Gaussian)
    exact.std = std

    class Wide(Gaussian):
        def forward(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
            return self.gain * std * x / sigma.reshape(-1, 1, 1, 1)

    method.student = method.trained["student"] = Wide()
    backward(method, "student", b)
    assert sign * float(gradients(method.student)[0]) > 0


def test_nan_to_num_trains_on_past_an_image_that_the_teacher_agrees_with() -> None:
    """As the reference: 0/0 of one image leaves the gradient of the others as it was."""
    b, t, gradients = batch(2), torch.tensor([500, 500]), []
    x = torch.stack([torch.zeros_like(b.images[0]), b.images[1]])
    for mend in (True, None):
        method, y = gaussian_method(dm_epsilon=0.0, dm_nan_to_num=mend), x.clone().requires_grad_()
        loss, _ = method.matching_loss(y, b.labels, t, torch.zeros_like(x))
        gradients += torch.autograd.grad(loss, y)
    assert not gradients[0][0].any() and bool(gradients[1][0].isnan().all())
    assert bool(gradients[0][1].any()) and torch.equal(gradients[0][1], gradients[1][1])


# --- labels and modes --------------------------------------------------------------------------


def test_one_shared_mask_drops_labels_for_all_three_networks() -> None:
    method, b = network_method(label_dropout=0.5), batch(16)
    networks = (method.student, method.teacher, method.critic.fake_score)
    calls = [asked(network) for network in networks]
    made = method.prepare(b)
    method.student_loss(b, made)
    method.critic_loss(b, made)
    labels = [args[2] for network in calls for args in network]
    dropped = labels[0].sum(dim=1) == 0
    assert 0 < int(dropped.sum()) < 16
    assert torch.equal(labels[0][~dropped], b.labels[~dropped])
    assert len(labels) >= 4
    assert all(torch.equal(other, labels[0]) for other in labels)


def seen_by_discriminator(method: Dmd2, b: Batch) -> tuple[Tensor, Tensor]:
    """Labels beside generated and beside real images, in the critic's phase."""
    seen: list[Tensor] = []
    method.critic.logits = lambda x, sigma, labels: seen.append(labels) or x.flatten(1)
    critic_loss(method, b)
    fake, real = seen[0].chunk(2)
    return fake, real


@pytest.mark.parametrize("steps", [1, 4])
def test_discriminator_meets_dropped_labels_as_often_on_real_images_as_on_fakes(
    steps: int,
) -> None:
    """Else a label that is missing gives a fake away, whatever the student learns."""
    changes = {"gan_critic_weight": 1.0, "gan_levels": 0, "label_dropout": 0.1, "steps": steps}
    fake, real = seen_by_discriminator(gaussian_method(**changes), b := batch(3000, size=1))
    dropped = [labels.sum(dim=1) == 0 for labels in (fake, real)]
    assert torch.equal(*dropped), "one mask"
    assert float(dropped[1].float().mean()) == pytest.approx(0.1, abs=0.02)
    assert torch.equal(real[~dropped[1]], b.labels[~dropped[1]])


def test_real_images_keep_their_labels_where_networks_draw_masks_of_their_own() -> None:
    changes = {"gan_critic_weight": 1.0, "label_dropout": 0.5, "shared_label_drop": False}
    fake, real = seen_by_discriminator(gaussian_method(**changes), b := batch(64, size=1))
    assert torch.equal(real, b.labels) and bool(fake.any(dim=1).all())


def test_best_discriminator_of_a_perfect_student_has_two_log_two_to_lose() -> None:
    """It answers with the share of reals among those whose label is kept, or dropped, as theirs."""
    changes = {"gan_critic_weight": 1.0, "gan_levels": 0, "label_dropout": 0.1, "steps": 1}
    fake, real = seen_by_discriminator(gaussian_method(**changes), batch(3000, size=1))
    drops = [(labels.sum(dim=1) == 0).double() for labels in (fake, real)]
    p_fake, p_real = (float(d.mean()) for d in drops)
    tiny = 1e-12  # where one of them never drops a label
    logit = {
        1.0: math.log((p_real + tiny) / (p_fake + tiny)),
        0.0: math.log((1 - p_real + tiny) / (1 - p_fake + tiny)),
    }
    answers = (torch.tensor([logit[d] for d in mask.tolist()]) for mask in drops)
    assert float(gan_critic_loss(*answers)) == pytest.approx(2 * math.log(2), abs=1e-6)


def masks(method: Dmd2, b: Batch) -> dict[str, Tensor]:
    """Which rows kept their label inside each network, while the student trains."""
    kept: dict[str, Tensor] = {}

    def watch(name: str, network: Denoiser) -> None:
        def remember(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            kept[name] = args[0].sum(dim=1)

        network.model.get_submodule("map_label").register_forward_pre_hook(remember)

    watch("student", method.student)
    watch("teacher", method.teacher)
    watch("fake", method.critic.fake_score)
    torch.manual_seed(0)
    method.student_loss(b, method.prepare(b))
    return kept


def test_reference_behaviour_draws_a_mask_for_each_network_and_the_teacher() -> None:
    changes = {"shared_label_drop": False, "teacher_eval": False}
    kept = masks(network_method(0.5, **changes), batch(32))
    assert not torch.equal(kept["teacher"], kept["fake"])
    assert not torch.equal(kept["student"], kept["fake"])
    assert 0 < float(kept["teacher"].mean()) < 1


def test_teacher_in_eval_mode_keeps_all_labels() -> None:
    kept = masks(network_method(0.5, shared_label_drop=False, teacher_eval=True), batch(32))
    assert bool(kept["teacher"].all())
    assert not bool(kept["fake"].all())


@pytest.mark.parametrize("teacher_eval", [True, False])
def test_teacher_answers_alike_twice_in_eval_mode_only(teacher_eval: bool) -> None:
    teacher, b = network_method(0.5, teacher_eval=teacher_eval).teacher, batch(32)
    first, second = (teacher(b.images, torch.tensor(5.0), b.labels) for _ in range(2))
    assert torch.equal(first, second) is teacher_eval


def test_one_step_student_draws_labels_of_its_own() -> None:
    method, b = gaussian_method(steps=1), batch(3000, size=1)
    made = method.prepare(b)
    assert not made.step.any()
    assert not torch.equal(made.labels, b.labels)
    assert made.labels.sum(dim=0).tolist() == pytest.approx([1000] * 3, abs=130)
    assert made.x.shape == b.images.shape


def with_others(n: int = 400) -> tuple[Batch, Tensor, Tensor]:
    """A batch with images and labels of another order, and these."""
    b, images = batch(n), torch.full((n, 1, 8, 8), 0.25)
    labels = b.labels.roll(1, dims=0)
    return replace(b, others=[(images, labels)]), images, labels


@pytest.mark.parametrize("simulate", [True, False])
def test_separate_labels_are_the_students_and_the_gans_stay_with_the_real_images(
    simulate: bool,
) -> None:
    changes = {"gan_critic_weight": 1.0, "gan_levels": 0, "backward_simulation": simulate}
    method = gaussian_method(separate_labels=True, **changes)
    b, images, others = with_others()
    calls, seen = asked(method.student), list[tuple[Tensor, Tensor]]()
    method.critic.logits = lambda x, sigma, labels: seen.append((x, labels)) or x.flatten(1)
    critic_loss(method, b)
    ((_, real), (fake_labels, real_labels)) = (both.chunk(2) for both in seen[0])
    assert torch.equal(fake_labels, others)
    assert all(torch.equal(labels, others) for _, _, labels in calls)
    assert torch.equal(real, b.images) and torch.equal(real_labels, b.labels)
    if not simulate:
        ((x, sigma, _),), z = calls, with_others()[0].normal_like(b.images)
        later = sigma < 80
        torch.testing.assert_close(x[later], (images + sigma.reshape(-1, 1, 1, 1) * z)[later])


def test_separate_labels_change_neither_the_noise_nor_the_draws_of_one_step() -> None:
    for steps in (1, 4):
        apart, together = (gaussian_method(steps=steps, separate_labels=s) for s in (True, None))
        made, same = (m.prepare(with_others(6)[0]) for m in (apart, together))
        x, y = (m.student(a.x, a.sigma, a.labels) for m, a in ((apart, made), (together, same)))
        assert torch.equal(x, y) and torch.equal(made.step, same.step)
        assert torch.equal(made.labels, same.labels) is (steps == 1)


def test_separate_labels_need_more_data_than_the_batch() -> None:
    assert gaussian_method(separate_labels=True).other_images
    assert not gaussian_method(separate_labels=True, steps=1).other_images
    assert not gaussian_method().other_images
    with pytest.raises(AssertionError, match="need a method that asks for other_images"):
        gaussian_method(separate_labels=True).prepare(batch())


# --- the student's own steps -------------------------------------------------------------------


def stream(seed: int = 0, n: int = 4) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(n, 1, 2, 2, generator=generator)


@pytest.mark.parametrize("stop", range(4))
def test_backward_simulation_makes_as_many_calls_and_draws_as_it_needs(stop: int) -> None:
    student, noise, draws = Gaussian(), stream(), []
    backward_simulation(
        student, EDM.sigmas(4), stop, torch.zeros(4, CLASSES), lambda: draws.append(0) or noise()
    )
    assert student.nfe == 4 * stop
    assert len(draws) == max(stop, 1)


def test_backward_simulation_of_no_step_is_pure_noise() -> None:
    x = backward_simulation(Gaussian(), EDM.sigmas(4), 0, torch.zeros(4, CLASSES), stream())[-1]
    torch.testing.assert_close(x, 80 * stream()())


@pytest.mark.parametrize("stop", range(1, 4))
def test_backward_simulation_is_the_sampler_cut_short(stop: int) -> None:
    labels, noise = torch.zeros(4, CLASSES), stream()
    image = backward_simulation(Gaussian(), EDM.sigmas(4), stop, labels, stream())[-1]
    sampled = sample_renoise(Gaussian(), noise(), labels, with_zero(EDM.sigmas(4)[:stop]), noise)
    torch.testing.assert_close(image, sampled, check_dtype=False)
    assert not image.requires_grad


def test_student_is_trained_on_the_step_after_the_simulated_ones() -> None:
    """All images of all micro-batches of an iteration share the step; iterations differ."""
    method, stops = gaussian_method(), []
    calls = asked(method.student)
    for step in range(40):
        for nimg in (step * 12, step * 12 + 6):
            calls.clear()
            generate(method, batch(nimg=nimg, step_nimg=step * 12))
            stops.append(len(calls) - 1)
            assert torch.equal(calls[-1][1], method.steps[stops[-1]].expand(6))
        assert stops[-1] == stops[-2]
    assert set(stops) == {0, 1, 2, 3}


@pytest.mark.parametrize("simulate", [True, False])
def test_first_step_starts_from_pure_noise(simulate: bool) -> None:
    method = gaussian_method(backward_simulation=simulate)
    calls = asked(method.student)
    for step in range(8):
        b, fresh = batch(64, nimg=step, step_nimg=step), batch(64, nimg=step, step_nimg=step)
        z = fresh.normal_like(fresh.images)
        generate(method, b)
        x, sigma, _ = calls[-1]
        first = sigma == 80
        torch.testing.assert_close(x[first], 80 * z[first])


def test_without_simulation_each_image_is_noised_to_a_step_of_its_own() -> None:
    method, b = gaussian_method(backward_simulation=False), batch(400)
    calls = asked(method.student)
    generate(method, b)
    ((x, sigma, labels),) = calls
    z = batch(400).normal_like(b.images)
    later = sigma < 80
    column = sigma.reshape(-1, 1, 1, 1)
    torch.testing.assert_close(x[later], (b.images + column * z)[later])
    counts = (sigma[:, None] == method.steps).sum(dim=0)
    assert counts.tolist() == pytest.approx([100] * 4, abs=35)
    assert torch.equal(labels, b.labels)


def test_simulation_keeps_no_graph_but_the_last_step_does() -> None:
    method, outputs = network_method(), []
    method.student.register_forward_hook(lambda *args: outputs.append(args[-1].requires_grad))
    for step in range(6):
        outputs.clear()
        generate(method, batch(step_nimg=step))
        assert outputs == [False] * (len(outputs) - 1) + [True]


# --- all stops of a roll-out -------------------------------------------------------------------


class Recorder(Denoiser):
    """Answers x / 2 plus the class number, and notes what it was asked."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.sigma_data, self.asked = 0.5, list[tuple[Tensor, Tensor, Tensor]]()
        self.gain = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        self.asked.append((x.detach(), sigma, labels))
        return self.gain * x + labels.argmax(dim=1).to(x).reshape(-1, 1, 1, 1)


def all_stops(n: int, nimg: int = 0) -> tuple[Recorder, Batch, tuple[Tensor, Tensor, Tensor]]:
    """What `simulate` makes of n images: clean images, labels, steps."""
    student, critic = Recorder(), Critic(Recorder())
    method = Dmd2(student, Recorder(), critic, replace(SETTINGS, all_stops=True), EDM)
    x = torch.zeros(n, 1, 4, 4)
    batch = Batch(x, torch.eye(10)[torch.arange(n) % 10], nimg, nimg, 0)
    return student, batch, method.simulate(batch, batch.labels)


@pytest.mark.parametrize("n", [4, 8, 32])
def test_every_stop_comes_equally_often(n: int) -> None:
    *_, (clean, labels, k) = all_stops(n)
    assert k.bincount().tolist() == [n // 4] * 4
    assert clean.shape == (n, 1, 4, 4) and labels.shape == (n, 10)


def test_stops_that_do_not_divide_the_batch_all_come() -> None:
    counts = torch.stack([all_stops(7, nimg)[2][2].bincount(minlength=4) for nimg in range(50)])
    assert bool((counts.sum(dim=1) == 7).all())
    assert int(counts.min()) >= 1 and int(counts.max()) == 2


def test_images_of_a_roll_out_cost_less_than_a_call_each() -> None:
    student, *_ = all_stops(32)
    assert sum(len(x) for x, *_ in student.asked) == 32 * 3 / 4


def test_images_are_those_of_the_sampler_cut_short_with_the_labels_of_their_roll_out() -> None:
    _, batch, (clean, labels, k) = all_stops(32)
    fresh = Batch(batch.images, batch.labels, batch.nimg, batch.step_nimg, batch.seed)
    noises = [fresh.normal_like(fresh.images[:8]).double() for _ in range(4)]
    sigmas = EDM.sigmas(4)
    student, rollouts = Recorder().double(), batch.labels[:8]
    stops = [sigmas[0] * noises[0]]
    for stop in range(1, 4):
        later = iter(noises[1:]).__next__
        stops.append(sample_renoise(student, noises[0], rollouts, with_zero(sigmas[:stop]), later))
    found = set[tuple[int, int]]()
    for image, label, stop in zip(clean, labels, k.tolist(), strict=True):
        distance = (stops[stop] - image).flatten(1).abs().amax(dim=1)
        rollout = int(distance.argmin())
        torch.testing.assert_close(image.double(), stops[stop][rollout], rtol=1e-5, atol=1e-5)
        assert torch.equal(label, rollouts[rollout])
        found.add((stop, rollout))
    assert len(found) == 32, "each stop of each roll-out once"


def test_what_is_drawn_follows_from_the_place_on_the_clock() -> None:
    (_, _, a), (_, _, again), (_, _, later) = all_stops(8), all_stops(8), all_stops(8, 8)
    assert all(map(torch.equal, a, again))
    assert not torch.equal(a[0], later[0])


# --- who learns from what ----------------------------------------------------------------------

GAN = {"gan_student_weight": 3e-3, "gan_critic_weight": 1e-2}


def test_student_phase_moves_the_student_alone() -> None:
    method = network_method(**GAN)
    backward(method, "student", batch())
    assert gradients(method.student)
    assert not gradients(method.critic)
    assert not gradients(method.teacher)


def test_critic_phase_moves_the_critic_alone() -> None:
    method, b = network_method(**GAN), batch()
    made = method.prepare(b)
    backward(method, "student", b, made)
    method.student.zero_grad()
    backward(method, "critic", b, made)
    assert gradients(method.critic.fake_score)
    assert method.critic.discriminator and gradients(method.critic.discriminator)
    assert not gradients(method.student)
    assert not gradients(method.teacher)


def test_critic_never_reaches_a_student_that_could_learn() -> None:
    method, b = network_method(**GAN), batch()
    loss, *_ = critic_loss(method, b)
    loss.backward()
    assert not gradients(method.student)


def test_critic_learns_from_the_images_that_the_student_just_made() -> None:
    method, b = network_method(), batch()
    calls = asked(method.student)
    fake = asked(method.critic.fake_score)
    made = method.prepare(b)
    method.student_loss(b, made)
    before, x = len(calls), made.images
    assert x is not None and not x.requires_grad
    torch.testing.assert_close(x, method.student(*calls[-1]), rtol=0, atol=0)
    calls.clear()
    fake.clear()
    method.critic_loss(b, made)
    assert before and not calls and made.images is x
    seen, sigma, _ = fake[0]
    assert float(((seen - x) / per_image(sigma)).std()) == pytest.approx(1, abs=0.15), "x and noise"


def test_critic_loss_is_the_denoising_loss_of_generated_images() -> None:
    method, b = gaussian_method(), batch()
    fake = asked(method.critic.fake_score)
    loss, logs, made = critic_loss(method, b)
    x, sigma, labels = fake[0]
    assert made.images is not None
    expected = fake_score_loss(Gaussian(0.6)(x, sigma), made.images, sigma, 0.5)
    torch.testing.assert_close(loss, expected.mean())
    assert not [name for name in logs if "gan" in name or "realism" in name]
    assert torch.equal(labels, made.labels)


def test_discriminator_compares_generated_images_with_real_ones() -> None:
    method, b = gaussian_method(gan_critic_weight=1.0, gan_levels=0), batch()
    seen: list[tuple[Tensor, Tensor]] = []
    method.critic.logits = lambda x, sigma, labels: seen.append((x, labels)) or x.flatten(1)
    loss, logs, made = critic_loss(method, b)
    ((fake, real), (fake_labels, real_labels)) = (both.chunk(2) for both in seen[0])
    assert made.images is not None and torch.equal(fake, made.images)
    assert torch.equal(fake_labels, made.labels)
    assert torch.equal(real, b.images)
    assert torch.equal(real_labels, b.labels)
    gan = gan_critic_loss(fake.flatten(1), real.flatten(1))
    torch.testing.assert_close(loss, logs["loss_fake"][0] + gan, check_dtype=False)


def test_critics_gan_loss_trains_the_encoder_and_not_the_decoder() -> None:
    method, b = network_method(), batch()
    fake, real = method.logits(b, (b.images * 0.1, b.labels), (b.images, b.labels))
    gan_critic_loss(fake, real).backward()
    assert fake.shape == (6, 1)
    network = method.critic.fake_score.model
    assert gradients(network.get_submodule("enc"))
    assert not gradients(network.get_submodule("dec"))
    weighted, *_ = critic_loss(network_method(gan_critic_weight=1.0), batch())
    double, logs, _ = critic_loss(network_method(gan_critic_weight=2.0), batch())
    assert {"loss_gan_critic", "realism_real", "realism_fake"} <= set(logs)
    gan, once = logs["loss_gan_critic"]
    assert once == 1
    torch.testing.assert_close(double - weighted, gan.float(), rtol=1e-3, atol=1e-3)


def test_student_feels_the_discriminator() -> None:
    method, b = network_method(gan_student_weight=1.0), batch()
    method.critic.fake_score.load_state_dict(method.teacher.state_dict())  # no matching gradient
    backward(method, "student", b)
    assert gradients(method.student)


def test_losses_follow_from_seed_and_position() -> None:
    def both(nimg: int) -> list[float]:
        method, b = network_method(**GAN), batch(nimg=nimg, step_nimg=nimg)
        made = method.prepare(b)
        return [float(backward(method, phase, b, made)) for phase in ("student", "critic")]

    assert both(64) == both(64)
    assert both(64) != both(128)


# --- discriminator -----------------------------------------------------------------------------


def test_discriminator_of_the_imagenet_network_has_the_published_shape() -> None:
    with torch.device("meta"):
        head = Discriminator(768)
        logits = head(torch.empty(2, 768, 8, 8))
    shapes = {name: tuple(p.shape) for name, p in head.named_parameters() if p.dim() > 1}
    assert shapes == {
        "0.weight": (768, 768, 4, 4),
        "3.weight": (768, 768, 4, 4),
        "6.weight": (1, 768, 1, 1),
    }
    norms = [m for m in head if isinstance(m, nn.GroupNorm)]
    assert [(m.num_groups, m.num_channels) for m in norms] == [(32, 768)] * 2
    assert [m.stride for m in head if isinstance(m, nn.Conv2d)] == [(2, 2), (4, 4), (1, 1)]
    assert logits.shape == (2, 1)


@pytest.mark.parametrize(("channels", "groups"), [(4, 1), (32, 8), (64, 32), (96, 32)])
def test_discriminator_answers_one_logit_an_image(channels: int, groups: int) -> None:
    assert Discriminator(channels, groups)(torch.randn(3, channels, 8, 8)).shape == (3, 1)


@pytest.mark.parametrize(("channels", "binary"), [(64, True), (128, False)])
def test_two_channels_a_group_leave_the_discriminator_only_signs(
    channels: int, binary: bool
) -> None:
    """The second normalisation sees one pixel: two numbers there become 1 and -1."""
    torch.manual_seed(0)
    head, answers = Discriminator(channels, groups=32), []
    head[4].register_forward_hook(lambda *args: answers.append(args[-1].abs()))
    head(torch.randn(64, channels, 8, 8))
    signs = float(((answers[0] - 1).abs() < 0.01).float().mean())
    assert signs > 0.9 if binary else signs < 0.1


def test_discriminator_refuses_groups_that_do_not_divide_its_channels() -> None:
    with pytest.raises(ValueError, match=r"need gan_groups that divide the 48 .* got 32 \(params"):
        Discriminator(48)


def test_critic_holds_fake_score_and_discriminator_for_one_optimiser() -> None:
    fake_score = small_denoiser(0)
    head = Discriminator(32, groups=8)
    own = sum(p.numel() for p in Critic(fake_score, head).parameters())
    assert own == sum(p.numel() for m in (fake_score, head) for p in m.parameters())
    assert len(list(Critic(fake_score).parameters())) == len(list(fake_score.parameters()))


# --- switches beyond the reference -------------------------------------------------------------


def test_a_students_own_grid_is_where_its_steps_are() -> None:
    method = gaussian_method(sigma_max=4.0, sigma_min=0.03)
    ends = method.steps[[0, -1]].tolist()
    assert ends == pytest.approx([4.0, 0.03]) and len(method.levels) == 1000
    made = gaussian_method(steps=1, sigma_max=2.5).prepare(batch(2000))
    assert set(made.sigma.tolist()) == {2.5}
    assert float(made.x.std()) == pytest.approx(2.5, rel=0.02)


def test_critic_levels_are_lognormal_if_asked() -> None:
    method, b = gaussian_method(critic_levels=(-1.2, 1.2), steps=1), batch(20_000, size=1)
    fake = asked(method.critic.fake_score)
    critic_loss(method, b)
    logs = fake[0][1].log()
    assert float(logs.mean()) == pytest.approx(-1.2, abs=0.03)
    assert float(logs.std()) == pytest.approx(1.2, rel=0.03)


def test_the_student_waits_for_its_critic() -> None:
    method = gaussian_method(critic_warmup_kimg=1.0, update_ratio=1)
    assert [method.phases(9, kimg) for kimg in (0.0, 0.99)] == [("critic",)] * 2
    assert method.phases(10, 1.0) == ("student", "critic")


def test_adversarial_losses_begin_late_and_slow_the_rates() -> None:
    late = {"gan_student_weight": 1.0, "gan_critic_weight": 1.0, "gan_from_kimg": 2.0}
    method = network_method(**late, gan_lr_factor=0.25)
    assert [method.rate_factor(kimg) for kimg in (1.9, 2.0)] == [1.0, 0.25]
    for step_nimg, begun in ((1999, False), (2000, True)):
        b = batch(step_nimg=step_nimg)
        made = method.prepare(b)
        _, student = method.student_loss(b, made)
        loss, critic = method.critic_loss(b, made)
        assert ("loss_gan_student" in student) is ("loss_gan_critic" in critic) is begun
        method.critic.zero_grad()
        loss.backward()
        assert method.critic.discriminator is not None
        head = [p.grad for p in method.critic.discriminator.parameters()]
        there = [g for g in head if g is not None]
        assert len(there) == len(head), "what ranks exchange must be there"
        assert any(bool(g.any()) for g in there) is begun


def test_assimilation_moves_the_fake_score_after_student_updates_alone() -> None:
    method = network_method(assimilate=0.25)
    score, student = method.critic.fake_score, method.student
    before = [p.clone() for p in score.parameters()]
    method.after_update("critic")
    assert all(map(torch.equal, score.parameters(), before))
    method.after_update("student")
    for new, old, own in zip(score.parameters(), before, student.parameters(), strict=True):
        torch.testing.assert_close(new, 0.75 * old + 0.25 * own)


def test_sid_sends_its_gradient_through_both_denoisers_to_the_student_alone() -> None:
    method = network_method(matching="sid", steps=1)
    backward(method, "student", batch())
    assert gradients(method.student)
    assert not gradients(method.teacher) and not gradients(method.critic)
    b = batch()
    made = method.prepare(b)
    x = method.student(made.x, made.sigma, made.labels).detach().requires_grad_()
    n, t = torch.zeros_like(x), torch.full((len(x),), 400)
    loss, direction = method.matching_loss(x, made.labels, t, n)
    [gradient] = torch.autograd.grad(loss, [x])
    direct = gaussian_method(matching="dmd").settings
    assert direct.matching == "dmd"
    assert not torch.allclose(gradient, direction / x.numel()), "not DMD's alone"


def test_a_divergence_asks_the_discriminator_about_the_same_noised_images() -> None:
    method = network_method(gan_critic_weight=1.0, divergence="forward_kl", steps=1)
    asked_of: list[tuple[Tensor, Tensor]] = []
    teacher = asked(method.teacher)
    logits = method.critic.logits

    def heard(x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        asked_of.append((x, sigma))
        return logits(x, sigma, labels)

    method.critic.logits = heard
    b = batch()
    method.student_loss(b, method.prepare(b))
    [(x, sigma)] = asked_of
    assert torch.equal(x, teacher[0][0]) and torch.equal(sigma, teacher[0][1])


def test_a_divergence_waits_until_the_discriminator_is_trained() -> None:
    waiting = {"gan_critic_weight": 1.0, "gan_from_kimg": 2.0, "steps": 1}
    method, plain = (network_method(**waiting, divergence=d) for d in ("forward_kl", None))
    for step_nimg, alike in ((0, True), (2000, False)):
        b, same = batch(step_nimg=step_nimg), batch(step_nimg=step_nimg)
        losses = [m.student_loss(b, m.prepare(b))[0] for m, b in ((method, b), (plain, same))]
        assert torch.equal(*losses) is alike


def test_levels_by_step_stay_between_a_step_and_the_next() -> None:
    method, b = (
        gaussian_method(levels_by_step=True, backward_simulation=False),
        batch(20_000, size=1),
    )
    teacher, fake = asked(method.teacher), asked(method.critic.fake_score)
    made = method.prepare(b)
    method.student_loss(b, made)
    method.critic_loss(b, made)
    nodes = with_zero(method.steps)
    for sigma in (teacher[0][1], fake[1][1]):
        for k in range(4):
            low, high = sigma[made.step == k].aminmax()
            assert nodes[k + 1] <= low <= nodes[k + 1] * 1.1 + 0.01
            assert nodes[k] * 0.9 <= high <= nodes[k]


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_share_of_the_inputs_are_noised_real_images(share: float) -> None:
    method = gaussian_method(real_share=share, all_stops=True, sigma_max=0.5, sigma_min=0.4)
    b = replace(batch(4000), images=torch.full((4000, 1, 8, 8), 5.0))
    made = method.prepare(b)
    later = made.step > 0
    real = made.x.flatten(1).mean(dim=1) > 2.5
    assert float(real[later].float().mean()) == pytest.approx(share, abs=0.03)
    assert torch.equal(made.sigma, method.steps[made.step])


def test_the_discriminator_sees_more_real_images_with_the_same_labels_dropped() -> None:
    method = gaussian_method(
        gan_critic_weight=1.0, gan_levels=0, gan_real_batch=3, label_dropout=0.5, steps=1
    )
    assert method.other_images == 2
    b = batch()
    b = replace(b, others=[(b.images + i, b.labels) for i in (1, 2)])
    seen = list[tuple[Tensor, Tensor]]()
    method.critic.logits = lambda x, sigma, labels: seen.append((x, labels)) or x.flatten(1)
    _, _, made = critic_loss(method, b)
    x, labels = seen[0]
    assert len(x) == 4 * 6 and made.keep is not None
    torch.testing.assert_close(x[6:], torch.cat([b.images + i for i in range(3)]))
    assert torch.equal(labels[6:], (b.labels * made.keep).repeat(3, 1))


REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"levels_by_step": True, "critic_levels": (-1.2, 1.2)},
        "need no critic_levels beside levels_by_step, got both",
    ),
    ({"divergence": "js"}, "need gan_critic_weight > 0 for divergence js, got 0"),
    (
        {"divergence": "js", "matching": "sid", "gan_critic_weight": 1.0},
        "need matching: dmd for a divergence, got sid",
    ),
    (
        {"real_share": 0.5, "steps": 1},
        "need backward_simulation and several steps for a real_share",
    ),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=str)
def test_switches_that_conflict_are_refused(changes: dict[str, Any], message: str) -> None:
    [(_, said)] = replace(SETTINGS, **changes).check("at")
    assert said.startswith(message)
