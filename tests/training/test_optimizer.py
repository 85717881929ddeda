"""Steps equal PyTorch's; a gradient that is not finite leaves no trace but a count."""

import math
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from experiment import tiny_params
from fewstep.distributed import Rank
from fewstep.params import Student
from fewstep.training.checkpoint import flatten_optimizer
from fewstep.training.optimizer import QUIET_STEPS, NonFinite, Updates, learning_rate_factor

CPU = torch.device("cpu")
ALONE = Rank(0, 1, CPU)
RATE, DECAY, BETAS = 0.01, 0.1, (0.8, 0.95)
KINDS = {
    "adam": lambda p: torch.optim.Adam(p, RATE, BETAS, weight_decay=DECAY),
    "adamw": lambda p: torch.optim.AdamW(p, RATE, BETAS, weight_decay=DECAY),
    "radam": lambda p: torch.optim.RAdam(p, RATE, BETAS, weight_decay=DECAY),
}
HOSTILE = [float("nan"), float("inf"), -float("inf")]


@pytest.fixture
def block(tmp_path: Path) -> Student:
    """Constant rate, no warm-up, no clipping."""
    cd = tiny_params(tmp_path).students["cd"]
    plain = replace(cd, betas=BETAS, weight_decay=DECAY, grad_clip=0.0, lr_warmup_kimg=0.0)
    return replace(plain, lr_schedule="constant")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.SiLU(), nn.Linear(5, 2))


def gradients(count: int) -> list[list[Tensor]]:
    """Gradients of `network`, some of them zero, one list a step."""
    torch.manual_seed(1)
    steps = [[torch.randn_like(p) for p in network().parameters()] for _ in range(count)]
    steps[1][0].zero_()
    return steps


def updates(block: Student, precision: str = "fp32") -> Updates:
    return Updates(network(), block, RATE, precision, ALONE)


def apply(u: Updates, grads: list[Tensor], nimg: int = 0) -> float:
    for parameter, grad in zip(u.parameters, grads, strict=True):
        parameter.grad = grad.clone()
    return float(u.step(nimg))


def snapshot(u: Updates) -> dict[str, Tensor]:
    """Weights, moments and step counts."""
    weights = {f"weight{i}": p.detach() for i, p in enumerate(u.parameters)}
    return deepcopy({**weights, **flatten_optimizer(u.optimizer)})


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


# --- steps -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_steps_equal_torchs(kind: str, block: Student) -> None:
    u, theirs = updates(replace(block, optimizer=kind)), network()
    optimizer = KINDS[kind](theirs.parameters())
    for grads in gradients(12):  # RAdam rectifies from the sixth on
        norm = apply(u, grads)
        for parameter, grad in zip(theirs.parameters(), grads, strict=True):
            parameter.grad = grad.clone()
        optimizer.step()
        assert norm == pytest.approx(float(torch.cat([g.flatten() for g in grads]).norm()))
        for mine, other in zip(u.parameters, theirs.parameters(), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-7)
    assert all(p.grad is None for p in u.parameters)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", HOSTILE)
def test_a_gradient_that_is_not_finite_changes_nothing(
    kind: str, value: float, block: Student
) -> None:
    u, undisturbed = (updates(replace(block, optimizer=kind)) for _ in range(2))
    steps = gradients(9)
    for grads in steps[:4]:
        apply(u, grads)
        apply(undisturbed, grads)
    before = snapshot(u)
    bad = [g.clone() for g in steps[4]]
    bad[2][1, 3] = value
    for _ in range(2):
        assert not math.isfinite(apply(u, bad))
        assert all(p.grad is None for p in u.parameters)
        assert_equal(snapshot(u), before)
    for grads in steps[4:]:
        assert apply(u, grads) == apply(undisturbed, grads)
    assert_equal(snapshot(u), snapshot(undisturbed))


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_gradient_may_be_the_one_that_is_not_finite(kind: str, block: Student) -> None:
    u, undisturbed = (updates(replace(block, optimizer=kind)) for _ in range(2))
    apply(u, [torch.full_like(p, math.nan) for p in u.parameters])
    for grads in gradients(3):
        apply(u, grads)
        apply(undisturbed, grads)
    assert_equal(snapshot(u), snapshot(undisturbed))


