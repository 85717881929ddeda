"""Limits of what is read, and text of others in messages."""

import io
import json
from pathlib import Path

import pytest

from fewstep.budgets import Bounded, number, read_json, read_small, regular, within
from fewstep.quoting import listed, plain, printable, quoted


def test_a_budget_says_what_was_counted_and_how_much() -> None:
    assert within(5, 5, "bytes of x") == 5
    with pytest.raises(ValueError, match="^need at most 1,000 bytes of x, got 1,001$"):
        within(1001, 1000, "bytes of x")
    with pytest.raises(ValueError, match=r"got 10\^400$"):
        within(10**400, 1000, "bytes of x")
    assert (number(16), number(-4), number(10**11), number(-(10**400))) == (
        *("16", "-4", "1e+11", "-10^400"),
    )


def test_only_plain_files_are_opened(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"12345")
    assert regular(tmp_path / "x") == tmp_path / "x"
    assert read_small(tmp_path / "x", 5, "x") == b"12345"
    with pytest.raises(ValueError, match="at most 4 bytes of x in .*x, got 5"):
        read_small(tmp_path / "x", 4, "x")
    with pytest.raises(ValueError, match="need a file, got a folder at"):
        regular(tmp_path)
    with pytest.raises(FileNotFoundError):
        regular(tmp_path / "y")


def test_a_bounded_file_reads_no_more_than_it_may() -> None:
    file = Bounded(io.BytesIO(bytes(100)), once=10, what="x", total=50)
    assert len(file.read(10)) == 10 and file.tell() == 10
    for read in (lambda: file.read(11), lambda: file.read()):
        with pytest.raises(ValueError, match="at most 10 bytes of x at once"):
            read()
    with pytest.raises(ValueError, match="at most 50 bytes of x, got 51"):
        file.seek(51)
    assert file.seek(45) == 45
    with pytest.raises(ValueError, match="at most 50 bytes of x"):
        file.read(6)


def test_json_is_bounded_in_every_direction() -> None:
    assert read_json('{"a": [1]}', 10, "x") == {"a": [1]}
    for text, message in {
        "[" * 10**5: "x is nested too deeply",
        " " * (1 << 20): "at most 1,000,000 bytes of x",
        json.dumps([[]] * 100): "at most 50 lists and objects in x",
    }.items():
        with pytest.raises(ValueError, match=message):
            read_json(text, 1_000_000, "x", objects=50 if "[]" in text else 10**6)


def test_foreign_text_moves_no_cursor() -> None:
    escape = "\x1b]0;title\x07\x9b2J\u202e\n"
    assert quoted(escape) == r"'\x1b]0;title\x07\x9b2J\u202e\n'"
    assert plain(escape) == r"\x1b]0;title\x07\x9b2J\u202e\n"
    assert printable(f"a\n{escape}") == "a\n" + plain(escape)[:-2] + "\n"
    assert quoted("x" * 99, 3) == "'xxx'..." and plain("x" * 99, 6) == "xxx..."
    assert listed(["a", "b\r", "c"], 2) == r"a, b\r and 1 more"
    assert (quoted(7), quoted(10**400), quoted(None)) == ("7", "a large number", "None")


def test_an_object_that_unfolds_is_only_named() -> None:
    inner: object = ()
    for _ in range(60):
        inner = (inner, inner)
    assert quoted(inner) == "an object of type tuple"
