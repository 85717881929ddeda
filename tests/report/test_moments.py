"""Images of validations come back from their files: some of many, the last among them."""

from pathlib import Path

import numpy as np
import pytest

from fewstep.paths import SNAPSHOTS
from fewstep.report.moments import MOST, moment_pictures, save_moment


def validation(value: int, channels: int = 3) -> np.ndarray:
    """Twelve images that tell their time, place and channel."""
    images = np.zeros((12, channels, 4, 4), np.uint8)
    images[:] = value + np.arange(12)[:, None, None, None] + 20 * np.arange(channels)[:, None, None]
    return images


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_images_come_back_in_the_order_of_time() -> None:
    for nimg in (10_000, 5_000, 1_000_000):
        save_moment(SNAPSHOTS / "cd", validation(nimg // 10_000), nimg)
    found = moment_pictures(["cd", "without-validation"])
    assert list(found) == ["cd"]
    expected = [validation(value)[:10] for value in (0, 1, 100)]
    assert np.array_equal(found["cd"].images, np.concatenate(expected))
    assert found["cd"].columns == 10
    assert found["cd"].caption == "From the top: after 5, 10, 1000 kimg"


def test_of_many_validations_the_first_and_the_last_are_shown() -> None:
    for kimg in range(1, 101):
        save_moment(SNAPSHOTS / "cd", validation(kimg, channels=1), 1000 * kimg)
    images = moment_pictures(["cd"])["cd"].images.reshape(-1, 10, 3, 4, 4)
    assert len(images) == MOST
    assert np.array_equal(images[0], validation(1, 1)[:10].repeat(3, axis=1))
    assert np.array_equal(images[-1], validation(100, 1)[:10].repeat(3, axis=1))
