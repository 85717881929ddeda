"""What the methods say they cost is what they compute."""

from dataclasses import replace
from itertools import count
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from experiment import set_up
from fewstep.data.batch import Batch
from fewstep.method import Method, Objective, build_method, student_block
from fewstep.methods import dmd2
from fewstep.networks import names
from fewstep.networks.denoiser import Denoiser, one_hot
from fewstep.networks.edm2 import EDM2Block
from fewstep.networks.layers import Conv2d, Linear, UNetBlock
from fewstep.networks.magnitude import MPConv
from fewstep.networks.ncsnpp import PyramidConv
from fewstep.networks.registry import build_denoiser
from fewstep.params import Params, Performance
from fewstep.planning.flops import forward_flops, matmul_rate

CPU = torch.device("cpu")
IMAGES = 2


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Params:
    plain = Performance(attention="plain")  # PyTorch counts no fused attention on a CPU
    return replace(set_up(tmp_path, monkeypatch, images=8), performance=plain)


def counted(call: Any, *inputs: Any) -> int:  # noqa: ANN401
    """FLOPs of a call, as PyTorch's counter sees them."""
    with FlopCounterMode(display=False) as counter:
        call(*inputs)
    return counter.get_total_flops()


def batch(params: Params, nimg: int, others: int = 0) -> Batch:
    d = params.data
    images = torch.rand(IMAGES, d.channels, d.resolution, d.resolution) * 2 - 1
    labels = one_hot(torch.arange(IMAGES), d.classes)
    return Batch(images, labels, nimg, nimg, params.seed, [(images, labels)] * others)


def batches(params: Params, steps: int) -> list[Batch]:
    """One batch for each number of steps that backward simulation may make."""
    found: dict[int, Batch] = {}
    for nimg in count(0, IMAGES):
        drawn = torch.randint(steps, (1,), generator=batch(params, nimg).shared_generator)
        found.setdefault(int(drawn), batch(params, nimg))
        if len(found) == steps:
            return list(found.values())
    raise AssertionError


def iteration(method: Method, number: int, b: Batch) -> None:
    """Losses and gradients of one iteration of the loop."""
    made = method.prepare(b)
    for phase in method.phases(number, 0.0):
        for other, module in method.trained.items():
            module.requires_grad_(other == phase)
        loss, _ = Objective(method, phase)(b, made)
        loss.backward()


def flops_of_training(method: Method, params: Params, steps: int, ratio: int) -> float:
    """FLOPs of training on an image, averaged over an update cycle and all numbers of steps."""
    iterations = [(i, nimg) for i in range(ratio) for nimg in batches(params, steps)]
    others = method.other_images
    total = sum(counted(iteration, method, i, batch(params, b.nimg, others)) for i, b in iterations)
    return total / (len(iterations) * IMAGES)


# --- training ----------------------------------------------------------------------------------

CASES: list[tuple[str, dict[str, Any]]] = [
    ("teacher", {}),
    ("cd", {}),
    ("cd", {"sync_dropout": False}),
    ("dmd2-1", {}),
    ("dmd2-1", {"update_ratio": 5}),
    ("dmd2-4", {}),
    ("dmd2-4", {"backward_simulation": False}),
    ("dmd2-4", {"gan_student_weight": 0.0}),
    ("dmd2-4", {"gan_student_weight": 0.0, "gan_critic_weight": 0.0}),
    ("dmd2-4", {"gan_levels": 0, "update_ratio": 1}),
    ("dmd2-4", {"gan_real_batch": 3}),
    ("dmd2-4", {"divergence": "js"}),
    ("dmd2-4", {"matching": "sid"}),
    ("mm-2", {}),
]


@pytest.mark.parametrize(("name", "changes"), CASES, ids=str)
def test_methods_cost_what_they_say(name: str, changes: dict[str, Any], toy: Params) -> None:
    """The first layer's input needs no gradient.

    The discriminator's own head is not told, nor that attention's products, of two inputs each,
    cost two products back to the input of a network, too.
    """
    params, tolerance = toy, 0.001
    steps = ratio = 1
    if name != "teacher":
        block = toy.students[name]
        s = replace(block.settings, **changes)
        block = replace(block, init_from="teacher", settings=s)
        params = replace(toy, students=MappingProxyType({name: block}))
        if isinstance(s, dmd2.Settings):
            steps, ratio = s.steps if s.backward_simulation else 1, s.update_ratio
            tolerance = 0.02 if s.gan_critic_weight else tolerance
        if name == "mm-2":
            ratio = 2  # the networks take turns
    method = build_method(student_block(name, params), params, CPU)
    forward, encoder = forward_flops(method.student, params)
    said = forward * method.forwards(encoder / forward)
    assert said == pytest.approx(flops_of_training(method, params, steps, ratio), rel=tolerance)


