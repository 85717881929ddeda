"""The file: what YAML itself hides, and files that are none."""

import re
from pathlib import Path

import pytest

from fewstep.params import ParamsError, load_params
from params_edits import TINY, load_text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "need a mapping of keys to values, got an empty file"),
        ("# nothing\n", "need a mapping of keys to values, got an empty file"),
        ("- 1\n", "need a mapping of keys to values, got [1]"),
        ("a: [\n", "need valid YAML, got: line 2, column 1: "),
        ("a:\n\tb: 1\n", "need valid YAML, got: line 2, column 1: "),
        ("a: 1\n---\nb: 2\n", "need valid YAML, got: line 2, column 1: "),
        ("a: !!python/name:os.system\n", "need valid YAML, got: line 1, column 4: could"),
        ("{a: 1}: 2\n", "need valid YAML, got: line 1, column 1: found unhashable key"),
        ("seed: 2020-13-45\n", "need valid YAML, got: month must be in 1..12"),
        ("a: \x07\n", "need valid YAML, got: unacceptable character #x0007"),
    ],
)
def test_file_that_is_no_mapping_is_refused(text: str, message: str) -> None:
    with pytest.raises(ParamsError, match="^" + re.escape(message)):
        load_text(text)


def test_missing_file_and_folder_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ParamsError, match=r"^need a params file, got nothing at none.yaml; run in"):
        load_params("none.yaml")
    with pytest.raises(
        ParamsError, match=r"^need a file .*, got: need a file, got a folder at \. \(\.\)$"
    ):
        load_params(".")


def test_duplicate_key_is_refused_with_both_lines() -> None:
    with pytest.raises(
        ParamsError, match=r"^need each key once, got it in lines \d+ and .*noise.rho"
    ):
        load_text(TINY.replace("  rho: 7.0\n", "  rho: 7.0\n  rho: 5.0\n"))


@pytest.mark.parametrize("text", ["010", "1_000", "1:30", "0x10"])
def test_number_that_yamls_read_apart_is_refused(text: str) -> None:
    message = f"YAML 1.1 and 1.2 may read {text} differently; write a finite "
    with pytest.raises(ParamsError, match=re.escape(message) + r".* \(params.yaml: seed\)"):
        load_text(TINY.replace("seed: 0\n", f"seed: {text}\n", 1))


def test_boolean_that_yamls_read_apart_is_refused() -> None:
    with pytest.raises(ParamsError, match=r"YAML 1.1 and 1.2 .*settings.sync_dropout"):
        load_text(TINY.replace("sync_dropout: true", "sync_dropout: on"))


@pytest.mark.parametrize("text", [".nan", ".inf", "1.0e+999"])
def test_number_that_is_not_finite_is_refused(text: str) -> None:
    with pytest.raises(ParamsError, match=r" finite .*params.yaml: noise.rho"):
        load_text(TINY.replace("rho: 7.0", f"rho: {text}"))


def test_self_containing_yaml_is_refused_not_followed() -> None:
    with pytest.raises(ParamsError, match=r"got no such key \(params.yaml: students.cd.method\)"):
        load_text(
            re.sub(r"(?s)students:\n.*?\ngenerate:", "students: &s {cd: *s}\ngenerate:", TINY)
        )
