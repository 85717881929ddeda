"""Logged means: weighed by what was counted, the same on every rank, exact after a restart."""

import json
import math
from threading import Barrier, Thread
from typing import Any

import pytest
import torch

from fewstep.distributed import Rank
from fewstep.logs import SIGMA_BOUNDS, Logged, by_group, by_sigma, mean_of
from fewstep.training import meter as meters
from fewstep.training.meter import Meter, readable

CPU = torch.device("cpu")
ALONE = Rank(0, 1, CPU)
NAN = float("nan")


def means(**values: Logged) -> dict[str, float]:
    meter = Meter()
    meter.add(values)
    return meter.means()


# --- means -------------------------------------------------------------------------------------


def test_mean_is_that_of_all_values_whatever_their_shape_and_type() -> None:
    assert means(loss=mean_of(torch.arange(6.0).reshape(2, 3))) == {"loss": 2.5}
    assert means(loss=mean_of(torch.tensor(3.0))) == {"loss": 3.0}
    assert means(share=mean_of(torch.tensor([True, False, False, True]))) == {"share": 0.5}


def test_masked_mean_is_that_of_the_values_under_the_mask() -> None:
    values, mask = torch.tensor([1.0, NAN, 5.0]), torch.tensor([True, False, True])
    assert means(loss=mean_of(values, mask)) == {"loss": 3.0}


def test_a_mask_that_covers_nothing_gives_no_mean() -> None:
    assert means(loss=mean_of(torch.ones(3), torch.zeros(3, dtype=torch.bool))) == {}


def test_groups_have_their_own_means_and_an_empty_one_has_none() -> None:
    values, group = torch.tensor([1.0, 2.0, 9.0, 5.0]), torch.tensor([0, 0, 3, 3])
    assert means(loss=by_group(values, group, 5)) == {"loss_0": 1.5, "loss_3": 7.0}


def test_a_nan_stays_in_its_group() -> None:
    found = means(loss=by_group(torch.tensor([1.0, NAN]), torch.tensor([0, 1]), 2))
    assert found["loss_0"] == 1 and math.isnan(found["loss_1"])


def test_a_mean_that_is_one_group_is_named_as_one() -> None:
    assert means(loss=by_group(torch.tensor([2.0]), torch.tensor([0]), 1)) == {"loss_0": 2.0}


def test_ranges_of_sigma_share_out_every_value_once() -> None:
    torch.manual_seed(0)
    sigma = torch.cat([torch.tensor([0.0, *SIGMA_BOUNDS[1:-1]]), torch.rand(50).exp() * 9])
    values = torch.rand(len(sigma))
    parts = by_sigma("loss", values, sigma)
    assert list(parts) == [
        "sigma/loss_0_to_0.1",
        "sigma/loss_0.1_to_1",
        "sigma/loss_1_to_10",
        "sigma/loss_10_to_inf",
    ]
    assert sum(float(count) for _, count in parts.values()) == len(sigma)
    total = sum(float(total) for total, _ in parts.values())
    assert total == pytest.approx(float(values.double().sum()))
    assert float(parts["sigma/loss_0.1_to_1"][1]) == 1, "a bound belongs to the range above it"


def test_sums_of_several_micro_batches_are_the_mean_of_all_their_values() -> None:
    torch.manual_seed(0)
    parts = [torch.rand(n) for n in (1, 7, 3)]
    meter = Meter()
    for part in parts:
        meter.add({"loss": mean_of(part)})
    assert meter.means()["loss"] == pytest.approx(float(torch.cat(parts).double().mean()), rel=1e-7)


def test_a_ratio_is_that_of_the_sums_not_the_mean_of_ratios() -> None:
    meter = Meter()
    for part, whole in ((1.0, 2.0), (1.0, 8.0)):
        meter.add({"share": (torch.tensor(part).double(), torch.tensor(whole).double())})
    assert meter.means() == {"share": 0.2}


def test_means_do_not_lose_small_values_beside_large_ones() -> None:
    meter = Meter()
    for value in (1e9, 1.0, 1.0, 1.0):
        meter.add({"loss": mean_of(torch.tensor(value))})
    assert meter.means()["loss"] == (1e9 + 3) / 4


def test_logging_keeps_no_graph() -> None:
    values = torch.ones(2, requires_grad=True) * 2
    logged = (mean_of(values), by_group(values, torch.tensor([0, 1]), 2))
    assert not any(part.requires_grad for pair in logged for part in pair)


