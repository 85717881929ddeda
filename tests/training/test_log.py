"""The log is the record: whole rows, on the disk at once, rewound without a trace."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fewstep.training.log import Log

ROWS = [{"nimg": 32 * i, "kimg": 0.032 * i, "loss": 1.0 / i} for i in range(1, 5)]


@pytest.fixture
def log(tmp_path: Path) -> Log:
    """A log of four rows."""
    log = Log(tmp_path / "scratch" / "log.jsonl")
    for row in ROWS:
        log.write(row)
    return log


def test_rows_come_back_as_they_were_written(log: Log) -> None:
    assert log.rows() == ROWS
    assert [json.loads(line) for line in log.path.read_text().splitlines()] == ROWS
    assert Log(log.path.with_name("none")).rows() == []


@pytest.mark.parametrize("cut", [1, 2, 20])
def test_a_cut_last_line_costs_that_row_alone(cut: int, log: Log) -> None:
    log.path.write_bytes(log.path.read_bytes()[:-cut])
    assert log.rows() == ROWS[:3]
    log.rewind(10**6)
    log.write({"nimg": 160, "loss": 0.1})
    assert log.rows() == [*ROWS[:3], {"nimg": 160, "loss": 0.1}], "and the next one is whole"


@pytest.mark.parametrize("line", ["no JSON", '{"kimg": 1}', "[1]", '{"nimg": "x"}', "\0\0", ""])
def test_a_line_that_is_no_row_is_refused_and_kept(line: str, log: Log) -> None:
    log.path.write_text(line + "\n" + log.path.read_text())
    before = log.path.read_bytes()
    with pytest.raises(ValueError, match=r"need JSON objects with nimg in .*log\.jsonl, got"):
        log.rewind(64)
    assert log.path.read_bytes() == before


def test_numbers_that_json_cannot_say_are_refused_before_they_are_written(log: Log) -> None:
    with pytest.raises(ValueError, match="JSON"):
        log.write({"nimg": 160, "loss": float("nan")})
    assert log.rows() == ROWS


@pytest.mark.parametrize(("nimg", "kept"), [(-1, 0), (0, 0), (63, 1), (64, 2), (128, 4), (999, 4)])
def test_rewinding_drops_what_was_written_later(nimg: int, kept: int, log: Log) -> None:
    lines = log.path.read_text().splitlines(keepends=True)
    log.rewind(nimg)
    assert log.path.read_text() == "".join(lines[:kept]), "the same bytes"
    assert [p.name for p in log.path.parent.iterdir()] == ["log.jsonl"]


def test_rewinding_nothing_begins_an_empty_log(tmp_path: Path) -> None:
    log = Log(tmp_path / "deep" / "log.jsonl")
    log.rewind(-1)
    assert log.path.read_bytes() == b""
    log.sync()


def test_a_death_while_rewinding_leaves_the_log_as_it_was(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fewstep.files.os.replace", dies)
    with pytest.raises(KeyboardInterrupt):
        log.rewind(32)
    assert log.rows() == ROWS


def test_a_row_is_in_the_file_as_soon_as_it_is_written(log: Log) -> None:
    """What a SIGKILL cannot take back: another process sees it."""
    program = "import os, sys; from pathlib import Path; from fewstep.training.log import Log; "
    program += "Log(Path(sys.argv[1])).write({'nimg': 160}); os._exit(9)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    died = subprocess.run([sys.executable, "-c", program, str(log.path)], env=environment)
    assert died.returncode == 9
    assert log.rows() == [*ROWS, {"nimg": 160}]
