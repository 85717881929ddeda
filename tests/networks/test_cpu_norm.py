"""GroupNorm, scale, shift and SiLU as one function, against PyTorch's four in float64."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.networks.cpu_norm import norm_silu, suits
from fewstep.networks.layers import GroupNorm
from places import ROOT

SRC = ROOT / "src"
EPS = 1e-5
# batch, channels, groups, height; the second is ADM-64's finest level, the last its narrowest here
SHAPES = [(3, 32, 8, 16), (1, 192, 32, 64), (5, 12, 3, 7), (2, 4, 1, 1)]


def inputs(
    shape: tuple[int, int, int, int] = SHAPES[0],
    dtype: torch.dtype = torch.float32,
    mean: float = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images, the norm's weight and bias, scale and shift together."""
    generator = torch.Generator().manual_seed(0)
    n, channels, _, size = shape
    x = mean + torch.randn(n, channels, size, size, generator=generator)
    x = x.to(dtype).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(2, channels, generator=generator)
    return x, weight, bias, torch.randn(n, 2 * channels, generator=generator)


def plain(
    x: Tensor, weight: Tensor, bias: Tensor, modulation: Tensor | None, groups: int, silu: bool
) -> Tensor:
    y = F.group_norm(x, groups, weight.to(x.dtype), bias.to(x.dtype), EPS)
    if modulation is not None:
        scale, shift = modulation[:, :, None, None].to(x.dtype).chunk(2, dim=1)
        y = y * (1 + scale) + shift
    return F.silu(y) if silu else y


def fused(
    x: Tensor, weight: Tensor, bias: Tensor, modulation: Tensor | None, groups: int, silu: bool
) -> Tensor:
    return norm_silu(x, weight, bias, groups, EPS, modulation, silu)


def outcome(function, given: list[Tensor | None], groups: int, silu: bool) -> list[Tensor]:  # noqa: ANN001
    """The answer, and the gradients of x, weight, bias and modulation."""
    given = [None if t is None else t.detach().requires_grad_() for t in given]
    y = function(*given, groups, silu)
    weights = torch.linspace(-1, 1, y.numel()).bfloat16().to(y).reshape(y.shape)  # not as y lies
    return [y, *torch.autograd.grad(y, [t for t in given if t is not None], weights)]


