"""Losses and weights in closed form."""

import math

import pytest
import torch
from torch import Tensor

from conftest import EDM, Gaussian
from fewstep.theory.losses import (
    DISTANCES,
    WEIGHTS,
    denoising_loss,
    distance,
    distribution_matching,
    divergence_factor,
    fake_score_loss,
    gan_critic_loss,
    gan_student_loss,
    loss_weight,
    score_identity,
)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- weights -----------------------------------------------------------------------------------


def test_sqrt_karras_weights_are_the_published_ones() -> None:
    nodes = EDM.nodes(8)
    sigma = torch.cat([nodes[[0, 1, 4]], torch.tensor([0.5]), nodes[[6, 7]]])
    golden = [2.0, 2.0002, 2.146, 2.828, 28.49, 500.0]
    assert loss_weight("sqrt_karras", sigma, 0.5).tolist() == pytest.approx(golden, rel=3e-4)


@pytest.mark.parametrize(
    ("kind", "golden"),
    [
        ("edm", [4.25, 8.0, 250_004.0]),
        ("karras", [4.25, 8.0, 250_004.0]),
        ("sqrt_karras", [4.25**0.5, 8.0**0.5, 250_004.0**0.5]),
        ("vlike", [1.25, 5.0, 250_001.0]),
        ("snr+1", [1.25, 5.0, 250_001.0]),
        ("snr", [0.25, 4.0, 250_000.0]),
        ("truncated-snr", [1.0, 4.0, 250_000.0]),
        ("flat", [1.0, 1.0, 1.0]),
        ("uniform", [1.0, 1.0, 1.0]),
    ],
)
def test_weights_have_their_closed_forms(kind: str, golden: list[float]) -> None:
    sigma = torch.tensor([2.0, 0.5, 0.002])
    assert loss_weight(kind, sigma, 0.5).tolist() == pytest.approx(golden, rel=1e-5)


def test_sqrt_karras_is_one_over_c_out() -> None:
    sigma, sigma_data = EDM.sigmas(50), 0.7
    c_out = sigma * sigma_data / (sigma**2 + sigma_data**2).sqrt()
    torch.testing.assert_close(loss_weight("sqrt_karras", sigma, sigma_data), 1 / c_out)


def test_weights_keep_the_shape_of_sigma() -> None:
    assert all(loss_weight(kind, torch.ones(3), 0.5).shape == (3,) for kind in WEIGHTS)


def test_unknown_weight_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"need a weight of edm, vlike, .*got 'p2'.*weight"):
        loss_weight("p2", torch.ones(1), 0.5)


# --- distances ---------------------------------------------------------------------------------


def test_distances_have_their_closed_forms() -> None:
    diff = torch.tensor([3.0, -4.0, 0.00005, 0.0]).reshape(1, 1, 2, 2)
    total = 25 + 0.00005**2
    huber = [1e-4 * (3 - 5e-5), 1e-4 * (4 - 5e-5), 0.5 * 0.00005**2, 0]
    assert distance("huber", diff).flatten().tolist() == pytest.approx(huber, rel=1e-5)
    assert distance("l2", diff).flatten().tolist() == pytest.approx([9, 16, 0.00005**2, 0])
    assert distance("l2_root", diff).tolist() == [[[[pytest.approx(math.sqrt(total))]]]]
    pseudo_huber = math.sqrt(total + 1e-8) - 1e-4
    assert distance("pseudo_huber", diff).tolist() == [[[[pytest.approx(pseudo_huber)]]]]


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        ("huber", (2, 3, 4, 4)),
        ("l2", (2, 3, 4, 4)),
        ("l2_root", (2, 1, 1, 1)),
        ("pseudo_huber", (2, 1, 1, 1)),
    ],
)
def test_distances_are_elementwise_or_one_an_image(kind: str, shape: tuple[int, ...]) -> None:
    assert distance(kind, normal(0, 2, 3, 4, 4)).shape == shape


@pytest.mark.parametrize("kind", DISTANCES)
def test_distances_are_even_and_smooth_at_zero(kind: str) -> None:
    diff = normal(0, 2, 1, 3, 3)
    torch.testing.assert_close(distance(kind, diff), distance(kind, -diff))
    zero = torch.zeros(2, 1, 3, 3, requires_grad=True)
    loss = distance(kind, zero)
    loss.sum().backward()
    assert float(loss.detach().max()) <= 1e-6
    assert zero.grad is not None
    assert not bool(zero.grad.any())


def test_unknown_distance_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"need a distance of huber, .*got 'lpips'.*distance"):
        distance("lpips", torch.zeros(1, 1, 1, 1))


# --- denoising ---------------------------------------------------------------------------------


