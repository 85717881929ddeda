"""Multistep consistency: published targets, edges, and what a loss may and may not move."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import CLASSES, EDM, Gaussian, exact_flow, small_denoiser
from fewstep.data.batch import Batch
from fewstep.methods.consistency import (
    Consistency,
    Edges,
    Grid,
    Settings,
    consistency_loss,
    reference_point,
    teacher_hop,
)
from fewstep.networks.denoiser import Denoiser
from fewstep.params import Student, load_params
from fewstep.theory.solve import inverse_ddim
from places import CONFIG

SETTINGS = Settings(
    steps=8,
    teacher_edges=(64, 1280),
    anneal_kimg=104_800,
    edges="edm",
    terminal_anchor=True,
    terminal_teacher_hop=True,
    sync_dropout=True,
    distance="pseudo_huber",
    weight="sqrt_karras",
)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]

# Spec, 4.3: Gaussian data, teacher = student = D(x; sigma), T = 64, x_t = sigma_t + 0.3.
# k: segment, sigma_t, sigma_s, sigma_b, x_s, x_ref, target
GOLDEN = {
    0: (0, 80, 73.4201089818, 34.9921890047, 73.6957049667, 35.1253274793, 0.00340876965868),
    9: (
        0,
        35.4749168338,
        34.9921890047,
        34.9921890047,
        35.2882040938,
        35.2882040938,
        0.0071550942073,
    ),
    10: (
        1,
        32.2123786645,
        29.2104786395,
        13.6985746829,
        29.4832925306,
        13.8310997927,
        0.00860852873376,
    ),
    40: (
        4,
        0.743379133665,
        0.628139217718,
        0.267475361379,
        0.935361963254,
        0.60660448336,
        0.361121122573,
    ),
    46: (
        5,
        0.253099073753,
        0.207869554109,
        0.0351866509908,
        0.534474361782,
        0.469042588066,
        0.455469859224,
    ),
    55: (
        6,
        0.033913303631,
        0.0260549988896,
        0.002,
        0.333599920898,
        0.332765846822,
        0.332693935946,
    ),
    63: (6, 0.00291660123553, 0.002, 0.002, 0.302913871095, 0.302913871095, 0.302907913999),
    64: (7, 0.002, 0, 0, 0.301995168077, 0.301995168077, 0.301995168077),
}


def method(student: Denoiser, teacher: Denoiser, **changes: Any) -> Consistency:  # noqa: ANN401
    return Consistency(student, teacher, replace(SETTINGS, **changes), EDM)


def grid(edges: int = 64, kind: str = "edm") -> Grid:
    return Grid.build(EDM.nodes(8), edges, kind, True, 7.0)


def every_edge(edges: int = 64) -> Edges:
    g = grid(edges)
    return g.edges(torch.arange(len(g.teacher) - 1))


def images(n: int, std: float = 0.5, size: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Gaussian images, one-hot labels and standard normal noise."""
    generator = torch.Generator().manual_seed(0)
    y, noise = (torch.randn(n, 1, size, size, generator=generator) for _ in range(2))
    return std * y, torch.eye(CLASSES)[torch.arange(n) % CLASSES], noise


# --- published numbers -------------------------------------------------------------------------


@torch.no_grad()
def test_targets_are_the_published_ones() -> None:
    edges = grid().edges(torch.tensor(list(GOLDEN)))
    sigma_t, labels = edges.sigma_t.reshape(-1, 1, 1, 1), torch.zeros(8, CLASSES)
    x_t, denoise = sigma_t + 0.3, Gaussian()
    x_s = teacher_hop(denoise, x_t, edges, labels)
    x_ref, sigma_ref = reference_point(x_s, denoise(x_s, edges.sigma_s), None, edges)
    target = inverse_ddim(x_t, x_ref, sigma_t, sigma_ref.reshape(-1, 1, 1, 1))
    got = [edges.segment, edges.sigma_t, edges.sigma_s, edges.sigma_b, x_s, x_ref, target]
    for i, values in enumerate(got):
        golden = [row[i] for row in GOLDEN.values()]
        assert values.flatten().tolist() == pytest.approx(golden, rel=1e-9)


