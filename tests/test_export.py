"""Exported students, run by the other program, draw our images.

Needs the extra `export` for ONNX and diffusers; without it those tests are skipped.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from experiment import tiny_params
from fewstep import export
from fewstep.cli import main
from fewstep.export.bundle import bundle
from fewstep.export.program import inputs
from fewstep.files import sha256_file
from fewstep.model import Model, load
from fewstep.networks.registry import build_denoiser
from fewstep.networks.weights import save_model
from fewstep.params import plain
from fewstep.paths import MODELS, SCORES

SEEDS = range(5)  # another batch than the one that is traced
SLOW = pytest.param("ncsnpp", marks=pytest.mark.slow)
CASES = {"ddim": ("ddim", 2, 1.0), "renoise": ("renoise", 2, 1.5), "heun": ("heun", 2, 1.0)}


@pytest.fixture
def student(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Model:
    """A small network with random weights, as a training leaves it, in a project's folder.

    `request.param` is its type.
    """
    monkeypatch.chdir(tmp_path)
    kind = getattr(request, "param", "adm")
    toy = tiny_params(
        tmp_path,
        network__type=kind,
        network__model_channels=8,
        network__channel_mult=[1, 1] if kind == "ncsnpp" else [1],  # which resamples otherwise
        network__attn_resolutions=[16],
        data__source="/home/someone/secret/toy.npz",
    )
    torch.manual_seed(0)
    denoiser = build_denoiser(toy)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    about = {
        "name": "cd",
        "kimg": 2.0,
        "network": plain(toy.network),
        "data": {**plain(toy.data), "sha256": "a" * 64},
        "sampling": {"sampler": "ddim", "steps": 2, **vars(toy.noise)},
    }
    save_model(MODELS / "cd", denoiser.state_dict(), about)
    return load(MODELS / "cd", device="cpu")


def ours(student: Model, case: str) -> np.ndarray:
    sampler, steps, scale = CASES[case]
    return student.sample(seeds=SEEDS, sampler=sampler, steps=steps, guidance_scale=scale)


def exported(case: str, to: str, out: str) -> Path:
    sampler, steps, scale = CASES[case]
    how = f"--sampler {sampler} --steps {steps} --guidance {scale} --out {out}"
    main(["export", "cd", "--to", to, *how.split()])
    return Path(out)


def differ(images: np.ndarray, other: np.ndarray) -> int:
    """The largest difference in grey levels."""
    assert images.dtype == other.dtype == np.uint8 and images.shape == other.shape
    return int(np.abs(images.astype(int) - other).max())


@pytest.mark.parametrize(
    ("case", "student"),
    [*((case, "adm") for case in CASES), ("renoise", "ncsnpp")],
    indirect=["student"],
)
def test_onnxruntime_draws_our_images(case: str, student: Model) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    file = exported(case, "onnx", "x.onnx")
    session = runtime.InferenceSession(file, providers=["CPUExecutionProvider"])
    sampler, steps, scale = CASES[case]
    given = inputs(student, student.row(sampler, steps, scale), SEEDS)
    assert [i.name for i in session.get_inputs()] == ["latents", "labels", "noise"][: len(given)]
    assert session.get_inputs()[0].shape[0] == "batch"
    feed = {i.name: g.numpy() for i, g in zip(session.get_inputs(), given, strict=True)}
    [images] = session.run(None, feed)
    assert differ(images, ours(student, case)) <= 1
    said = session.get_modelmeta().custom_metadata_map
    assert said["name"] == "cd" and said["license"].startswith("not stated. The weights derive")
    assert sha256_file(MODELS / "cd" / "model.safetensors") in said["origin"]


PLAIN = """
import sys, numpy as np, torch
program = torch.export.load("x.pt2").module()
np.save("images.npy", program(*torch.load("inputs.pt")).numpy())
assert not any(name.startswith("fewstep") for name in sys.modules)
"""


@pytest.mark.parametrize("student", ["adm", SLOW], indirect=True)
def test_plain_torch_draws_our_images(student: Model) -> None:
    exported("renoise", "torch", "x.pt2")
    sampler, steps, scale = CASES["renoise"]
    torch.save(inputs(student, student.row(sampler, steps, scale), SEEDS), "inputs.pt")
    subprocess.run([sys.executable, "-c", PLAIN], check=True)
    assert differ(np.load("images.npy"), ours(student, "renoise")) <= 1


WITHOUT_US = """
import sys
class Refused:
    def find_spec(self, name, *_):
        if name.split(".")[0] == "fewstep":
            raise ImportError("fewstep is not there")