def test_denoising_loss_weighs_each_image_by_edms_lambda() -> None:
    D_x, y, sigma = normal(0, 2, 1, 3, 3), normal(1, 2, 1, 3, 3), torch.tensor([0.5, 2.0])
    lam = torch.tensor([8.0, 4.25]).reshape(-1, 1, 1, 1)
    torch.testing.assert_close(denoising_loss(D_x, y, sigma, 0.5), lam * (D_x - y) ** 2)


def test_exact_denoiser_has_the_least_denoising_loss() -> None:
    """Of all D = gain x D_exact, gain 1 minimises the loss, whatever the sigma."""
    y = 0.5 * normal(0, 50_000, 1, 1, 1)
    for sigma in (0.1, 1.0, 10.0):
        x, sigmas, exact = y + sigma * normal(1, *y.shape), torch.full((len(y),), sigma), Gaussian()
        loss = denoising_loss(exact(x, sigmas), y, sigmas, 0.5).mean()
        (slope,) = torch.autograd.grad(loss, exact.gain)
        exact.gain.data += 1.0
        (curvature,) = torch.autograd.grad(
            denoising_loss(exact(x, sigmas), y, sigmas, 0.5).mean(), exact.gain
        )
        assert abs(float(slope)) < 0.05 * float(curvature)


# --- distribution matching ---------------------------------------------------------------------


def test_distribution_matching_reproduces_the_published_numbers() -> None:
    x = torch.tensor([0.5, -0.25, 1.0, 0.0]).reshape(1, 4, 1, 1).requires_grad_()
    noise = torch.tensor([0.1, -0.2, 0.3, 0.4]).reshape(1, 4, 1, 1)
    sigma = EDM.sigmas(1000).flip(0)[500].float()
    x_t = (x + sigma * noise).detach()
    D_teacher, D_fake = Gaussian(0.5)(x_t, sigma), Gaussian(0.6)(x_t, sigma)
    loss, direction = distribution_matching(x, D_teacher, D_fake)
    golden = [0.02838435, -0.02848431, 0.06629679, 0.03811237]
    assert direction.flatten().tolist() == pytest.approx(golden, rel=1e-5)
    assert float(loss.detach()) == pytest.approx(0.000933105600, rel=1e-5)
    weight = (D_fake - D_teacher) / direction
    assert weight.flatten().tolist() == pytest.approx([0.4162499921] * 4, rel=1e-5)


def test_distribution_matching_gradient_is_the_direction_over_the_number_of_elements() -> None:
    x, D_teacher, D_fake = (normal(i, 2, 3, 4, 4).requires_grad_() for i in range(3))
    loss, direction = distribution_matching(x, D_teacher, D_fake)
    loss.backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, direction / x.numel())
    assert D_teacher.grad is None
    assert D_fake.grad is None


def test_distribution_matching_normalises_each_image_by_the_teachers_correction() -> None:
    x, D_teacher, D_fake = (normal(i, 2, 1, 4, 4) for i in range(3))
    scale = torch.tensor([1.0, 100.0]).reshape(-1, 1, 1, 1)
    _, direction = distribution_matching(x, D_teacher, D_fake)
    _, scaled = distribution_matching(scale * x, scale * D_teacher, scale * D_fake)
    torch.testing.assert_close(scaled, direction)


def test_epsilon_keeps_the_direction_finite_where_the_teacher_agrees_with_x() -> None:
    x, D_fake = normal(0, 1, 1, 2, 2), normal(1, 1, 1, 2, 2)
    _, infinite = distribution_matching(x, x, D_fake)
    _, finite = distribution_matching(x, x, D_fake, epsilon=1e-6)
    assert not bool(torch.isfinite(infinite).any())
    torch.testing.assert_close(finite, (D_fake - x) / 1e-6)


def test_nan_to_num_moves_nothing_where_the_teacher_agrees_with_x_and_all_else_as_before() -> None:
    torch.manual_seed(0)
    x, teacher, fake = (torch.randn(3, 1, 2, 2) for _ in range(3))
    teacher[0] = fake[0] = x[0]
    moved = torch.tensor([False, True, True]).reshape(-1, 1, 1, 1)
    plain, direction = distribution_matching(x, teacher, fake)
    loss, mended = distribution_matching(x, teacher, fake, nan_to_num=True)
    assert bool(direction[0].isnan().all()) and not math.isfinite(float(plain))
    assert torch.equal(mended, torch.where(moved, direction, 0.0))
    torch.testing.assert_close(loss, 0.5 * mended.square().mean())


