"""All randomness of a micro-batch follows from (seed, nimg) and, where shared, the step."""

import pytest
import torch

from fewstep.data.batch import Batch, derived_seed


def make(nimg: int = 0, step_nimg: int = 0, seed: int = 0, n: int = 8) -> Batch:
    return Batch(torch.zeros(n, 1, 2, 2), torch.eye(n), nimg, step_nimg, seed)


def draws(batch: Batch) -> list[float]:
    """Numbers from every source of a micro-batch's own randomness, shared ones left out."""
    torch.manual_seed(batch.dropout_seed)
    tensors = [
        batch.normal_like(batch.images),
        batch.uniform_ints(0, 10**9),
        batch.keep_labels(0.5),
        torch.randint(10**9, (4,), generator=batch.cpu_generator),
        torch.rand(4),
    ]
    return torch.cat([t.double().flatten() for t in tensors]).tolist()


def test_draws_follow_from_seed_and_position_alone() -> None:
    assert draws(make(nimg=640, step_nimg=512, seed=3)) == draws(make(640, 640, 3))


@pytest.mark.parametrize(("nimg", "seed"), [(64, 0), (0, 1)])
def test_other_positions_and_seeds_draw_otherwise(nimg: int, seed: int) -> None:
    ours, theirs = torch.tensor(draws(make())), torch.tensor(draws(make(nimg, 0, seed)))
    assert float((ours == theirs).float().mean()) < 0.2  # the label masks agree by chance


def test_sources_of_one_batch_are_unrelated() -> None:
    batch = make()
    first = torch.rand(8, generator=batch.generator)
    assert not torch.equal(first, torch.rand(8, generator=batch.cpu_generator))
    assert not torch.equal(first, torch.rand(8, generator=make().shared_generator))


def test_shared_generator_is_the_steps() -> None:
    """Every micro-batch of a step draws the same, on any rank; the next step draws otherwise."""

    def shared(batch: Batch) -> list[int]:
        return torch.randint(10**9, (4,), generator=batch.shared_generator).tolist()

    assert shared(make(nimg=512, step_nimg=512)) == shared(make(nimg=576, step_nimg=512))
    assert shared(make(nimg=512, step_nimg=512)) != shared(make(nimg=512, step_nimg=640))
    assert shared(make(seed=1)) != shared(make(seed=2))


def test_clock_is_that_of_the_whole_batch() -> None:
    assert make(nimg=1600, step_nimg=1500).kimg == 1.5


def test_uniform_ints_fill_their_range_evenly() -> None:
    counts = make(n=4000).uniform_ints(3, 7).bincount()
    assert counts.tolist() == pytest.approx([0, 0, 0, *[1000] * 4], abs=130)


@pytest.mark.parametrize("drop", [0.0, 0.1, 1.0])
def test_labels_are_dropped_at_the_rate_asked_for(drop: float) -> None:
    keep = make(n=4000).keep_labels(drop)
    assert keep.shape == (4000, 1)
    assert set(keep.flatten().tolist()) <= {0.0, 1.0}
    assert 1 - float(keep.mean()) == pytest.approx(drop, abs=0.02)


def test_normal_like_keeps_shape_and_type() -> None:
    noise = make().normal_like(torch.zeros(500, 1, 4, 4, dtype=torch.float64))
    assert noise.dtype == torch.float64
    assert (float(noise.mean()), float(noise.std())) == pytest.approx((0, 1), abs=0.05)


def test_derived_seeds_tell_their_parts_apart() -> None:
    parts = [(1, 23), (12, 3), (123,), (1, 2, 3), (1, 23, "shared"), (3, 12)]
    seeds = {derived_seed(*p) for p in parts}
    assert len(seeds) == len(parts)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derived_seed(1, "a") == derived_seed(1, "a")
