"""A params file for other people's images and teacher: what `fewstep new` writes.

It begins as the shipped preset that is nearest in size. The blocks about data, network, teacher and
sizes are written anew; students, rows and settings stay as the preset has them, but for the times.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fewstep.data.look import Look
from fewstep.params import Network
from fewstep.params.editing import KeyPath, Text
from fewstep.theory.sample import nfe

PRESETS = Path("config")
SMALL, MEDIUM = "fmnist16", "cifar10"  # on a CPU or below 32 pixels; up to 32 pixels on a GPU
LARGE = "imagenet64"
TRAINED = "fmnist16-teacher"  # has the block of a teacher that is trained
FEWEST = 16  # images: with fewer, no half of them has neighbours to compare with
DEAREST = 100  # network calls of a row; calibrations of published numbers take more
BATCH_STEPS = 5000  # optimiser steps that a batch has to leave room for


@dataclass(frozen=True)
class Weights:
    """A teacher that is there: where, its checksum, and what was read from it."""

    url: str
    sha256: str
    about: dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """How many images are drawn, compared with and validated on."""

    images: int
    reference: int
    validation: int
    seed_ranges: int

    @classmethod
    def of(cls, available: int, most: int = 2000) -> "Sizes":
        """As many as the default has, or the data can give: half for rows, half to compare with.

        Raises:
            ValueError: the data has too few.
        """
        if available < FEWEST:
            raise ValueError(
                f"need at least {FEWEST} images, half of them to compare with, got {available} "
                "(--data)"
            )
        images = min(most, available // 2)
        reference = min(5 * most, available - images)
        return cls(images, reference, max(min(images // 4, 500), min(images, 64)), 1)


@dataclass(frozen=True)
class Proposal:
    """All that is chosen; `text` writes it."""

    look: Look
    teacher: Weights | None
    preset: str
    resolution: int
    network: Network
    sizes: Sizes
    few: bool  # a single student and three rows: for minutes
    title: str
    precision: str
    gpus: int = 1  # processes of a training
    students_scale: float = 1.0  # of all times of students
    teacher_kimg: float | None = None  # None: the preset's

    @property
    def channels(self) -> int:
        return int(self.teacher.about["img_channels"]) if self.teacher else self.look.channels

    @property
    def classes(self) -> int:
        return int(self.teacher.about["label_dim"]) if self.teacher else self.look.classes

    def scaled(self, students: float, teacher_kimg: float | None) -> "Proposal":
        return replace(self, students_scale=students, teacher_kimg=teacher_kimg)

    def text(self) -> str:
        """The params file."""
        text = Text(preset_text(self.preset))
        self._edit_sizes(text)
        self._edit_students(text)
        text.replace(("data",), self._data())
        text.replace(("network",), self._network())
        text.replace(("teacher",), self._teacher())
        text.put(("precision",), f"{self.precision} # inside the networks; weights stay fp32")
        text.put(("device",), "auto # auto | cpu | cuda")
        text.put(("tracking", "wandb"), "{ mode: disabled, project: fewstep }")
        body = text.edited()
        return f"{self.title}\n{body[body.index('seed:') :]}"

    def _data(self) -> str:
        seen = self.look
        fit = "as they are" if seen.fixed else "cropped and resized to this"
        classes = ""
        if not self.classes:
            classes = " # the teacher knows none; labels do not count"
        elif names := seen.class_names:
            classes = f" # {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"
        return (
            "data:\n"
            f"  source: {_quoted(seen.source)} # {seen.images:,} images\n"
            f"  resolution: {self.resolution} # {fit}\n"
            f"  channels: {self.channels}\n"
            f"  classes: {self.classes}{classes}\n"
        )

    def _network(self) -> str:
        n = self.network
        whose = "as the teacher's weights have it" if self.teacher else "trained here"
        return (
            f"network: # {whose}; shared by teacher, student and fake score\n"
            f"  type: {n.type}\n"
            f"  model_channels: {n.model_channels}\n"
            f"  channel_mult: {list(n.channel_mult)}\n"
            f"  num_blocks: {n.num_blocks}\n"
            f"  attn_resolutions: {list(n.attn_resolutions)}\n"
            f"  sigma_data: {n.sigma_data}\n"
        )

    def _teacher(self) -> str:
        if self.teacher is not None:
            return (
                "teacher:\n"
                f"  url: {_quoted(self.teacher.url)}\n"
                f"  sha256: {self.teacher.sha256} # of the file that was looked at\n"
            )
        text = Text(preset_text(TRAINED))
        train = ("teacher", "train")
        if self.teacher_kimg is not None:
            factor = self.teacher_kimg / float(text.value((*train, "kimg")))
            text.scale(lambda path: path[:2] == train and _is_time(path), _scaled_by(factor))
        if self.preset != SMALL:
            for key in ("batch", "batch_gpu"):
                text.put((*train, key), "256")
        self._share_batch(text, train)
        if not self.classes:
            text.put((*train, "settings", "label_dropout"), "0.0")
        edited = Text(text.edited())
        start, end = edited.lines_of(("teacher",))
        _, *lines = edited.text[start:end].rstrip().split("\n")
        return "\n".join(
            ["teacher: # trained on the same images", *lines, "    validation: null", ""]
        )

    def _edit_sizes(self, text: Text) -> None:
        s, least = self.sizes, min(self.sizes.images, self.sizes.reference)
        text.put(("generate", "images"), f"{s.images} # per row and seed range")
        text.put(("generate", "batch"), str(min(250, s.images)))
        text.put(("generate", "seed_ranges"), str(s.seed_ranges))
        text.put(
            ("metric", "reference_images"), f"{s.reference} # and {s.images} others: the floor"
        )
        for key in ("reference", "inception_score"):
            if ("metric", key) in text.paths():
                text.replace(("metric", key), "")  # of other data; of ImageNet's classes
        subset = max(2, min(1000, least // 2))
        text.put(("metric", "kid"), f"{{ subsets: 100, subset_size: {subset} }}")
        text.put(("metric", "memorisation"), "{ k: 3, expected: 0.01 }")
        validation = ("training", "validation")
        text.put((*validation, "images"), str(s.validation))
        text.put((*validation, "reference_images"), str(min(2000, self.look.images)))

    def _edit_students(self, text: Text) -> None:
        students = [
            path[1] for path in text.paths() if path[:1] == ("students",) and len(path) == 2
        ]
        kept = students[:1] if self.few else students
        for name in students:
            if name not in kept:
                text.replace(("students", name), "")
        for name, row in self._rows(text):
            if not self._keeps(name, row, kept):
                text.replace(("rows", name), "")
        blocks = ("students", "training")
        scaled = _scaled_by(self.students_scale)
        text.scale(lambda path: path[0] in blocks and _is_time(path), scaled)
        for name in kept:
            self._fit_batch(text, ("students", name))
            self._share_batch(text, ("students", name))
        if self.resolution >> (len(self.network.channel_mult) - 1) != 8:
            gan = ("gan_student_weight", "gan_critic_weight")  # its head takes 8x8 pixels
            text.scale(lambda p: p[0] == "students" and p[-1] in gan, lambda _: "0.0")
        if not self.classes:
            dropout = ("settings", "label_dropout")
            text.scale(lambda p: p[0] == "students" and p[2:] == dropout, lambda _: "0.0")

    def _fit_batch(self, text: Text, student: KeyPath) -> None:
        """Halve a batch that would leave few steps; Adam's rates go with its root."""
        batch, at = int(text.value((*student, "batch"))), float(text.value((*student, "kimg")))
        smaller = batch
        while smaller > 64 and at * self.students_scale * 1000 / smaller < BATCH_STEPS:
            smaller //= 2
        if smaller < batch:
            part = int(text.value((*student, "batch_gpu")))
            text.put((*student, "batch"), str(smaller))
            text.put((*student, "batch_gpu"), str(min(part, smaller)))
            rates = [p for p in text.paths() if p[:2] == student and _is_rate(p)]
            text.scale(lambda path: path in rates, _scaled_by((smaller / batch) ** 0.5))

    def _share_batch(self, text: Text, block: KeyPath) -> None:
        """Make micro-batches small enough that each process has as many of them."""
        batch, part = (int(text.value((*block, key))) for key in ("batch", "batch_gpu"))
        own, rest = divmod(batch, self.gpus)
        if own and not rest and batch // part % self.gpus:
            fits = next(n for n in range(min(part, own), 0, -1) if own % n == 0)
            text.put((*block, "batch_gpu"), str(fits))

    def _rows(self, text: Text) -> Iterator[tuple[str, dict[str, str]]]:
        for path in text.paths():
            if path[:1] == ("rows",) and len(path) == 2:
                keys = ("model", "sampler", "steps", "guidance_scale")
                yield path[1], {key: text.value((*path, key)) for key in keys}

    def _keeps(self, name: str, row: dict[str, str], students: list[str]) -> bool:
        guided = float(row["guidance_scale"]) != 1
        if row["model"] not in ("teacher", *students) or (guided and not self.classes):
            return False
        if row["model"] == "teacher":
            few = row["sampler"] == "heun" or row["steps"] == "8"
            steps = int(row["steps"]) if row["steps"].isdecimal() else 1  # own
            return nfe(row["sampler"], steps) <= DEAREST and (few or not self.few)
        return True