def test_gradients_are_clipped_to_their_norm_before_the_step(block: Student) -> None:
    clipped, scaled = updates(replace(block, grad_clip=0.5)), updates(block)
    for grads in gradients(3):
        norm = apply(clipped, grads)
        assert norm > 0.5, "the norm is told as it was"
        apply(scaled, [g * (0.5 / (norm + 1e-6)) for g in grads])
        for mine, other in zip(clipped.parameters, scaled.parameters, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_a_mended_gradient_makes_the_step_of_the_finite_one(kind: str, block: Student) -> None:
    """NaN is 0 and infinity the bound, before clipping; the norm is told as it came."""
    mending = replace(block, optimizer=kind, nonfinite_to=1e5, grad_clip=0.5)
    u, theirs = updates(mending), updates(replace(block, optimizer=kind, grad_clip=0.5))
    for grads in gradients(8):
        bad, good = [g.clone() for g in grads], [g.clone() for g in grads]
        for element, value, mended in zip(range(3), HOSTILE, (0.0, 1e5, -1e5), strict=True):
            bad[2][1, element], good[2][1, element] = value, mended
        assert math.isnan(apply(u, bad))
        apply(theirs, good)
        assert_equal(snapshot(u), snapshot(theirs))
    assert all(bool(p.isfinite().all()) for p in u.parameters)


def test_gradients_that_are_finite_need_no_mending(block: Student) -> None:
    mending, plain = updates(replace(block, nonfinite_to=1e-3)), updates(block)
    for grads in gradients(4):
        assert apply(mending, grads) == apply(plain, grads)
    assert_equal(snapshot(mending), snapshot(plain))


def test_steps_use_the_rate_of_their_time(block: Student) -> None:
    warming = replace(block, lr_warmup_kimg=1.0, kimg=10.0, optimizer="adam", weight_decay=0.0)
    grads = gradients(2)[0]
    for nimg, rate in ((0, 0.0), (250, RATE / 4), (1000, RATE)):
        u = updates(warming)
        before = snapshot(u)
        apply(u, grads, nimg)
        moved = [
            (p.detach() - before[f"weight{i}"]).abs().max() for i, p in enumerate(u.parameters)
        ]
        assert float(max(moved)) == pytest.approx(rate, rel=1e-3), "Adam's first step is the rate"


# --- fp16 --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_scaled_loss_gives_the_step_of_the_loss(kind: str, block: Student) -> None:
    x, nets, norms = torch.randn(4, 3), [network(), network()], []
    for net, precision in zip(nets, ("fp32", "fp16"), strict=True):
        u = Updates(net, replace(block, optimizer=kind), RATE, precision, ALONE)
        assert u.scaler.get_scale() == (2.0**16 if precision == "fp16" else 1)
        u.backward(net(x).square().mean())
        norms.append(float(u.step(0)))
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)
    for mine, other in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_the_scale_halves_on_overflow_and_the_step_is_left_out(kind: str, block: Student) -> None:
    u = updates(replace(block, optimizer=kind), "fp16")
    weight = u.parameters[0]
    u.backward(weight.sum())
    u.step(0)
    before, scale = snapshot(u), u.scaler.get_scale()
    u.backward(weight.sum() * 1e36)  # finite itself, infinite times the scale
    assert not math.isfinite(float(u.step(0)))
    assert_equal(snapshot(u), before)
    assert u.scaler.get_scale() == scale / 2
    u.backward(weight.sum())
    assert math.isfinite(float(u.step(0)))
    assert not torch.equal(u.parameters[0], before["weight0"])


def test_the_scale_grows_again_and_is_part_of_the_state(block: Student) -> None:
    u, other = updates(block, "fp16"), updates(block, "fp16")
    u.scaler.set_growth_interval(3)
    for _ in range(3):
        u.backward(u.parameters[0].sum())
        u.step(0)
    assert u.scaler.get_scale() == 2.0**17
    other.scaler.load_state_dict(u.scaler.state_dict())
    assert other.scaler.get_scale() == 2.0**17


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_a_fixed_scale_stays_whatever_comes(scale: float, block: Student) -> None:
    u = updates(replace(block, loss_scale=scale), "fp16")
    u.scaler.set_growth_interval(1)
    weight = u.parameters[0]
    for factor in (1.0, 1e38, math.nan, 1.0):
        assert u.scaler.get_scale() == scale
        u.backward(weight.sum() * factor)
        assert weight.grad is not None and float(weight.grad[0, 0]) == pytest.approx(
            float(torch.tensor(scale * factor)), nan_ok=True
        )
        assert math.isfinite(float(u.step(0))) == (factor == 1)  # the norm squares 1e38
    assert u.scaler.get_scale() == scale


