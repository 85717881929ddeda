"""The table in three forms, its caption, metrics.json: what they hold, and what is refused."""

import csv
import json
import math
import re
from pathlib import Path

import pytest

from fewstep.report.tables import (
    SHOWN,
    latex_table,
    markdown_table,
    metrics_table,
    table_caption,
    write_metrics,
    write_table,
)
from fewstep.report.text import (
    COLUMNS,
    cell,
    format_row,
    measured,
    rounded,
    row_caption,
    significant,
)
from scored import ABOUT, FLOOR, frame, row

TEACHER = row("teacher-heun-35", 18, 11.5, nfe=35, kimg=None, student="teacher")
ROWS = frame(
    TEACHER,
    row("teacher-euler-8", 8, 31.8, kimg=None, student="teacher"),
    row("cd-8", 8, 14.7123456789),
)


def test_csv_keeps_order_rounds_and_leaves_cells_empty(tmp_path: Path) -> None:
    write_table(ROWS, tmp_path, "caption")
    with open(tmp_path / "table.csv", newline="") as file:
        reader = csv.DictReader(file)
        read = list(reader)
    known = ("detector_sha256", "data_sha256", "reference_images")
    columns = (*COLUMNS[:-1], *known, *COLUMNS[-1:])
    assert tuple(reader.fieldnames or ()) == columns
    assert [line["row"] for line in read] == ["teacher-heun-35", "teacher-euler-8", "cd-8"]
    assert float(read[2]["value"]) == 14.7, "three digits, as other machines have them too"
    assert read[0]["kimg"] == ""


def test_markdown_has_the_caption_above_and_a_line_of_one_width_a_row(tmp_path: Path) -> None:
    write_table(ROWS, tmp_path, "How to read it.")
    caption, blank, *table = (tmp_path / "table.md").read_text(encoding="utf-8").splitlines()
    assert (caption, blank) == ("How to read it.", "")
    assert len(table) == 2 + len(ROWS)
    assert len({len(line) for line in table}) == 1


def test_numbers_are_right_aligned_and_names_left() -> None:
    rule = markdown_table(ROWS).splitlines()[1].strip("|").split("|")
    right = {column for column, cell in zip(SHOWN, rule, strict=True) if cell.endswith(":")}
    assert right == set(SHOWN) - {"row", "method", "sampler"}


def test_best_of_a_number_of_network_calls_is_bold_and_a_lone_row_is_not() -> None:
    table = markdown_table(ROWS)
    assert "**14.71 ± 0.25**" in table
    assert table.count("**") == 2


def test_caption_names_metric_reference_seeds_and_floor() -> None:
    caption = table_caption(ROWS, ABOUT)
    said = "seed from 0 to 1,999, the same in every row."
    for part in ("FD-EffLite0", "10,000 real images", said, "8,000 others", "2.41"):
        assert part in caption
    assert "FID" not in caption


def test_metrics_have_one_column_a_row_under_the_metric(tmp_path: Path) -> None:
    write_metrics(ROWS, FLOOR, tmp_path / "metrics.json")
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    (values,) = metrics.values()
    assert list(values) == ["teacher-heun-35", "teacher-euler-8", "cd-8", "floor"]
    assert (values["cd-8"], values["floor"]) == (14.7, FLOOR["value"])


def test_a_row_called_floor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"row name other than 'floor'.*\(params.yaml: rows\)"):
        write_metrics(frame(row("floor", 1, 1.0)), FLOOR, tmp_path / "metrics.json")


METRICS = {
    "FD-EffLite0": {"value": 14.7, "std": 0.3, "std_of": "resamples"},
    "recall": {"value": 0.5, "std": None, "std_of": None},
    "KD-EffLite0": {"value": 0.00412, "std": 0.0001, "std_of": "subsets"},
}


def test_other_metrics_are_columns_of_the_csv_and_a_second_markdown_table(tmp_path: Path) -> None:
    rows = [row("a", 8, 1.0, metrics=METRICS), row("b", 4, 2.0, metrics={})]
    write_table(frame(*rows), tmp_path, "caption")
    with open(tmp_path / "table.csv", newline="") as file:
        first, second = list(csv.DictReader(file))
    assert float(first["recall"]) == 0.5 and second["recall"] == ""
    assert list(first)[-1] == "kimg"
    table = metrics_table(frame(*rows))
    assert "0.00412 |" in table and "FD-EffLite0" not in table
    assert table in (tmp_path / "table.md").read_text()


def test_latex_escapes_names_and_bolds_the_best() -> None:
    text = latex_table(frame(row("a_b&c", 8, 1.0), row("x", 8, 2.0)))
    assert r"a\_b\&c" in text and r"\textbf{1.00 ± 0.25}" in text and r"\textbf{2.00" not in text
    body = [line for line in text.splitlines() if " & " in line]
    assert len({len(re.findall(r"(?<!\\)&", line)) for line in body}) == 1, "as many cells"


@pytest.mark.parametrize("key", ["metric", "detector_sha256", "reference_sha256"])
def test_scores_of_another_detector_or_reference_are_never_in_one_table(
    key: str, tmp_path: Path
) -> None:
    rows = [row("a", 8, 1.0, **{key: "1"}), row("b", 8, 1.0, **{key: "2"})]
    with pytest.raises(ValueError, match=f"need one {key} in a table, got 1 of a and 2 of b"):
        write_table(frame(*rows), tmp_path, "")


