"""`fewstep import`: others' checkpoints become models of ours, in names that are free."""

import json
from pathlib import Path

import pytest
import torch
import yaml

import parity
from experiment import tiny_params
from fewstep.cli import main
from fewstep.networks.weights import read_safetensors
from fewstep.params import ParamsError
from fewstep.paths import MODELS
from fewstep.stages import import_ as stage
from places import VECTORS


def published(folder: Path) -> Path:
    """The recorded network of 16x16 RGB images as a file of DMD2."""
    weights = parity.Vectors(VECTORS, "weights_a.npz").under("weights/")
    torch.save(weights | {"model.map_augment.weight": torch.zeros(32, 9)}, folder / "student.bin")
    return folder / "student.bin"


FITS = {"network__model_channels": 32, "data__channels": 3}


def test_a_checkpoint_becomes_a_model_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    stage.run(tiny_params(tmp_path, **FITS), str(published(tmp_path)))
    weights, about = read_safetensors(Path("artifacts/models/student/model.safetensors"))
    recorded = parity.Vectors(VECTORS, "weights_a.npz").under("weights/")
    assert all(torch.equal(weights[name], recorded[name]) for name in recorded)
    assert json.loads(Path("artifacts/models/student/model.json").read_text()) == about
    assert about["left_out"] == ["model.map_augment.weight"] and about["source"] == "student.bin"
    out = capsys.readouterr().out
    assert "student.bin: torch archive, sha256" in out and "model_channels: 32" in out
    assert "left out: model.map_augment.weight" in out
    stage.run(tiny_params(tmp_path, **FITS), "artifacts/models/student", out=Path("elsewhere"))
    assert read_safetensors(Path("elsewhere/model.safetensors"))[1]["format"] == "safetensors"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("network__model_channels", 64, r"need network\.model_channels 32, got 64 \(params\.yaml"),
        (
            "network__channel_mult",
            [1, 2, 2],
            r"need network\.channel_mult \[1, 2\], got \[1, 2, 2\]",
        ),
        ("network__num_blocks", 3, r"need network\.num_blocks 1, got 3"),
        ("network__type", "ddpmpp", r"need network\.type adm, got ddpmpp"),
        ("network__attn_resolutions", [16], r"attn_resolutions \[8\], got \[16\]"),
        ("data__classes", 11, r"need data\.classes 10, got 11 \(params\.yaml: data\.classes\)"),
        ("data__channels", 1, r"need data\.channels 3, got 1"),
        ("data__resolution", 32, r"need data\.resolution 16, got 32"),
    ],
)
def test_what_does_not_fit_is_named_by_its_key(
    tmp_path: Path, key: str, value: object, message: str
) -> None:
    levels = {"network__attn_resolutions": [16]} if key == "data__resolution" else {}
    params = tiny_params(tmp_path, **{**FITS, **levels, key: value})
    with pytest.raises(ValueError, match=message):
        stage.run(params, str(published(tmp_path)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    weights = parity.Vectors(VECTORS, "weights_a.npz").under("weights/")
    weights["model.out_conv.bias"][0] = float("inf")
    torch.save(weights, tmp_path / "x.bin")
    with pytest.raises(FloatingPointError, match="need finite images .* not finite from .*x.bin"):
        stage.run(tiny_params(tmp_path, **FITS), str(tmp_path / "x.bin"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- names that are taken ------------------------------------------------------------------------


def test_names_are_those_of_files_without_what_names_cannot_have() -> None:
    names = {
        "network-snapshot-000100-0.050.pkl": "network-snapshot-000100-0-050",
        "runs/dmd2-10/model.safetensors": "dmd2-10",
        "runs/dmd2 10/pytorch_model.bin": "dmd2-10",
        "../teacher.pkl": "teacher",
        "é.pkl": "imported",
    }
    assert {path: stage.name_of(Path(path)) for path in names} == names


@pytest.mark.parametrize("name", ["teacher", "cd", "theirs"])
def test_networks_of_the_params_are_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    imports = {"theirs": {"url": "theirs.pkl", "sha256": "0" * 64}}
    params = tiny_params(tmp_path, **FITS, imports=imports)
    (tmp_path / f"{name}.bin").write_bytes(published(tmp_path).read_bytes())
    with pytest.raises(ValueError, match=f"need a name that is free, got {name}, .*--force"):
        stage.run(params, f"{name}.bin")
    assert not (MODELS / name).exists()
    stage.run(params, f"{name}.bin", force=True)
    assert (MODELS / name / "model.safetensors").is_file()


def test_a_folder_with_something_in_it_is_replaced_by_force_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    params = tiny_params(tmp_path, **FITS)
    stage.run(params, str(published(tmp_path)))
    before = (MODELS / "student" / "model.json").read_bytes()
    for out in (None, MODELS / "student", tmp_path):
        with pytest.raises(ValueError, match="need a folder that is new or empty, got .*--force"):
            stage.run(params, str(published(tmp_path)), out)
    assert (MODELS / "student" / "model.json").read_bytes() == before
    source = "artifacts/models/student"
    with pytest.raises(ValueError, match="need a folder that is new or empty, got .*student"):
        stage.run(params, f"{source}/model.safetensors", Path(source))
    stage.run(params, source, force=True)
    assert read_safetensors(MODELS / "student" / "model.safetensors")[1]["source"] == "student"


def test_it_says_what_can_be_done_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    published(tmp_path)
    stage.run(tiny_params(tmp_path, **FITS), "student.bin")
    out = capsys.readouterr().out
    assert "fewstep sample student\n" in out and "students.<name>.init_from: student" in out
    row = "{ model: student, sampler: heun, steps: 18, guidance_scale: 1.0 }"
    assert f"measure it: rows: student: {row} (params.yaml)" in out


def test_what_was_imported_is_a_model_of_the_params(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the model of a row and as a start; `download-model` would make the same."""
    monkeypatch.chdir(tmp_path)
    tiny_params(tmp_path, **FITS)
    (tmp_path / "folder").mkdir()
    published(tmp_path).rename("folder/pytorch_model.bin")
    main(["import", "folder"])
    made = (MODELS / "folder" / "model.safetensors").read_bytes()
    raw = yaml.safe_load(Path("params.yaml").read_text())
    assert set(raw["imports"]["folder"]) == {"url", "sha256"}
    raw["rows"]["cd-4"]["model"] = raw["students"]["cd"]["init_from"] = "folder"
    Path("params.yaml").write_text(yaml.safe_dump(raw, sort_keys=False))
    main(["download-model", "folder"])
    assert (MODELS / "folder" / "model.safetensors").read_bytes() == made
    raw["imports"]["folder"]["sha256"] = "0" * 64
    Path("params.yaml").write_text(yaml.safe_dump(raw, sort_keys=False))
    with pytest.raises(SystemExit, match="need sha256 000.*of the checkpoint in folder"):
        main(["download-model", "folder"])
    del raw["imports"]["folder"]["sha256"]  # a local one needs none
    Path("params.yaml").write_text(yaml.safe_dump(raw, sort_keys=False))
    main(["download-model", "folder"])


def test_weights_at_an_address_need_a_checksum(tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match=r"need the sha256 of a file at an address.*imports.a.sh"):
        tiny_params(tmp_path, imports={"a": {"url": "https://example.org/a.pt"}})


def test_an_entry_of_imports_keeps_what_is_around_it() -> None:
    block = {"url": "b.bin", "sha256": "0a"}
    line = "  b: {sha256: 0a, url: b.bin}\n"
    assert stage.with_import("imports: {} # none\na: 1\n", "b", block) == f"imports:\n{line}a: 1\n"
    text = "imports:\n  c: { url: c } # C\n\n# A\na: 1\n"
    after = stage.with_import(text, "b", block)
    assert after == f"imports:\n  c: {{ url: c }} # C\n{line}\n# A\na: 1\n"
    assert stage.with_import(after, "b", block) == after
