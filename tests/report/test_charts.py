"""Charts: which panels losses.png has, what is smoothed, and what nobody has to wait for."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from fewstep.paths import MODELS
from fewstep.report.charts import loss_curves, losses, smoothed, validation_by_kimg
from fewstep.report.frames import logs_frame
from scored import write_log

NAMES = ["cd", "one", "none"]


@pytest.fixture
def logs(tmp_path: Path) -> pd.DataFrame:
    falling = [{"nimg": i, "loss": 1000 / i, "edge/loss_snap": 1} for i in range(64, 6400, 64)]
    write_log(tmp_path / MODELS / "cd", *falling)
    compared = {"validation/teacher_FD": 3, "validation/real_brightness": 0.3}
    one = {"nimg": 64, "dm": 3, "lr": 1, "validation/FD": 4, **compared}
    write_log(tmp_path / MODELS / "one", one)
    write_log(tmp_path / MODELS / "none")
    return logs_frame(NAMES, tmp_path)


def test_loss_curves_draw_students_with_different_losses(
    logs: pd.DataFrame, tmp_path: Path
) -> None:
    loss_curves(logs, NAMES, tmp_path / "loss.png")
    pixels = np.asarray(Image.open(tmp_path / "loss.png").convert("RGB"))
    assert pixels.shape[0] == 3 * 240
    assert pixels.shape[1] == 2 * 340, "no panel for what breaks a loss down or compares, nor lr"
    assert (pixels != 255).any()
    for line in range(3):
        assert (pixels[240 * line : 240 * (line + 1)] != 255).any(), "an empty log says so"


def test_losses_of_a_training_are_named_in_its_chart(logs: pd.DataFrame) -> None:
    svg = losses("cd", logs[logs["name"] == "edge/loss_snap"])
    assert "edge/loss snap" in svg and "training images, thousands" in svg


def test_validations_are_drawn_with_what_they_are_compared_with(logs: pd.DataFrame) -> None:
    svg = validation_by_kimg(logs, "FD") or ""
    assert ">one<" in svg and ">teacher<" in svg and "validation FD" in svg
    assert validation_by_kimg(logs, "recall") is None
    sign = logs[logs["name"] == "validation/FD"].assign(name="validation/std_ratio", value=0.9)
    svg = validation_by_kimg(sign, "std_ratio", level=1.0) or ""
    assert ">real images<" in svg and "validation std ratio" in svg


def test_without_students_the_picture_says_so_and_has_no_panels(tmp_path: Path) -> None:
    loss_curves(logs_frame([]), [], tmp_path / "loss.png")
    white = np.asarray(Image.open(tmp_path / "loss.png").convert("L")) == 255
    assert 0 < (~white).sum() < 0.02 * white.size


def test_smoothing_keeps_shape_and_constants() -> None:
    def smooth(values: list[float], window: int) -> list[float]:
        return smoothed(pd.Series(values), window).tolist()

    assert smooth([3.0] * 7, window=3) == pytest.approx([3.0] * 7)
    assert smooth([0.0, 3.0, 0.0], window=3) == [1.5, 1.0, 1.5]
    assert smooth([5.0], window=4) == [5.0]


def test_importing_the_report_does_not_import_matplotlib() -> None:
    code = "import sys, fewstep.report.page; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_printing_a_row_does_not_import_pandas() -> None:
    code = "import sys, fewstep.report; sys.exit('pandas' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