def test_a_fixed_scale_of_1_in_fp16_is_no_scale_at_all(block: Student) -> None:
    x, nets = torch.randn(4, 3), [network(), network()]
    for net, precision in zip(nets, ("fp32", "fp16"), strict=True):
        u = Updates(net, replace(block, loss_scale=1.0), RATE, precision, ALONE)
        for _ in range(3):
            u.backward(net(x).square().mean())
            u.step(0)
    for mine, other in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(mine, other)


def test_what_overflows_at_a_fixed_scale_is_mended(block: Student) -> None:
    """The reference of consistency distillation: fp16, scale 1, infinity to 1e5."""
    u = updates(replace(block, loss_scale=1.0, nonfinite_to=1e5, optimizer="adam"), "fp16")
    weight = u.parameters[0]
    before = weight.detach().clone()
    u.backward(weight.sum() * math.inf)
    assert float(u.step(0)) == math.inf
    torch.testing.assert_close(weight, before - RATE, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_only_fp16_scales_its_loss(precision: str, block: Student) -> None:
    u = updates(block, precision)
    u.backward(u.parameters[0].sum())
    assert u.parameters[0].grad is not None
    assert torch.equal(u.parameters[0].grad, torch.ones_like(u.parameters[0]))


# --- counting what was left out ----------------------------------------------------------------


def note(counter: NonFinite, phase: str, nimg: int, norm: float, loss: float = 0.25) -> None:
    counter.note(phase, nimg, torch.tensor(norm), torch.tensor(loss))


def test_what_is_not_finite_is_told_with_its_phase_nimg_norm_and_loss() -> None:
    counter = NonFinite(20, ALONE)
    note(counter, "student", 64, math.inf, 0.25)
    note(counter, "critic", 64, 1.0)
    note(counter, "critic", 96, math.nan, math.nan)
    assert list(counter.check()) == [
        {"nimg": 64, "nonfinite": "student", "norm": "inf", "loss": "0.25"},
        {"nimg": 96, "nonfinite": "critic", "norm": "nan", "loss": "nan"},
    ]
    assert counter.total == 2
    assert list(counter.check()) == [], "each is told once"


def test_a_row_of_failures_stops_the_run_naming_loss_and_nimg() -> None:
    counter, told = NonFinite(3, ALONE), []
    for nimg in (32, 64):
        note(counter, "critic", nimg, math.nan, 0.5)
        told += counter.check()
    note(counter, "critic", 96, -math.inf, math.nan)
    match = r"the critic gradient is -inf at nimg 96, its loss nan: 3 in a row.*\.lr, \.max_nonfini"
    with pytest.raises(FloatingPointError, match=match):
        for event in counter.check():
            told.append(event)
    assert [event["nimg"] for event in told] == [32, 64, 96], "the last one is in the log too"


def test_failures_before_the_last_are_told_when_many_steps_are_looked_at_once() -> None:
    counter, told = NonFinite(2, ALONE), []
    for nimg in (0, 32, 64, 96):
        note(counter, "student", nimg, 1.0 if nimg == 32 else math.nan)
    with pytest.raises(FloatingPointError, match="at nimg 96"):
        for event in counter.check():
            told.append(event)
    assert [event["nimg"] for event in told] == [0, 64, 96]


def test_phases_are_counted_apart_and_a_finite_step_begins_anew() -> None:
    counter = NonFinite(2, ALONE)
    for nimg in range(0, 320, 32):
        note(counter, "student", nimg, math.nan if nimg % 64 else 1.0)
        note(counter, "critic", nimg, 1.0 if nimg % 64 else math.nan)
        assert len(list(counter.check())) == 1
    assert counter.total == 10
    assert counter.in_a_row == {"student": 1, "critic": 0}


def test_a_gpu_is_not_waited_for_at_every_step() -> None:
    gpu = NonFinite(20, Rank(0, 1, torch.device("cuda")))
    for nimg in range(QUIET_STEPS - 1):
        note(gpu, "student", nimg, 1.0)
        assert not gpu.due()
    note(gpu, "student", QUIET_STEPS, 1.0)
    assert gpu.due()
    assert NonFinite(20, ALONE).due(), "a CPU has computed it anyway"


# --- schedules ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "middle", "late", "end"),
    [
        ("constant", 1.0, 1.0, 1.0),
        ("linear", 0.5, 0.25, 0.0),
        ("cosine", 0.5, (1 - math.sqrt(0.5)) / 2, 0.0),
        ("inverse_sqrt", math.sqrt(1 / 2), math.sqrt(3 / 8), math.sqrt(3 / 10)),
    ],
)
def test_learning_rate_warms_up_and_then_follows_its_schedule(
    schedule: str, middle: float, late: float, end: float, tmp_path: Path
) -> None:
    overrides = {
        "students__cd__kimg": 10.0,
        "students__cd__lr_warmup_kimg": 2.0,
        "students__cd__lr_schedule": schedule,
        **({"students__cd__lr_ref_kimg": 3.0} if schedule == "inverse_sqrt" else {}),
    }
    block = tiny_params(tmp_path, **overrides).students["cd"]
    assert [learning_rate_factor(block, nimg) for nimg in (0, 500, 1000)] == [0, 0.25, 0.5]
    assert learning_rate_factor(block, 2000) == 1
    assert learning_rate_factor(block, 6000) == pytest.approx(middle)
    assert learning_rate_factor(block, 8000) == pytest.approx(late)
    assert learning_rate_factor(block, 10_000) == pytest.approx(end)


