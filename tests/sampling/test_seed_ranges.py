"""The seeds of a row: disjoint ranges, of which all rows have the first."""

from dataclasses import replace

from fewstep.params import Generate, Row
from fewstep.sampling.batches import seed_ranges

THREE = Generate(images=5, batch=2, first_seed=7, labels="balanced", seed_ranges=3)
ROW = Row(model="teacher", sampler="heun", steps=4, guidance_scale=1.0)


def test_seed_ranges_are_disjoint_and_follow_one_another() -> None:
    assert seed_ranges(THREE, ROW) == [range(7, 12), range(12, 17), range(17, 22)]
    assert seed_ranges(replace(THREE, seed_ranges=None), ROW) == [range(7, 12)]


def test_a_row_may_have_other_seed_ranges_than_the_rest() -> None:
    assert seed_ranges(THREE, replace(ROW, seed_ranges=1)) == [range(7, 12)]
    one = replace(THREE, seed_ranges=None)
    assert seed_ranges(one, replace(ROW, seed_ranges=2))[1] == range(12, 17)
