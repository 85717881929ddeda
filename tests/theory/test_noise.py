"""Noise levels: the goldens of the specs, and what every grid must have."""

import pytest
import torch
from torch import Tensor

from conftest import EDM
from fewstep.theory.noise import (
    Schedule,
    annealed_teacher_edges,
    edge_probability,
    lognormal_sigmas,
    segments,
    teacher_sigmas,
)

STUDENT_8 = [
    80,
    34.9921890047,
    13.6985746829,
    4.63707496869,
    1.28661426958,
    0.267475361379,
    0.0351866509908,
    0.002,
    0,
]
DMD2_10 = [80, 42.4152, 21.1087, 9.72320, 4.06612, 1.50174, 0.469979, 0.116639, 0.0204353, 0.002]


def edge_probabilities(edges: int, kind: str, anchor: bool = True) -> tuple[Tensor, Tensor]:
    """Of a grid for 8 student steps: the probability of each edge, and of each segment."""
    student = EDM.nodes(8)
    teacher = teacher_sigmas(edges, student, 7.0)
    bounds = segments(teacher, student)
    p = edge_probability(teacher, bounds, kind, anchor, 7.0)
    return p, torch.stack([p[first : last + 1].sum() for first, last in bounds.tolist()])


# --- Karras schedules --------------------------------------------------------------------------


def test_student_grid_of_8_steps_is_the_published_one() -> None:
    sigmas = EDM.nodes(8)
    assert sigmas.dtype == torch.float64
    assert sigmas.tolist() == pytest.approx(STUDENT_8, rel=1e-11)


@pytest.mark.parametrize(
    ("steps", "expected"),
    [(10, DMD2_10), (4, [80, 9.7232, 0.469979, 0.002]), (2, [80, 0.002]), (1, [80])],
)
def test_dmd2_step_lists_are_the_published_ones(steps: int, expected: list[float]) -> None:
    assert EDM.sigmas(steps).tolist() == pytest.approx(expected, rel=1e-5)


def test_score_levels_are_the_published_ones() -> None:
    levels = EDM.sigmas(1000).flip(0)
    golden = {
        0: 0.002,
        20: 0.00323159,
        100: 0.0167514,
        250: 0.170312,
        500: 2.52651,
        750: 17.6173,
        900: 45.556,
        980: 72.0539,
        999: 80.0,
    }
    assert levels[list(golden)].tolist() == pytest.approx(list(golden.values()), rel=1e-5)
    shares = torch.bucketize(levels, torch.tensor([0.1, 1.0, 10.0]).double()).bincount() / 1000
    assert shares.tolist() == pytest.approx([0.212, 0.192, 0.266, 0.330], abs=5e-4)


@pytest.mark.parametrize("n", [2, 3, 17, 1000])
@pytest.mark.parametrize("rho", [1.0, 3.0, 7.0])
def test_karras_sigmas_descend_between_exact_ends_uniformly_in_their_root(
    n: int, rho: float
) -> None:
    sigmas = Schedule(0.01, 50.0, rho).sigmas(n)
    assert (float(sigmas[0]), float(sigmas[-1])) == (50.0, 0.01)
    gaps = (sigmas ** (1 / rho)).diff()
    assert bool((gaps < 0).all())
    torch.testing.assert_close(gaps, gaps.mean().expand_as(gaps), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("low", "high"), [(90.0, 80.0), (80.0, 80.0), (0.0, 80.0), (-1.0, 80.0)])
def test_a_schedule_refuses_ends_that_do_not_descend_to_above_zero(low: float, high: float) -> None:
    match = rf"need 0 < sigma_min < sigma_max, got {low} and {high} \(params.yaml: noise\)"
    with pytest.raises(ValueError, match=match):
        Schedule(low, high, 7.0)


@pytest.mark.parametrize("n", [0, -1])
def test_a_schedule_has_at_least_one_level(n: int) -> None:
    with pytest.raises(ValueError, match=rf"need at least 1 noise level, got {n}"):
        EDM.sigmas(n)
    with pytest.raises(ValueError, match=rf"need at least 1 noise level, got {n}"):
        EDM.nodes(n)


@pytest.mark.parametrize("steps", [1, 2, 8])
def test_nodes_are_the_sigmas_and_the_clean_image(steps: int) -> None:
    assert EDM.nodes(steps).tolist() == [*EDM.sigmas(steps).tolist(), 0.0]