sys.meta_path.insert(0, Refused())
sys.modules["torchvision"] = None  # which does not import beside a CPU build of torch
import numpy as np
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained("p", custom_pipeline="p", trust_remote_code=True)
pipeline.set_progress_bar_config(disable=True)
np.save("images.npy", pipeline(seeds=range(5), output_type="np").images)
pictures = pipeline(class_labels=[1, 0]).images
assert len(pictures) == 2 and pictures[0].size == (16, 16)
"""


@pytest.mark.parametrize("student", ["adm", SLOW], indirect=True)
def test_diffusers_draws_our_images_without_us(
    student: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("diffusers")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))  # where it copies the folder's code
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    exported("renoise", "diffusers", "p")
    done = subprocess.run([sys.executable, "-c", WITHOUT_US], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert differ(np.load("images.npy"), ours(student, "renoise")) <= 1
    assert "license: other" in Path("p/README.md").read_text()


@pytest.mark.parametrize(("kind", "name"), [("ddpmpp", "DDPMpp"), ("ncsnpp", "NCSNpp")])
def test_bundled_code_stands_alone(kind: str, name: str) -> None:
    template = (
        "from fewstep.networks.denoiser import Denoiser\nfrom fewstep.networks.adm import ADM\n"
    )
    code = bundle(template, {"fewstep.networks.adm": f"fewstep.networks.{kind}"})
    found: dict[str, Any] = {"__name__": "bundled"}
    sys.modules["bundled"] = type(sys)("bundled")  # where dataclasses look
    exec(compile(code, "bundled.py", "exec"), found)
    assert found["NETWORK"].__name__ == name and "ADM" not in found
    assert "from fewstep" not in code.replace("from fewstep.networks import cpu_norm", "")


def test_a_hub_folder_is_a_model_with_a_card(student: Model) -> None:
    sha256 = sha256_file(MODELS / "cd" / "model.safetensors")
    SCORES.mkdir(parents=True)
    row = {"row": "cd-2", "sampler": "ddim", "steps": 2, "nfe": 2, "guidance_scale": 1.0}
    row |= {"metric": "FD-EffLite0", "value": 12.345, "std": 0.5, "images": 2000}
    for name, of in (("cd-2", sha256), ("old", "0" * 64)):
        (SCORES / f"{name}.json").write_text(json.dumps({**row, "row": name, "model_sha256": of}))
    log = [{"nimg": 1000 * n, "loss": 1 / n} for n in (1, 2)]
    (MODELS / "cd" / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    file = MODELS / "cd" / "model.safetensors"  # as its name does, it leads to scores and curves
    main(f"export {file} --to hub --license cc-by-4.0 --out h".split())
    again = load("h", device="cpu")
    assert np.array_equal(again.sample(seeds=SEEDS), ours(student, "ddim"))
    front, text = Path("h/README.md").read_text().removeprefix("---\n").split("---\n", 1)
    assert yaml.safe_load(front)["license"] == "cc-by-4.0"
    assert "| cd-2 | ddim | 2 | 2 | 1.0 | FD-EffLite0 | 12.35 ± 0.50 | 2,000 |" in text
    assert "| old |" not in text, "a score of other weights"
    assert sha256 in text and "toy.npz" in text and "is no FID" in text
    everything = b"".join(f.read_bytes() for f in Path("h").iterdir())
    assert b"someone" not in everything, "folders of a person"
    made = {"README.md", "model.json", "model.safetensors", "samples.png", "curves.png"}
    assert {f.name for f in Path("h").iterdir()} == made
    assert "need a place that is free, got h" in refusal("export cd --to hub --out h")


def refusal(command: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main(command.split())
    return str(caught.value)


def test_without_a_licence_the_card_says_so(student: Model) -> None:
    main("export cd --to hub".split())
    text = Path("artifacts/export/cd-hub/README.md").read_text()
    assert "license: other\nlicense_name: not-stated" in text
    assert "Licence of the weights: **not stated**" in text and "bind what may be done" in text
    assert "No score of exactly these weights" in text


def test_what_cannot_be_exported_is_refused(
    student: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "need the folder or file of a model, got 'nobody'" in refusal("export nobody --to hub")
    assert "need steps, an integer >= 1" in refusal("export cd --to hub --steps 0")
    assert "need an identifier such as cc-by-4.0" in refusal("export cd --to hub --license a_b")
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert "need onnx, which is not installed: pip install" in refusal("export cd --to onnx")
    assert not Path("artifacts/export").exists()


def test_formats_are_the_files_of_the_folder() -> None:
    assert export.names() == ("diffusers", "hub", "onnx", "torch")
    with pytest.raises(ValueError, match="need a format of diffusers, .* got 'gguf'"):
        export.find("gguf")
