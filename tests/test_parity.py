"""This code against the recorded answers of the reference implementations, and the check itself."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import parity
from places import VECTORS

KEPT = [file for file in parity.FILES if file not in parity.left_out(VECTORS)]


@pytest.mark.parametrize("file", KEPT)
def test_answers_are_those_of_the_reference(file: str) -> None:
    results = list(parity.checks(VECTORS, file))
    assert results
    failed = [str(result) for result in results if not result.ok]
    assert not failed, "\n".join(failed)


def test_reduced_vectors_keep_every_kind_of_check_and_stay_small() -> None:
    assert set(parity.FILES) - set(KEPT) == {"network_ddpmpp.npz"}
    assert sum(file.stat().st_size for file in VECTORS.iterdir()) <= 10_000_000


def test_wrong_shape_nan_and_small_errors_fail() -> None:
    one = torch.ones(2)
    assert parity.check("same", one, one, 0.0, 0.0).ok
    assert not parity.check("off", one + 2e-4, one, *parity.NETWORK).ok
    assert not parity.check("shape", one, torch.ones(3), *parity.NETWORK).ok
    assert not parity.check("nan", one * torch.nan, one, *parity.NETWORK).ok
    assert not parity.check("nan", one, one * torch.nan, *parity.NETWORK).ok


def test_what_is_missing_is_an_error_unless_the_folder_says_so(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"need frechet\.npz in .*, which is not there"):
        list(parity.checks(tmp_path, "frechet.npz"))
    with np.load(VECTORS / "frechet.npz") as arrays:
        np.savez(tmp_path / "frechet.npz", **dict(arrays))
    with pytest.raises(SystemExit, match=r"need 1/features_a in frechet\.npz"):
        list(parity.checks(tmp_path, "frechet.npz"))
    left_out = {"left_out": ["frechet.npz:1/*", "frechet.npz:2/*"]}
    (tmp_path / "REDUCED.json").write_text(json.dumps(left_out))
    assert [result.ok for result in parity.checks(tmp_path, "frechet.npz")] == [True]


def test_command_counts_failures_and_refuses_what_is_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(parity, "FILES", {"frechet.npz": parity.frechet})
    shutil.copy(VECTORS / "REDUCED.json", tmp_path)
    with np.load(VECTORS / "frechet.npz") as arrays:
        np.savez(tmp_path / "frechet.npz", **dict(arrays))
        assert parity.main([str(tmp_path)]) == 0
        assert "1 of 1 checks hold" in capsys.readouterr().out
        np.savez(tmp_path / "frechet.npz", **dict(arrays) | {"0/fid": arrays["0/fid"] + 1e-6})
    assert parity.main([str(tmp_path)]) == 1
    assert "FAIL" in capsys.readouterr().out
    assert parity.main([str(tmp_path / "nowhere")]) == 2
