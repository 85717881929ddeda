"""What a preset needs, made of random numbers in the current folder; speed hangs on no weight."""

from dataclasses import replace
from types import MappingProxyType

import numpy as np
import torch

from fewstep.data.labelled import ArraySource
from fewstep.data.lmdb import build_lmdb
from fewstep.networks.registry import build_denoiser
from fewstep.networks.weights import save_model
from fewstep.params import Params, Student
from fewstep.paths import DATA, MODELS

IMAGES = 2048
NEVER = 1e9  # kimg


def prepare(params: Params, batch: int | None) -> Params:
    """The preset without what is no part of a step: validation, states, snapshots, trackers.

    A step is one micro-batch of batch_gpu images, or of `batch`, as is a batch of the sampler.
    """
    students = {name: _alone(block, batch) for name, block in params.students.items()}
    teacher = params.teacher
    if teacher.train is not None:
        teacher = replace(teacher, train=_alone(teacher.train, batch))
    wandb = replace(params.tracking.wandb, mode="disabled")
    return replace(
        params,
        students=MappingProxyType(students),
        teacher=teacher,
        tracking=replace(params.tracking, dvclive=False, wandb=wandb),
        generate=replace(params.generate, batch=batch or params.generate.batch),
    )


def _alone(block: Student, batch: int | None) -> Student:
    """The block on its own: from the teacher's weights, with a critic of its own."""
    changes = {"batch": batch or block.batch_gpu, "batch_gpu": batch or block.batch_gpu}
    phema = block.phema and replace(block.phema, snapshot_kimg=NEVER)
    settings = block.settings
    if getattr(settings, "continue_critic", False):
        settings = replace(settings, continue_critic=False)
    return replace(
        block,
        **changes,
        init_from=block.init_from and "teacher",
        validation=None,
        checkpoint_kimg=NEVER,
        phema=phema,
        settings=settings,
    )


def random_source(count: int, shape: tuple[int, int, int], classes: int) -> ArraySource:
    """Images of noise, whose classes follow one another."""
    images = np.random.default_rng(0).integers(0, 256, (count, *shape), np.uint8)
    return ArraySource("random", images, np.arange(count) % classes, classes)


def random_inputs(params: Params) -> None:
    """Random images as LMDB, and a teacher whose output layers are not zero as new ones are."""
    d = params.data
    shape = (d.channels, d.resolution, d.resolution)
    build_lmdb(random_source(IMAGES, shape, d.classes), DATA, silent=True)
    torch.manual_seed(0)
    teacher = build_denoiser(params)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    save_model(MODELS / "teacher", teacher.state_dict(), {"name": "teacher", "kimg": 0.0})
