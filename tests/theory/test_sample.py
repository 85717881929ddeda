"""Samplers on Gaussian data: where they land, what they cost, and what a seed decides."""

import pytest
import torch
from torch import Tensor

from conftest import EDM, Gaussian, exact_flow
from fewstep.theory.guidance import guided
from fewstep.theory.sample import (
    SAMPLERS,
    SeededNoise,
    nfe,
    sample,
    sample_ancestral,
    sample_ddim,
    sample_edm,
    sample_renoise,
    to_uint8,
)
from fewstep.theory.solve import ConditionalDenoise

CHURN = {"S_churn": 40.0, "S_min": 0.05, "S_max": 50.0, "S_noise": 1.0}
SHAPE = (1, 4, 4)


@torch.no_grad()
def images(sampler: str, denoise: ConditionalDenoise, seeds: range, steps: int = 5) -> Tensor:
    """What `fewstep generate` does for these seeds."""
    noise = SeededNoise(seeds, SHAPE)
    latents, labels = noise(), torch.eye(3)[noise.labels(3)]
    churn = CHURN if sampler == "churn" else None
    return sample(sampler, denoise, noise, latents, labels, EDM.nodes(steps), churn)


def exact_jump(x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
    """The exact one-step student of N(0, 1/4): the ODE's solution at sigma = 0."""
    return exact_flow(x, sigma, 0 * sigma)


def many(n: int = 20_000) -> tuple[Tensor, Tensor]:
    latents = torch.randn(n, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    return latents, torch.zeros(n, 3)


# --- where they land ---------------------------------------------------------------------------


@torch.no_grad()
def test_heun_reproduces_the_exact_ode() -> None:
    latents, labels = many(64)
    sigmas = EDM.nodes(128)
    x = sample_edm(Gaussian(), latents, labels, sigmas)
    exact = exact_flow(80 * latents.double(), sigmas[0], sigmas[-1])
    torch.testing.assert_close(x, exact, rtol=2e-3, atol=0)


@torch.no_grad()
def test_ddim_is_euler_along_the_whole_grid() -> None:
    latents, labels = many(64)
    sigmas = EDM.nodes(8)
    euler = sample_edm(Gaussian(), latents, labels, sigmas, heun=False)
    torch.testing.assert_close(sample_ddim(Gaussian(), latents, labels, sigmas), euler)


@torch.no_grad()
@pytest.mark.parametrize("sampler", ["heun", "euler", "churn"])
def test_long_samplers_give_the_datas_std(sampler: str) -> None:
    assert float(images(sampler, Gaussian(), range(500), 128).std()) == pytest.approx(0.5, rel=0.05)


@torch.no_grad()
def test_few_euler_steps_collapse_towards_the_mean() -> None:
    """What distillation is for: one step gives D(x; sigma_max), the mean of all data."""
    assert float(images("euler", Gaussian(), range(8), 1).std()) < 0.01


@torch.no_grad()
@pytest.mark.parametrize("steps", [1, 2, 10])
def test_renoising_an_exact_student_keeps_the_datas_std(steps: int) -> None:
    latents, labels = many()
    generator = torch.Generator().manual_seed(1)

    def noise() -> Tensor:
        return torch.randn(latents.shape, generator=generator)

    x = sample_renoise(exact_jump, latents, labels, EDM.nodes(steps), noise)
    assert float(x.std()) == pytest.approx(0.5, rel=0.02)


@torch.no_grad()
def test_ancestral_steps_of_the_exact_posterior_keep_the_datas_std() -> None:
    """The student of moment matching draws a clean image given the noised one, not its mean."""
    latents, labels = many()
    generator = torch.Generator().manual_seed(1)

    def noise() -> Tensor:
        return torch.randn(latents.shape, generator=generator)

    def exact_draw(x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        shrink = 0.25 / (0.25 + sigma**2)
        return shrink * x + (0.25 * (1 - shrink)).sqrt() * noise()

    x = sample_ancestral(exact_draw, latents, labels, EDM.nodes(4), noise)
    assert float(x.std()) == pytest.approx(0.5, rel=0.02)


@torch.no_grad()
def test_long_ancestral_sampling_of_means_gives_the_datas_std() -> None:
    latents, labels = many(4000)
    noise = SeededNoise(range(4000), (1, 1, 1))
    x = sample_ancestral(Gaussian(), latents, labels, EDM.nodes(200), noise)
    assert float(x.std()) == pytest.approx(0.5, rel=0.05)


@torch.no_grad()
def test_churn_of_zero_is_heun() -> None:
    latents, labels = many(8)
    sigmas, noise = EDM.nodes(6), SeededNoise(range(8), (1, 1, 1))
    still = sample_edm(Gaussian(), latents, labels, sigmas, noise=noise, S_churn=0.0)
    heun = sample_edm(Gaussian(), latents, labels, sigmas)
    torch.testing.assert_close(still, heun, rtol=0, atol=0)


@torch.no_grad()
def test_churn_acts_between_its_bounds_only() -> None:
    latents, labels = many(8)
    sigmas = EDM.nodes(6)

    def churned(S_min: float, S_max: float) -> Tensor:
        noise = SeededNoise(range(8), (1, 1, 1))
        return sample_edm(
            Gaussian(), latents, labels, sigmas, True, noise, S_churn=3.0, S_min=S_min, S_max=S_max
        )

    heun = sample_edm(Gaussian(), latents, labels, sigmas)
    torch.testing.assert_close(churned(81.0, 90.0), heun, rtol=0, atol=0)
    assert not torch.allclose(churned(0.0, 90.0), heun)


def test_images_are_float64_until_they_are_rounded() -> None:
    assert all(images(sampler, Gaussian(), range(2)).dtype == torch.float64 for sampler in SAMPLERS)


def test_unknown_sampler_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"need a sampler of heun, euler, .*got 'plms'.*rows"):
        images("plms", Gaussian(), range(1))


# --- what they cost ----------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 1.5])
@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_nfe_is_the_number_of_network_calls_an_image(
    sampler: str, steps: int, scale: float
) -> None:
    network = Gaussian()
    images(sampler, guided(network, scale), range(3), steps)
    assert network.nfe == 3 * nfe(sampler, steps, scale)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers_draw_noise_only_where_they_say_so(sampler: str) -> None:
    noise = SeededNoise(range(2), SHAPE)
    latents, labels, drawn = noise(), torch.eye(3)[noise.labels(3)], list[int]()
    churn = CHURN if sampler == "churn" else None
    with torch.no_grad():
        sample(
            sampler,
            Gaussian(),
            lambda: drawn.append(0) or noise(),
            latents,
            labels,
            EDM.nodes(5),
            churn,
        )
    assert bool(drawn) is SAMPLERS[sampler].draws


def test_nfe_of_published_samplers() -> None:
    assert nfe("heun", 18) == 35
    assert nfe("churn", 256) == 511
    assert nfe("renoise", 10, 1.5) == 20


# --- what a seed decides -----------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_images_do_not_depend_on_the_batch_split(sampler: str) -> None:
    together = images(sampler, Gaussian(), range(7))
    splits = [range(0, 3), range(3, 4), range(4, 7)]
    apart = torch.cat([images(sampler, Gaussian(), seeds) for seeds in splits])
    torch.testing.assert_close(together, apart, rtol=0, atol=0)


def test_unlike_seeds_give_unlike_images() -> None:
    x = images("heun", Gaussian(), range(4)).flatten(1)
    assert float(torch.pdist(x).min()) > 0.1


def test_a_seed_gives_latents_then_its_label_then_fresh_noise() -> None:
    noise = SeededNoise([5, 6], SHAPE)
    latents, labels, fresh = noise(), noise.labels(1000), noise()
    generator = torch.Generator().manual_seed(6)
    assert torch.equal(latents[1], torch.randn(SHAPE, generator=generator))
    assert int(labels[1]) == int(torch.randint(1000, (1,), generator=generator))
    assert torch.equal(fresh[1], torch.randn(SHAPE, generator=generator))


def test_labels_from_seeds_cover_the_classes_evenly() -> None:
    labels = SeededNoise(range(3000), (1, 1, 1)).labels(3)
    assert labels.shape == (3000,)
    assert labels.dtype == torch.int64
    assert labels.bincount().tolist() == pytest.approx([1000] * 3, abs=130)


# --- uint8 -------------------------------------------------------------------------------------


def test_to_uint8_rounds_as_edm_does() -> None:
    grey = torch.tensor([-9.0, -1.0, -0.5, 0.0, 0.0038, 0.0041, 1.0, 9.0])
    assert to_uint8(grey).tolist() == [0, 0, 64, 128, 128, 128, 255, 255]
    levels = torch.arange(256)
    assert torch.equal(to_uint8(levels / 127.5 - 1), levels.to(torch.uint8))
