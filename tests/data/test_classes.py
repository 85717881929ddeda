"""Names of classes, and data without any, from the source to pictures."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from experiment import set_up, tiny_params
from fewstep.data.ingest import ingest
from fewstep.data.labelled import ArraySource
from fewstep.data.lmdb import ImageDataset, build_lmdb
from fewstep.data.sources import open_source
from fewstep.networks.denoiser import one_hot
from fewstep.networks.registry import build_denoiser
from fewstep.params import ParamsError
from fewstep.paths import DATA
from fewstep.report.drawn import as_file, write
from fewstep.sampling.batches import generate_batches
from fewstep.sampling.classes import chosen_classes, class_names
from fewstep.stages import build_lmdb as build_stage
from fewstep.theory.noise import Schedule

NAMES = ("T-shirt", "Coat", "Bag, small")


def pictures(folder: Path, classes: tuple[str, ...]) -> Path:
    for i, name in enumerate(classes):
        (folder / name).mkdir(parents=True, exist_ok=True)
        Image.new("L", (16, 16), 40 * i).save(folder / name / f"{i}.png")
    return folder


def test_names_of_class_folders_reach_the_lmdb(tmp_path: Path) -> None:
    source = open_source(pictures(tmp_path / "p", ("dog", "cat")), 16, 1, 2)
    manifest = ingest(source, tmp_path / "data.lmdb", silent=True)
    assert manifest["class_names"] == ["cat", "dog"]
    dataset = ImageDataset(tmp_path / "data.lmdb")
    assert dataset.class_names == ("cat", "dog")
    dataset.verify()
    again = open_source(tmp_path / "data.lmdb", 16, 1, 2)
    assert again.class_names == ("cat", "dog")


@pytest.mark.parametrize("kind", ["folders", "npz"])
def test_names_in_the_params_come_before_those_of_the_source(tmp_path: Path, kind: str) -> None:
    folder = pictures(tmp_path / "p", ("dog", "cat"))
    if kind == "npz":
        folder = tmp_path / "toy.npz"
        np.savez(folder, images=np.zeros((2, 1, 16, 16), np.uint8), labels=np.arange(2))
    source = open_source(folder, 16, 1, 2)
    manifest = ingest(source, tmp_path / "data.lmdb", class_names=("chat", "chien"), silent=True)
    assert manifest["class_names"] == ["chat", "chien"]
    assert ImageDataset(tmp_path / "data.lmdb").class_names == ("chat", "chien")


def test_the_stage_takes_names_from_the_params(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = list("abcdefghij")
    build_stage.run(set_up(tmp_path, monkeypatch, data__class_names=names))
    assert ImageDataset(DATA).class_names == tuple(names)


def test_without_names_an_lmdb_has_the_bytes_that_it_had(tmp_path: Path) -> None:
    images = np.zeros((3, 1, 4, 4), np.uint8)
    metadata = build_lmdb(ArraySource("toy", images, np.arange(3), 3), tmp_path / "toy.lmdb")
    assert list(metadata) == ["format", "images", "shape", "classes", "source", "content_sha256"]
    assert ImageDataset(tmp_path / "toy.lmdb").class_names == ()


@pytest.mark.parametrize("classes", [0, 1])
@pytest.mark.parametrize("kind", ["loose", "npz", "dataset.json"])
def test_images_without_labels_are_one_class_or_none(
    tmp_path: Path, kind: str, classes: int
) -> None:
    folder = pictures(tmp_path, (".",)) if kind != "npz" else tmp_path / "toy.npz"
    if kind == "npz":
        np.savez(folder, images=np.zeros((2, 1, 16, 16), np.uint8))
    if kind == "dataset.json":
        (folder / "dataset.json").write_text(json.dumps({"labels": None}))
    source = open_source(folder, 16, 1, classes)
    out = tmp_path / "out" / "data.lmdb"
    assert ingest(source, out, silent=True)["classes"] == classes
    assert set(ImageDataset(out).labels().tolist()) == {0}


def test_labels_do_not_count_without_classes(tmp_path: Path) -> None:
    source = open_source(pictures(tmp_path / "p", ("dog", "cat")), 16, 1, 0)
    manifest = ingest(source, tmp_path / "data.lmdb", silent=True)
    assert manifest["classes"] == 0 and "class_names" not in manifest
    labelled = ArraySource("toy", np.zeros((3, 1, 4, 4), np.uint8), np.arange(3), 3)
    build_lmdb(labelled, tmp_path / "ten.lmdb", silent=True)
    assert open_source(tmp_path / "ten.lmdb", 4, 1, 0).classes == 0


@pytest.mark.parametrize("kind", ["adm", "ddpmpp", "ncsnpp"])
def test_a_network_without_classes_trains_and_draws(tmp_path: Path, kind: str) -> None:
    given = {"data__classes": 0, "network__type": kind, "rows__dmd2-4-guided": None}
    params = tiny_params(tmp_path, **given)
    denoiser = build_denoiser(params, label_dropout=0.5)
    assert not any("map_label" in name for name in denoiser.state_dict())
    labels = one_hot(torch.zeros(2, dtype=torch.int64), 0)
    assert labels.shape == (2, 0)
    denoiser(torch.zeros(2, 1, 16, 16), torch.ones(2), labels).sum().backward()
    row = params.rows["teacher-euler-4"]
    cpu, grid = torch.device("cpu"), Schedule.of(params.noise)
    [(images, drawn)] = generate_batches(params, row, denoiser.eval(), grid, [range(3)], cpu)
    assert images.shape == (3, 1, 16, 16) and drawn.tolist() == [0, 0, 0]


def test_nothing_guides_without_classes(tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match=r"need guidance_scale 1 where data.classes is 0.*guided"):
        tiny_params(tmp_path, data__classes=0)


@pytest.mark.parametrize(
    ("text", "classes"),
    [("T-shirt", [0]), ("coat,t-shirt", [1, 0]), ("Bag, small", [2]), ("0-1,Coat", [0, 1, 1])],
)
def test_classes_are_chosen_by_name_or_number(text: str, classes: list[int]) -> None:
    assert chosen_classes(text, NAMES) == classes


def test_an_unknown_class_is_told_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="need --classes of T-shirt, Coat, .*did you mean 'Coat'"):
        chosen_classes("Cot", NAMES)


def test_names_come_from_the_model_or_else_from_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert class_names({"data": {"class_names": ["a"]}}) == ("a",) and class_names({}) == ()
    source = ArraySource("toy", np.zeros((2, 1, 4, 4), np.uint8), np.arange(2), 2, ("b", "c"))
    build_lmdb(source, "artifacts/data.lmdb", silent=True)
    assert class_names({}) == ("b", "c")


def test_pictures_are_named_by_their_classes(tmp_path: Path) -> None:
    write(tmp_path, np.zeros((2, 1, 4, 4), np.uint8), [0, 2], [5, 6], NAMES)
    names = {file.name for file in tmp_path.glob("0*.png")}
    assert names == {"000005-class0-T-shirt.png", "000006-class2-Bag-small.png"}
    assert as_file("../T-shirt/top") == "..-T-shirt-top" and as_file("/") == "unnamed"
