"""`fewstep results-table`: what all results hold, and experiments it has to cope with."""

import csv
import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import yaml

from experiment import set_up, tiny_params
from fewstep.data.lmdb import ImageDataset
from fewstep.files import read_json, write_json
from fewstep.params import Params
from fewstep.paths import DATA, MODELS, RESULTS, SAMPLES, SCORES, STATS_ABOUT
from fewstep.report.provenance import recall
from fewstep.stages import fid, generate, ref_stats, results_table
from fewstep.training.log import Log
from scored import ABOUT, row, write_log

DVC = Path(__file__).parents[2] / "dvc.yaml"


def outs_of_results() -> list[str]:
    """Paths; an out with options is a mapping of its path to them."""
    outs = yaml.safe_load(DVC.read_text())["stages"]["results-table"]["outs"]
    return [out if isinstance(out, str) else next(iter(out)) for out in outs]


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Params:
    return set_up(tmp_path, monkeypatch)


@pytest.mark.filterwarnings("ignore:need 113 images")
def test_rows_are_scored_and_tabled(toy: Params, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"model": "teacher", "sampler": "ddim", "steps": 2, "guidance_scale": 2.0}
    churn = {"S_churn": 10.0, "S_min": 0.05, "S_max": 50.0, "S_noise": 1.003}
    params = tiny_params(
        Path(),
        metric__reference_images=120,
        generate__images=20,
        generate__seed_ranges=2,
        rows={
            "one": {**row, "steps": 1, "guidance_scale": 1.0},
            "two": {**row, "seed_ranges": 1},
            "churn": {**row, "sampler": "churn", "guidance_scale": 1.0, "churn": churn},
        },
    )
    for student in params.students:
        (MODELS / student).mkdir()
        rows = [{"nimg": 1000, "seconds": 2.0, "loss": 0.5}, {"nimg": 2000, "seconds": 4.0}]
        Log(MODELS / student / "log.jsonl").write({"nimg": 0, "validation/teacher_FD": 3.0})
        found = {"validation/FD": 9.0, "validation/recall": 0.5, "validation/real_brightness": 0.3}
        Log(MODELS / student / "log.jsonl").write({"nimg": 500, **found})
        Log(MODELS / student / "log.jsonl").write(rows[0])
        Log(MODELS / student / "log.jsonl").write(rows[1])
    ref_stats.run(params)
    for name in params.rows:
        generate.run(params, name)
        fid.run(params, name)
    results_table.run(params)
    with Path("results/table.csv").open(newline="") as file:
        table = {r["row"]: r for r in csv.DictReader(file)}
    assert list(table) == ["one", "two", "churn"]
    assert [r["nfe"] for r in table.values()] == ["1", "4", "3"], "guidance doubles the calls"
    assert [r["seed_ranges"] for r in table.values()] == ["2", "1", "2"]
    caption = " ".join(Path("results/table.md").read_text().split())
    assert "from 0 to 39, the same in every row (two: to 19)" in caption
    assert {r["metric"] for r in table.values()} == {"FD-EffLite0"}
    metrics = json.loads(Path("results/metrics.json").read_text())
    ((column, metrics),) = metrics.items()
    data = ImageDataset(DATA).content_sha256()
    against = hashlib.sha256(f"{data} 120 ".encode()).hexdigest()
    assert column == f"FD-EffLite0-{against[:4]}"
    assert metrics["one"] == float(table["one"]["value"])
    assert metrics["floor"] == pytest.approx(
        json.loads(Path("artifacts/ref-stats.json").read_text())["floor"]["value"],
        rel=5e-3,
    )
    assert Path("results/samples.png").read_bytes().startswith(b"\x89PNG")
    assert {file.name for file in Path("results/grids").iterdir()} == {
        "one.png",
        "two.png",
        "churn.png",
    }
    curve = Path("results/validation/cd.csv").read_text()
    assert curve == "kimg,distance,recall\n0.5,9.0,0.5\n", "its own, without the teacher's"
    assert "one" in capsys.readouterr().out
    runs = json.loads(Path("results/provenance.json").read_text())
    for what in ("samples", "scores"):
        assert list(runs[what]) == list(table)
        assert all(run["hardware"] == runs["results"]["hardware"] for run in runs[what].values())
    shutil.rmtree("results")
    results_table.run(replace(params, students=MappingProxyType({})))
    outputs = outs_of_results()
    assert all(Path(out).exists() for out in outputs), "without students, too"
    (SAMPLES / "one.npz").write_bytes(b"made elsewhere")
    assert recall("samples/one", SAMPLES / "one.npz") is None


# --- on scores and samples that are written by hand ---------------------------------------------


@pytest.fixture
def scored(toy: Params) -> Params:
    """A row of each model; logs of all students but the last, whose loss has a name of its own."""
    hashes = {"detector_sha256": "d" * 64, "data_sha256": "a" * 64, "reference_sha256": "b" * 64}
    about = {**ABOUT, **hashes, "metric": "FD-EffLite0", "detector": {"features": "x"}}
    write_json(STATS_ABOUT, {**about, "looked_through": None})
    rows = {model: {"model": model, "sampler": "ddim"} for model in ("teacher", *toy.students)}
    SAMPLES.mkdir(parents=True)
    for name in rows:
        known: dict[str, Any] = {"model": name, "rounding": "truncated", "notes": [], **hashes}
        write_json(SCORES / f"{name}.json", row(name, 8, 14.7, **known))
        images = np.zeros((20, 1, 16, 16), np.uint8)
        np.savez(SAMPLES / f"{name}.npz", images=images, labels=np.arange(20) % 10)
    for student in toy.students:
        write_log(MODELS / student, {"nimg": 500, "lr": 1, "energy": 1}, {"nimg": 500, "loss_e": 7})
    of = {"steps": 8, "guidance_scale": 1.0}
    return tiny_params(
        Path(), generate__images=20, rows={name: {**row, **of} for name, row in rows.items()}
    )


def test_the_labels_of_the_data_are_read_once_and_not_for_each_class_shown(
    scored: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, labels = [], ImageDataset.labels

    def counted(self: ImageDataset) -> np.ndarray:
        read.append(self)
        return labels(self)

    for student in scored.students:
        write_log(MODELS / student, {"nimg": 1000, "loss": 0.5})
    monkeypatch.setattr(ImageDataset, "labels", counted)
    results_table.run(scored)
    assert len(read) == 1


def test_a_loss_may_have_any_name(scored: Params) -> None:
    first, second, *_ = scored.students
    write_json(MODELS / first / "model.json", {"main_loss": "energy"})
    results_table.run(scored)
    assert (RESULTS / "losses" / f"{first}.csv").read_text() == "kimg,loss\n0.5,1.0\n"
    assert (RESULTS / "losses" / f"{second}.csv").read_text() == "kimg,loss\n0.5,7.0\n"


def test_an_experiment_without_students_has_all_results(scored: Params) -> None:
    teacher = {"teacher": scored.rows["teacher"]}
    results_table.run(replace(scored, students=MappingProxyType({}), rows=teacher))
    outputs = outs_of_results()
    assert all(Path(out).exists() for out in outputs)
    assert list((RESULTS / "losses").iterdir()) == []
    (values,) = read_json(RESULTS / "metrics.json").values()
    assert values == {"teacher": 14.7, "floor": 2.41}
