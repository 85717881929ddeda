"""`fewstep compare`: what it says of rows that differ, and of rows that do not."""

import subprocess
from pathlib import Path

import numpy as np
import pytest

from experiment import set_up, tiny_params
from fewstep.params import Params
from fewstep.paths import SAMPLES
from fewstep.stages import compare, ref_stats

DISTANCE = 3  # the line of the distance

pytestmark = pytest.mark.filterwarnings("ignore:need 113 images")


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Params:
    """Rows `near` and `twin` of the data's own distribution, and `far`, of half the contrast."""
    set_up(tmp_path, monkeypatch)
    params = tiny_params(
        tmp_path,
        metric__reference_images=120,
        generate__images=40,
        metric__bootstrap={"resamples": 20, "confidence": 0.95},
        metric__manifold={"k": 3, "density_k": 5},
    )
    ref_stats.run(params)
    rng = np.random.default_rng(1)
    SAMPLES.mkdir()
    for name, high in (("near", 256), ("twin", 256), ("far", 128)):
        images = rng.integers(0, high, (40, 1, 16, 16), np.uint8)
        save(name, images, np.arange(40))
    return params


def save(name: str, images: np.ndarray, seeds: np.ndarray) -> None:
    np.savez(SAMPLES / f"{name}.npz", images=images, labels=seeds % 10, seeds=seeds)


def said(params: Params, a: str, b: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    capsys.readouterr()
    compare.run(params, a, b)
    return capsys.readouterr().out.splitlines()


def test_a_true_difference_exceeds_the_noise_and_an_accident_does_not(
    toy: Params, capsys: pytest.CaptureFixture[str]
) -> None:
    head, _, heads, distance, precision, _, *note = said(toy, "near", "far", capsys)
    assert head == "near against far: 40 images of each, the same seeds"
    assert heads.split() == ["near", "far", "difference", "95%", "interval"]
    assert distance.startswith("FD-EffLite0 (lower is better)")
    assert distance.endswith("  near is better")
    assert precision.startswith("precision (higher is better)")
    assert "over 20 resamples" in " ".join(note) and max(map(len, note)) <= 100
    assert said(toy, "far", "near", capsys)[DISTANCE].endswith("  far is worse")
    assert said(toy, "near", "twin", capsys)[DISTANCE].endswith("  no difference")
    assert "  +0  " in said(toy, "near", "near", capsys)[DISTANCE]


def test_rows_of_other_seeds_are_compared_without_pairs_on_as_many_images(
    toy: Params, capsys: pytest.CaptureFixture[str]
) -> None:
    with np.load(SAMPLES / "far.npz") as arrays:
        save("far", arrays["images"][:30], np.arange(100, 130))
    head, *_, note = said(toy, "near", "far", capsys)
    assert head.endswith("30 images of each, other seeds")
    assert note.endswith("does not cancel.")


def test_a_row_of_fewer_seed_ranges_is_compared_on_the_seeds_it_has(
    toy: Params, capsys: pytest.CaptureFixture[str]
) -> None:
    with np.load(SAMPLES / "near.npz") as arrays:
        save("part", arrays["images"][29::-1], arrays["seeds"][29::-1])
    head, *lines = said(toy, "near", "part", capsys)
    assert head.endswith("30 images of each, the same seeds")
    assert "  +0  " in lines[DISTANCE - 1], "the same images, matched by their seeds"


def test_what_is_missing_is_named(toy: Params) -> None:
    with pytest.raises(ValueError, match=r"NAME or REVISION:NAME, got 'nobody'"):
        compare.run(toy, "near", "nobody")
    with pytest.raises(ValueError, match=r"got nothing \(params.yaml: metric.bootstrap"):
        compare.run(tiny_params(Path()), "near", "far")


@pytest.mark.slow  # git and DVC
def test_a_row_of_another_revision_comes_from_the_cache(
    toy: Params, capsys: pytest.CaptureFixture[str]
) -> None:
    identity = ["-c", "user.name=t", "-c", "user.email=t@t"]
    subprocess.run(["git", "init", "-q"], check=True)
    subprocess.run(["dvc", "init", "-q"], check=True)
    subprocess.run(["dvc", "add", "-q", str(SAMPLES / "near.npz")], check=True)
    subprocess.run(["git", "add", "-A"], check=True)
    subprocess.run(["git", *identity, "commit", "-qm", "near"], check=True)
    with np.load(SAMPLES / "far.npz") as arrays:
        other = {key: arrays[key] for key in arrays.files}
    save("near", other["images"], other["seeds"])
    line = said(toy, "HEAD:near", "near", capsys)[DISTANCE]
    assert line.endswith("  HEAD:near is better")
