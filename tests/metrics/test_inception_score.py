"""Inception Score: its two extremes, the formula on a small table, invariances, refusals."""

import numpy as np
import pytest
import torch

from fewstep.metrics.inception_score import inception_score
from fidelity import fidelity_module


def test_certain_and_balanced_classes_score_their_number() -> None:
    logits = 1000.0 * np.eye(7)[np.arange(70) % 7]
    assert inception_score(logits, splits=1) == (pytest.approx(7, rel=1e-12), 0.0)


def test_images_that_all_look_alike_score_one() -> None:
    logits = np.tile(np.random.default_rng(0).normal(size=9), (40, 1))
    assert inception_score(logits, splits=4)[0] == pytest.approx(1, rel=1e-12)


def test_score_of_two_images_is_the_formula() -> None:
    p = np.array([[0.9, 0.1], [0.3, 0.7]])
    marginal = [0.6, 0.4]
    kl = [sum(row[c] * np.log(row[c] / marginal[c]) for c in range(2)) for row in p]
    assert inception_score(np.log(p), splits=1)[0] == pytest.approx(np.exp(np.mean(kl)), rel=1e-12)


def test_a_constant_added_to_an_images_logits_changes_nothing() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(50, 6))
    shifted = logits + rng.normal(0, 900, size=(50, 1))
    assert inception_score(shifted, 3) == pytest.approx(inception_score(logits, 3), rel=1e-9)


def test_order_by_class_does_not_lower_the_score() -> None:
    logits = 30.0 * np.eye(10)[np.arange(2000) // 200]
    mean, std = inception_score(logits, splits=10)
    assert mean == pytest.approx(10, rel=0.05) and 0 < std < 0.3


def test_one_split_is_what_torch_fidelity_gives() -> None:
    logits = np.random.default_rng(0).normal(0, 3, size=(60, 20)).astype(np.float32)
    module = fidelity_module("metric_isc")
    theirs = module.isc_features_to_metric(torch.from_numpy(logits), splits=1)
    ours, _ = inception_score(logits, splits=1)
    assert ours == pytest.approx(theirs[module.KEY_METRIC_ISC_MEAN], rel=1e-9)


def test_bad_logits_and_splits_are_refused() -> None:
    with pytest.raises(ValueError, match="need 1 to 5 splits, got 6 .*inception_score.splits"):
        inception_score(np.zeros((5, 3)), splits=6)
    with pytest.raises(ValueError, match="need finite logits"):
        inception_score(np.full((5, 3), np.nan), splits=1)
    with pytest.raises(ValueError, match=r"shape \(5,\)"):
        inception_score(np.zeros(5))