@torch.no_grad()
def test_method_makes_the_published_targets() -> None:
    edges = grid().edges(torch.tensor(list(GOLDEN)))
    x_t, labels = edges.sigma_t.reshape(-1, 1, 1, 1) + 0.3, torch.zeros(8, CLASSES)
    consistency = method(Gaussian(), Gaussian())
    x_s = teacher_hop(consistency.teacher, x_t, edges, labels)
    target = consistency.target(x_t, x_s, x_t, labels, edges, torch.get_rng_state())
    assert target.dtype == torch.float32
    assert target.flatten().tolist() == pytest.approx([g[-1] for g in GOLDEN.values()], rel=1e-6)


def test_edge_types_are_the_published_ones() -> None:
    edges = every_edge()
    assert edges.snap.nonzero().flatten().tolist() == [9, 18, 27, 36, 45, 54, 63]
    assert edges.terminal.nonzero().flatten().tolist() == [64]


@pytest.mark.parametrize(
    ("edges", "general", "snap", "terminal"),
    [(64, 0.875, 0.109, 0.0154), (1280, 0.9938, 0.0054, 0.0008)],
)
def test_mix_of_edge_types_is_the_published_one(
    edges: int, general: float, snap: float, terminal: float
) -> None:
    drawn, p = every_edge(edges), grid(edges).probability
    mix = [p[~(drawn.snap | drawn.terminal)], p[drawn.snap], p[drawn.terminal]]
    golden = [general, snap, terminal]
    assert [float(part.sum()) for part in mix] == pytest.approx(golden, abs=5e-4)


@pytest.mark.parametrize(
    ("edges", "golden"),
    [
        (64, [73.5, 32.5, 18.8, 12.0, 7.9, 5.1, 3.2]),
        (286, [65.5, 95.2, 243.9, 34.3, 41.0, 61.1, 12.1]),
        (1280, [292, 425, 1092, 152, 182, 272, 52]),
        (1276, [1453]),
    ],
)
def test_snap_gains_are_the_published_ones(edges: int, golden: list[float]) -> None:
    drawn = every_edge(edges)
    gains = 1 / (1 - drawn.sigma_b / drawn.sigma_t)[drawn.snap]
    assert gains[: len(golden)].tolist() == pytest.approx(golden, abs=0.5, rel=1e-3)


def test_worst_gain_of_the_schedule_is_at_35_016() -> None:
    drawn = every_edge(1276)
    first = int(drawn.snap.nonzero()[0])
    assert float(drawn.sigma_t[first]) == pytest.approx(35.01629, abs=1e-5)


def test_gains_of_the_first_edges_are_the_published_ones() -> None:
    drawn, bounds = every_edge(), grid().bounds
    gains = 1 / (1 - drawn.sigma_b / drawn.sigma_t)[bounds[:, 0]]
    assert gains[[0, 6]].tolist() == pytest.approx([1.78, 1.06], abs=5e-3)


# --- edges -------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [2, 4, 8])
@pytest.mark.parametrize("edges", [2, 9, 16, 71, 286])
def test_every_edge_goes_down_inside_its_segment(steps: int, edges: int) -> None:
    student = EDM.nodes(steps)
    g = Grid.build(student, edges, "uniform", True, 7.0)
    drawn = g.edges(torch.arange(len(g.teacher) - 1))
    assert bool((drawn.sigma_t > drawn.sigma_s).all())
    assert bool((drawn.sigma_s >= drawn.sigma_b).all())
    assert bool((drawn.sigma_t <= student[drawn.segment]).all())
    assert torch.equal(drawn.sigma_b, student[drawn.segment + 1])
    assert not bool((drawn.snap & drawn.terminal).any())
    assert int(drawn.terminal.sum()) == 1
    assert bool((drawn.sigma_s[drawn.snap] == drawn.sigma_b[drawn.snap]).all())
    assert torch.equal(drawn.sigma_s == 0, drawn.terminal)


@pytest.mark.parametrize("kind", ["uniform", "vp", "edm"])
def test_draws_follow_the_probabilities(kind: str) -> None:
    g, n = grid(64, kind), 200_000
    drawn = g.draw(n, torch.Generator().manual_seed(0))
    k = torch.searchsorted(-g.teacher[:-1].contiguous(), -drawn.sigma_t)
    assert torch.equal(g.teacher[k], drawn.sigma_t)
    p = g.probability.double() / g.probability.double().sum()
    counts = k.bincount(minlength=len(p))
    often = p * n > 5
    z = (counts - n * p)[often] / (n * p * (1 - p)).sqrt()[often]
    assert float(z.abs().max()) < 4
    assert float(z.square().mean()) == pytest.approx(1, abs=0.6)
    assert int(counts[~often].sum()) <= 30