# --- rows --------------------------------------------------------------------------------------


def test_a_nan_that_was_counted_is_shown_as_such() -> None:
    meter = Meter()
    meter.add({"loss": mean_of(torch.tensor([1.0, NAN])), "norm": mean_of(torch.tensor(math.inf))})
    row = readable(meter.means())
    assert row == {"loss": "nan", "norm": "inf"}
    json.dumps(row, allow_nan=False)


def test_rows_have_six_digits() -> None:
    assert readable({"a": 1.23456789, "b": 1e-12 / 3, "c": 0.0, "d": -1234567.0}) == {
        "a": 1.23457,
        "b": 3.33333e-13,
        "c": 0.0,
        "d": -1234570.0,
    }


# --- restarts and ranks ------------------------------------------------------------------------


def test_a_restored_meter_goes_on_bit_by_bit() -> None:
    torch.manual_seed(0)
    whole, first = Meter(), Meter()
    part = {"loss": mean_of(torch.rand(7)), "step": by_group(torch.rand(4), torch.arange(4), 6)}
    rest = {"loss": mean_of(torch.rand(3)), "new": mean_of(torch.tensor(NAN))}
    for meter in (whole, first):
        meter.add(part)
    second = Meter.restore(json.loads(json.dumps(first.state())), CPU)
    for meter in (whole, second):
        meter.add(rest)
    assert list(second.sums) == list(whole.sums), "in the order of the uninterrupted row"
    for name, pair in whole.sums.items():
        for mine, other in zip(pair, second.sums[name], strict=True):
            assert mine.dtype == other.dtype and torch.equal(mine.nan_to_num(), other.nan_to_num())
    assert json.dumps(second.state()) == json.dumps(whole.state())


def test_one_rank_keeps_its_sums_and_an_empty_meter_stays_empty() -> None:
    meter = Meter()
    meter.add({"loss": mean_of(torch.tensor([1.0, 2.0]))})
    assert meter.over_ranks(ALONE).means() == meter.means() == {"loss": 1.5}
    assert Meter().over_ranks(ALONE).means() == {}


def on_ranks(meters_of: list[Meter], monkeypatch: pytest.MonkeyPatch) -> list[dict[str, float]]:
    """What each of these ranks, threads here, gets from over_ranks."""
    world, meet = len(meters_of), Barrier(len(meters_of), timeout=10)
    place: list[Any] = [None] * world
    found: list[dict[str, float]] = [{}] * world

    def exchange(value: object, rank: Rank) -> list[Any]:
        meet.wait()
        place[rank.index] = value
        meet.wait()
        return list(place)

    def total(values: torch.Tensor, rank: Rank) -> torch.Tensor:
        parts = exchange(values, rank)
        assert len({part.shape for part in parts}) == 1, "a collective needs equal shapes"
        return torch.stack(parts).sum(dim=0)

    def run(index: int) -> None:
        found[index] = meters_of[index].over_ranks(Rank(index, world, CPU)).means()

    monkeypatch.setattr(meters, "sum_over_ranks", total)
    monkeypatch.setattr(meters, "gather", exchange)
    threads = [Thread(target=run, args=(i,)) for i in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_ranks_get_the_mean_of_all_their_values(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = [Meter() for _ in range(2)]
    for i, meter in enumerate(ranks):
        meter.add({"loss": mean_of(torch.arange(3.0) + i)})
        meter.add({"step": by_group(torch.tensor([4.0]), torch.tensor([i]), 3)})
    expected = {"loss": 1.5, "step_0": 4.0, "step_1": 4.0}
    assert on_ranks(ranks, monkeypatch) == [expected, expected]


def test_a_rank_that_counted_less_than_another_still_adds_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After a state the first rank alone holds what was counted before it."""
    first, second = Meter(), Meter()
    first.add({"loss_dm": mean_of(torch.tensor(6.0)), "loss_fake": mean_of(torch.tensor(1.0))})
    second.add({"loss_fake": mean_of(torch.tensor(3.0))})
    expected = {"loss_dm": 6.0, "loss_fake": 2.0}
    assert on_ranks([first, second], monkeypatch) == [expected, expected]
    assert on_ranks([first, Meter()], monkeypatch) == [first.means(), first.means()]
