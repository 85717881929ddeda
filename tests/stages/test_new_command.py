"""`fewstep new`: a params file that fits images and weights which it has looked at."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.cli import main
from fewstep.data.labelled import ArraySource
from fewstep.data.lmdb import build_lmdb
from fewstep.data.look import Look, look
from fewstep.interop.architecture import architecture, network_block
from fewstep.model import load
from fewstep.networks.denoiser import Denoiser
from fewstep.networks.protocol import Architecture
from fewstep.networks.registry import network_class
from fewstep.params import Network, Params, load_params
from fewstep.params.editing import Text
from fewstep.planning import speed
from fewstep.planning.propose import (
    LARGE,
    MEDIUM,
    SMALL,
    Proposal,
    Sizes,
    Weights,
    number,
    sized_network,
)
from fewstep.planning.speed import LAUNCHING, Speed
from fewstep.stages import new
from fewstep.theory.sample import nfe
from places import CONFIG


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the presets, on a machine whose speed is known."""
    monkeypatch.chdir(tmp_path)
    Path("config").symlink_to(CONFIG)
    monkeypatch.setattr(new, "measure", lambda _: Speed(2e10, 0.004))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    return tmp_path


def pictures(folder: Path, mode: str = "RGB", each: int = 20) -> Path:
    """Three class folders of images at odd sizes."""
    rng = np.random.default_rng(0)
    for name in ("T-shirt", "coat", "bag"):
        (folder / name).mkdir(parents=True)
        for i in range(each):
            height, width = rng.integers(17, 50, 2)
            shape = (height, width, 3) if mode == "RGB" else (height, width)
            Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(folder / name / f"{i}.png")
    return folder


def written(*arguments: str) -> Params:
    main(["new", "--out", "mine.yaml", *arguments])
    main(["check", "--params", "mine.yaml"])
    return load_params("mine.yaml")


def test_images_at_odd_sizes_become_params_that_fit(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    params = written("--data", str(pictures(here / "pics")), "--budget", "20m")
    assert (params.data.resolution, params.data.channels, params.data.classes) == (16, 3, 3)
    assert list(params.students) == ["mm-8", "cd-8", "dmd2-10", "dmd2-1"]
    assert params.generate.images + params.metric.reference_images <= 60
    out = capsys.readouterr().out
    assert "60 images, RGB" in out and "T-shirt (20), bag (20), coat (20)" in out
    assert "train teacher: " in out and " of 20 min: training" in out
    text = Path("mine.yaml").read_text()
    assert "classes: 3 # T-shirt, bag, coat" in text and "assets" not in text


def test_an_existing_file_stays(here: Path) -> None:
    Path("params.yaml").write_text("mine")
    with pytest.raises(SystemExit, match="need a new file, got params.yaml, which is there"):
        main(["new", "--data", "nowhere"])
    assert Path("params.yaml").read_text() == "mine"


def test_minutes_are_for_a_single_student(here: Path) -> None:
    params = written("--data", str(pictures(here / "pics", "L")), "--budget", "2m")
    assert list(params.students) == ["mm-8"] and params.data.channels == 1
    assert list(params.rows) == ["teacher-heun-35", "teacher-euler-8", "mm-8"]


def test_an_lmdb_keeps_its_size_and_its_names(here: Path) -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (40, 1, 12, 12), np.uint8)
    build_lmdb(ArraySource("toy", images, np.arange(40) % 2, 2, ("a", "b")), "toy.lmdb")
    params = written("--data", "toy.lmdb")
    assert (params.data.resolution, params.data.channels, params.data.classes) == (12, 1, 2)
    assert look("toy.lmdb").class_names == ("a", "b")


def unet(kind: str, resolution: int, classes: int, **given: object) -> Denoiser:
    shape: dict = {"model_channels": 32, "channel_mult": (1, 2), "num_blocks": 1}
    shape |= {"attn_resolutions": (8,), "channels": 3, **given}
    return Denoiser(
        network_class(kind)(Architecture(resolution, classes=classes, **shape)), 0.5, "fp32"
    )


@pytest.mark.parametrize("kind", ["ddpmpp", "ncsnpp"])
def test_a_teacher_without_classes_is_what_the_params_describe(here: Path, kind: str) -> None:
    torch.manual_seed(0)
    torch.save(unet(kind, 16, 0).state_dict(), "teacher.bin")
    params = written("--data", str(pictures(here / "pics")), "--teacher", "teacher.bin")
    assert params.data.classes == 0 and params.network.type == kind
    assert params.teacher.url == "teacher.bin" and all(
        row.guidance_scale == 1 for row in params.rows.values()
    )
    denoiser = load("teacher.bin", sigma_data=0.5).denoiser
    assert denoiser(torch.zeros(2, 3, 16, 16), torch.ones(2), torch.zeros(2, 0)).isfinite().all()


