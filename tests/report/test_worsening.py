"""The warning: after three worsenings in a row, once, with the model that may be drawn instead."""

import pytest

from fewstep.report.worsening import scores_in, worsened, worsenings


def scores(*values: float) -> list[tuple[int, float]]:
    return [(5000 * (i + 1), value) for i, value in enumerate(values)]


TEXT = "cd: validation has worsened three times in a row since 10 kimg, where it was 12.35; a row "


def test_three_worsenings_in_a_row_are_a_warning_with_the_model_to_draw() -> None:
    text = worsened("cd", scores(30, 12.345, 13, 14, 15))
    assert text == TEXT + "may draw the model of that time as model: cd@best"


def test_the_best_may_be_an_earlier_one_than_that_since_which_it_worsens() -> None:
    text = worsened("cd", [(2500, 9.5), *scores(30, 12.345, 13, 14, 15)])
    assert text == TEXT + "may draw the model of 2.5 kimg, 9.5, as model: cd@best"


@pytest.mark.parametrize(
    "values", [(), (1,), (1, 2, 3), (1, 2, 2, 3), (1, 2, 3, 2, 4), (4, 3, 2, 1), (1, 2, 3, 4, 5)]
)
def test_fewer_or_more_or_others_are_none(values: tuple[float, ...]) -> None:
    assert worsened("cd", scores(*values)) is None


def test_a_new_best_outdates_the_warnings_before_it() -> None:
    up = (2, 3, 4, 5)
    assert len(worsenings("cd", scores(*up, 4, 5, 6, 7))) == 2
    assert worsenings("cd", scores(*up, 1)) == []
    assert worsenings("cd", []) == []


def test_only_a_students_own_distances_are_its_scores() -> None:
    rows = [
        {"nimg": 0, "validation/teacher_FD": 1.0, "validation/teacher_recall": 0.7},
        {"nimg": 64, "loss": 3.0},
        {"nimg": 64, "validation/FD": 9.0, "validation/recall": 0.5, "validation/std_ratio": 0.9},
        {"nimg": 96, "validation/brightness": 0.3, "validation/real_brightness": 0.29},
        {"nimg": 128, "validation/FD": 8.0},
    ]
    assert scores_in(rows) == [(64, 9.0), (128, 8.0)]