def preset_text(name: str) -> str:
    """A shipped preset.

    Raises:
        ValueError: it is not here.
    """
    try:
        return (PRESETS / f"{name}.yaml").read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(
            f"need the presets of this repository, got no {PRESETS / name}.yaml; run in its root"
        ) from error


def sized_network(resolution: int, model_channels: int) -> Network:
    """An ADM of that width for images of that size, whose lowest level has 7 to 15 pixels."""
    levels = [resolution]
    while levels[-1] % 2 == 0 and levels[-1] > 15:
        levels.append(levels[-1] // 2)
    mults = tuple(min(2 ** min(i, 1) + (i > 2), 3) for i in range(len(levels)))
    attention = tuple(n for n in levels[1:] if n <= 16)
    return Network("adm", model_channels, mults, 1 if resolution <= 16 else 2, attention, 0.5)


def _is_time(path: KeyPath) -> bool:
    return path[-1] == "kimg" or path[-1].endswith("_kimg")


def _is_rate(path: KeyPath) -> bool:
    return path[-1] == "lr" or path[-1].endswith("_lr")


def _scaled_by(factor: float) -> Any:  # noqa: ANN401
    return lambda value: number(value * factor)


def number(value: float) -> str:
    """Three digits in a form that YAML 1.1 and 1.2 read alike."""
    if value == 0:
        return "0.0"
    if 1e-3 <= abs(value) < 1e6:
        return _short(f"{float(f'{value:.3g}'):f}")
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{_short(mantissa)}e{int(exponent):+d}"


def _short(decimal: str) -> str:
    """A number without zeros at its end, but for the one behind the point: 0.5, 20.0."""
    text = decimal.rstrip("0")
    return f"{text}0" if text.endswith(".") else text


def _quoted(text: str) -> str:
    """A path as YAML reads it: plain where that is safe."""
    import yaml

    return yaml.safe_dump(text, width=10_000, allow_unicode=True).removesuffix("\n...\n").rstrip()
