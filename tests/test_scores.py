"""Spread over seed ranges, names of metrics, and the reference as a file."""

import subprocess
from pathlib import Path

import numpy as np
import pytest

from fewstep import provenance
from fewstep.files import write_json
from fewstep.metrics.frechet import gaussian_stats
from fewstep.params import (
    Bootstrap,
    InceptionScoreSettings,
    KidSettings,
    ManifoldSettings,
    MemorisationSettings,
    Metric,
)
from fewstep.scores import (
    Reference,
    Scores,
    load_reference,
    metric_names,
    noted,
    save_reference,
    score,
    spread,
)

RNG = np.random.default_rng(0)


def reference(spatial: bool = False) -> Reference:
    features = RNG.normal(size=(200, 4)).astype(np.float32)
    stats = gaussian_stats(features)
    labels = np.arange(200) % 2
    return Reference(
        stats, stats if spatial else None, features, labels, np.arange(200) * 3, 150, np.ones(50)
    )


def test_several_ranges_are_a_mean_and_the_std_of_one_range() -> None:
    ranges = [Scores({"FD": v}, {"FD": (9.0, "resamples")}) for v in (1.0, 2.0, 6.0)]
    found = spread(ranges)["FD"]
    assert found["value"] == 3.0 and found["values"] == [1.0, 2.0, 6.0]
    assert found["std"] == pytest.approx(7**0.5) and found["std_of"] == "ranges"


def test_one_range_has_the_error_it_knows_of_or_none() -> None:
    found = spread([Scores({"FD": 1.0, "recall": 0.5}, {"FD": (0.1, "resamples")})])
    assert (found["FD"]["std"], found["FD"]["std_of"]) == (0.1, "resamples")
    assert found["recall"]["std"] is None and found["recall"]["std_of"] is None


def test_published_names_belong_to_the_published_weights() -> None:
    assert metric_names("FID") == {"kernel": "KID", "spatial": "sFID", "score": "IS"}
    assert metric_names("FD-EffLite0")["kernel"] == "KD-EffLite0"
    assert "IS" not in metric_names("FD-Inception").values()


def test_every_block_brings_its_metric_and_no_other() -> None:
    features = RNG.normal(size=(50, 4)).astype(np.float32)
    outputs = {
        "features": features,
        "spatial": features,
        "logits": RNG.normal(size=(50, 3)).astype(np.float32),
    }
    settings = Metric(
        "inception-2015",
        200,
        kid=KidSettings(4, 20),
        manifold=ManifoldSettings(3, 5),
        memorisation=MemorisationSettings(2, 0.1),
        inception_score=InceptionScoreSettings(2),
        bootstrap=Bootstrap(3, 0.9),
    )
    labels, real = np.arange(50) % 2, reference(spatial=True)
    found = score(outputs, labels, real, "FID", settings)
    manifold = ["precision", "recall", "density", "coverage"]
    assert set(found.values) == {"FID", "sFID", "KID", "IS", "memorised", *manifold}
    assert {name: of for name, (_, of) in found.errors.items()} == {
        "FID": "resamples",
        "KID": "subsets",
        "IS": "splits",
    }
    assert found.neighbours[0]["training"][0] % 3 == 0, "places in the data set"
    bare = score(outputs, labels, real, "FID", Metric("inception-2015", 200))
    assert set(bare.values) == {"FID", "sFID"} and bare.values["FID"] == found.values["FID"]
    assert "CMMD" in score(outputs, labels, reference(), "FD-CLIP", Metric("clip", 200)).values


def test_classes_of_a_single_image_have_no_distance() -> None:
    features = RNG.normal(size=(3, 4)).astype(np.float32)
    settings = Metric("efficientnet-lite0", 200)
    assert (
        score({"features": features}, np.array([0, 0, 1]), reference(), "FD", settings).classes
        == {}
    )


@pytest.mark.parametrize("spatial", [False, True])
def test_a_reference_comes_back_from_its_file_and_has_one_form(
    spatial: bool, tmp_path: Path
) -> None:
    original = reference(spatial)
    for name in ("a.npz", "b.npz"):
        save_reference(tmp_path / name, original)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    found = load_reference(tmp_path / "a.npz")
    np.testing.assert_array_equal(found.features, original.features)
    np.testing.assert_array_equal(found.stats.cov, original.stats.cov)
    assert found.kept == 150 and (found.spatial is None) != spatial


def test_a_file_that_is_no_reference_is_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", mean=np.zeros(2))
    with pytest.raises(ValueError, match="need a reference of `fewstep ref-stats` in .*x.npz"):
        load_reference(tmp_path / "x.npz")


def test_warnings_are_kept_once_and_given_on() -> None:
    def work() -> int:
        for _ in range(3):
            noted_warning()
        return 5

    def noted_warning() -> None:
        import warnings

        warnings.warn("few images", stacklevel=2)

    with pytest.warns(UserWarning, match="few images"):
        assert noted(work) == (5, ["few images"])


# --- provenance ---------------------------------------------------------------------------------


def test_a_commit_with_edits_is_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.delenv("FEWSTEP_COMMIT", raising=False)
    assert provenance.commit() is None
    monkeypatch.setenv("FEWSTEP_COMMIT", "")
    assert provenance.commit() is None, "an image that was built without saying it"
    monkeypatch.setenv("FEWSTEP_COMMIT", "0" * 40)
    assert provenance.commit() == "0" * 40
    for name in ("file", "dvc.lock"):
        Path(name).write_text("1")
    identity = ["-c", "user.name=t", "-c", "user.email=t@t"]
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "x"]):
        subprocess.run(["git", *command], check=True)
    clean = provenance.commit()
    assert clean is not None and len(clean) == 40
    Path("dvc.lock").write_text("2")
    assert provenance.commit() == clean, "which a run itself writes"
    Path("file").write_text("2")
    assert provenance.commit() == clean + "+"


def test_a_result_that_came_from_elsewhere_has_no_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_json("score.json", {"value": 1})
    assert provenance.recall("row", Path("score.json")) is None
    provenance.remember("row", Path("score.json"))
    known = provenance.recall("row", Path("score.json"))
    assert known is not None and known["hardware"]["cores"] >= 1 and known["versions"]["torch"]
    write_json("score.json", {"value": 2})
    assert provenance.recall("row", Path("score.json")) is None