def test_a_fall_that_begins_in_the_warm_up_is_multiplied_with_it(block: Student) -> None:
    early = replace(block, kimg=10.0, lr_warmup_kimg=4.0, lr_schedule="inverse_sqrt")
    early = replace(early, lr_ref_kimg=1.0)
    assert learning_rate_factor(early, 2000) == pytest.approx(0.5 / math.sqrt(2))
    assert learning_rate_factor(early, 4000) == pytest.approx(0.5)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "inverse_sqrt"])
def test_a_run_that_is_all_warm_up_or_has_none_is_defined_everywhere(
    schedule: str, block: Student
) -> None:
    cases = ((10.0, 10.0), (10.0, 20.0), (10.0, 0.0))
    for kimg, warmup in cases:
        b = replace(block, kimg=kimg, lr_warmup_kimg=warmup, lr_schedule=schedule)
        factors = [learning_rate_factor(b, nimg) for nimg in range(0, 10_001, 500)]
        assert all(0 <= factor <= 1 for factor in factors)
        assert (factors[0] == 1) == (warmup == 0)


# --- few kernels --------------------------------------------------------------------------------


def errors(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, float]:
    """Relative, in the norm of each tensor."""
    assert a.keys() == b.keys()
    return {k: float((a[k] - b[k]).norm() / b[k].norm()) for k in b}


def trained(cd: Student, kind: str, how: str, steps: int = 5) -> dict[str, Tensor]:
    block = replace(cd, optimizer=kind, weight_decay=0.01, grad_clip=0.5)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    u = Updates(net, block, 1e-2, "fp32", ALONE, how)
    for step in range(steps):
        u.backward(net(torch.randn(16, 4)).square().mean())
        u.step(1000 * (step + 1))
    return {k: v.clone() for k, v in net.state_dict().items()}


@pytest.mark.parametrize("kind", ["adamw", "adam", "radam"])
@pytest.mark.parametrize("how", ["fused", "foreach"])
def test_updates_are_those_of_the_loop(how: str, kind: str, tmp_path: Path) -> None:
    cd = tiny_params(tmp_path).students["cd"]
    found = errors(trained(cd, kind, how), trained(cd, kind, "loop"))
    assert max(found.values()) <= 1e-5, found
    moved = errors(trained(cd, kind, "loop", 0), trained(cd, kind, "loop"))
    assert min(moved.values()) > 1e-3
