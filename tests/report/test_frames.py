"""The two frames: what stands in them, what a model's log and times say, and refusals."""

from pathlib import Path

import numpy as np
import pytest

from fewstep.files import write_json
from fewstep.paths import MODELS, SCORES, TIMES
from fewstep.report.frames import (
    best_per_nfe,
    frame_of,
    logs_frame,
    main_loss,
    other_metrics,
    rows_frame,
    train_seconds,
)
from scored import row, write_log


def test_rows_come_in_the_order_asked_for_with_the_times_of_their_models(tmp_path: Path) -> None:
    metrics = {"FD-EffLite0": {"value": 2.0, "std": None}, "recall": {"value": 0.5, "std": 0.1}}
    for name, model, kimg in (("b", "cd", 48.0), ("a", "teacher", None)):
        score = row(name, 8, 2.0, model=model, kimg=kimg, metrics=metrics, classes={"0": 1.5})
        write_json(tmp_path / SCORES / f"{name}.json", score)
    write_log(tmp_path / TIMES, {"nimg": 64, "seconds": 2.5}, file="cd.jsonl")
    rows = rows_frame(["b", "a"], tmp_path)
    assert rows.index.tolist() == ["b", "a"]
    assert rows["student"].tolist() == ["cd", "teacher"]
    assert rows["train_seconds"].tolist() == [2.5, pytest.approx(np.nan, nan_ok=True)]
    assert rows["kimg"].tolist() == [48.0, pytest.approx(np.nan, nan_ok=True)]
    assert rows.loc["a", "metrics.recall.value"] == 0.5 and rows.loc["a", "classes.0"] == 1.5
    assert other_metrics(rows) == ["recall"]


def test_no_rows_and_rows_without_a_column_are_refused() -> None:
    with pytest.raises(ValueError, match=r"at least 1 row, got 0 \(params.yaml: rows\)"):
        frame_of([])
    broken = row("cd-8", 8, 1.0)
    del broken["nfe"], broken["kimg"]
    with pytest.raises(ValueError, match="every column in row cd-8, got none for nfe, kimg"):
        frame_of([broken])


def test_the_best_is_that_of_several_rows_with_one_number_of_steps() -> None:
    rows = frame_of([row("a", 4, 2.0), row("b", 8, 9.0), row("c", 4, 1.0), row("d", 2, 1.0)])
    assert best_per_nfe(rows) == ["c"]


# --- logs ---------------------------------------------------------------------------------------


def test_log_gives_each_loss_where_it_was_computed(tmp_path: Path) -> None:
    write_log(
        tmp_path / MODELS / "dmd2",
        {"nimg": 64, "kimg": 0.064, "lr": 1, "fake": 2},
        {"nimg": 96, "nonfinite": "student", "loss": "nan"},
        {"nimg": 128, "kimg": 0.128, "lr": 1, "fake": 4, "dm": 3},
    )
    logs = logs_frame(["dmd2"], tmp_path)
    assert list(logs.columns) == ["model", "nimg", "kimg", "name", "value"]
    curves = dict(list(logs.groupby("name", sort=False)))
    assert list(curves) == ["lr", "fake", "dm"]
    assert curves["dm"][["kimg", "value"]].to_numpy().tolist() == [[0.128, 3.0]]
    assert curves["fake"][["kimg", "value"]].to_numpy().tolist() == [[0.064, 2.0], [0.128, 4.0]]


def test_no_logs_are_a_frame_with_the_same_columns_and_types(tmp_path: Path) -> None:
    write_log(tmp_path / MODELS / "cd", {"nimg": 64, "loss": 1})
    none, some = logs_frame([], tmp_path), logs_frame(["cd"], tmp_path)
    assert len(none) == 0 and none.dtypes.equals(some.dtypes)


def test_logs_that_cannot_be_drawn_are_refused(tmp_path: Path) -> None:
    (tmp_path / MODELS / "cd").mkdir(parents=True)
    for text in ('{"loss": 1}\n', "loss\n", "[1]\n"):
        (tmp_path / MODELS / "cd" / "log.jsonl").write_text(text)
        with pytest.raises(ValueError, match="need JSON objects with nimg in .*log.jsonl"):
            logs_frame(["cd"], tmp_path)


def test_the_main_loss_is_what_the_model_says_or_the_first_that_it_logged(tmp_path: Path) -> None:
    for model in ("toy", "old"):
        write_log(
            tmp_path / MODELS / model, {"nimg": 1, "lr": 1, "loss_b": 2, "loss_a": 3, "energy": 4}
        )
    write_json(tmp_path / MODELS / "toy" / "model.json", {"main_loss": "energy"})
    write_json(tmp_path / MODELS / "old" / "model.json", {"kimg": 1})
    logs = logs_frame(["toy", "old"], tmp_path)
    found = [main_loss(model, logs, tmp_path) for model in ("toy", "old", "imported")]
    assert found == ["energy", "loss_b", None]


def test_training_times_stand_in_a_file_of_their_own(tmp_path: Path) -> None:
    times = [{"nimg": 64, "seconds": 2.0}, {"nimg": 96, "seconds": 3.0}]
    write_log(tmp_path / TIMES, *times, file="cd.jsonl")
    of = {"cd": 0.096, "cd@best": 0.064, "downloaded": None}
    found = [train_seconds(model, kimg, tmp_path) for model, kimg in of.items()]
    assert found == [3.0, 2.0, None], "the best model was trained as long as it has kimg"
