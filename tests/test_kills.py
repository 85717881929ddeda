"""Real kills of real trainings; see kills.py."""

import pytest

import kills


@pytest.mark.slow
def test_thirty_killed_trainings_go_on_as_if_nothing_had_happened() -> None:
    kills.main(30, seed=0, stops=0)


@pytest.mark.slow
def test_ten_trainings_that_are_told_to_stop_or_not_read_lose_nothing() -> None:
    kills.main(0, seed=0, stops=10)
