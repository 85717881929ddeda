"""Brightness and spread: of black and white, as numpy has them, exact in any order."""

import numpy as np
import pytest

from fewstep.training.signs import PixelSums, std_ratio


def images(count: int, high: int = 256, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, high, (count, 3, 4, 4), np.uint8)


def test_black_is_0_and_white_is_1_and_neither_is_spread() -> None:
    for grey, brightness in ((0, 0.0), (51, 0.2), (255, 1.0)):
        sums = PixelSums.of(np.full((5, 1, 2, 2), grey, np.uint8))
        assert sums.brightness == brightness and sums.spread == 0


def test_brightness_and_spread_are_those_of_numpy() -> None:
    found, x = images(1500), images(1500).astype(np.float64)
    sums = PixelSums.of(found)
    assert sums.brightness == pytest.approx(x.mean() / 255, rel=1e-12)
    assert sums.spread == pytest.approx(x.std(axis=0, ddof=1).mean(), rel=1e-12)


def test_sums_of_parts_are_those_of_all_to_the_bit() -> None:
    found = images(300)
    parts = PixelSums.of(found[170:]) + PixelSums.of(found[:0]) + PixelSums.of(found[:170])
    whole = PixelSums.of(found)
    assert (parts.count, parts.spread) == (300, whole.spread)
    assert (parts.total == whole.total).all() and (parts.squares == whole.squares).all()


def test_images_that_look_alike_have_a_low_ratio() -> None:
    real = images(2000)
    few = np.repeat(real[:1], 2000, axis=0)
    half = np.where(np.arange(2000)[:, None, None, None] % 2, real, few)
    ratios = [std_ratio(PixelSums.of(x), PixelSums.of(real)) for x in (few, half, real)]
    assert ratios[0] == 0 and ratios[2] == 1 and 0.5 < (ratios[1] or 0) < 0.95


def test_pixels_that_are_constant_in_real_images_do_not_make_the_ratio_infinite() -> None:
    real, drawn = images(100), images(100, seed=1)
    real[..., 0, 0] = 0
    drawn[..., 0, 0] = np.arange(100)[:, None] % 2
    assert std_ratio(PixelSums.of(drawn), PixelSums.of(real)) == pytest.approx(1, abs=0.05)
    assert std_ratio(PixelSums.of(drawn), PixelSums.of(np.zeros_like(real))) is None
