"""Class distances: equal to the general Fréchet distance, class by class; refusals."""

import numpy as np
import pytest

from fewstep.metrics.classwise import class_distances, small_sample_distance
from fewstep.metrics.frechet import frechet_distance, gaussian_stats


def normal(rows: int, dim: int, shift: float = 0.0, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(rows, dim)) @ rng.normal(size=(dim, dim)) + shift).astype(np.float32)


@pytest.mark.parametrize(("n", "m", "dim"), [(300, 200, 6), (5, 200, 6), (9, 7, 40), (2, 2, 5)])
@pytest.mark.filterwarnings("ignore:need .* images for a covariance of full rank")
def test_distance_from_singular_values_is_the_general_one(n: int, m: int, dim: int) -> None:
    a, b = normal(n, dim), normal(m, dim, shift=0.3, seed=1)
    general = frechet_distance(gaussian_stats(a), gaussian_stats(b))
    # where covariances are singular, the general one takes roots of rounding
    tolerance = 1e-10 if min(n, m) > dim else 1e-6
    assert small_sample_distance(a, b) == pytest.approx(general, rel=tolerance)


def test_distance_of_a_set_to_itself_is_zero_and_a_shift_adds_its_square() -> None:
    a = normal(10, 30)
    assert small_sample_distance(a, a) == pytest.approx(0, abs=1e-9)
    shifted = a.astype(np.float64) + 2
    assert small_sample_distance(a, shifted) == pytest.approx(30 * 4, rel=1e-9)


def test_each_class_is_compared_with_its_own_images() -> None:
    features, reference = normal(90, 4), normal(120, 4, seed=1)
    labels, reference_labels = np.arange(90) % 3, np.arange(120) % 4
    found = class_distances(features, labels, reference, reference_labels)
    assert list(found) == [0, 1, 2]  # class 3 was not generated
    for label, distance in found.items():
        stats = gaussian_stats(features[labels == label])
        other = gaussian_stats(reference[reference_labels == label])
        assert distance == pytest.approx(frechet_distance(stats, other), rel=1e-10)


def test_small_classes_warn_and_missing_ones_are_refused() -> None:
    x, y = normal(8, 4), np.arange(8) % 2
    with pytest.warns(UserWarning, match="need 5 images of each class .*, got 4: class distances"):
        class_distances(x, y, x, y)
    with pytest.raises(
        ValueError, match="at least 2 images of class 1 on either side, got 4 and 0"
    ):
        class_distances(x, y, x, np.zeros(8, int))
    with pytest.raises(ValueError, match=r"a label for each of 8 images, got shape \(7,\)"):
        class_distances(x, y[:7], x, y)
