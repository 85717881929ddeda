"""One iteration of a student at its true size: python tests/true_size.py PRESET STUDENT.

Random teacher, random images, one image in fp32 on the CPU; prints JSON: seconds, bytes (the most
that the process held) and planned (what fewstep.planning.plan says that it holds).
"""

import json
import sys
import time
from dataclasses import replace
from types import MappingProxyType

import numpy as np
import torch

from fewstep.cli import keep_freed_memory
from fewstep.data.labelled import ArraySource
from fewstep.data.lmdb import ImageDataset, build_lmdb
from fewstep.distributed import Rank
from fewstep.networks.registry import build_denoiser
from fewstep.networks.weights import save_model
from fewstep.params import Params, load_params
from fewstep.paths import DATA, MODELS
from fewstep.planning.plan import plan_student
from fewstep.training.loop import Run, peak_memory

CPU = torch.device("cpu")


def one_image(params: Params, name: str) -> Params:
    """The preset with a batch of one image for that student, without its validation."""
    block = replace(params.students[name], batch=1, batch_gpu=1, validation=None)
    tracking = replace(params.tracking, wandb=replace(params.tracking.wandb, mode="disabled"))
    students = MappingProxyType({name: block})
    return replace(params, device="cpu", precision="fp32", students=students, tracking=tracking)


def write_inputs(params: Params) -> None:
    """A random teacher whose layers are not zero, and eight random images."""
    d, rng = params.data, np.random.default_rng(0)
    images = rng.integers(0, 256, (8, d.channels, d.resolution, d.resolution), np.uint8)
    source = ArraySource("random", images, np.arange(8, dtype=np.int64), d.classes)
    build_lmdb(source, DATA, silent=True)
    torch.manual_seed(0)
    teacher = build_denoiser(params)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    save_model(MODELS / "teacher", teacher.state_dict(), {"name": "teacher"})


def main(preset: str, name: str) -> None:
    keep_freed_memory()  # as every command
    params = one_image(load_params(preset), name)
    if not (MODELS / "teacher" / "model.safetensors").exists():
        write_inputs(params)
    dataset = ImageDataset(DATA, params.data.classes)
    run = Run(name, params.students[name], params, Rank(0, 1, CPU), dataset)
    started = time.perf_counter()
    run.iterate()
    seconds = time.perf_counter() - started
    planned = plan_student(name, params.students[name], params, world=1).total_memory
    print(json.dumps({"seconds": seconds, "bytes": peak_memory(CPU), "planned": planned}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