# --- teacher grid ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kimg", "edges"),
    [(0, 64), (1000, 66), (10_000, 85), (26_200, 135), (52_400, 286), (104_800, 1280), (1e6, 1280)],
)
def test_teacher_edges_follow_the_published_schedule(kimg: float, edges: int) -> None:
    assert annealed_teacher_edges(kimg, 64, 1280, 104_800) == edges


def test_teacher_edges_are_final_without_annealing() -> None:
    assert annealed_teacher_edges(0, 64, 1280, 0) == 1280


def test_published_targets_get_one_extra_node_where_grids_coincide() -> None:
    """Of the targets 64 to 1280, 174 coincide with the student's grid, and lose its 6 nodes."""
    student = EDM.nodes(8)
    refined = []
    for edges in range(64, 1281):
        grid = teacher_sigmas(edges, student, 7.0)
        raw = edges + (edges % 7 == 1)
        kept = EDM.sigmas(raw)
        far = ((kept[:, None] - student[1:-1]).abs() > 1e-4 * student[1:-1]).all(dim=1)
        far[-1] = True
        torch.testing.assert_close(grid[:-1], kept[far], rtol=0, atol=0)
        if raw > edges:
            refined.append(edges)
    assert len(refined) == 174
    assert refined[:3] == [64, 71, 78]
    assert len(teacher_sigmas(64, student, 7.0)) == 66  # raw 65: 65 edges, not 64


@pytest.mark.parametrize("steps", [2, 3, 4, 8, 10])
@pytest.mark.parametrize("edges", [2, 5, 9, 16, 64, 73])
def test_teacher_grid_keeps_the_ends_and_skips_the_students_nodes(steps: int, edges: int) -> None:
    student = EDM.nodes(steps)
    teacher = teacher_sigmas(edges, student, 7.0)
    assert len(teacher) - 1 >= edges
    assert bool((teacher.diff() < 0).all())
    assert (teacher[0], teacher[-2], teacher[-1]) == (student[0], student[-2], 0)
    inner = (teacher[1:-2, None] - student[1:-1]).abs() / student[1:-1]
    assert inner.numel() == 0 or float(inner.min()) > 1e-5


def test_teacher_grid_is_a_copy_that_callers_may_change() -> None:
    student = EDM.nodes(8)
    teacher_sigmas(64, student, 7.0).zero_()
    assert float(teacher_sigmas(64, student, 7.0)[0]) == 80


# --- segments ----------------------------------------------------------------------------------


def test_segments_of_64_edges_are_the_published_ones() -> None:
    student = EDM.nodes(8)
    bounds = segments(teacher_sigmas(64, student, 7.0), student).tolist()
    starts = [0, 10, 19, 28, 37, 46, 55, 64]
    assert bounds == [[a, b - 1] for a, b in zip(starts, [*starts[1:], 65], strict=True)]


def test_segment_sizes_of_1280_edges_are_the_published_ones() -> None:
    student = EDM.nodes(8)
    bounds = segments(teacher_sigmas(1280, student, 7.0), student)
    sizes = bounds[:, 1] - bounds[:, 0] + 1
    assert sizes.tolist() == [183, 183, 183, 182, 183, 183, 182, 1]


@pytest.mark.parametrize("edges", [16, 71, 286])
def test_segments_partition_the_edges_at_the_students_nodes(edges: int) -> None:
    student = EDM.nodes(8)
    teacher = teacher_sigmas(edges, student, 7.0)
    owner = torch.full((len(teacher) - 1,), -1)
    for j, (first, last) in enumerate(segments(teacher, student).tolist()):
        assert bool((owner[first : last + 1] == -1).all())
        owner[first : last + 1] = j
    assert bool((student[owner + 1] < teacher[:-1]).all())
    assert bool((teacher[:-1] <= student[owner]).all())


def test_empty_segment_takes_the_edge_nearest_to_its_boundary() -> None:
    student = torch.tensor([80.0, 10.0, 9.0, 1.0, 0.0], dtype=torch.float64)
    teacher = torch.tensor([80.0, 8.0, 1.0, 0.0], dtype=torch.float64)
    assert segments(teacher, student).tolist() == [[0, 0], [1, 1], [1, 1], [2, 2]]


# --- edge probabilities ------------------------------------------------------------------------


