"""NCSN++'s network: the papers' equations, its filter, its frequencies, its image pyramid."""

from copy import deepcopy

import pytest
import torch
from torch import Tensor

import ncsnpp_plain as plain
from experiment import architecture_of
from fewstep.networks.compute import tune
from fewstep.networks.denoiser import Denoiser
from fewstep.networks.layers import Conv2d, Init, UNetBlock, filter_of
from fewstep.networks.ncsnpp import NCSNpp, NoiseFourier, PyramidConv
from fewstep.networks.protocol import Architecture
from fewstep.params import Performance

SMALL = architecture_of(plain)
BOTH = torch.channels_last, torch.contiguous_format


def network(**performance: object) -> NCSNpp:
    """The small network with the weights of the plain equations."""
    unet = NCSNpp(SMALL).eval()
    unet.load_state_dict(plain.weights())
    tune(Denoiser(unet, 0.5, "fp32"), Performance(**performance))  # pyright: ignore
    return unet


# --- the whole -----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize("attention", ["fused", "plain"])
def test_images_and_bottleneck_are_those_of_the_plain_equations(
    layout: str, attention: str
) -> None:
    unet, (x, c_noise, labels) = network(layout=layout, attention=attention), plain.inputs()
    F_x, bottleneck = plain.run(x, c_noise, labels, plain.weights())
    assert 0.3 < float(F_x.std()) < 3
    with torch.no_grad():
        found = unet(x, c_noise, labels), unet.encode(x, c_noise, labels)
    torch.testing.assert_close(found[0].double(), F_x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[1].double(), bottleneck, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.03), (torch.float16, 0.004)])
def test_half_precision_rounds_as_it_must(dtype: torch.dtype, tolerance: float) -> None:
    unet, (x, c_noise, labels) = network(), plain.inputs()
    expected, _ = plain.run(x, c_noise, labels, plain.weights())
    with torch.no_grad():
        found = unet(x.to(dtype), c_noise, labels)
    assert found.dtype == dtype
    assert float((found.double() - expected).norm() / expected.norm()) < tolerance


def test_weights_have_the_names_and_shapes_of_published_checkpoints() -> None:
    state = NCSNpp(SMALL).state_dict()
    assert {name: tuple(w.shape) for name, w in state.items()} == plain.shapes()
    augmented = NCSNpp(SMALL, augment_dim=9).state_dict()
    assert augmented.keys() - state.keys() == {"map_augment.weight"}
    assert augmented["map_augment.weight"].shape == (2 * plain.WIDTH, 9)


def test_the_network_of_cifar10_has_the_published_size_and_bottleneck() -> None:
    with torch.device("meta"):
        unet = NCSNpp(Architecture(32, 3, 10, 128, (2, 2, 2), 4, (16,)), augment_dim=9)
    assert sum(p.numel() for p in unet.parameters()) / 1e6 == pytest.approx(56.4, abs=0.05)
    assert (unet.bottleneck_channels, unet.bottleneck_resolution) == (256, 8)


def test_every_parameter_gets_a_gradient_and_the_frequencies_get_none() -> None:
    unet, (x, c_noise, labels) = network().train(), plain.inputs()
    unet(x, c_noise, labels).square().mean().backward()
    silent = [n for n, p in unet.named_parameters() if p.grad is None or not p.grad.any()]
    assert not silent
    assert "map_noise.freqs" not in dict(unet.named_parameters())


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_what_the_pyramid_adds_leaves_the_layout(layout: str) -> None:
    """With one channel the images lie in both layouts at once."""
    unet, seen = network(layout=layout), list[Tensor]()
    for block in (part for part in unet.modules() if isinstance(part, UNetBlock)):
        block.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    unet(*plain.inputs())
    last = [x.is_contiguous(memory_format=torch.channels_last) for x in seen]
    assert last == [layout == "channels_last"] * 21


# --- the filter ----------------------------------------------------------------------------------


def resampling(**way: bool) -> Conv2d:
    return Conv2d(2, 2, 0, Init("kaiming_normal"), taps=(1, 3, 3, 1), **way)


