"""`fewstep sample`: the images of models and of checkpoints, as pictures and arrays."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiment import set_up
from fewstep.cli import main
from fewstep.networks.weights import read_safetensors, save_model
from fewstep.params import Params, plain
from fewstep.paths import MODELS, trained
from fewstep.stages import generate
from fewstep.stages.sample import parse
from parity import structure_pickle
from places import VECTORS


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Params:
    return set_up(tmp_path, monkeypatch, images=8)


def images(folder: str) -> np.ndarray:
    with np.load(Path(folder) / "images.npz") as file:
        return file["images"].astype(int)


def test_images_are_those_that_a_row_draws(toy: Params) -> None:
    generate.run(toy, "teacher-euler-4")
    with np.load(generate.SAMPLES / "teacher-euler-4.npz") as file:
        expected = file["images"].astype(int)
    main("sample teacher --seeds 3-9 --classes 3-9 --sampler euler --steps 4 --out o".split())
    assert np.abs(images("o") - expected[3:10]).max() <= 1, "a grey level of rounding"


def test_pictures_and_arrays_are_the_same_images(toy: Params) -> None:
    main("sample teacher --seeds 0-11,40 --classes 2,5 --steps 1 --sampler ddim --out o".split())
    with np.load("o/images.npz") as file:
        drawn, labels, seeds = (file[key] for key in ("images", "labels", "seeds"))
    assert seeds.tolist() == [*range(12), 40] and labels.tolist() == [2, 5] * 6 + [2]
    for image, label, seed in zip(drawn, labels, seeds, strict=True):
        with Image.open(f"o/{seed:06d}-class{label}.png") as png:
            assert np.array_equal(np.asarray(png)[..., 0], image[0])
    with Image.open("o/grid.png") as png:
        scale = (png.width + 2) // 10 - 2
        assert scale % 16 == 0 and png.height == 2 * (scale + 2) - 2
    assert len(list(Path("o").iterdir())) == 13 + 2


def test_a_student_is_sampled_as_it_was_trained(
    toy: Params, capsys: pytest.CaptureFixture[str]
) -> None:
    weights, _ = read_safetensors(MODELS / "teacher" / "model.safetensors")
    for name in ("cd", "cd@best", "dmd2-4", "dmd2-1", "mm-2"):
        sampling = toy.students[trained(name)].settings.sampled(toy.noise)
        save_model(MODELS / name, weights, {"name": name, "sampling": sampling})
        main(["sample", name, "--seeds", "0"])
    said = capsys.readouterr().out
    cd = toy.students["cd"].settings
    assert f"of cd, ddim, {getattr(cd, 'steps')} NFE" in said  # noqa: B009
    assert f"of cd@best, ddim, {getattr(cd, 'steps')} NFE" in said  # noqa: B009
    assert "of dmd2-4, renoise, 4 NFE" in said and "of dmd2-1, renoise, 1 NFE" in said
    assert "of mm-2, ancestral, 2 NFE" in said
    main(["sample", "dmd2-4", "--seeds", "0", "--guidance", "1.5", "--steps", "2"])
    assert "of dmd2-4, renoise, 4 NFE" in capsys.readouterr().out, "guidance doubles two steps"


SAID = {"sampler": "ddim", "steps": 4, "sigma_min": 0.002, "sigma_max": 80.0, "rho": 7.0}


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ([], r"need sigma_min, sigma_max and rho in `sampling` .*, got \[\]"),
        ("ddim", "need sigma_min, sigma_max and rho in `sampling` .*, got 'ddim'"),
        (SAID | {"rho": 0}, "need sigma_min, sigma_max and rho in `sampling`"),
        (SAID | {"sigma_max": 10**400}, "need sigma_min, sigma_max and rho in `sampling`"),
        (SAID | {"sampler": "churn"}, "need a sampler of heun, .*, got 'churn'"),
        (SAID | {"sampler": None}, "need a sampler of heun, .*, got None"),
        (SAID | {"steps": "4"}, "need steps, an integer >= 1, got '4'"),
        (SAID | {"steps": [4]}, "need steps, an integer >= 1, got an object of type list"),
    ],
)
def test_what_a_checkpoint_says_of_its_sampling_is_checked(
    sampling: object, message: str, toy: Params
) -> None:
    weights, _ = read_safetensors(MODELS / "teacher" / "model.safetensors")
    save_model(MODELS / "cd", weights, {"name": "cd", "sampling": sampling})
    with pytest.raises(SystemExit, match=message):
        main(["sample", "cd"])


def test_other_peoples_checkpoints_and_folders_are_sampled(
    toy: Params, capsys: pytest.CaptureFixture[str]
) -> None:
    main("sample artifacts/models/teacher --seeds 0 --steps 1 --sampler ddim --out a".split())
    file = "artifacts/models/teacher/model.safetensors"
    main(f"sample {file} --seeds 0 --steps 1 --sampler ddim --out b".split())
    assert np.array_equal(images("a"), images("b"))
    text = Path("params.yaml").read_text()
    text = text.replace("model_channels: 16", "model_channels: 32")
    Path("params.yaml").write_text(text.replace("channels: 1\n", "channels: 3\n"))
    Path("teacher.pkl").write_bytes(structure_pickle(VECTORS))
    main("sample teacher.pkl --seeds 0-3 --steps 1 --sampler ddim --out c".split())
    assert images("c").shape == (4, 3, 16, 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("nobody", r"need a finished model \(teacher, cd, .* got 'nobody'"),
        ("cd@best", r"need a finished model \(.* got 'cd@best'"),
        ("cd", "need artifacts/models/cd/model.safetensors, .* make it with `fewstep train cd`"),
        ("teacher --seeds 3-", r"need numbers and ranges such as 0-63,100, got '3-' \(--seeds\)"),
        ("teacher --seeds 9-3", r"need at least one number, got '9-3' \(--seeds\)"),
        ("teacher --seeds 9223372036854775808", r"need numbers below 2\^63, got .* \(--seeds\)"),
        (
            "teacher --seeds 0-99999999999",
            r"at most 1,000,000 numbers for --seeds, got 100,000,",
        ),
        ("teacher --classes 0-99999999999", r"at most 1,000,000 numbers for --classes, got 100,"),
        (
            "teacher --seeds " + "9" * 9000,
            r"need numbers below 2\^63, got '9{80}'\.\.\. ",
        ),
        ("teacher --steps 1000000000", "need at most 10,000 steps, got 1,000,000,000"),
        ("teacher --classes 0,10", "need labels from 0 to 9, the classes of teacher, got 10"),
        (
            "teacher --sampler churn",
            "need a sampler of heun, euler, ddim, renoise, ancestral, got 'churn'",
        ),
        ("teacher --steps -1", "need steps, an integer >= 1, got -1"),
        ("teacher --steps 0", "need steps, an integer >= 1, got 0"),
        ("params.yaml", "need an EDM pickle"),
    ],
)
def test_what_cannot_be_drawn_is_refused(arguments: str, message: str, toy: Params) -> None:
    with pytest.raises(SystemExit, match=message):
        main(["sample", *arguments.split()])
    assert not Path("artifacts/pictures").exists()


def test_lists_of_numbers() -> None:
    assert parse("0-3,7, 5", "--seeds") == [0, 1, 2, 3, 7, 5]


def test_each_run_has_a_folder_of_its_own(toy: Params, capsys: pytest.CaptureFixture[str]) -> None:
    few = "--seeds 0 --steps 1 --sampler ddim"
    main(f"sample teacher {few}".split())
    main(f"sample artifacts/models/teacher/model.safetensors {few} --classes 3".split())
    pictures = Path("artifacts/pictures")
    assert {p.name for p in pictures.iterdir()} == {"teacher", "teacher-2"}
    assert (pictures / "teacher" / "000000-class0.png").exists()
    assert (pictures / "teacher-2" / "000000-class3.png").exists()
    assert "in artifacts/pictures/teacher-2" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="need a folder that is new or empty, got artifacts/pict"):
        main(f"sample teacher {few} --out {pictures / 'teacher'}".split())
    assert len(list((pictures / "teacher").iterdir())) == 3


def test_a_file_is_sampled_as_its_own_json_says_whatever_the_params_describe(
    toy: Params, capsys: pytest.CaptureFixture[str]
) -> None:
    weights, _ = read_safetensors(MODELS / "teacher" / "model.safetensors")
    about = {
        "name": "cd",
        "network": plain(toy.network),
        "data": plain(toy.data),
        "sampling": SAID | {"steps": 2},
    }
    save_model(Path("away"), weights, about)
    text = Path("params.yaml").read_text()
    Path("params.yaml").write_text(text.replace("model_channels: 16", "model_channels: 32"))
    main("sample away/model.safetensors --seeds 0-3 --out o".split())
    main("sample away --seeds 0-3 --steps 3 --out p".split())
    assert "cd was trained for 2 steps and is sampled in 3" in capsys.readouterr().err
    assert images("o").shape == (4, 1, 16, 16) and not np.array_equal(images("o"), images("p"))