def test_gradient_pulls_a_distribution_towards_the_teachers() -> None:
    """A descent step shrinks images of a fake distribution that is too wide, and widens narrow."""
    sigma = torch.tensor(1.0)
    for std, sign in ((0.8, 1), (0.3, -1)):
        x = std * normal(0, 1000, 1, 1, 1)
        x_t = x + sigma * normal(1, *x.shape)
        D_teacher, D_fake = Gaussian(0.5)(x_t, sigma), Gaussian(std)(x_t, sigma)
        _, direction = distribution_matching(x, D_teacher, D_fake)
        assert sign * float((direction.clamp(-10, 10) * x).mean()) > 0


# --- fake score and GAN ------------------------------------------------------------------------


def test_fake_score_loss_is_edms_weighted_mean() -> None:
    D_x, x, sigma = normal(0, 3, 1, 2, 2), normal(1, 3, 1, 2, 2), torch.tensor([0.1, 1.0, 10.0])
    loss = fake_score_loss(D_x, x, sigma, 0.5)
    each = denoising_loss(D_x, x, sigma, 0.5).flatten(1).mean(dim=1)
    torch.testing.assert_close(loss, each)


def test_gan_losses_have_their_closed_forms() -> None:
    fake, real = torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [-1.0]])

    def softplus(t: float) -> float:
        return math.log1p(math.exp(t))

    student = (softplus(0) + softplus(-2)) / 2
    critic = (softplus(0) + softplus(2)) / 2 + (softplus(-1) + softplus(1)) / 2
    assert float(gan_student_loss(fake)) == pytest.approx(student)
    assert float(gan_critic_loss(fake, real)) == pytest.approx(critic)


def test_gan_losses_oppose_each_other_on_fakes() -> None:
    logits = torch.zeros(2, 1, requires_grad=True)
    (student,) = torch.autograd.grad(gan_student_loss(logits), logits)
    (critic,) = torch.autograd.grad(gan_critic_loss(logits, torch.zeros(2, 1)), logits)
    torch.testing.assert_close(student, -critic)
    assert bool((student < 0).all())


# --- other ways to match -----------------------------------------------------------------------


def test_score_identity_is_the_papers_two_terms_and_reaches_both_denoisers() -> None:
    x, D_teacher, D_fake = (normal(i, 3, 1, 2, 2).requires_grad_() for i in range(3))
    loss = score_identity(x, D_teacher, D_fake, alpha=1.2)
    weight = (x - D_teacher).abs().mean(dim=(1, 2, 3), keepdim=True).detach()
    gap = D_teacher - D_fake
    wanted = ((1 - 1.2) * gap**2 + gap * (D_fake - x)) / weight
    torch.testing.assert_close(loss, wanted.mean())
    to_x, to_teacher, to_fake = torch.autograd.grad(loss, [x, D_teacher, D_fake])
    torch.testing.assert_close(to_x, -gap.detach() / weight / x.numel())
    assert bool(to_teacher.any()) and bool(to_fake.any())


def test_score_identity_of_equal_denoisers_is_zero() -> None:
    x, D_x = normal(0, 2, 1, 2, 2), normal(1, 2, 1, 2, 2)
    assert float(score_identity(x, D_x, D_x, 1.0)) == 0


@pytest.mark.parametrize(("kind", "wanted"), [("forward_kl", [0.5, 1.5]), ("js", [0.8, 1.2])])
def test_a_divergence_weighs_images_by_their_density_ratio(kind: str, wanted: list[float]) -> None:
    logits = torch.tensor([1.0, 3.0]).log()  # ratios 1 and 3: forward KL r, JS r / (1 + r)
    factor = divergence_factor(kind, logits, torch.tensor([0.31, 0.39]))
    assert factor.tolist() == pytest.approx(wanted)


def test_a_divergence_changes_no_level_as_a_whole_and_clips_ratios() -> None:
    place = torch.arange(1000) / 1000
    factor = divergence_factor("forward_kl", 100 * normal(0, 1000), place)
    assert factor.reshape(10, 100).mean(dim=1).tolist() == pytest.approx([1.0] * 10)
    assert float(factor.max() / factor.min()) <= 20 / 0.1 * 10
    ratios = divergence_factor("forward_kl", torch.tensor([-100.0, 100.0]), torch.zeros(2))
    assert float(ratios[1] / ratios[0]) == pytest.approx(200)


def test_unweighted_matching_moves_images_by_the_plain_difference() -> None:
    x, D_teacher, D_fake = (normal(i, 3, 1, 2, 2) for i in range(3))
    _, direction = distribution_matching(x, D_teacher, D_fake, weighted=False)
    torch.testing.assert_close(direction, D_fake - D_teacher)
    _, doubled = distribution_matching(x, D_teacher, D_fake, factor=2.0)
    _, once = distribution_matching(x, D_teacher, D_fake)
    torch.testing.assert_close(doubled, 2 * once)