def test_numbers_in_git_have_three_digits_and_are_whole_above_them() -> None:
    numbers = (0.0, 0.0041234, 0.73149, 12.3456, 684.52, 1909.39, -0.51239)
    assert [rounded(n) for n in numbers] == [0.0, 0.00412, 0.731, 12.3, 685.0, 1909.0, -0.512]
    assert rounded(123.456, 4) == 123.5 and math.isnan(rounded(math.nan))


def test_three_digits_are_shown_whatever_the_size() -> None:
    numbers = (0, 0.00412, 0.7315, 12.34, 1234.5, -0.5)
    shown = [significant(value) for value in numbers]
    assert shown == ["0", "0.00412", "0.732", "12.3", "1,234", "-0.500"]


def test_a_value_has_as_many_decimals_as_two_digits_of_its_spread() -> None:
    pairs = [(11.894, 0.7004), (2039.2, 33.6), (0.7785, 0.0123), (5.0, None), (0.0, 0.0)]
    shown = ["11.89 ± 0.70", "2,039 ± 34", "0.778 ± 0.012", "5.00", "0"]
    assert [measured(value, std) for value, std in pairs] == shown
    stds = [cell(std, "std") for std in (0.602, 0.0, None)]
    assert stds == ["0.60", "0", "–"]


def test_the_caption_says_what_the_std_is_of_and_what_is_doubtful() -> None:
    metrics = {"FD-EffLite0": {"value": 1.0, "std": 0.1, "std_of": "ranges"}}
    three = row("three", 8, 1.0, seed_ranges=3, metrics=metrics, notes=["too few images"])
    caption = table_caption(frame(three), ABOUT)
    assert "over the disjoint seed ranges" in caption and caption.endswith("Note: too few images.")
    assert "bootstrap" not in caption and "resamples" in table_caption(ROWS, ABOUT)
    both = table_caption(frame(TEACHER, three), ABOUT)
    assert "0 to 5,999, the same in every row (teacher-heun-35: to 1,999)" in both
    most = table_caption(frame(TEACHER, row("one", 8, 1.0), three), ABOUT)
    assert "0 to 1,999, the same in every row (three: to 5,999)" in most
    assert "one range's value; where there is one range, over resamples" in both


def test_a_published_reference_is_named_where_its_scores_stand(tmp_path: Path) -> None:
    file = {"url": "https://x.org/refs/imagenet-64x64.npz", "sha256": "1a2b3c4d" * 8}
    metrics = {"FID": {"value": 1.0, "std": 0.25, "std_of": "resamples"}}
    rows = frame(row("cd-8", 8, 1.0, metric="FID", metrics=metrics))
    floor = {**FLOOR, "other_images": None}
    about = {"floor": floor, "reference_images": 50_000, "reference_file": file}
    caption = table_caption(rows, about)
    assert "FID (lower is better) against the published statistics imagenet-64x64.npz" in caption
    assert "(sha256 1a2b3c4d1a2b), all other metrics against 50,000 images of our own" in caption
    assert "2,000 images of our own data against these statistics" in caption


def test_scores_against_other_references_or_detectors_never_share_a_column(tmp_path: Path) -> None:
    def column(**changes: object) -> str:
        write_metrics(frame(row("a", 8, 1.0, **changes)), FLOOR, tmp_path / "m.json")
        (name,) = json.loads((tmp_path / "m.json").read_text())
        return name

    file = {"url": "https://x.org/ref.npz", "sha256": "1a2b3c4d" * 8}
    other = {**file, "sha256": "2" * 64}
    names = [
        column(),
        column(reference_images=5000),
        column(data_sha256="2" * 64),
        column(metric="FID", reference_file=file),
        column(metric="FID", reference_file=other),
        column(metric="FD-Inception", reference_file=file),
        column(metric="FD-Inception", reference_file=file, detector_sha256="e" * 64),
    ]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"(FID|FD-EffLite0|FD-Inception)-[0-9a-f]{4}", name) for name in names)
    published = column(metric="FID", reference_file=file)
    same = column(metric="FID", reference_file=file, detector_sha256="e" * 64, data_sha256="2" * 64)
    assert same == published, "FID is of one file of weights, and the reference is the file"


def test_the_csv_says_what_rows_were_measured_with(tmp_path: Path) -> None:
    write_table(frame(row("a", 8, 1.0, detector_sha256="d", data_sha256="r")), tmp_path, "")
    with (tmp_path / "table.csv").open(newline="") as file:
        (found,) = csv.DictReader(file)
    assert (found["detector_sha256"], found["data_sha256"]) == ("d", "r")


def test_terminal_lines_of_rows_align() -> None:
    lines = [format_row(row("cd-8", 1, 9.0)), format_row(row("dmd2-10-guided", 10, 635.25))]
    assert len({line.index("FD-EffLite0") for line in lines}) == 1
    assert len({line.index("NFE") for line in lines}) == 1
    assert "1 step " in lines[0] and "10 steps" in lines[1] and "635.25" in lines[1]


def test_row_caption_names_guidance_only_when_it_is_on() -> None:
    assert row_caption(row("cd-8", 8, 14.7123456789)) == "FD-EffLite0 14.7 · 8 NFE · ddim"
    guided = row("g", 10, 17.0, guidance_scale=1.5, nfe=20)
    assert row_caption(guided) == "FD-EffLite0 17.0 · 20 NFE · ddim, guidance 1.5"
