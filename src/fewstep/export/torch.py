"""A `torch.export` program: runs in plain PyTorch, `torch.export.load(file).module()(...)`.

Tracing goes through every network call: minutes for many steps of a large network.
"""

from pathlib import Path

import torch
from torch.export import Dim

from fewstep.export.order import Order
from fewstep.export.program import Program, inputs, portable, traced_quietly
from fewstep.files import atomic_path

SUFFIX = ".pt2"


@torch.no_grad()
def write(order: Order, path: Path) -> None:
    """Write latents and labels -> uint8 (B, H, W, C) as a program for any batch.

    What it is and where it comes from are extra files of the archive.
    """
    student, row = order.student, order.row
    program = Program(portable(student), row, student.grid, student.classes)
    example = inputs(student, row, range(2))
    batch = Dim("batch", min=1)
    shapes = tuple({0: batch} for _ in example)
    exported = traced_quietly(program, example, shapes)
    with atomic_path(path) as temporary:
        torch.export.save(exported, temporary, extra_files=order.notes())
