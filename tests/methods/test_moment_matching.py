"""Moment matching: where it looks, what each turn moves, and its fixed points in closed form."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import CLASSES, EDM, Gaussian, small_denoiser
from fewstep.data.batch import Batch
from fewstep.methods.moment_matching import MomentMatching, Noised, Settings, posterior
from fewstep.networks.denoiser import Denoiser
from fewstep.theory.losses import distribution_matching

SETTINGS = Settings(steps=4, auxiliary_lr=1e-3, normalise=True, label_dropout=0.0)
STUDENT, TEACHER = 0.4, 0.5  # std of the data that they denoise exactly


def gaussian_method(auxiliary: float = 0.6, **changes: Any) -> MomentMatching:  # noqa: ANN401
    settings = replace(SETTINGS, **changes)
    return MomentMatching(Gaussian(STUDENT), Gaussian(TEACHER), Gaussian(auxiliary), settings, EDM)


def batch(n: int = 6, size: int = 4) -> Batch:
    generator = torch.Generator().manual_seed(0)
    images = TEACHER * torch.randn(n, 1, size, size, generator=generator)
    labels = torch.eye(CLASSES)[torch.arange(n) % CLASSES]
    return Batch(images, labels, 0, 0, seed=0)


def gain_of(std: float, sigma: float) -> float:
    return std**2 / (std**2 + sigma**2)


def at(t: float, s: float, n: int = 200_000) -> Noised:
    """Gaussian data noised to t, to be looked at at s."""
    b = batch(n, size=1)
    sigma = torch.full((n,), t)
    x = b.images + t * b.normal_like(b.images)
    return Noised(x, sigma, torch.zeros(n, dtype=torch.int64), torch.full((n,), s), b.labels)


def gradient(loss: Tensor, network: Denoiser) -> float:
    """Of a Gaussian's gain, its only parameter."""
    [found] = torch.autograd.grad(loss, list(network.parameters()))
    return float(found)


# --- turns and noise levels --------------------------------------------------------------------


def test_the_auxiliary_denoiser_learns_first_and_then_every_other_time() -> None:
    phases = [gaussian_method().phases(i, 0.0) for i in range(4)]
    assert phases == [("auxiliary",), ("student",)] * 2


def test_each_step_is_looked_at_between_itself_and_the_next() -> None:
    method = gaussian_method(sigma_max=4.0, sigma_min=0.1)
    seen = method.noised(batch(20_000, size=1))
    nodes = [4.0, *method.nodes[1:].tolist()]
    assert nodes[3] == pytest.approx(0.1) and nodes[4] == 0
    for step in range(4):
        own = seen.step == step
        assert int(own.sum()) == pytest.approx(5000, abs=300)
        assert torch.equal(seen.t[own], torch.full_like(seen.t[own], nodes[step]))
        low, high = seen.s[own].aminmax()
        assert max(nodes[step + 1], EDM.sigma_min) * (1 - 1e-5) <= float(low)
        assert float(high) <= nodes[step]
        place = seen.s[own] ** (1 / 7)
        ends = max(nodes[step + 1], EDM.sigma_min) ** (1 / 7), nodes[step] ** (1 / 7)
        assert float(place.mean()) == pytest.approx(sum(ends) / 2, rel=0.01), "uniform, as Karras'"


def test_labels_are_dropped_for_all_three_networks_alike() -> None:
    method, asked = gaussian_method(label_dropout=0.5), list[Tensor]()
    for network in (method.student, method.teacher, method.auxiliary):
        network.register_forward_pre_hook(lambda module, args: asked.append(args[2]))
    method.loss("student", batch(400), None)
    assert len(asked) == 3 and all(torch.equal(labels, asked[0]) for labels in asked)
    assert int((asked[0].sum(dim=1) == 0).sum()) == pytest.approx(200, abs=40)


# --- what each turn moves ----------------------------------------------------------------------


@pytest.mark.parametrize("normalise", [True, False])
def test_a_student_whose_auxiliary_agrees_with_the_teacher_is_left_alone(normalise: bool) -> None:
    method = gaussian_method(auxiliary=TEACHER, normalise=normalise)
    loss, logs = method.loss("student", batch(), None)
    assert float(loss.detach()) == 0 == gradient(loss, method.student)
    assert logs["loss_moments"][0] == 0


