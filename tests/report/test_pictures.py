"""Sample grids: whole pixels in the order given, captions that fit, what is refused."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

import scored
from fewstep.report import pictures
from fewstep.report.pictures import sample_grid, sample_pictures


def images(value: int, count: int = 6, channels: int = 1, size: int = 16) -> NDArray[np.uint8]:
    return np.full((count, channels, size, size), value, dtype=np.uint8)


def test_sample_pixels_are_upscaled_by_a_whole_number_in_the_order_given(tmp_path: Path) -> None:
    path = tmp_path / "samples.png"
    ramp = images(0, channels=3)  # coloured, as no letter is
    ramp[:, 0] = np.arange(6)[:, None, None] * 10 + 100
    sample_grid({"real": ramp, "cd": images(7, channels=3)}, {}, path, columns=3, lines=2)
    pixels = np.asarray(Image.open(path).convert("RGB"))
    corners = []
    for red in range(100, 160, 10):
        found = np.argwhere((pixels == (red, 0, 0)).all(axis=2))
        corners.append(found.min(axis=0))
        assert len(found) == 48 * 48  # 16 pixels x 3, nothing blurred at the edge
        assert (found.max(axis=0) - corners[-1] == 47).all()
    assert tuple(corners[1] - corners[0]) == (0, 50)  # 2 pixels between
    assert tuple(corners[3] - corners[0]) == (50, 0)  # image 3 begins the second line
    assert np.argwhere((pixels == 7).all(axis=2))[:, 1].min() > corners[2][1] + 48


def test_sample_grid_has_the_same_bytes_each_time_and_wraps_panels(tmp_path: Path) -> None:
    samples = {f"row-{index}": images(index * 20, channels=3) for index in range(5)}
    captions = {name: "a caption that is much longer than its panel is wide" for name in samples}
    for name in ("a.png", "b.png"):
        sample_grid(samples, captions, tmp_path / name, columns=3, lines=2, title="Title")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    width, height = Image.open(tmp_path / "a.png").size
    assert width > 3 * 3 * 48 and height > 2 * 2 * 48


def test_long_captions_stay_within_their_panel(tmp_path: Path) -> None:
    path = tmp_path / "samples.png"
    sample_grid({"a" * 80: images(0)}, {"a" * 80: "b" * 300}, path, columns=3, lines=2)
    pixels = np.asarray(Image.open(path).convert("L"))
    inked = np.flatnonzero((pixels < 255).any(axis=0))
    panel = np.flatnonzero((pixels == 0).sum(axis=0) > 48)
    assert inked.min() >= panel.min() and inked.max() <= panel.max()


def test_samples_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "samples.png"
    with pytest.raises(ValueError, match=r"need 20 images of cd, got 6 \(params.yaml: generate"):
        sample_grid({"cd": images(0)}, {}, path, columns=10, lines=2)
    with pytest.raises(ValueError, match=r"need images of one shape, got \(1, 16, 16\) of a, "):
        sample_grid({"a": images(0), "b": images(0, size=8)}, {}, path, columns=3, lines=2)
    with pytest.raises(ValueError, match="need samples of at least 1 row"):
        sample_grid({}, {}, path, columns=3)
    assert not path.exists()


@pytest.mark.parametrize(
    ("classes", "count", "columns"),
    [(0, 20, 10), (1, 20, 10), (3, 20, 9), (6, 20, 6), (10, 20, 10), (1000, 20, 10), (3, 5, 5)],
)
def test_a_line_of_tiles_has_whole_rounds_of_classes(
    classes: int, count: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = images(0, count)
    monkeypatch.setattr(pictures, "row_images", lambda name, places: (found[places], None))
    monkeypatch.setattr(pictures, "real_images", lambda dataset, labels: found)
    dataset = SimpleNamespace(shape=found.shape[1:])
    shown = sample_pictures([scored.row("cd", 8, 1.0)], cast(Any, dataset), count, classes)
    assert [picture.columns for picture in shown] == [columns, columns]