@pytest.mark.parametrize("format", BOTH)
def test_a_constant_stays_constant_inside(format: torch.memory_format) -> None:
    x = torch.ones(1, 2, 8, 8).contiguous(memory_format=format)
    up, down = resampling(up=True)(x), resampling(down=True)(x)
    assert (up.shape, down.shape) == ((1, 2, 16, 16), (1, 2, 4, 4))
    torch.testing.assert_close(up[:, :, 1:-1, 1:-1], torch.ones(1, 2, 14, 14))
    torch.testing.assert_close(down[:, :, 1:-1, 1:-1], torch.ones(1, 2, 2, 2))
    # beyond the edges there are zeros: one of the four taps sees them, or two near a pixel's edge
    assert float(up[0, 0, 0, 5]) == pytest.approx(3 / 4)
    assert float(down[0, 0, 0, 1]) == pytest.approx(7 / 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_single_pixel_becomes_the_filter(dtype: torch.dtype) -> None:
    x = torch.zeros(1, 2, 8, 8, dtype=dtype)
    x[0, 0, 3, 4] = 1.0
    y = resampling(up=True)(x)
    row = torch.tensor([1.0, 3.0, 3.0, 1.0])
    assert y.dtype == dtype and not y[0, 1].any()
    assert torch.equal(y[0, 0, 5:9, 7:11].float(), row.outer(row) / 16)
    assert float(y.sum()) == 4.0, "four pixels for one, of the same mean"


def test_going_down_is_the_transpose_of_going_up() -> None:
    x, y = torch.randn(1, 2, 8, 8), torch.randn(1, 2, 16, 16)
    up, down = resampling(up=True), resampling(down=True)
    assert float((up(x) * y).sum()) == pytest.approx(4 * float((x * down(y)).sum()), rel=1e-4)


def test_the_filter_of_two_taps_is_the_box_of_the_other_networks() -> None:
    assert torch.equal(filter_of((1, 1)), torch.full((1, 1, 2, 2), 0.25))
    x = torch.randn(1, 2, 8, 8)
    box = Conv2d(2, 2, 0, Init("kaiming_normal"), down=True)
    torch.testing.assert_close(box(x)[0, 0, 1, 2], x[0, 0, 2:4, 4:6].mean())


@pytest.mark.parametrize("channels", [1, 3])
def test_the_pyramid_convolves_then_filters_in_any_order(channels: int) -> None:
    part = PyramidConv(channels, 5, NCSNpp.style).double()
    with torch.no_grad():
        assert part.bias is not None
        part.bias.copy_(torch.randn(5))
    x = torch.randn(2, channels, 8, 8, dtype=torch.float64)
    expected = plain.pyramid(x, {f"a.{k}": w for k, w in part.state_dict().items()}, "a")
    torch.testing.assert_close(part(x), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", ["up", "down"])
def test_gradients_in_half_precision_are_near_those_in_float32(
    way: str, dtype: torch.dtype
) -> None:
    layer, found = resampling(**{way: True}), list[Tensor]()
    x = torch.randn(2, 2, 8, 8)
    for kind in (dtype, torch.float32):
        given = x.to(kind).requires_grad_()
        layer(given).square().sum().backward()
        assert given.grad is not None and given.grad.dtype == kind
        found.append(given.grad.float())
    assert float((found[0] - found[1]).norm() / found[1].norm()) < 0.01


# --- the frequencies -----------------------------------------------------------------------------


def test_frequencies_are_drawn_with_a_standard_deviation_of_16() -> None:
    torch.manual_seed(0)
    freqs = NoiseFourier(20_000).freqs
    assert freqs.shape == (10_000,)
    assert float(freqs.std()) == pytest.approx(16, rel=0.03) and abs(float(freqs.mean())) < 0.5


def test_features_are_cosines_and_sines_in_float32() -> None:
    features = NoiseFourier(4)
    features.freqs.copy_(torch.tensor([0.25, 1.0]))
    c = torch.tensor([1.0, 0.5], dtype=torch.bfloat16)
    half = 0.5**0.5
    expected = torch.tensor([[0.0, 1.0, 1.0, 0.0], [half, -1.0, half, 0.0]])
    torch.testing.assert_close(features(c), expected, rtol=0, atol=1e-6)


def test_frequencies_go_where_the_weights_go() -> None:
    torch.manual_seed(0)
    first, other = NCSNpp(SMALL), NCSNpp(SMALL)
    expected, own = (unet.state_dict()["map_noise.freqs"].clone() for unet in (first, other))
    assert not torch.equal(own, expected)
    copy = deepcopy(first)
    other.load_state_dict(first.state_dict())
    for unet in (copy, other):
        assert torch.equal(unet.state_dict()["map_noise.freqs"], expected)
