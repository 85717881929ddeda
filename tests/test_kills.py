"""Real kills of real trainings; see kills.py."""

import pytest

import kills


@pytest.mark.slow
def test_thirty_killed_trainings_go_on_as_if_nothing_had_happened() -> None:
    kills.main(30, seed=0)