def test_a_teacher_of_other_classes_is_refused(here: Path) -> None:
    torch.save(unet("adm", 16, 10).state_dict(), "teacher.bin")
    with pytest.raises(SystemExit, match="need data of 10 classes, as the teacher's, got 3 in"):
        written("--data", str(pictures(here / "pics")), "--teacher", "teacher.bin")


PUBLISHED: dict[str, tuple[Network, int, int]] = {  # with resolution and classes
    "imagenet-64x64-cond-adm": (
        Network("adm", 192, (1, 2, 3, 4), 3, (32, 16, 8), 0.5),
        64,
        1000,
    ),
    "cifar10-32x32-cond-vp": (Network("ddpmpp", 128, (2, 2, 2), 4, (16,), 0.5), 32, 10),
    "cifar10-32x32-uncond-vp": (Network("ddpmpp", 128, (2, 2, 2), 4, (16,), 0.5), 32, 0),
    "cifar10-32x32-cond-ve": (Network("ncsnpp", 128, (2, 2, 2), 4, (16,), 0.5), 32, 10),
    "cifar10-32x32-uncond-ve": (Network("ncsnpp", 128, (2, 2, 2), 4, (16,), 0.5), 32, 0),
    "ffhq-64x64-uncond-ve": (Network("ncsnpp", 128, (1, 2, 2, 2), 4, (16,), 0.5), 64, 0),
    "afhqv2-64x64-uncond-ve": (Network("ncsnpp", 128, (1, 2, 2, 2), 4, (16,), 0.5), 64, 0),
    "ffhq-64x64-uncond-vp": (Network("ddpmpp", 128, (1, 2, 2, 2), 4, (16,), 0.5), 64, 0),
    "afhqv2-64x64-uncond-vp": (Network("ddpmpp", 128, (1, 2, 2, 2), 4, (16,), 0.5), 64, 0),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_block_of_each_published_network_is_read_from_its_weights(name: str) -> None:
    block, resolution, classes = PUBLISHED[name]
    given = {k: v for k, v in vars(block).items() if k not in ("type", "sigma_data")}
    with torch.device("meta"):
        weights = unet(block.type, resolution, classes, **given).state_dict()
    about = architecture(weights)
    assert network_block(about) == block
    assert (about["img_resolution"], about["label_dim"]) == (resolution, classes)


@pytest.mark.parametrize(
    ("available", "images", "reference"), [(16, 8, 8), (200, 100, 100), (60_000, 2000, 10_000)]
)
def test_sizes_are_the_default_s_or_what_the_data_gives(
    available: int, images: int, reference: int
) -> None:
    sizes = Sizes.of(available)
    assert (sizes.images, sizes.reference) == (images, reference)


def test_too_few_images_are_refused() -> None:
    with pytest.raises(ValueError, match=r"need at least 16 images, .*, got 15 \(--data\)"):
        Sizes.of(15)


@pytest.mark.parametrize("resolution", [8, 12, 16, 28, 32, 64])
def test_a_network_ends_at_a_low_resolution(resolution: int) -> None:
    network = sized_network(resolution, 32)
    lowest = resolution >> (len(network.channel_mult) - 1)
    assert resolution % (1 << (len(network.channel_mult) - 1)) == 0 and lowest < 16


@pytest.mark.parametrize("preset", [SMALL, MEDIUM, LARGE])
@pytest.mark.parametrize("classes", [0, 5])
def test_each_preset_becomes_params_of_other_data(here: Path, preset: str, classes: int) -> None:
    counts = (100,) * classes
    look = Look("a b", 500, 3, (64,), True, counts, ("v", "w: x", "y", "z", "yes")[:classes])
    about = {"img_channels": 3, "label_dim": classes, "source": "t.pkl"}
    weights = Weights("t.pkl", "0a" * 32, about)
    network, sizes = sized_network(64, 64), Sizes.of(500)
    made = Proposal(look, weights, preset, 64, network, sizes, False, "# t", "bf16")
    Path("mine.yaml").write_text(made.scaled(0.01, None).text())
    params = load_params("mine.yaml")
    assert params.network == network and params.data.source == "a b"
    assert params.metric.reference is None and params.data.classes == classes
    for s in params.students.values():
        assert s.batch <= 64 or s.kimg * 1000 / s.batch >= 5000
    assert all(nfe(row.sampler, row.steps) <= 100 for row in params.rows.values())
    longer = replace(made, teacher=None, look=replace(look, counts=(100,) * 5))
    Path("mine.yaml").write_text(longer.scaled(1.0, 12.5).text())
    train = load_params("mine.yaml").teacher.train
    assert train is not None and train.kimg == 12.5 and train.validation is None


EDITS: dict[str, tuple[Callable[[Text], object], str]] = {
    "a value and its comment": (lambda t: t.put(("a", "b"), "2"), "a: # A\n  b: 2\n\n# C\nc: 3\n"),
    "a block": (lambda t: t.replace(("a",), "a: 5\n"), "a: 5\n\n# C\nc: 3\n"),
    "a key that goes": (lambda t: t.replace(("c",), ""), "a: # A\n  b: 1 # B\n\n# C\n"),
}


@pytest.mark.parametrize("case", EDITS)
def test_an_edit_keeps_what_is_around_it(case: str) -> None:
    edit, expected = EDITS[case]
    text = Text("a: # A\n  b: 1 # B\n\n# C\nc: 3\n")
    edit(text)
    assert text.edited() == expected


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0.0"), (20, "20.0"), (0.012345, "0.0123"), (2e-6, "2.0e-6")]
)
def test_numbers_are_written_as_both_yamls_read_them(value: float, text: str) -> None:
    assert number(value) == text


