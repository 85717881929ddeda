"""A training step of each method: its rate, and the seconds of its parts.

The rate is of steps as they are; the parts come from other steps, in which each call is waited for,
so on a GPU they can add up to more than a step.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from statistics import median
from typing import Any

import torch
from clock import Parts, in_turn, summary

from fewstep.data.lmdb import ImageDataset
from fewstep.distributed import Rank
from fewstep.method import student_block
from fewstep.params import Params
from fewstep.paths import DATA
from fewstep.planning.flops import image_flops
from fewstep.training.loop import Run, peak_memory
from fewstep.training.meter import Meter
from fewstep.training.tracking import Tracker

WARM_UP = 2  # cycles: compilation, and the optimiser's state
PARTS = {
    "data": "waiting for a batch, bringing it to the device",
    "teacher": "its calls",
    "student": "its forward calls, roll-outs among them",
    "backward": "the student's",
    "critic": "forward calls of fake score and discriminator, or of the auxiliary denoiser",
    "critic backward": "",
    "optimiser": "clipping and updates",
    "averages": "of the student's weights",
    "log": "sums, rows, the look for gradients that are not finite",
    "rest": "noise, solver steps in float64, losses",
}


def methods(params: Params, wanted: list[str] | None) -> list[str]:
    """What the preset trains, or those of it that are wanted.

    Raises:
        ValueError: one that it does not train.
    """
    every = [*(["teacher"] if params.teacher.train is not None else []), *params.students]
    if unknown := [name for name in wanted or () if name not in every]:
        raise ValueError(f"need methods of {', '.join(every)}, got {', '.join(unknown)}")
    return wanted or every


def training(
    name: str,
    variants: Mapping[str, Params],
    device: torch.device,
    pairs: int,
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """Rates, parts, losses, FLOPs and memory of each variant's steps; all see the same images.

    One measurement is a cycle: as many steps as lie between two updates of the student.
    """
    runs = {v: Stepped(name, params, device) for v, params in variants.items()}
    for run in runs.values():
        run.warm_up()
    some = next(iter(runs.values()))
    images, flops = some.images, image_flops(some.run.method, some.run.params)
    cycles = {variant: run.cycle for variant, run in runs.items()}
    found = summary(in_turn(cycles, pairs, device), images, flops, about)
    in_turn({variant: run.split for variant, run in runs.items()}, pairs, device)
    for variant, run in runs.items():
        row = found[variant]
        row["parts"], row["cpu_parts"] = run.parts(0), run.parts(1)
        row["loss"], row["memory_gib"] = run.losses, run.memory / 2**30
    return {
        "images": images,
        "steps": some.steps,
        "flops_per_image": flops,
        "variants": found,
    }


class Stepped:
    """One variant's training, of which cycles are measured."""

    def __init__(self, name: str, params: Params, device: torch.device) -> None:
        block = student_block(name, params)
        dataset = ImageDataset(DATA, params.data.classes)
        before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        self.run = Run(name, block, params, Rank(0, 1, device), dataset, Tracker())
        self.run.resume()
        self.own = torch.cuda.memory_allocated(device) - before if device.type == "cuda" else 0
        self.device, self.samples = device, list[Parts]()
        phases = self.run.method.phases  # long after any warm-up
        updates = (i for i in count() if "student" in phases(i, math.inf))
        first = next(updates)
        self.steps = next(updates) - first
        self.images = self.steps * block.batch
        self.losses: dict[str, float] = {}
        self.memory = 0

    def cycle(self) -> None:
        for _ in range(self.steps):
            self.run.iterate()

    def warm_up(self) -> None:
        """Compile, and keep the losses of the first cycle, and the most memory of the last."""
        note, first = self.run.nonfinite.note, dict[str, torch.Tensor]()
        # a GPU holds all variants at once; of other ones' networks this one's peak knows nothing
        others = torch.cuda.memory_allocated(self.device) - self.own if self.own else 0

        def noted(phase: str, nimg: int, norm: torch.Tensor, loss: torch.Tensor) -> None:
            first.setdefault(phase, loss)
            note(phase, nimg, norm, loss)

        with replaced(self.run.nonfinite, "note", noted):
            for _ in range(WARM_UP):
                if self.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(self.device)
                self.cycle()
        self.losses = {phase: float(loss) for phase, loss in first.items()}
        self.memory = peak_memory(self.device) - others

    def split(self) -> None:
        """A cycle with clocks around its parts."""
        parts = Parts(self.device)
        with watching(self.run, parts), parts.part("rest"):
            self.cycle()
        self.samples.append(parts)

    def parts(self, clock: int) -> dict[str, float]:
        """Median seconds of each part of a cycle, of wall (0) or processor (1)."""
        seconds = [{n: float(p.seconds[n][clock]) for n in PARTS} for p in self.samples]
        return {name: median(each[name] for each in seconds) for name in PARTS}


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:  # noqa: ANN401
    """An attribute of an object or a class for a while."""
    own = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        delattr(owner, name) if own is None else setattr(owner, name, own)


@contextmanager
def watching(run: Run, parts: Parts) -> Iterator[None]:
    """Clocks around the calls that make up a step; none of them knows."""
    places = [(owner, name, part) for owner, name, part in _places(run) if owner is not None]
    opened = [
        replaced(owner, name, parts.watched(getattr(owner, name), part))
        for owner, name, part in places
    ]
    for each in opened:
        each.__enter__()
    try:
        yield
    finally:
        for each in opened:
            each.__exit__(None, None, None)


def _places(run: Run) -> Iterator[tuple[Any, str, str]]:
    method: Any = run.method
    yield method.student, "forward", "student"
    yield getattr(method, "teacher", None), "forward", "teacher"
    yield getattr(method, "auxiliary", None), "forward", "critic"
    critic = getattr(method, "critic", None)
    if critic is not None:
        yield critic.fake_score, "forward", "critic"
        yield critic.fake_score, "bottleneck", "critic"
        yield critic.discriminator, "forward", "critic"
    for phase, updates in run.updates.items():
        yield updates, "backward", "backward" if phase == "student" else "critic backward"
        yield updates, "step", "optimiser"
    yield run, "feed", "data"
    yield run.averages, "update", "averages"
    yield run, "write_row", "log"
    yield run, "write_nonfinite", "log"
    yield Meter, "add", "log"
    if hasattr(method, "diagnostics"):
        yield method, "diagnostics", "log"
