"""The GPUs of this machine, as its device files show them, without importing torch."""

import glob
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path

DRIVER = Path("/proc/driver/nvidia/version")
NONE = ("", "-1", "NoDevFiles", "none", "void")  # what stands for no GPU in CUDA_VISIBLE_DEVICES


def count_gpus(environ: Mapping[str, str] = os.environ) -> int:
    """Number of GPUs that CUDA would see if it worked."""
    devices = len(glob.glob("/dev/nvidia[0-9]*"))
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return devices
    return min(devices, len([name for name in visible.split(",") if name.strip() not in NONE]))


def say_gpus(count: int) -> None:
    """Print on stderr what `snakemake --profile gpu` will run on."""
    what = f"{count} GPUs" if count else "no GPU here, so everything runs on the CPU"
    print(f"profile gpu: {what}", file=sys.stderr, flush=True)


def driver_version() -> str:
    """The version of NVIDIA's kernel driver, `535.129.03`; `unknown` where it does not say."""
    found = re.search(r"\s(\d+\.\d[\d.]*)\s", DRIVER.read_text()) if DRIVER.is_file() else None
    return found.group(1) if found else "unknown"