def test_draws_follow_from_the_generator() -> None:
    first, again = (grid().draw(64, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first.sigma_t, again.sigma_t)


def test_grid_follows_the_clock_and_is_built_once() -> None:
    consistency = method(Gaussian(), Gaussian())
    assert len(consistency.grid(0).teacher) == 66
    assert len(consistency.grid(52_400).teacher) == 287
    assert consistency.grid(0) is consistency.grid(1)
    assert sorted(consistency.grids) == [64, 286]


@pytest.fixture(scope="module")
def released() -> Student:
    """The training whose checkpoint was published."""
    return load_params(CONFIG / "imagenet64-cd-seed.yaml").students["cd-8"]


def test_segments_of_the_released_training_saw_the_known_number_of_images(
    released: Student,
) -> None:
    settings = released.settings
    assert isinstance(settings, Settings)
    seen = Consistency(Gaussian(), Gaussian(), settings, EDM).images_by_segment(157_698.048)
    known = [5_594, 109_766, 1.67e6, 15.97e6, 66.98e6, 66.69e6, 5.80e6, 0.56e6]
    assert seen == pytest.approx(known, rel=0.02)
    assert sum(seen) == pytest.approx(157_698_048)


def test_a_share_of_uniform_edges_reaches_every_segment(released: Student) -> None:
    settings, kimg = released.settings, released.kimg
    assert isinstance(settings, Settings)
    usual = Consistency(Gaussian(), Gaussian(), settings, EDM)
    (key, text), *_ = usual.warnings(kimg)
    assert key == "uniform_share" and text.startswith("segment 1 of 8 (1 has most noise) will see")
    mixed = replace(settings, uniform_share=0.2)
    mended = Consistency(Gaussian(), Gaussian(), mixed, EDM)
    assert min(mended.images_by_segment(kimg)) >= 0.2 / 8 * kimg * 1000
    assert list(mended.warnings(kimg)) == []


# --- the teacher's hop -------------------------------------------------------------------------


@torch.no_grad()
def test_hop_error_falls_with_the_third_power_of_the_step() -> None:
    """Heun's local order: halving the edges' length divides the error of a hop by 8."""

    def worst(n: int) -> float:
        edges = every_edge(n)
        sigma_t, sigma_s = (s.reshape(-1, 1, 1, 1) for s in (edges.sigma_t, edges.sigma_s))
        x_t = sigma_t + 0.3
        x_s = teacher_hop(Gaussian(), x_t, edges, torch.zeros(len(x_t), CLASSES))
        error = (x_s / exact_flow(x_t, sigma_t, sigma_s) - 1).abs()
        return float(error[~edges.terminal].max())

    assert worst(128) / worst(256) == pytest.approx(8, rel=0.15)


@torch.no_grad()
def test_terminal_target_is_the_image_or_the_teachers_answer() -> None:
    y, labels, noise = images(3)
    edges = grid().edges(torch.full((3,), 64))
    x_t = y.double() + 0.002 * noise.double()
    for hop, expected in ((False, y), (True, Gaussian(0.7)(x_t, edges.sigma_t).float())):
        consistency = method(Gaussian(), Gaussian(0.7), terminal_teacher_hop=hop)
        x_s = teacher_hop(consistency.teacher, x_t, edges, labels)
        target = consistency.target(x_t, x_s, y, labels, edges, torch.get_rng_state())
        torch.testing.assert_close(target, expected)


def test_teacher_answers_in_eval_mode_and_stays_frozen() -> None:
    teacher = small_denoiser(1, dropout=0.5, label_dropout=0.5)
    before = [p.clone() for p in teacher.parameters()]
    y, labels, noise = images(4)
    edges = grid().edges(torch.tensor([0, 9, 40, 64]))
    method(small_denoiser(2), teacher).edge_loss(y, labels, edges, noise)[0].sum().backward()
    assert not teacher.training
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(map(torch.equal, before, teacher.parameters()))


# --- what a student gains from it --------------------------------------------------------------


class ExactStudent(Gaussian):
    """Jumps to the lower boundary of its segment where the exact ODE would go."""

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        nodes = EDM.nodes(8)
        sigma = sigma.double()
        below = (nodes[None, 1:] < sigma[:, None] - 1e-12).long().argmax(dim=1) + 1
        sigma, sigma_b = (s.reshape(-1, 1, 1, 1) for s in (sigma, nodes[below]))
        return inverse_ddim(x, exact_flow(x, sigma, sigma_b), sigma, sigma_b)


class Constant(Gaussian):
    """Always answers with the same image, which agrees with itself at every sigma."""

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        return torch.full_like(x, 0.1)


@torch.no_grad()
def losses(student: Denoiser, edges: int) -> tuple[Tensor, Tensor]:
    """Loss of every edge, one image each, and which edges are general."""
    drawn = every_edge(edges)
    y, labels, noise = images(len(drawn.segment))
    loss, _ = method(student, Gaussian()).edge_loss(y, labels, drawn, noise)
    return loss, ~(drawn.snap | drawn.terminal)


def test_exact_student_is_the_fixed_point_in_the_limit_of_a_fine_grid() -> None:
    def general(student: Denoiser, edges: int) -> float:
        loss, mask = losses(student, edges)
        return float(loss[mask].mean())

    fine = general(ExactStudent(), 512)
    assert fine < general(ExactStudent(), 128) / 50
    assert fine < general(Gaussian(), 512) / 1000  # the teacher as its own student


@pytest.mark.parametrize("student", [Constant(), Gaussian(0.1), Gaussian(2.0)])
def test_collapse_does_not_pay(student: Denoiser) -> None:
    """Every target holds a hop of the teacher, so that agreeing with oneself is not enough."""
    wrong, _ = losses(student, 128)
    exact, _ = losses(ExactStudent(), 128)
    assert bool((wrong > 0).all())
    assert float(wrong.mean()) > 10 * float(exact.mean())


def test_gradient_comes_from_the_trained_answer_alone() -> None:
    """The target holds the live student too, but as a constant."""
    student, edges = Gaussian(0.6), grid().edges(torch.tensor([0, 9, 40, 64]))
    y, labels, noise = images(4)
    consistency = method(student, Gaussian())
    consistency.edge_loss(y, labels, edges, noise)[0].sum().backward()
    sigma_t = edges.sigma_t.reshape(-1, 1, 1, 1)
    x_t = y.double() + sigma_t * noise.double()
    with torch.no_grad():
        x_s = teacher_hop(consistency.teacher, x_t, edges, labels)
        target = consistency.target(x_t, x_s, y, labels, edges, torch.get_rng_state())
    D_t = student(x_t, edges.sigma_t)
    loss = consistency_loss(D_t, target, edges.sigma_t, "pseudo_huber", "sqrt_karras", 0.5)
    assert student.gain.grad is not None
    torch.testing.assert_close(student.gain.grad, torch.autograd.grad(loss.sum(), student.gain)[0])


# --- synchronised dropout ----------------------------------------------------------------------


def recorded(student: Denoiser) -> list[tuple[Tensor, Tensor]]:
    """A list that each call of the student extends by its answer and the random state after it."""
    calls: list[tuple[Tensor, Tensor]] = []

    def remember(module: torch.nn.Module, args: tuple[Tensor, ...], answer: Tensor) -> None:
        on_gpu = answer.device.type == "cuda"
        state = torch.cuda.get_rng_state() if on_gpu else torch.get_rng_state()
        calls.append((answer.detach(), state))

    student.register_forward_hook(remember)
    return calls


@pytest.mark.parametrize("device", DEVICES)
def test_sync_dropout_replays_the_masks_of_the_trained_forward(device: str) -> None:
    """Rows that are not general ask the student the same question twice."""
    student = small_denoiser(1, dropout=0.5).to(device)
    calls = recorded(student)
    y, labels, noise = (t.to(device) for t in images(6))
    edges = grid().edges(torch.tensor([0, 9, 40, 46, 63, 64])).to(torch.device(device))
    method(student, small_denoiser(2).to(device)).edge_loss(y, labels, edges, noise)
    (trained, after), (replayed, _) = calls
    same = edges.snap | edges.terminal
    torch.testing.assert_close(replayed[same], trained[same], rtol=1e-6, atol=1e-6)
    now = torch.cuda.get_rng_state() if device == "cuda" else torch.get_rng_state()
    assert torch.equal(now, after)  # the stream goes on where the trained forward left it


def test_dropout_that_is_not_synchronised_is_off_in_the_target() -> None:
    student = small_denoiser(1, dropout=0.5)
    calls = recorded(student)
    y, labels, noise = images(2)
    edges = grid().edges(torch.tensor([9, 64]))
    method(student, small_denoiser(2), sync_dropout=False).edge_loss(y, labels, edges, noise)
    assert student.training
    (trained, _), (answer, _) = calls
    x_t = y.double() + edges.sigma_t.reshape(-1, 1, 1, 1) * noise.double()
    quiet = student.eval()(x_t, edges.sigma_t, labels)
    torch.testing.assert_close(answer, quiet, rtol=0, atol=0)
    assert not torch.allclose(trained, quiet)


# --- losses ------------------------------------------------------------------------------------


def test_loss_sums_over_the_elements_of_an_image() -> None:
    D_t, target = torch.ones(2, 1, 4, 4), torch.zeros(2, 1, 4, 4)
    sigma_t = torch.tensor([0.5, 0.5], dtype=torch.float64)
    elementwise = consistency_loss(D_t, target, sigma_t, "l2", "edm", 0.5)
    assert elementwise.tolist() == pytest.approx([8 * 16.0] * 2)
    norm = consistency_loss(D_t, target, sigma_t, "l2_root", "edm", 0.5)
    assert norm.tolist() == pytest.approx([8 * 4.0] * 2)


def test_loss_of_a_batch_is_the_mean_and_logs_split_it() -> None:
    y, labels, _ = images(256, size=1)
    consistency = method(Gaussian(0.3), Gaussian(), edges="uniform")
    loss, logs = consistency.loss("student", Batch(y, labels, 0, 0, seed=0))
    total, count = logs["loss"]
    assert float(total / count) == pytest.approx(float(loss.detach())) and count == 256
    parts = {
        "edge": [logs[f"edge/loss_{kind}"] for kind in ("general", "snap", "terminal")],
        "sigma": [logged for name, logged in logs.items() if name.startswith("sigma/")],
        "segment": list(zip(*logs["segment/loss"], strict=True)),
    }
    for name, split in parts.items():
        assert float(sum(part for part, _ in split)) == pytest.approx(float(total)), name
        assert sum(n for _, n in split) == 256 and all(n > 0 for _, n in split), name
    kinds = ("general", "snap", "terminal")
    assert sum(int(logs[f"edge/share_{kind}"][0]) for kind in kinds) == 256
    shares = [logs[f"edge/gradient_share_{kind}"] for kind in kinds]
    assert float(sum(pull / all_pulls for pull, all_pulls in shares)) == pytest.approx(1)


def test_gains_are_the_published_ones() -> None:
    edges, error = every_edge(), torch.ones(65)
    logs = method(Gaussian(), Gaussian()).diagnostics(error, error, edges)
    total, count = logs["edge/gain_snap"]
    assert float(total / count) == pytest.approx(
        sum((73.5, 32.5, 18.8, 12.0, 7.9, 5.1, 3.2)) / 7, rel=2e-3
    )
    assert tuple(map(float, logs["edge/gain_terminal"])) == (1, 1)


def test_loss_follows_from_seed_and_position() -> None:
    y, labels, _ = images(8)
    consistency = method(Gaussian(0.3), Gaussian())

    def loss(nimg: int, seed: int = 0) -> float:
        return float(consistency.loss("student", Batch(y, labels, nimg, 0, seed))[0].detach())

    assert loss(64) == loss(64)
    assert len({loss(64), loss(128), loss(64, seed=1)}) == 3


@pytest.mark.parametrize("device", DEVICES)
def test_every_device_trains_on_the_same_edges(device: str) -> None:
    """Edges are drawn on the CPU; `loss` moves them."""
    drawn: list[Tensor] = []

    class Watching(Gaussian):
        def forward(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
            drawn.append(sigma.cpu())
            return super().forward(x, sigma)

    y, labels, _ = (t.to(device) for t in images(8))
    consistency = method(Watching().to(device), Gaussian().to(device))
    consistency.loss("student", Batch(y, labels, 0, 0, seed=0))
    expected = consistency.grid(0).draw(8, Batch(y, labels, 0, 0, seed=0).cpu_generator)
    assert torch.equal(drawn[0], expected.sigma_t)
