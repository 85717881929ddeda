"""The network: published shapes and names, and what labels and dropout do."""

import pytest
import torch
from torch import Tensor

from conftest import CLASSES, small_denoiser
from fewstep.networks.adm import ADM
from fewstep.networks.ddpmpp import DDPMpp
from fewstep.networks.denoiser import Denoiser
from fewstep.networks.layers import UNetBlock
from fewstep.networks.ncsnpp import NCSNpp
from fewstep.networks.protocol import Architecture
from fewstep.networks.unet import UNet


def inputs(n: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Images, c_noise and one-hot labels for the small network."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 1, 8, 8, generator=generator)
    return x, torch.linspace(-1, 1, n), torch.eye(CLASSES)[torch.arange(n) % CLASSES]


def small_adm(dropout: float = 0.0, label_dropout: float = 0.0) -> ADM:
    network = small_denoiser(0, dropout, label_dropout).model
    assert isinstance(network, ADM)
    return network


def test_imagenet_network_has_the_published_size_and_bottleneck() -> None:
    with torch.device("meta"):  # shapes without memory
        unet = ADM(Architecture(64, 3, 1000, 192, (1, 2, 3, 4), 3, (32, 16, 8)))
        x, sigma, labels = torch.empty(2, 3, 64, 64), torch.empty(2), torch.empty(2, 1000)
        bottleneck = Denoiser(unet, 0.5, "fp32").bottleneck(x, sigma, labels)
        image = Denoiser(unet, 0.5, "fp32")(x, sigma, labels)
    assert sum(p.numel() for p in unet.parameters()) / 1e6 == pytest.approx(295.9, abs=0.05)
    assert bottleneck.shape == (2, 768, 8, 8)
    assert (unet.bottleneck_channels, unet.bottleneck_resolution) == (768, 8)
    assert image.shape == x.shape
    assert len(unet.enc) == 16
    assert [name for name in unet.dec if name.startswith("8x8")] == [
        "8x8_in0",
        "8x8_in1",
        *(f"8x8_block{i}" for i in range(4)),
    ]


def test_imagenet_network_attends_where_published() -> None:
    with torch.device("meta"):
        unet = ADM(Architecture(64, 3, 10, 64, (1, 2, 3, 4), 1, (32, 16, 8)))
    stages = [*unet.enc.items(), *unet.dec.items()]
    heads = {name: block.heads for name, block in stages if getattr(block, "heads", 0)}
    assert heads == {
        "32x32_block0": 2,
        "16x16_block0": 3,
        "8x8_block0": 4,
        "8x8_in0": 4,
        "8x8_block1": 4,
        "16x16_block1": 3,
        "32x32_block1": 2,
    }


def test_state_dict_has_the_reference_names() -> None:
    names = set(ADM(Architecture(16, 3, 10, 32, (1, 2), 1, (8,))).state_dict())
    assert names >= {
        "map_layer0.weight",
        "map_label.weight",
        "enc.16x16_conv.weight",
        "enc.8x8_down.conv0.resample_filter",
        "enc.8x8_down.skip.resample_filter",
        "enc.8x8_block0.qkv.weight",
        "dec.8x8_in0.proj.bias",
        "dec.16x16_up.conv0.weight",
        "dec.16x16_block1.skip.bias",
        "out_norm.weight",
        "out_conv.bias",
    }
    assert not names & {"map_label.bias", "enc.8x8_down.skip.weight", "map_augment.weight"}


@pytest.mark.parametrize("kind", [ADM, DDPMpp, NCSNpp])
def test_output_has_the_shape_of_the_input(kind: type[UNet]) -> None:
    unet = kind(Architecture(16, 2, 5, 32, (1, 2), 1, (8,)))
    x = torch.randn(3, 2, 16, 16)
    assert unet(x, torch.zeros(3), torch.eye(5)[:3]).shape == x.shape


def test_untrained_adm_answers_zero() -> None:
    unet = ADM(Architecture(8, 1, CLASSES, 32, (1,), 1, ()))
    assert not bool(unet(*inputs()).any())


def test_answers_do_not_depend_on_the_rest_of_the_batch() -> None:
    unet = small_adm().eval()
    x, c_noise, labels = inputs()
    alone = torch.cat([unet(x[i : i + 1], c_noise[i : i + 1], labels[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(unet(x, c_noise, labels), alone, rtol=1e-5, atol=1e-5)


def test_every_parameter_gets_a_gradient() -> None:
    unet = small_adm()
    unet(*inputs()).square().sum().backward()
    silent = [n for n, p in unet.named_parameters() if p.grad is None or not p.grad.any()]
    assert not silent


def test_label_and_noise_level_change_the_answer() -> None:
    unet = small_adm().eval()
    x, c_noise, labels = inputs()
    answer = unet(x, c_noise, labels)
    for other in (unet(x, c_noise, labels.roll(1, 1)), unet(x, c_noise + 1, labels)):
        assert bool(((answer - other).flatten(1).abs().amax(dim=1) > 1e-3).all())


def test_label_dropout_zeroes_whole_rows_at_its_rate_in_train_mode_only() -> None:
    unet = small_adm(label_dropout=0.3)
    seen: list[Tensor] = []
    assert unet.map_label is not None
    unet.map_label.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    labels = torch.eye(CLASSES)[torch.arange(3000) % CLASSES]
    unet.train().embed(torch.zeros(3000), labels)
    unet.eval().embed(torch.zeros(3000), labels)
    dropped = seen[0].sum(dim=1) == 0
    assert float(dropped.float().mean()) == pytest.approx(0.3, abs=0.04)
    assert bool((seen[0][~dropped] == labels[~dropped]).all())
    assert bool((seen[1] == labels).all())


def test_dropout_acts_in_train_mode_only() -> None:
    unet = small_adm(dropout=0.5)
    first, second = unet(*inputs()), unet(*inputs())
    assert not torch.equal(first, second)
    unet.eval()
    torch.testing.assert_close(unet(*inputs()), unet(*inputs()), rtol=0, atol=0)


def test_narrow_network_attends_with_one_head() -> None:
    block = ADM(Architecture(8, 1, CLASSES, 32, (1,), 1, ())).dec["8x8_in0"]
    assert isinstance(block, UNetBlock)
    assert block.heads == 1


def test_attention_lets_every_pixel_see_every_other() -> None:
    unet = small_adm().eval()
    block = unet.dec["8x8_in0"]
    assert isinstance(block, UNetBlock)
    x = torch.randn(1, block.n_out, 8, 8, requires_grad=True)
    block.attend(x)[0, :, 0, 0].sum().backward()
    assert x.grad is not None
    assert bool((x.grad.abs().sum(dim=1) > 0).all())


def test_dropout_acts_at_the_named_resolutions_only() -> None:
    unet = ADM(Architecture(16, 1, CLASSES, 32, (1, 2), 1, (), 0.5, dropout_resolutions=(8,)))
    stages = [*unet.enc.items(), *unet.dec.items()]
    rates = [(name, stage.dropout) for name, stage in stages if isinstance(stage, UNetBlock)]
    assert len(rates) == 10
    for name, rate in rates:
        assert rate == (0.5 if name.startswith("8x8") else 0.0), name


@pytest.mark.parametrize("kind", [ADM, DDPMpp, NCSNpp])
def test_blocks_carry_what_their_names_say(kind: type[UNet]) -> None:
    """Names are EDM's and stay; nothing reads them back."""
    unet = kind(Architecture(16, 1, CLASSES, 32, (1, 2, 2), 2, (8,)))
    stages = [*unet.enc.items(), *((f"dec {name}", stage) for name, stage in unet.dec.items())]
    named = [(name, stage) for name, stage in stages if isinstance(stage, UNetBlock)]
    assert [stage for _, stage in named] == list(unet.blocks())
    assert len(named) == 6 + 2 + 9 + 2 + 2
    for name, block in named:
        assert block.resolution == int(name.removeprefix("dec ").split("x")[0])
        assert block.takes_skip == (name.startswith("dec ") and "_block" in name)


@pytest.mark.parametrize("kind", [ADM, DDPMpp, NCSNpp])
def test_a_bottleneck_is_as_wide_and_fine_as_the_network_says(kind: type[UNet]) -> None:
    for mult, blocks in (((1, 2, 3), 1), ((2,), 2), ((1, 1), 1)):
        unet = kind(Architecture(16, 1, CLASSES, 32, mult, blocks, ()))
        x, c_noise = torch.randn(2, 1, 16, 16), torch.zeros(2)
        expected = (2, unet.bottleneck_channels, *[unet.bottleneck_resolution] * 2)
        assert unet.encode(x, c_noise, torch.eye(CLASSES)[:2]).shape == expected