def errors(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    pairs = zip(found, exact, strict=True)
    return [float(((a.double() - b).norm() / (b.norm() + 1e-3)).detach()) for a, b in pairs]


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("modulated", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_as_exact_as_float32_allows(
    shape: tuple[int, int, int, int], modulated: bool, silu: bool
) -> None:
    *given, modulation = inputs(shape)
    given = [*given, modulation if modulated else None]
    exact = outcome(plain, [None if t is None else t.double() for t in given], shape[2], silu)
    assert max(errors(outcome(fused, given, shape[2], silu), exact)) <= 1e-6


def test_in_bfloat16_only_the_answers_are_rounded() -> None:
    given = list[Tensor | None](inputs(dtype=torch.bfloat16))
    exact = outcome(plain, [t.double() for t in given if t is not None], 8, True)
    found = outcome(fused, given, 8, True)
    assert [t.dtype for t in found] == [torch.bfloat16] * 2 + [torch.float32] * 3
    assert torch.equal(
        found[0], outcome(fused, [t.float() for t in given if t is not None], 8, True)[0].bfloat16()
    )
    assert max(errors(found, exact)[:2]) < 2**-8
    assert max(errors(found, exact)[2:]) < 1e-6
    assert max(errors(found, exact)) < max(errors(outcome(plain, given, 8, True), exact))


def test_images_far_from_zero_are_normalised_as_by_pytorch() -> None:
    given = inputs((2, 32, 8, 64), mean=30)
    exact = outcome(plain, [t.double() for t in given], 8, True)
    theirs = errors(outcome(plain, list(given), 8, True), exact)
    ours = errors(outcome(fused, list(given), 8, True), exact)
    assert all(a <= 2 * b for a, b in zip(ours, theirs, strict=True)), (ours, theirs)


def test_values_beyond_the_range_of_exp_come_through() -> None:
    x = torch.full((1, 4, 1, 2), 1.0).contiguous(memory_format=torch.channels_last)
    x[..., 1] = -1
    shifts = torch.tensor([[0.0] * 4 + [-1e4, -200.0, 200.0, 1e30]])
    y = norm_silu(x, torch.ones(4), torch.zeros(4), 1, EPS, shifts, True)
    assert y[0, :2].abs().max() < 1e-30
    torch.testing.assert_close(y[0, 2:, 0, 0], torch.tensor([201.0, 1e30]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_stays_so_and_in_its_image(value: float, dtype: torch.dtype) -> None:
    given = inputs(dtype=dtype)
    given[0][1, 0, 3, 3] = value
    y, dx, dweight, *_ = outcome(fused, list(given), 8, True)
    clean = outcome(fused, list(inputs(dtype=dtype)), 8, True)
    assert y[1, :4].isnan().all() and dx[1, :4].isnan().all() and dweight[:4].isnan().all()
    for a, b in zip((y, dx), clean, strict=False):
        assert torch.equal(a[[0, 2]], b[[0, 2]])
        assert torch.equal(a[1, 4:], b[1, 4:])


def test_neither_batch_nor_threads_change_a_bit() -> None:
    given, threads = list[Tensor | None](inputs()), torch.get_num_threads()
    together = outcome(fused, given, 8, True)
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            again = outcome(fused, given, 8, True)
            assert all(map(torch.equal, again, together))
    finally:
        torch.set_num_threads(threads)
    x, weight, bias, modulation = inputs()
    alone = norm_silu(x[1:2], weight, bias, 8, EPS, modulation[1:2], True)
    assert torch.equal(alone[0], together[0][1])


def test_pytorch_keeps_the_threads_that_it_was_given() -> None:
    count = "import torch; from fewstep.networks import cpu_norm; print(torch.get_num_threads())"
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SRC)}
    done = subprocess.run(
        [sys.executable, "-c", count], env=environ, capture_output=True, text=True, check=True
    )
    assert done.stdout == "1\n"


def test_only_what_the_kernels_know_goes_to_them() -> None:
    x = inputs()[0]
    assert suits(x) and suits(x.bfloat16())
    assert not any(map(suits, (x.contiguous(), x.half(), x.double(), x.to("meta"))))
    norm = GroupNorm(32, EPS)
    for other in (x.contiguous(), x.half(), x.to("meta")):
        y = norm.to(other.device)(other, silu=True)
        assert (y.dtype, y.shape) == (other.dtype, other.shape)


def test_less_is_kept_for_the_backward_pass() -> None:
    x, _, _, modulation = (t.requires_grad_() for t in inputs())
    norm, kept = GroupNorm(32, EPS), dict[bool, int]()
    for norm.fused in (True, False):
        storages = dict[int, int]()

        def pack(t: Tensor, storages: dict[int, int] = storages) -> Tensor:
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            norm(x, modulation, silu=True)
        kept[norm.fused] = sum(storages.values())
    assert kept[True] < 1.2 * x.nbytes < 2.5 * x.nbytes < kept[False]


def test_its_gradient_is_not_taken_for_a_constant() -> None:
    x, weight, bias, modulation = inputs()
    y = norm_silu(x.requires_grad_(), weight, bias, 8, EPS, modulation, True)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        dx.sum().backward()


# --- without numba -----------------------------------------------------------------------------

WITHOUT = """
import sys
if HIDDEN:
    sys.modules["numba"] = None
import torch
import torch.nn.functional as F
from fewstep.networks.compute import accelerate, tune
from fewstep.networks.layers import GroupNorm
from fewstep.networks.registry import build_denoiser
from fewstep.params import Performance, load_params

norm, x = GroupNorm(32, 1e-5), torch.randn(2, 32, 4, 4).to(memory_format=torch.channels_last)
assert torch.equal(norm(x, silu=True), F.silu(F.group_norm(x, 8, norm.weight, norm.bias, 1e-5)))
denoiser = build_denoiser(load_params(PARAMS))
images, labels = torch.zeros(2, 1, 16, 16), torch.eye(10)[:2]
assert bool(denoiser(images, torch.ones(2), labels).isfinite().all())
print("quiet so far", file=sys.stderr)
for how in (Performance(norm="plain"), Performance(layout="contiguous"), *[Performance()] * 2):
    accelerate(tune(denoiser, how), how)
"""


@pytest.mark.parametrize("hidden", [True, False])
def test_without_numba_norms_are_pytorchs_and_one_line_says_so(hidden: bool) -> None:
    """Missing, or with its compiler switched off, which ended in a TypeError."""
    tiny = str(SRC.parent / "config" / "tiny.yaml")
    code = WITHOUT.replace("HIDDEN", str(hidden)).replace("PARAMS", repr(tiny))
    environ = {**os.environ, "PYTHONPATH": str(SRC)}
    environ |= {} if hidden else {"NUMBA_DISABLE_JIT": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env=environ, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    quiet, said = done.stderr.splitlines()
    assert quiet == "quiet so far"
    assert "performance.norm: fused" in said and "pip install 'fewstep[cpu]'" in said


def test_a_gpu_and_plain_norms_load_no_numba() -> None:
    code = "import sys; from fewstep.networks import weights; print('numba' in sys.modules)"
    environ = {**os.environ, "PYTHONPATH": str(SRC)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"