# --- one forward pass --------------------------------------------------------------------------


def filtered_pixels(layer: Conv2d, x: Tensor) -> int:
    """Places at which each tap is used: of going up, before; of the pyramid, at all pixels."""
    height = x.shape[2]
    if isinstance(layer, PyramidConv):
        return (height + 1) ** 2  # what the convolution of the filtered image reads
    return (height if layer.up else height // 2) ** 2


def by_hand(denoiser: Denoiser, params: Params) -> int:
    """2 FLOPs for each weight and place it is used at, and attention's two products."""
    total = 0

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        if isinstance(module, Conv2d):
            taps, channels = module.resample_filter, inputs[0].shape[1]
            if taps is not None and taps.shape[-1] > 2:  # the box filter has no products
                total += 2 * taps.numel() * channels * filtered_pixels(module, inputs[0])
            if module.weight is not None:
                total += 2 * module.weight.numel() * output.shape[2] * output.shape[3]
        elif isinstance(module, Linear):
            total += 2 * module.weight.numel()
        elif isinstance(module, MPConv):
            pixels = output.shape[2] * output.shape[3] if output.ndim == 4 else 1
            total += 2 * module.weight.numel() * pixels
        elif isinstance(module, EDM2Block) and module.heads:
            pixels = output.shape[2] * output.shape[3]
            weights = module.attn_qkv.weight.numel() * 4 // 3  # of attn_proj, too
            total += 4 * pixels**2 * output.shape[1] + 2 * pixels * weights
        elif isinstance(module, UNetBlock) and module.heads:
            pixels = output.shape[2] * output.shape[3]
            weights = module.qkv.cast(torch.float32)[0].numel() * 4 // 3  # of proj, too
            total += 4 * pixels**2 * output.shape[1] + 2 * pixels * weights

    handles = [m.register_forward_hook(hook) for m in denoiser.modules()]
    b = batch(params, 0)
    with torch.no_grad():
        denoiser(b.images[:1], torch.ones(1), b.labels[:1])
    for handle in handles:
        handle.remove()
    return total


@pytest.mark.parametrize("kind", names())
def test_a_forward_pass_is_its_products_counted_by_hand(kind: str, toy: Params) -> None:
    params = replace(toy, network=replace(toy.network, type=kind, attn_resolutions=(16, 8)))
    denoiser = build_denoiser(params)
    forward, encoder = forward_flops(denoiser, params)
    assert forward == by_hand(denoiser, params)
    assert 0 < encoder < forward / 2, "the decoder is the larger part"


def test_the_encoder_is_what_the_bottleneck_takes(toy: Params) -> None:
    b, denoiser = batch(toy, 0), build_denoiser(toy)
    inputs = (b.images, torch.ones(IMAGES), b.labels)
    both = (counted(denoiser, *inputs) / IMAGES, counted(denoiser.bottleneck, *inputs) / IMAGES)
    assert forward_flops(denoiser, toy) == both


def test_counting_computes_nothing_and_leaves_the_network(toy: Params) -> None:
    """A trillion multiply-adds are counted in no time, without weights and in any mode."""
    data, network = replace(toy.data, resolution=512), replace(toy.network, model_channels=512)
    large = replace(toy, data=data, network=replace(network, channel_mult=(1, 1)))
    with torch.device("meta"):
        denoiser = build_denoiser(large, dropout=0.5, label_dropout=0.5).train()
    assert forward_flops(denoiser, large)[0] > 1e13
    denoiser = build_denoiser(toy).train()
    before = {name: value.clone() for name, value in denoiser.state_dict().items()}
    forward_flops(denoiser, toy)
    assert denoiser.training and all(p.requires_grad for p in denoiser.parameters())
    after = denoiser.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_precision_does_not_change_the_count(toy: Params) -> None:
    counts = {
        forward_flops(build_denoiser(p), p)
        for p in (toy, replace(toy, precision="bf16"), replace(toy, precision="fp16"))
    }
    assert len(counts) == 1


def test_the_rate_of_a_device_is_its_time_for_a_product(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(t for start in range(6) for t in (start, start + (9.0 if start == 0 else 0.5)))
    monkeypatch.setattr("fewstep.planning.flops.time.perf_counter", lambda: next(ticks))
    monkeypatch.setattr("fewstep.planning.flops.torch.mm", lambda a, b: None)
    assert matmul_rate(CPU, "fp32") == 2 * 512**3 / 0.5, "the best, not the first"
