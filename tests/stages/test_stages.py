"""The stages on a toy experiment: what they write, and what they refuse."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from experiment import set_up, tiny_params
from fewstep.data.lmdb import ImageDataset
from fewstep.files import sha256_file
from fewstep.networks.weights import read_safetensors
from fewstep.params import Params
from fewstep.paths import DATA, MODELS, SAMPLES, SCORES, SNAPSHOTS, STATS, STATS_ABOUT
from fewstep.stages import download_model, download_teacher, fid, generate, ref_stats
from fewstep.training.log import Log
from parity import structure_pickle
from places import VECTORS

ROW = "teacher-euler-4"


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


def test_a_reference_larger_than_the_data_is_refused(toy: Params) -> None:
    with pytest.raises(ValueError, match=r"need 256 \+ 64 disjoint images, got 200 .*reference_im"):
        ref_stats.run(toy)


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
    text = (SCORES / f"{ROW}.json").read_text()
    score = json.loads(text)
    names = ["FD-EffLite0", "KD-EffLite0", "precision", "recall", "density", "coverage"]
    assert list(score["metrics"]) == [*names, "memorised"]
    for found in score["metrics"].values():
        assert found["value"] == pytest.approx(np.mean(found["values"])) and found["std_of"] == (
            "ranges"
        )
        assert found["std"] == pytest.approx(np.std(found["values"], ddof=1))
    assert (score["images"], score["seed_ranges"], score["labels"]) == (20, 2, "balanced")
    assert score["reference_sha256"] == sha256_file(STATS)
    assert score["ema"] is None and "truncated" in score["rounding"]
    assert any(note.startswith("need 113 images") for note in score["notes"])
    nearest = score["neighbours"][0]
    assert nearest["seed"] == nearest["image"] and len(nearest["training"]) == 2
    assert list(score["classes"]) == [str(c) for c in range(10)]
    fid.run(params, ROW)
    assert (SCORES / f"{ROW}.json").read_text() == text, "nothing of the clock or machine"


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
    with np.load(SAMPLES / f"{ROW}.npz") as samples:
        arrays = dict(samples)
    arrays["images"][7] = dataset.read([163])[0][0]
    np.savez(SAMPLES / f"{ROW}.npz", **arrays)
    fid.run(params, ROW)
    nearest = json.loads((SCORES / f"{ROW}.json").read_text())["neighbours"][0]
    assert nearest["image"] == 7 and nearest["training"] == [163]
    assert nearest["distances"][0] < 1e-3 and nearest["near_duplicate"]


def test_scores_need_a_reference_of_the_same_features(toy: Params) -> None:
    params = tiny_params(Path(), metric__reference_images=120, generate__images=20)
    ref_stats.run(params)
    generate.run(params, ROW)
    about = json.loads(STATS_ABOUT.read_text())
    STATS_ABOUT.write_text(json.dumps({**about, "metric": "FID", "detector_sha256": "1"}))
    with pytest.raises(ValueError, match="need a reference for FD-EffLite0, got FID"):
        fid.run(params, ROW)
