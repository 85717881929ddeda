"""Spread over seed ranges, names of metrics, and the reference as a file."""

from pathlib import Path

import numpy as np
import pytest

from fewstep.metrics.frechet import gaussian_stats
from fewstep.metrics.reference import Reference, load_reference, save_reference
from fewstep.metrics.score import Scores, metric_names, noted, score, spread
from fewstep.params import (
    Bootstrap,
    InceptionScoreSettings,
    KidSettings,
    ManifoldSettings,
    MemorisationSettings,
    Metric,
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
    with pytest.raises(
        ValueError, match="need a reference written by `fewstep ref-stats` in .*x.npz"
    ):
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
