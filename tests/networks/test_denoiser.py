"""Preconditioning in closed form, precision, and guidance."""

import pytest
import torch
from torch import Tensor, nn

from conftest import CLASSES, Gaussian, small_denoiser
from fewstep.networks.adm import ADM
from fewstep.networks.denoiser import Denoiser, one_hot
from fewstep.networks.protocol import Architecture, Network
from fewstep.theory.guidance import guided


def inputs(n: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy images, sigmas and one-hot labels for the small network."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 1, 8, 8, generator=generator)
    sigma = torch.tensor([0.002, 0.5, 5.0, 80.0])[:n]
    return x * (sigma**2 + 0.25).sqrt().reshape(-1, 1, 1, 1), sigma, one_hot(torch.arange(n) % 3, 3)


def by_label(x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
    """A denoiser whose answer is its label's index, 1 to 3, and 0 without a label."""
    index = labels @ torch.arange(1.0, CLASSES + 1)
    return index.reshape(-1, 1, 1, 1) * torch.ones_like(x)


# --- preconditioning ---------------------------------------------------------------------------


class Recorder(Network):
    """Answers 1 and remembers what it was asked."""

    def __init__(self) -> None:
        nn.Module.__init__(self)

    def forward(self, x: Tensor, c_noise: Tensor, labels: Tensor) -> Tensor:
        self.x, self.c_noise = x, c_noise
        return torch.ones_like(x)


def test_preconditioning_is_edms() -> None:
    network = Recorder()
    x, sigma, labels = inputs()
    D_x = Denoiser(network, 0.5, "fp32")(x, sigma, labels)
    column = sigma.reshape(-1, 1, 1, 1)
    total = column**2 + 0.25
    torch.testing.assert_close(network.x, x / total.sqrt())
    torch.testing.assert_close(network.c_noise, sigma.log() / 4)
    torch.testing.assert_close(D_x, x * 0.25 / total + column * 0.5 / total.sqrt())


def test_untrained_denoiser_is_the_gaussian_one() -> None:
    """F = 0 leaves c_skip x, the exact denoiser of N(0, sigma_data^2)."""
    untrained = Denoiser(ADM(Architecture(8, 1, CLASSES, 32, (1,), 1, ())), 0.5, "fp32")
    x, sigma, labels = inputs()
    torch.testing.assert_close(untrained(x, sigma, labels), Gaussian()(x, sigma))


def test_denoiser_hardly_changes_clean_images() -> None:
    x, _, labels = inputs()
    D_x = small_denoiser(0)(x, torch.tensor(1e-6), labels)
    torch.testing.assert_close(D_x, x, rtol=0, atol=1e-4)


def test_sigma_may_be_one_for_all_or_one_an_image() -> None:
    denoiser, (x, _, labels) = small_denoiser(0).eval(), inputs()
    scalar = denoiser(x, torch.tensor(0.7), labels)
    for sigma in (torch.full((4,), 0.7), torch.full((4, 1, 1, 1), 0.7, dtype=torch.float64)):
        torch.testing.assert_close(denoiser(x, sigma, labels), scalar, rtol=0, atol=0)


def test_float64_is_rounded_on_entry() -> None:
    denoiser, (x, sigma, labels) = small_denoiser(0).eval(), inputs()
    D_x = denoiser(x.double(), sigma.double(), labels)
    assert D_x.dtype == torch.float32
    torch.testing.assert_close(D_x, denoiser(x, sigma, labels), rtol=0, atol=0)


def test_bf16_computes_inside_and_answers_float32_nearby() -> None:
    full, half = small_denoiser(0).eval(), small_denoiser(0, precision="bf16").eval()
    dtypes: list[torch.dtype] = []
    half.model.get_submodule("out_conv").register_forward_hook(
        lambda *args: dtypes.append(args[-1].dtype)
    )
    x, sigma, labels = inputs()
    D_x, reference = half(x, sigma, labels), full(x, sigma, labels)
    assert dtypes == [torch.bfloat16]
    assert D_x.dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in half.parameters())
    scale = 0.5 * sigma / (sigma**2 + 0.25).sqrt()
    error = (D_x - reference).flatten(1).abs().amax(dim=1) / scale
    assert 0 < float(error.detach().max()) < 0.1


def test_bottleneck_is_the_last_encoder_output_of_the_forward() -> None:
    denoiser, (x, sigma, labels) = small_denoiser(0).eval(), inputs()
    outputs: list[Tensor] = []
    stage = denoiser.model.get_submodule("enc.8x8_block0")
    stage.register_forward_hook(lambda *args: outputs.append(args[-1]))
    denoiser(x, sigma, labels)
    bottleneck = denoiser.bottleneck(x, sigma, labels)
    assert bottleneck.shape == (4, 32, 8, 8)
    torch.testing.assert_close(bottleneck, outputs[0], rtol=0, atol=0)


# --- guidance ----------------------------------------------------------------------------------


def test_guidance_of_scale_1_is_the_denoiser_itself() -> None:
    denoise = Gaussian()
    assert guided(denoise, 1) is denoise
    assert guided(denoise, 1.0) is denoise


def test_guidance_is_linear_in_its_scale() -> None:
    """From the unconditional answer at 0 through the conditional one at 1."""
    denoise, (x, sigma, labels) = small_denoiser(0).eval(), inputs()
    D_0, D_c = denoise(x, sigma, torch.zeros_like(labels)), denoise(x, sigma, labels)
    for scale in (-1.0, 0.0, 0.5, 1.5, 4.0):
        D_x = guided(denoise, scale)(x, sigma, labels)
        torch.testing.assert_close(D_x, D_0 + scale * (D_c - D_0), rtol=1e-4, atol=1e-4)


def test_guidance_extrapolates_each_images_own_label() -> None:
    x, sigma, labels = inputs()
    D_x = guided(by_label, 1.5)(x, sigma, labels)
    torch.testing.assert_close(D_x.mean(dim=(1, 2, 3)), 1.5 * torch.tensor([1.0, 2.0, 3.0, 1.0]))


@pytest.mark.parametrize("sigma", [torch.tensor(0.7), torch.full((4,), 0.7)])
def test_guidance_costs_two_calls_an_image(sigma: Tensor) -> None:
    denoise, (x, _, labels) = Gaussian(), inputs()
    guided(denoise, 1.5)(x, sigma, labels)
    assert denoise.nfe == 8


def test_one_hot_rows_mark_their_class() -> None:
    rows = one_hot(torch.tensor([2, 0]), CLASSES)
    assert rows.dtype == torch.float32
    assert rows.tolist() == [[0, 0, 1], [1, 0, 0]]