def test_only_the_network_of_the_turn_gets_a_gradient() -> None:
    student, teacher, auxiliary = (small_denoiser(i) for i in range(3))
    method = MomentMatching(student, teacher, auxiliary, SETTINGS, EDM)
    b = batch(size=8)
    for phase in ("student", "auxiliary"):
        for name, network in method.trained.items():
            network.requires_grad_(name == phase).zero_grad()
        method.loss(phase, b, None)[0].backward()
        for name, network in {**method.trained, "teacher": method.teacher}.items():
            moved = any(p.grad is not None and bool(p.grad.any()) for p in network.parameters())
            assert moved is (name == phase)


def test_the_auxiliary_settles_between_the_students_mean_and_the_teacher() -> None:
    """For linear students and Gaussian data, E[x | z_s] is linear, and known."""
    t, s = 2.0, 0.7
    r, g = s**2 / t**2, gain_of(STUDENT, t)
    z_t = TEACHER**2 + t**2  # variance; x = g z_t and z_s = (r + (1 - r) g) z_t + noise
    mix = r + (1 - r) * g
    students_mean = g * mix * z_t / (mix**2 * z_t + s**2 * (1 - r))
    best = (students_mean + gain_of(TEACHER, s)) / 2
    method, noised = gaussian_method(), at(t, s)
    for factor, sign in ((0.98, -1), (1.0, 0), (1.02, 1)):
        next(method.auxiliary.parameters()).data.fill_(factor * best / gain_of(0.6, s))
        n = torch.randn(noised.x.shape, generator=torch.Generator().manual_seed(1))
        loss, _ = method.auxiliary_loss(noised, n)
        slope = gradient(loss, method.auxiliary)
        assert abs(slope) < 2e-3 if not sign else slope * sign > 5e-3


def test_the_students_gradient_is_the_difference_of_the_denoisers() -> None:
    t, s = 2.0, 0.7
    method, noised = gaussian_method(normalise=False), at(t, s, n=1000)
    n = torch.randn(noised.x.shape, generator=torch.Generator().manual_seed(1))
    loss, _ = method.student_loss(noised, n)
    x = gain_of(STUDENT, t) * noised.x
    z = posterior(noised, x, n)
    difference = (gain_of(0.6, s) - gain_of(TEACHER, s)) * z
    wanted = (difference * x).mean()  # x is proportional to the student's gain, which is 1
    assert gradient(loss, method.student) == pytest.approx(float(wanted), rel=1e-5)


def test_a_single_step_from_much_noise_is_distribution_matching() -> None:
    """z_s is then the student's image with fresh noise of s, and the gradient that of DMD."""
    t, s = 80.0, 0.02
    method, noised = gaussian_method(steps=1), at(t, s, n=1000)
    n = torch.randn(noised.x.shape, generator=torch.Generator().manual_seed(1))
    loss, _ = method.student_loss(noised, n)
    x = method.student(noised.x, noised.t)
    x_s = x + s * n
    D_teacher, D_fake = gain_of(TEACHER, s) * x_s, gain_of(0.6, s) * x_s
    alike, _ = distribution_matching(x, D_teacher, D_fake, 1e-3)
    assert float(loss.detach()) == pytest.approx(float(alike.detach()), rel=0.02)
    own, theirs = (gradient(each, method.student) for each in (loss, alike))
    assert own == pytest.approx(theirs, rel=0.02)


# --- settings ----------------------------------------------------------------------------------


def test_it_samples_ancestrally_on_its_own_grid() -> None:
    s = replace(SETTINGS, sigma_max=10.0)
    said = s.sampled(EDM)
    assert said == {
        "sampler": "ancestral", "steps": 4, "sigma_min": 0.002, "sigma_max": 10.0, "rho": 7.0
    }  # fmt: skip


def test_more_than_sixteen_steps_are_refused() -> None:
    assert list(replace(SETTINGS, steps=17).check("at")) == [
        ("at.steps", "need at most 16 steps, got 17")
    ]
