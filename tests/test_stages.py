"""The stages on a toy experiment: what they write, and what they refuse."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from experiment import set_up, tiny_params
from fewstep.averages import SNAPSHOTS
from fewstep.files import sha256_file
from fewstep.models import MODELS, read_safetensors, save_model
from fewstep.params import Params
from fewstep.stages import download_model, download_teacher, fid, generate, ref_stats, results_table
from fewstep.tracking import Log
from parity import structure_pickle

ROW = "teacher-euler-4"
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
    params = tiny_params(
        Path(),
        metric__reference_images=120,
        generate__images=20,
        rows={"one": {**row, "steps": 1, "guidance_scale": 1.0}, "two": row},
    )
    for student in params.students:
        (MODELS / student).mkdir()
        rows = [{"nimg": 1000, "seconds": 2.0, "loss": 0.5}, {"nimg": 2000, "seconds": 4.0}]
        Log(MODELS / student / "log.jsonl").write(rows[0])
        Log(MODELS / student / "log.jsonl").write(rows[1])
    ref_stats.run(params)
    for name in params.rows:
        generate.run(params, name)
        fid.run(params, name)
    results_table.run(params)
    with Path("results/table.csv").open(newline="") as file:
        table = {r["row"]: r for r in csv.DictReader(file)}
    assert list(table) == ["one", "two"]
    assert (table["one"]["nfe"], table["two"]["nfe"]) == ("1", "4"), "guidance doubles the calls"
    assert {r["metric"] for r in table.values()} == {"FD-EffLite0"}
    metrics = json.loads(Path("results/metrics.json").read_text())["FD-EffLite0"]
    assert metrics["one"] == float(table["one"]["value"])
    assert metrics["floor"] == pytest.approx(
        json.loads(Path("artifacts/ref-stats.json").read_text())["floor"]["value"]
    )
    assert Path("results/samples.png").read_bytes().startswith(b"\x89PNG")
    assert {file.name for file in Path("results/grids").iterdir()} == {"one.png", "two.png"}
    assert "one" in capsys.readouterr().out


def test_scores_need_a_reference_of_the_same_features(toy: Params) -> None:
    params = tiny_params(Path(), metric__reference_images=120, generate__images=20)
    ref_stats.run(params)
    generate.run(params, ROW)
    about = json.loads(ref_stats.ABOUT.read_text())
    ref_stats.ABOUT.write_text(json.dumps({**about, "metric": "FID", "detector_sha256": "1"}))
    with pytest.raises(ValueError, match="need a reference of FD-EffLite0, got FID"):
        fid.run(params, ROW)
