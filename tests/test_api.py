"""`import fewstep`: models and scores without params.yaml, from any folder."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fewstep
from experiment import set_up
from fewstep.metrics.images import score
from fewstep.model import Model, load
from fewstep.networks.weights import load_model, read_safetensors, save_model
from fewstep.params import Params, plain
from fewstep.paths import MODELS, SAMPLES
from fewstep.stages import generate
from places import ROOT

TEACHER = ROOT / "assets" / "teacher-fmnist16.safetensors"
SAID = {"sampler": "euler", "steps": 4, "sigma_min": 0.002, "sigma_max": 80.0, "rho": 7.0}


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Params:
    return set_up(tmp_path, monkeypatch, images=8)


def told(toy: Params, name: str = "cd", **said: Any) -> Path:  # noqa: ANN401
    """The toy teacher's weights as a model whose JSON says all that a training writes."""
    weights, _ = read_safetensors(MODELS / "teacher" / "model.safetensors")
    about = {
        "name": name,
        "network": plain(toy.network),
        "data": plain(toy.data),
        "noise": plain(toy.noise),
        "sampling": SAID,
    }
    save_model(MODELS / name, weights, {**about, **said})
    return (MODELS / name).absolute()


ELSEWHERE = """
import sys
import fewstep
assert "torch" not in sys.modules and "numpy" not in sys.modules, "importing fewstep is instant"
assert fewstep.__version__[0].isdigit()
import numpy as np
student = fewstep.load(sys.argv[1], device="cpu")
np.save("images.npy", student.sample(8, batch=int(sys.argv[2])))
"""


def test_from_another_folder_the_images_are_those_of_generate(toy: Params, tmp_path: Path) -> None:
    folder = told(toy, "teacher")
    generate.run(toy, "teacher-euler-4")
    with np.load(SAMPLES / "teacher-euler-4.npz") as file:
        expected = file["images"]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    command = [sys.executable, "-c", ELSEWHERE, str(folder), str(toy.generate.batch)]
    done = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    images = np.load(elsewhere / "images.npy")
    assert images.dtype == np.uint8 and images.shape == (8, 16, 16, 1)
    again = load(folder, device="cpu").sample(seeds=range(len(expected)), batch=toy.generate.batch)
    assert np.array_equal(again.transpose(0, 3, 1, 2), expected), "bit for bit"
    assert np.abs(again[:8].astype(int) - images).max() <= 1, "a batch of another size"


def test_folder_and_file_are_the_same_model(toy: Params) -> None:
    folder = told(toy)
    state = torch.random.get_rng_state()
    one, other = load(folder), load(folder / "model.safetensors")
    assert torch.equal(state, torch.random.get_rng_state()), "nothing was drawn for the caller"
    assert np.array_equal(one.sample(2), other.sample(2))
    assert (one.name, one.sampler, one.steps, one.shape, one.classes) == (
        *("cd", "euler", 4),
        *((1, 16, 16), 10),
    )


def test_labels_and_seeds_choose_each_image_alone(toy: Params) -> None:
    student = load(told(toy))
    images = student.sample(seeds=[5, 3, 5], labels=[1, 2, 1], steps=4)
    assert np.array_equal(images[0], images[2]) and not np.array_equal(images[0], images[1])
    assert np.abs(student.sample(seeds=[3], labels=2).astype(int) - images[1:2]).max() <= 1
    assert np.array_equal(student.sample(3, labels=np.array([0, 1, 2])), student.sample(3)), (
        "without labels: the seed modulo the classes"
    )


def test_denoise_is_the_denoiser(toy: Params) -> None:
    student, (denoiser, _) = load(told(toy)), load_model("teacher", toy)
    x, sigma = torch.randn(3, 1, 16, 16), torch.tensor([0.1, 1.0, 9.0])
    rows = torch.eye(10)[[7, 7, 7]]
    assert torch.equal(student.denoise(x, sigma, 7), denoiser(x, sigma, rows))
    assert torch.equal(student.denoise(x, sigma, rows), denoiser(x, sigma, rows))
    assert torch.equal(student.denoise(x, 2.0), denoiser(x, torch.tensor(2.0), 0 * rows))


def test_a_teacher_is_sampled_on_the_grid_of_its_training() -> None:
    teacher = load(TEACHER)
    assert (teacher.sampler, teacher.steps) == ("heun", 18)
    assert vars(teacher.grid) == {"sigma_min": 0.002, "sigma_max": 80.0, "rho": 7.0}
    assert teacher.trains_unconditional()
    assert teacher.sample(2, steps=1, guidance_scale=1.5).shape == (2, 16, 16, 1)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"labels": 10}, "need labels from 0 to 9, the classes of cd, got 10"),
        ({"labels": -1}, "need labels from 0 to 9, the classes of cd, got -1"),
        ({"labels": [0.5]}, "need labels that are integers, got list"),
        ({"count": 2, "labels": [1]}, "need 2 labels, one an image, got 1"),
        ({"seeds": [1, 2], "labels": [1]}, "need 2 labels, one an image, got 1"),
        ({"count": 3, "seeds": [1]}, "need 3 seeds, one an image, got 1"),
        ({"seeds": [-1]}, "need seeds from 0 to 2.63 - 1, got -1"),
        ({"seeds": range(2**62)}, "need at most 1,000,000 seeds, got"),
        ({"count": 0}, "need at least 1 image, got 0"),
        ({"seeds": []}, "need at least 1 image, got 0|need 1 seeds, one an image, got 0"),
        ({"steps": 0}, "need steps, an integer >= 1, got 0"),
        ({"steps": 2.0}, "need steps, an integer >= 1, got 2.0"),
        ({"steps": 10**9}, "need at most 10,000 steps"),
        ({"sampler": "churn"}, "need a sampler of heun, .*, got 'churn'"),
        ({"guidance_scale": float("nan")}, "need a finite guidance scale, got nan"),
        ({"batch": 0}, "need a batch of at least 1 image, got 0"),
    ],
)
def test_what_cannot_be_drawn_is_refused(asked: dict[str, Any], message: str, toy: Params) -> None:
    with pytest.raises(ValueError, match=message):
        load(told(toy)).sample(**asked)