def test_a_copy_of_a_preset_makes_room(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("params.yaml").write_bytes((CONFIG / "fmnist16.yaml").read_bytes())
    main(["new", "--data", str(pictures(here / "pics")), "--budget", "20m"])
    assert load_params("params.yaml").data.source.endswith("pics")
    assert "next: make repro\n" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"need a new file.*got config/fmnist16.yaml"):
        main(["new", "--data", "pics", "--out", "config/fmnist16.yaml"])


REFUSED: dict[str, tuple[list[str], str]] = {
    "no data": (["--data", "nowhere"], r"got nothing at nowhere \(--data\)"),
    "no teacher": (["--teacher", "none.pkl"], r"got nothing at none.pkl \(--teacher\)"),
    "a GPU and no hours": (["--gpu", "h100"], "for this machine, got --gpu$"),
    "hours and no GPU": (["--hours", "3"], "for this machine, got --hours$"),
    "both": (
        ["--gpu", "h100", "--hours", "3", "--budget", "1h"],
        "got --gpu and --hours and --bud",
    ),
    "a second": (
        ["--budget", "1s"],
        r"need a budget of 2m or more, .* 1\.6 min, got 0\.0 min \(--budget\)",
    ),
    "another size": (
        ["--data", "toy.npz", "--resolution", "32"],
        r"need the resolution 12, that of the images, .*, got 32 \(--resolution\)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_names_the_option(here: Path, case: str) -> None:
    pictures(here / "pics")
    np.savez("toy.npz", images=np.zeros((40, 1, 12, 12), np.uint8), labels=np.arange(40) % 2)
    given, message = REFUSED[case]
    with pytest.raises(SystemExit, match=message):
        main(["new", "--out", "mine.yaml", "--data", "pics", *given])
    assert not Path("mine.yaml").exists()


def test_each_gpu_has_a_micro_batch(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = str(pictures(here / "pics"))
    params = written("--data", data, "--gpu", "h100", "--hours", "24", "--gpus", "8")
    assert params.teacher.train is not None
    for block in (params.teacher.train, *params.students.values()):
        assert block.batch // block.batch_gpu % 8 == 0
    out = capsys.readouterr().out
    assert "fewstep plan --params mine.yaml --gpu h100 --gpus 8" in out
    assert "processes that divides" not in out


def test_a_small_network_is_sized_by_its_launches(here: Path) -> None:
    np.savez("toy.npz", images=np.zeros((400, 1, 12, 12), np.uint8), labels=np.arange(400) % 2)
    params = written("--data", "toy.npz", "--gpu", "h100", "--hours", "1")
    assert params.teacher.train is not None
    steps = sum(
        1000 * s.kimg / s.batch_gpu for s in (params.teacher.train, *params.students.values())
    )
    assert steps * 3 * LAUNCHING < 3600  # a step has three passes at least


def test_a_short_budget_draws_enough_for_a_covariance(here: Path) -> None:
    np.savez("toy.npz", images=np.zeros((4000, 1, 12, 12), np.uint8), labels=np.arange(4000) % 2)
    params = written("--data", "toy.npz", "--budget", "3m")
    assert params.generate.images >= 113


def test_time_without_a_processor_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, waits = iter([0.0, 4.0, 4.0, 7.0, 7.0, 12.0]), iter([0, 2, 2, 4, 4, 6])
    computed = iter([0.0, 2.0, 2.0, 4.0, 4.0, 6.0])  # in the second try its own threads took turns
    monkeypatch.setattr(speed.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(speed.time, "process_time", lambda: next(computed))
    monkeypatch.setattr(speed, "_waits", lambda: {"1": next(waits), "2": 0.0})
    monkeypatch.setattr(speed, "_processors", lambda: 1)
    assert speed._fastest(lambda: None) == (2.0, 5 / 12)
