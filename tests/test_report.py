"""The table, metrics.json and the figures: what they hold, and that figures are whole pictures."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from fewstep.report.figures import loss_curves, read_log, sample_grid, smoothed
from fewstep.report.tables import (
    COLUMNS,
    cell,
    format_row,
    latex_table,
    markdown_table,
    measured,
    metrics_table,
    row_caption,
    significant,
    table_caption,
    write_metrics,
    write_table,
)
from fewstep.tracking import Log

FLOOR = {"value": 2.41, "images": 2000, "other_images": 8000}


def row(name: str, steps: int, value: float, **changes: object) -> dict[str, Any]:
    return {
        "row": name,
        "student": "cd",
        "method": "consistency",
        "sampler": "ddim",
        "steps": steps,
        "nfe": steps,
        "guidance_scale": 1.0,
        "metric": "FD-EffLite0",
        "value": value,
        "std": 0.25,
        "metrics": {"FD-EffLite0": {"value": value, "std": 0.25, "std_of": "resamples"}},
        "images": 2000,
        "first_seed": 0,
        "detector_sha256": "d" * 64,
        "data_sha256": "da7a" * 16,
        "reference_file": None,
        "reference_images": 10_000,
        "seed_ranges": 1,
        "kimg": 48.0,
        "train_seconds": 288.4,
    } | changes


ROWS = [
    row("teacher-heun-35", 18, 11.5, nfe=35, kimg=None, train_seconds=None, student="teacher"),
    row("teacher-euler-8", 8, 31.8, kimg=None, train_seconds=None, student="teacher"),
    row("cd-8", 8, 14.7123456789),
]


def images(value: int, count: int = 6, channels: int = 1, size: int = 16) -> NDArray[np.uint8]:
    return np.full((count, channels, size, size), value, dtype=np.uint8)


# --- numbers ---------------------------------------------------------------------------------


def test_csv_keeps_order_and_precision_and_leaves_cells_empty(tmp_path: Path) -> None:
    write_table(ROWS, tmp_path, "caption")
    with open(tmp_path / "table.csv", newline="") as file:
        reader = csv.DictReader(file)
        read = list(reader)
    columns = (*COLUMNS[:-2], "detector_sha256", *COLUMNS[-2:])
    assert tuple(reader.fieldnames or ()) == columns
    assert [line["row"] for line in read] == ["teacher-heun-35", "teacher-euler-8", "cd-8"]
    assert float(read[2]["value"]) == 14.7123456789
    assert read[0]["kimg"] == read[0]["train_seconds"] == ""


def test_markdown_has_the_caption_above_and_a_line_of_one_width_a_row(tmp_path: Path) -> None:
    write_table(ROWS, tmp_path, "How to read it.")
    caption, blank, *table = (tmp_path / "table.md").read_text(encoding="utf-8").splitlines()
    assert (caption, blank) == ("How to read it.", "")
    assert len(table) == 2 + len(ROWS)
    assert len({len(line) for line in table}) == 1


def test_numbers_are_right_aligned_and_names_left() -> None:
    rule = markdown_table(ROWS).splitlines()[1].strip("| ").split(" | ")
    right = {column for column, cell in zip(COLUMNS, rule, strict=True) if cell.endswith(":")}
    assert right == set(COLUMNS) - {"row", "student", "method", "sampler", "metric"}


def test_best_of_a_number_of_steps_is_bold_and_a_lone_row_is_not() -> None:
    table = markdown_table(ROWS)
    assert "**14.71**" in table
    assert table.count("**") == 2


def test_caption_names_metric_reference_seeds_and_floor() -> None:
    caption = table_caption(ROWS, 10000, FLOOR)
    said = "seed from 0 to 1,999, the same in every row."
    for part in ("FD-EffLite0", "10,000 real images", said, "8,000 others", "2.41"):
        assert part in caption
    assert "FID" not in caption


def test_metrics_have_one_column_a_row_under_the_metric(tmp_path: Path) -> None:
    write_metrics(ROWS, FLOOR, tmp_path / "metrics.json")
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    (values,) = metrics.values()
    assert list(values) == ["teacher-heun-35", "teacher-euler-8", "cd-8", "floor"]
    assert (values["cd-8"], values["floor"]) == (14.7123456789, FLOOR["value"])


def test_a_row_called_floor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"row name other than 'floor'.*\(params.yaml: rows\)"):
        write_metrics([row("floor", 1, 1.0)], FLOOR, tmp_path / "metrics.json")


def test_no_rows_and_rows_without_a_column_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"at least 1 row, got 0 \(params.yaml: rows\)"):
        write_table([], tmp_path, "")
    broken = row("cd-8", 8, 1.0)
    del broken["nfe"], broken["kimg"]
    with pytest.raises(ValueError, match="every column in row cd-8, got none for nfe, kimg"):
        write_table([broken], tmp_path, "")
    assert not list(tmp_path.iterdir())


METRICS = {
    "FD-EffLite0": {"value": 14.7, "std": 0.3, "std_of": "resamples"},
    "recall": {"value": 0.5, "std": None, "std_of": None},
    "KD-EffLite0": {"value": 0.00412, "std": 0.0001, "std_of": "subsets"},
}


def test_other_metrics_are_columns_of_the_csv_and_a_second_markdown_table(tmp_path: Path) -> None:
    rows = [row("a", 8, 1.0, metrics=METRICS), row("b", 4, 2.0, metrics={})]
    write_table(rows, tmp_path, "caption")
    with open(tmp_path / "table.csv", newline="") as file:
        first, second = list(csv.DictReader(file))
    assert float(first["recall"]) == 0.5 and second["recall"] == ""
    assert list(first)[-1] == "train_seconds"
    table = metrics_table(rows)
    assert "0.00412 ± 0.00010" in table and "FD-EffLite0" not in table
    assert table in (tmp_path / "table.md").read_text()


def test_latex_escapes_names_and_bolds_the_best() -> None:
    text = latex_table([row("a_b&c", 8, 1.0), row("x", 8, 2.0)])
    assert r"a\_b\&c" in text and r"\textbf{1.00}" in text and r"\textbf{2.00}" not in text
    body = [line for line in text.splitlines() if " & " in line]
    assert len({len(re.findall(r"(?<!\\)&", line)) for line in body}) == 1, "as many cells"


@pytest.mark.parametrize("key", ["metric", "detector_sha256", "reference_sha256"])
def test_scores_of_another_detector_or_reference_are_never_in_one_table(
    key: str, tmp_path: Path
) -> None:
    rows = [row("a", 8, 1.0, **{key: "1"}), row("b", 8, 1.0, **{key: "2"})]
    with pytest.raises(ValueError, match=f"need one {key} in a table, got 1 of a and 2 of b"):
        write_table(rows, tmp_path, "")


def test_three_digits_are_shown_whatever_the_size() -> None:
    numbers = (0, 0.00412, 0.7315, 12.34, 1234.5, -0.5)
    shown = [significant(value) for value in numbers]
    assert shown == ["0", "0.00412", "0.732", "12.3", "1,234", "-0.500"]


def test_a_value_has_as_many_decimals_as_two_digits_of_its_spread() -> None:
    pairs = [(11.894, 0.7004), (2039.2, 33.6), (0.7785, 0.0123), (5.0, None), (0.0, 0.0)]
    shown = ["11.89 ± 0.70", "2,039 ± 34", "0.778 ± 0.012", "5.00", "0"]
    assert [measured(value, std) for value, std in pairs] == shown
    stds = [cell(row("a", 8, 1.0, std=std), "std", bold=False) for std in (0.602, 0.0, None)]
    assert stds == ["0.60", "0", "–"]


def test_the_caption_says_what_the_std_is_of_and_what_is_doubtful() -> None:
    metrics = {"FD-EffLite0": {"value": 1.0, "std": 0.1, "std_of": "ranges"}}
    three = row("three", 8, 1.0, seed_ranges=3, metrics=metrics)
    caption = table_caption([three], 9, FLOOR, ["too few images"])
    assert "over the disjoint seed ranges" in caption and caption.endswith("Note: too few images.")
    assert "bootstrap" not in caption and "resamples" in table_caption(ROWS, 9, FLOOR)
    both = table_caption([ROWS[0], three], 9, FLOOR)
    assert "0 to 5,999, the same in every row (teacher-heun-35: to 1,999)" in both
    assert "one range's value; where there is one range, over resamples" in both


def test_a_published_reference_is_named_where_its_scores_stand(tmp_path: Path) -> None:
    file = {"url": "https://x.org/refs/imagenet-64x64.npz", "sha256": "1a2b3c4d" * 8}
    rows = [{**r, "metric": "FID", "metrics": {"FID": r["metrics"][r["metric"]]}} for r in ROWS]
    caption = table_caption(rows, 50_000, {**FLOOR, "other_images": None}, (), file)
    assert "FID (lower is better) against the published statistics imagenet-64x64.npz" in caption
    assert "(sha256 1a2b3c4d1a2b), all other metrics against 50,000 images of our own" in caption
    assert "2,000 images of our own data against these statistics" in caption


def test_scores_against_other_references_or_detectors_never_share_a_column(tmp_path: Path) -> None:
    def column(**changes: object) -> str:
        write_metrics([row("a", 8, 1.0, **changes)], FLOOR, tmp_path / "m.json")
        (name,) = json.loads((tmp_path / "m.json").read_text())
        return name

    file = {"url": "https://x.org/ref.npz", "sha256": "1a2b3c4d" * 8}
    assert column() == "FD-EffLite0-ref-da7ada7a-10000"
    assert column(reference_images=5000) == "FD-EffLite0-ref-da7ada7a-5000"
    assert column(data_sha256="2" * 64) == "FD-EffLite0-ref-22222222-10000"
    assert column(metric="FID", reference_file=file) == "FID-ref-1a2b3c4d"
    assert column(metric="FID", reference_file={**file, "sha256": "2" * 64}) == "FID-ref-22222222"
    own = column(metric="FD-Inception", reference_file=file)
    assert own == "FD-Inception-net-dddddddd-ref-1a2b3c4d"
    other = column(metric="FD-Inception", reference_file=file, detector_sha256="e" * 64)
    assert other == "FD-Inception-net-eeeeeeee-ref-1a2b3c4d"
    assert "." not in own + column()


def test_the_csv_says_what_rows_were_measured_with(tmp_path: Path) -> None:
    write_table([row("a", 8, 1.0, detector_sha256="d", reference_sha256="r")], tmp_path, "")
    with (tmp_path / "table.csv").open(newline="") as file:
        (found,) = csv.DictReader(file)
    assert (found["detector_sha256"], found["reference_sha256"]) == ("d", "r")


def test_terminal_lines_of_rows_align() -> None:
    lines = [format_row(row("cd-8", 1, 9.0)), format_row(row("dmd2-10-guided", 10, 635.25))]
    assert len({line.index("FD-EffLite0") for line in lines}) == 1
    assert len({line.index("NFE") for line in lines}) == 1
    assert "1 step " in lines[0] and "10 steps" in lines[1] and "635.25" in lines[1]


# --- figures ---------------------------------------------------------------------------------


def test_row_caption_names_guidance_only_when_it_is_on() -> None:
    assert row_caption(ROWS[2]) == "ddim · 8 NFE · FD-EffLite0 14.7"
    guided = row("g", 10, 17.0, guidance_scale=1.5, nfe=20)
    assert row_caption(guided) == "ddim, guidance 1.5 · 20 NFE · FD-EffLite0 17.0"


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


def write_log(path: Path, *rows: dict[str, object]) -> Path:
    path.touch()
    for row in rows:
        Log(path).write(row)
    return path


def test_log_gives_each_loss_where_it_was_computed(tmp_path: Path) -> None:
    log = write_log(
        tmp_path / "log.jsonl",
        {"nimg": 64, "kimg": 0.064, "lr": 1, "seconds": 1, "fake": 2},
        {"nimg": 96, "nonfinite": "student", "loss": "nan"},
        {"nimg": 128, "kimg": 0.128, "lr": 1, "seconds": 2, "fake": 4, "dm": 3},
    )
    curves = read_log(log)
    assert list(curves) == ["fake", "dm"]
    assert [part.tolist() for part in curves["dm"]] == [[0.128], [3.0]]
    assert [part.tolist() for part in curves["fake"]] == [[0.064, 0.128], [2.0, 4.0]]


def test_loss_curves_draw_students_with_different_losses(tmp_path: Path) -> None:
    falling = [{"nimg": i, "loss": 1000 / i, "edge/loss_snap": 1} for i in range(64, 6400, 64)]
    logs = {
        "cd": write_log(tmp_path / "cd.jsonl", *falling),
        "one": write_log(tmp_path / "one.jsonl", {"nimg": 64, "dm": 3, "validation/FD": 4}),
        "none": write_log(tmp_path / "none.jsonl"),
    }
    loss_curves(logs, tmp_path / "loss.png")
    pixels = np.asarray(Image.open(tmp_path / "loss.png").convert("RGB"))
    assert pixels.shape[0] == 3 * 240
    assert pixels.shape[1] == 2 * 340, "what breaks a loss down has no panel"
    assert (pixels != 255).any()


def test_without_students_the_picture_says_so_and_has_no_panels(tmp_path: Path) -> None:
    loss_curves({}, tmp_path / "loss.png")
    white = np.asarray(Image.open(tmp_path / "loss.png").convert("L")) == 255
    assert 0 < (~white).sum() < 0.02 * white.size


def test_logs_that_cannot_be_drawn_are_refused(tmp_path: Path) -> None:
    for text in ('{"loss": 1}\n', "loss\n", "[1]\n"):
        (tmp_path / "log.jsonl").write_text(text)
        with pytest.raises(ValueError, match="need JSON objects with nimg in .*log.jsonl"):
            read_log(tmp_path / "log.jsonl")


def test_smoothing_keeps_shape_and_constants() -> None:
    assert smoothed(np.full(7, 3.0), window=3) == pytest.approx(np.full(7, 3.0))
    assert smoothed(np.array([0.0, 3.0, 0.0]), window=3).tolist() == [1.5, 1.0, 1.5]
    assert smoothed(np.array([5.0]), window=4).tolist() == [5.0]


def test_importing_the_report_does_not_import_matplotlib() -> None:
    code = "import sys, fewstep.report.page; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