def test_guidance_needs_an_unconditional_branch(toy: Params) -> None:
    train = {"method": "denoising", "settings": {"P_mean": -1.2, "P_std": 1.2, "label_dropout": 0}}
    student = load(told(toy, train=train))
    with pytest.raises(ValueError, match="need guidance_scale 1 for cd, got 1.5: .*label dropout"):
        student.sample(1, guidance_scale=1.5)
    for unknown in (None, [], {"method": "nobody", "settings": {}}, {"method": []}):
        assert load(told(toy, train=unknown)).trains_unconditional() is None


def test_other_steps_than_it_was_trained_for_are_drawn_with_a_warning(toy: Params) -> None:
    with pytest.warns(UserWarning, match="cd was trained for 4 steps and is sampled in 2"):
        load(told(toy)).sample(1, steps=2)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"network": None}, "need a network in its JSON, got network None"),
        ({"network": {"type": "adm"}}, "need a network in its JSON, got network.model_channels"),
        ({"data": None}, "need an integer >= 1 as data.resolution in its JSON, got None"),
        ({"data": {"resolution": 16, "channels": 1, "classes": 10**40}}, "classes|that can be bu"),
        ({"data": {"resolution": 16, "channels": 1, "classes": 11}}, "map_label.* instead of"),
        ({"width": 10**12}, "differences|that can be built"),
        ({"blocks": 10**12}, "need at most .* blocks, one a tensor of the file, got 2,0"),
        ({"type": "torch"}, "need adm or ddpmpp|need a network"),
        ({"sampling": {"sampler": "euler", "steps": 4}}, "need sigma_min, sigma_max and rho"),
        ({"sampling": "euler"}, "need sigma_min, sigma_max and rho"),
    ],
)
def test_a_json_that_lies_is_refused(said: dict[str, Any], message: str, toy: Params) -> None:
    keys = {"width": "model_channels", "blocks": "num_blocks", "type": "type"}
    if (key := next(iter(said))) in keys:
        said = {"network": {**plain(toy.network), keys[key]: said[key]}}
    with pytest.raises(ValueError, match=message):
        load(told(toy, **said))


def test_a_model_that_is_not_there_or_says_too_little_is_named(toy: Params, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="need the folder or file of a model, got 'nobody'"):
        load("nobody")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="need model.safetensors or pytorch_model.bin in"):
        load("empty")
    with pytest.raises(ValueError, match="need sigma_data for .*, whose file does not say it"):
        load(MODELS / "teacher")
    assert load(MODELS / "teacher", sigma_data=0.25).denoiser.sigma_data == 0.25
    with pytest.raises(ValueError, match="need a precision of fp32, .*, got 'fp8'"):
        load(TEACHER, precision="fp8")


def test_denoise_refuses_what_is_no_image_of_the_model(toy: Params) -> None:
    student, x = load(told(toy)), torch.zeros(2, 1, 16, 16)
    with pytest.raises(ValueError, match=r"need images of shape \(B, 1, 16, 16\), got \(2, 16"):
        student.denoise(x.movedim(1, -1), 1.0)
    with pytest.raises(ValueError, match="need sigmas above 0, one or 2, got float32 of shape"):
        student.denoise(x, 0.0)
    with pytest.raises(ValueError, match="need labels from 0 to 9"):
        student.denoise(x, 1.0, [3, 10])
    with pytest.raises(ValueError, match=r"need label rows of shape \(2, 10\), got \(2, 9\)"):
        student.denoise(x, 1.0, torch.zeros(2, 9))


@pytest.mark.filterwarnings("ignore:need .* images for a covariance")
def test_scores_are_of_real_images_or_of_a_reference(tmp_path: Path) -> None:
    with np.load(ROOT / "assets" / "fmnist16.npz") as file:
        real = file["images"][:100].reshape(100, 16, 16, 1)
    [(name, value)] = score(real[:50], real[50:], device="cpu").items()
    assert name == "FD-EffLite0" and value > 0
    assert score(real, real, device="cpu")[name] < 1e-3 * value
    with pytest.raises(ValueError, match="need images: uint8, .* got float64"):
        score(real / 255, real)  # pyright: ignore[reportArgumentType]
    with pytest.raises(FileNotFoundError, match="which `fewstep ref-stats` writes"):
        score(real, tmp_path / "none.npz")
    (tmp_path / "r.npz").touch()
    (tmp_path / "r.json").write_text(json.dumps({"detector": {"features": "efficientnet-lite0"}}))
    with pytest.raises(ValueError, match="need a reference for efficientnet-lite0 with sha256"):
        score(real, tmp_path / "r.npz", device="cpu")


def test_the_package_offers_what_it_says() -> None:
    assert fewstep.load is load and fewstep.Model is Model and fewstep.score is score
    assert {"load", "score", "Model", "__version__"} <= set(dir(fewstep))
    with pytest.raises(AttributeError, match="no attribute 'smaple'"):
        fewstep.smaple  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]
