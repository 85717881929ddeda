"""The GPUs of this machine, and a CUDA that cannot use them."""

from pathlib import Path

import pytest
import torch

from fewstep import gpus
from fewstep.distributed import pick_device
from fewstep.gpus import count_gpus, driver_version


def with_gpus(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """So many device files, and no CUDA."""
    monkeypatch.setattr(gpus.glob, "glob", lambda _: [f"/dev/nvidia{i}" for i in range(count)])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_gpus_are_counted_as_cuda_sees_them(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(4, monkeypatch)
    visible = ("", "-1", "NoDevFiles", "2", "0,3", "GPU-a,GPU-b")
    assert [count_gpus({"CUDA_VISIBLE_DEVICES": v}) for v in visible] == [0, 0, 0, 1, 2, 2]
    assert count_gpus({}) == 4


NVRM = """NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  535.129.03  Release Build
GCC version:  gcc version 12.2.0 (Debian 12.2.0-14)
"""


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_a_cuda_that_cannot_use_the_gpus_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_gpus(2, monkeypatch)
    (tmp_path / "version").write_text(NVRM)
    monkeypatch.setattr(gpus, "DRIVER", tmp_path / "version")

    def init() -> None:
        raise RuntimeError("The NVIDIA driver is too old (found version 12020). Please update it")

    monkeypatch.setattr(torch.cuda, "init", init)
    said = rf"2 GPUs here, got driver 535\.129\.03 and torch {torch.__version__[:4]}.*12020\) \("
    with pytest.raises(ValueError, match=said):
        pick_device(name)
    assert pick_device("cpu") == torch.device("cpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    if name == "auto":
        assert pick_device(name) == torch.device("cpu"), "none of them was to be used"


def test_without_gpus_auto_is_the_cpu_and_cuda_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(0, monkeypatch)
    assert pick_device("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match="need a GPU for device: cuda, found none"):
        pick_device("cuda")


def test_a_driver_that_says_nothing_is_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpus, "DRIVER", tmp_path / "version")
    assert driver_version() == "unknown"
    (tmp_path / "version").write_text("")
    assert driver_version() == "unknown"