def test_edm_edge_weights_are_the_published_ones() -> None:
    p, _ = edge_probabilities(64, "edm")
    student = EDM.nodes(8)
    assert int(p.argmax()) == 46
    assert float(teacher_sigmas(64, student, 7.0)[46]) == pytest.approx(0.2530991, rel=1e-6)
    golden = [5.5886068e-7, 1.1669719e-5, 0.062882678, 6.8729855e-5, 1 / 65]
    assert p[[0, 9, 46, 63, 64]].tolist() == pytest.approx(golden, rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "edges", "golden"),
    [
        ("edm", 64, [4.0e-5, 7.3e-4, 0.0106, 0.0981, 0.4082, 0.4246, 0.0424, 0.0154]),
        ("edm", 1280, [4e-5, 7.0e-4, 0.0107, 0.1012, 0.4262, 0.4239, 0.0366, 0.00078]),
        ("vp", 1280, [0.0103, 0.0285, 0.0899, 0.2867, 0.4173, 0.1454, 0.0212, 0.0008]),
        ("uniform", 64, [0.125] * 8),
    ],
)
def test_segment_probabilities_are_the_published_ones(
    kind: str, edges: int, golden: list[float]
) -> None:
    _, by_segment = edge_probabilities(edges, kind)
    assert by_segment.tolist() == pytest.approx(golden, rel=0, abs=5e-5)
    assert by_segment.tolist() == pytest.approx(golden, rel=0.15)  # one rounds to a single digit


@pytest.mark.parametrize(("edges", "last"), [(64, 2.1e-5), (1280, 1.0e-6)])
def test_last_edge_is_rare_without_the_anchor(edges: int, last: float) -> None:
    p, _ = edge_probabilities(edges, "edm", anchor=False)
    assert float(p[-1]) == pytest.approx(last, rel=0.05)


@pytest.mark.parametrize("kind", ["edm", "vp"])
def test_anchor_moves_the_last_edge_only_and_keeps_the_others_in_proportion(kind: str) -> None:
    free, _ = edge_probabilities(64, kind, anchor=False)
    anchored, _ = edge_probabilities(64, kind)
    assert float(anchored[-1]) == pytest.approx(1 / 65)
    ratio = anchored[:-1] / free[:-1]
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))


@pytest.mark.parametrize("anchor", [True, False])
@pytest.mark.parametrize("kind", ["uniform", "vp", "edm"])
def test_edge_probabilities_are_positive_and_sum_to_one(kind: str, anchor: bool) -> None:
    p, _ = edge_probabilities(71, kind, anchor)
    assert p.dtype == torch.float32
    assert bool((p > 0).all())
    assert float(p.sum()) == pytest.approx(1, abs=1e-5)


def test_uniform_edges_ignore_the_anchor_and_are_uniform_inside_a_segment() -> None:
    p, _ = edge_probabilities(64, "uniform")
    torch.testing.assert_close(p, edge_probabilities(64, "uniform", anchor=False)[0])
    assert p[[0, 9, 10, 64]].tolist() == pytest.approx([1 / 80, 1 / 80, 1 / 72, 1 / 8])


def test_unknown_edge_distribution_is_refused() -> None:
    with pytest.raises(ValueError, match=r"need edges uniform, vp or edm, got 'cosine'"):
        edge_probabilities(64, "cosine")


def test_lognormal_sigmas_are_exp_of_a_shifted_normal() -> None:
    sigmas = lognormal_sigmas(torch.tensor([-1.0, 0.0, 1.0]), -1.2, 1.2)
    assert sigmas.log().tolist() == pytest.approx([-2.4, -1.2, 0.0], abs=1e-6)


def test_a_uniform_share_mixes_the_two_distributions() -> None:
    student = EDM.nodes(8)
    teacher = teacher_sigmas(64, student, 7.0)
    bounds = segments(teacher, student)
    (edm, uniform), mixed = (
        [edge_probability(teacher, bounds, kind, True, 7.0) for kind in ("edm", "uniform")],
        edge_probability(teacher, bounds, "edm", True, 7.0, uniform_share=0.25),
    )
    torch.testing.assert_close(mixed, 0.75 * edm + 0.25 * uniform)
    first = mixed[: int(bounds[0, 1]) + 1].sum()
    assert float(first) == pytest.approx(0.75 * 4.0e-5 + 0.25 / 8, rel=1e-3)
