"""The stages on a toy experiment: what they write, and what they refuse."""

import ast
import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from experiment import set_up, tiny_params
from fewstep import evaluate
from fewstep.averages import SNAPSHOTS
from fewstep.data.lmdb import ImageDataset
from fewstep.files import sha256_file
from fewstep.fingerprint import CODE
from fewstep.models import MODELS, read_safetensors, save_model
from fewstep.params import Params
from fewstep.provenance import recall
from fewstep.sample import SeededNoise
from fewstep.stages import download_model, download_teacher, fid, generate, ref_stats, results_table
from fewstep.stages.generate import SAMPLES
from fewstep.tracking import Log
from fewstep.train import DATA
from parity import structure_pickle

ROW = "teacher-euler-4"
DVC = Path(__file__).parents[1] / "dvc.yaml"
SRC = DVC.parent / "src" / "fewstep"
VECTORS = Path(__file__).parent / "data" / "parity"


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Params:
    return set_up(tmp_path, monkeypatch)


def published_teacher() -> str:
    """Move the toy's teacher to where a download would take it from; gives its sha256."""
    (MODELS / "teacher" / "model.safetensors").rename("weights.safetensors")
    return sha256_file("weights.safetensors")


def test_a_downloaded_teacher_is_verified_and_written(toy: Params) -> None:
    sha256 = published_teacher()
    params = tiny_params(Path(), teacher={"url": "weights.safetensors", "sha256": sha256})
    download_teacher.run(params)
    ours, about = read_safetensors(MODELS / "teacher" / "model.safetensors")
    theirs, _ = read_safetensors(Path("weights.safetensors"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs) and len(ours) == len(
        theirs
    )
    assert about["sha256"] == sha256 and about["kimg"] == 0.0


def test_an_edm_pickle_is_a_teacher_too(toy: Params) -> None:
    file = Path("teacher.pkl")
    file.write_bytes(structure_pickle(VECTORS))
    params = tiny_params(
        Path(),
        teacher={"url": str(file), "sha256": sha256_file(file)},
        network__model_channels=32,
        data__channels=3,
    )
    download_teacher.run(params)
    ours, about = read_safetensors(MODELS / "teacher" / "model.safetensors")
    assert ours["model.enc.16x16_conv.weight"].shape == (32, 3, 3, 3)
    assert about["model_type"] == "DhariwalUNet"


def test_an_import_is_a_model_without_log_and_snapshots(toy: Params) -> None:
    sha256 = published_teacher()
    params = tiny_params(
        Path(), imports={"theirs": {"url": "weights.safetensors", "sha256": sha256}}
    )
    download_model.run(params, "theirs")
    assert (MODELS / "theirs" / "model.safetensors").exists()
    assert Log(MODELS / "theirs" / "log.jsonl").rows() == []
    assert list((SNAPSHOTS / "theirs").iterdir()) == []
    with pytest.raises(ValueError, match="need an import of: theirs, got 'other'.*imports"):
        download_model.run(params, "other")


def test_a_teacher_with_another_sha256_is_refused(toy: Params) -> None:
    published_teacher()
    params = tiny_params(Path(), teacher={"url": "weights.safetensors", "sha256": "0" * 64})
    with pytest.raises(ValueError, match=r"0{64}.*teacher\.sha256"):
        download_teacher.run(params)
    assert not (MODELS / "teacher" / "model.safetensors").exists()


def test_a_teacher_that_does_not_fit_the_params_is_refused(toy: Params) -> None:
    teacher = {"url": "weights.safetensors", "sha256": published_teacher()}
    params = tiny_params(Path(), teacher=teacher, network__num_blocks=2)
    with pytest.raises(ValueError, match="weights.safetensors does not fit the network"):
        download_teacher.run(params)
    assert not (MODELS / "teacher" / "model.safetensors").exists()


@pytest.mark.parametrize("sampler", ["heun", "euler", "ddim", "renoise"])
def test_images_depend_on_their_seed_not_on_the_batch(toy: Params, sampler: str) -> None:
    images = []
    for batch, first, count in [(8, 0, 8), (3, 0, 8), (2, 5, 3)]:
        overrides = {f"rows__{ROW}__sampler": sampler, "generate__images": count}
        split = {"generate__batch": batch, "generate__first_seed": first}
        params = tiny_params(Path(), **overrides, **split)
        generate.run(params, ROW)
        with np.load(generate.SAMPLES / f"{ROW}.npz") as samples:
            images.append(samples["images"].astype(int))
            assert list(samples["seeds"]) == list(range(first, first + count))
    assert np.abs(images[0] - images[1]).max() <= 1, "a grey level of rounding"
    assert np.abs(images[0][5:8] - images[2]).max() <= 1


def test_labels_are_balanced_or_drawn_from_the_seed(toy: Params) -> None:
    for policy, expected in [("balanced", [0, 1, 2, 3, 4, 5]), ("random", None)]:
        params = tiny_params(Path(), generate__labels=policy, generate__images=6)
        generate.run(params, ROW)
        with np.load(generate.SAMPLES / f"{ROW}.npz") as samples:
            labels = samples["labels"].tolist()
        assert labels == expected if expected else labels != [0, 1, 2, 3, 4, 5]


def test_an_interrupted_row_goes_on_with_the_batches_it_has(
    toy: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = tiny_params(Path(), generate__images=10, generate__batch=4, generate__seed_ranges=2)
    generate.run(params, ROW)
    whole = (generate.SAMPLES / f"{ROW}.npz").read_bytes()
    asked: list[range] = []

    class DiesAtTheThird(SeededNoise):
        def __init__(self, seeds: range, *rest: Any) -> None:  # noqa: ANN401
            asked.append(seeds)
            if len(asked) == 3:
                raise KeyboardInterrupt
            super().__init__(seeds, *rest)

    monkeypatch.setattr(evaluate, "SeededNoise", DiesAtTheThird)
    with pytest.raises(KeyboardInterrupt):
        generate.run(params, ROW)
    generate.run(params, ROW)
    assert asked[2:] == [range(8, 10), range(8, 10), range(10, 14), range(14, 18), range(18, 20)]
    assert (generate.SAMPLES / f"{ROW}.npz").read_bytes() == whole
    assert not (generate.SCRATCH / ROW).exists()


@pytest.mark.parametrize("change", [{f"rows__{ROW}__steps": 3}, {"generate__labels": "random"}])
def test_batches_of_other_params_are_not_used(toy: Params, change: dict[str, object]) -> None:
    folders = [
        generate.fingerprint(params, params.rows[ROW], torch.device("cpu"))
        for params in (tiny_params(Path()), tiny_params(Path(), **change))
    ]
    assert folders[0] != folders[1]


def imported(module: str) -> set[str]:
    """That module of fewstep and those that it imports, at the top or within a function."""
    found, waiting = set[str](), {module}
    while waiting:
        found.add(name := waiting.pop())
        for node in ast.walk(ast.parse((SRC / f"{name}.py").read_text())):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("fewstep"):
                names = [node.module] if node.module != "fewstep" else [a.name for a in node.names]
                waiting |= {str(name).removeprefix("fewstep.") for name in names}
        waiting -= found | {"distributed"}  # it moves values and computes none
    return found


def test_nothing_begun_outlives_the_code_of_networks_and_samplers() -> None:
    assert {"unet", "norms"} < imported("denoiser") <= set(CODE)
    assert imported("denoiser") < imported("sample") <= set(generate.CODE)


def test_images_that_are_not_finite_stop_the_row(toy: Params) -> None:
    weights, about = read_safetensors(MODELS / "teacher" / "model.safetensors")
    weights["model.out_conv.bias"].fill_(float("nan"))
    save_model(MODELS / "teacher", weights, about)
    with pytest.raises(
        FloatingPointError, match="teacher gave images that are not finite: euler, 4 steps"
    ):
        generate.run(toy, ROW)
    assert not (generate.SAMPLES / f"{ROW}.npz").exists()


def test_a_reference_larger_than_the_data_is_refused(toy: Params) -> None:
    with pytest.raises(ValueError, match=r"need 256 \+ 64 disjoint images, got 200 .*reference_im"):
        ref_stats.run(toy)


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
        Log(MODELS / student / "log.jsonl").write({"nimg": 500, "validation/FD": 9.0})
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
    caption = Path("results/table.md").read_text()
    assert "from 0 to 39, the same in every row (two: to 19)" in caption
    assert {r["metric"] for r in table.values()} == {"FD-EffLite0"}
    metrics = json.loads(Path("results/metrics.json").read_text())
    ((column, metrics),) = metrics.items()
    data = ImageDataset(DATA).content_sha256()
    assert column == f"FD-EffLite0-ref-{data[:8]}-120"
    assert metrics["one"] == float(table["one"]["value"])
    assert metrics["floor"] == pytest.approx(
        json.loads(Path("artifacts/ref-stats.json").read_text())["floor"]["value"]
    )
    assert Path("results/samples.png").read_bytes().startswith(b"\x89PNG")
    assert {file.name for file in Path("results/grids").iterdir()} == {
        "one.png",
        "two.png",
        "churn.png",
    }
    curve = Path("results/validation/cd.csv").read_text()
    assert curve == "kimg,distance\n0.5,9.0\n", "the student's own, without the teacher's"
    assert "one" in capsys.readouterr().out
    runs = json.loads(Path("results/provenance.json").read_text())
    for what in ("samples", "scores"):
        assert list(runs[what]) == list(table)
        assert all(run["hardware"] == runs["results"]["hardware"] for run in runs[what].values())
    shutil.rmtree("results")
    results_table.run(replace(params, students=MappingProxyType({})))
    outputs = yaml.safe_load(DVC.read_text())["stages"]["results-table"]["outs"]
    assert all(Path(out).exists() for out in outputs), "without students, too"
    (SAMPLES / "one.npz").write_bytes(b"made elsewhere")
    assert recall("samples/one", SAMPLES / "one.npz") is None


@pytest.mark.filterwarnings("ignore:need 113 images")
def test_a_score_says_how_it_was_measured_and_has_all_metrics_asked_for(toy: Params) -> None:
    params = tiny_params(
        Path(),
        generate__images=20,
        generate__seed_ranges=2,
        metric__reference_images=120,
        metric__kid={"subsets": 3, "subset_size": 10},
        metric__manifold={"k": 3, "density_k": 5},
        metric__memorisation={"k": 2, "expected": 0.1, "images": 200},
    )
    ref_stats.run(params)
    generate.run(params, ROW)
    fid.run(params, ROW)
    text = (fid.SCORES / f"{ROW}.json").read_text()
    score = json.loads(text)
    names = ["FD-EffLite0", "KD-EffLite0", "precision", "recall", "density", "coverage"]
    assert list(score["metrics"]) == [*names, "memorised"]
    for found in score["metrics"].values():
        assert found["value"] == pytest.approx(np.mean(found["values"])) and found["std_of"] == (
            "ranges"
        )
        assert found["std"] == pytest.approx(np.std(found["values"], ddof=1))
    assert (score["images"], score["seed_ranges"], score["labels"]) == (20, 2, "balanced")
    assert score["reference_sha256"] == sha256_file(ref_stats.STATS)
    assert score["ema"] is None and "truncated" in score["rounding"]
    assert any(note.startswith("need 113 images") for note in score["notes"])
    nearest = score["neighbours"][0]
    assert nearest["seed"] == nearest["image"] and len(nearest["training"]) == 2
    assert list(score["classes"]) == [str(c) for c in range(10)]
    fid.run(params, ROW)
    assert (fid.SCORES / f"{ROW}.json").read_text() == text, "nothing of the clock or machine"


def test_a_copied_training_image_is_found_as_such(toy: Params) -> None:
    params = tiny_params(
        Path(),
        generate__images=20,
        metric__reference_images=120,
        metric__memorisation={"k": 1, "expected": 0.1, "images": 200},
    )
    ref_stats.run(params)
    generate.run(params, ROW)
    dataset = ImageDataset(DATA)
    with np.load(generate.SAMPLES / f"{ROW}.npz") as samples:
        arrays = dict(samples)
    arrays["images"][7] = dataset.read([163])[0][0]
    np.savez(generate.SAMPLES / f"{ROW}.npz", **arrays)
    fid.run(params, ROW)
    nearest = json.loads((fid.SCORES / f"{ROW}.json").read_text())["neighbours"][0]
    assert nearest["image"] == 7 and nearest["training"] == [163]
    assert nearest["distances"][0] < 1e-3 and nearest["near_duplicate"]


def test_scores_need_a_reference_of_the_same_features(toy: Params) -> None:
    params = tiny_params(Path(), metric__reference_images=120, generate__images=20)
    ref_stats.run(params)
    generate.run(params, ROW)
    about = json.loads(ref_stats.ABOUT.read_text())
    ref_stats.ABOUT.write_text(json.dumps({**about, "metric": "FID", "detector_sha256": "1"}))
    with pytest.raises(ValueError, match="need a reference of FD-EffLite0, got FID"):
        fid.run(params, ROW)
