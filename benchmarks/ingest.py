"""`fewstep build-lmdb` on PNGs in EDM's zip: images a second, memory, and both for ImageNet."""

import io
import json
import resource
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import psutil
from PIL import Image

from fewstep.params import Data, load_params

PRESET = Path(__file__).parents[1] / "config" / "imagenet64.yaml"
IMAGENET = 1_281_167  # training images
DISTINCT = 1024  # what decodes does not know that it did so before
LOOK = 0.02  # seconds between two looks at the memory


def ingest_rates(images: int) -> dict[str, Any]:
    """Of the stage as it is run, Python's start included; a build of a fifth gives the slope that
    ImageNet's memory is reckoned with. Both are larger than one commit of the LMDB."""
    data = load_params(PRESET).data
    few, many = (_build(data, count) for count in (max(images // 5, 1), images))
    slope = (many["peak_bytes"] - few["peak_bytes"]) / max(many["images"] - few["images"], 1)
    more = (IMAGENET - images) * max(slope, 0.0)
    return {
        **many,
        "imagenet_minutes": IMAGENET / many["images_per_second"] / 60,
        "imagenet_peak_bytes": many["peak_bytes"] + more,
    }


def _build(data: Data, images: int) -> dict[str, Any]:
    with TemporaryDirectory(dir=".") as folder:
        write_zip(Path(folder) / data.source, images, data)
        command = [sys.executable, "-m", "fewstep", "build-lmdb", "--params", str(PRESET)]
        began, cpu, peak = time.perf_counter(), _cpu_seconds(), 0
        process = psutil.Popen(command, cwd=folder, stdout=sys.stderr)
        while process.poll() is None:
            peak = max(peak, _resident(process))
            time.sleep(LOOK)
        wall = time.perf_counter() - began
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command)
    return {
        "images": images,
        "processes": data.workers or psutil.cpu_count(),
        "images_per_second": images / wall,
        "images_per_cpu_second": images / (_cpu_seconds() - cpu),
        "peak_bytes": peak,
    }


def write_zip(path: Path, images: int, data: Data) -> None:
    """Blurred noise with grain, PNGs of photographs' size, as EDM's dataset tool packs them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files = [_png(index, data.resolution) for index in range(min(images, DISTINCT))]
    names = [f"{i // 1000:05}/img{i:08}.png" for i in range(images)]
    with zipfile.ZipFile(path, "w") as archive:
        for i, name in enumerate(names):
            archive.writestr(name, files[i % len(files)])
        labels = [[name, i % data.classes] for i, name in enumerate(names)]
        archive.writestr("dataset.json", json.dumps({"labels": labels}))


def _png(seed: int, resolution: int) -> bytes:
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
    smooth = np.asarray(coarse.resize((resolution, resolution), Image.Resampling.BICUBIC))
    pixels = (smooth + rng.normal(0, 6, smooth.shape)).round().clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


def _cpu_seconds() -> float:
    """Of all finished children and theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _resident(process: psutil.Process) -> int:
    """Bytes of a process and those that it started; what they share counts for each."""
    try:
        family = [process, *process.children(recursive=True)]
        return sum(member.memory_info().rss for member in family)
    except psutil.NoSuchProcess:  # ended while we looked
        return 0
