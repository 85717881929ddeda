"""`fewstep new --data FOLDER`: a params file for these images, this teacher and this much time."""

import re
from argparse import ArgumentParser
from collections.abc import Iterator
from dataclasses import replace
from filecmp import cmp
from math import ceil
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from fewstep.data.look import Look, look
from fewstep.download import CACHE, measured
from fewstep.files import atomic_path
from fewstep.interop.architecture import network_block
from fewstep.interop.checkpoint import import_checkpoint
from fewstep.method import build_method
from fewstep.params import Params, Student, load_params
from fewstep.planning import plan, propose
from fewstep.planning.describe import describe, duration
from fewstep.planning.flops import image_flops
from fewstep.planning.plan import GB, GPUS, Hardware
from fewstep.planning.propose import PRESETS, Proposal, Sizes, Weights, number
from fewstep.planning.sight import data_problems
from fewstep.planning.speed import LAUNCHING, STAGE, Speed, measure
from fewstep.planning.utilisation import share_of

HELP = "write a params file for your images and your teacher, sized to your time"
TAKES_PATH = True

FEW = 600.0  # seconds below which there is a single student
WIDTHS = (16, 32, 64, 96, 128, 192)  # model_channels of a teacher that is trained here
ENOUGH = 200.0  # kimg of such a teacher: at 8x8 and 16x16 it then draws well
TEACHER = 0.6  # of the time for training, where a teacher is trained: students inherit its faults
LEAST = 0.2  # of the budget goes into training; one that leaves less is refused
TRAINING = 0.5  # of the time after starting, at least; else fewer images are drawn and scored
BUSY = 0.1  # of the time: with more of it taken by others, it is said
DRAWN = 113  # images of a row, at least: with fewer the default's covariance has no full rank


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--data", required=True, help="images: whatever data.source may name")
    parser.add_argument("--teacher", help="weights: a file, folder or URL; default: trained here")
    parser.add_argument("--budget", help="time on this machine, as 20m or 2h; default: 40m")
    parser.add_argument("--gpu", choices=GPUS, help="kind of GPU that it will run on, with --hours")
    parser.add_argument("--hours", type=float, help="time on those GPUs")
    parser.add_argument("--gpus", type=int, default=1, help="number of GPUs; default: 1")
    text = "share of the data sheet's FLOP/s that is reached; default: as measured, or a guess"
    parser.add_argument("--utilisation", type=float, help=text)
    text = "of the images; default: the teacher's, or what images and time allow"
    parser.add_argument("--resolution", type=int, help=text)
    parser.add_argument("--out", type=Path, help="the file to write; default: params.yaml")


def run(
    path: str,
    data: str,
    teacher: str | None = None,
    budget: str | None = None,
    gpu: str | None = None,
    hours: float | None = None,
    gpus: int = 1,
    utilisation: float | None = None,
    resolution: int | None = None,
    out: Path | None = None,
) -> None:
    """Look at images and weights, write a params file that fits, print choices and plan.

    Args:
        path: the file to write, unless `out` names another. One that is there stays, unless it is
            a copy of a shipped preset.
        budget: of all stages, on this machine. Not beside `gpu` and `hours`.

    Raises:
        ValueError: a file that is there already, arguments that do not go together, or images
            that the teacher does not know.
    """
    file = out or Path(path)
    _refuse_taken(file)
    if given := _half_given(gpu, hours, budget):
        raise ValueError(f"need --gpu and --hours, or --budget for this machine, got {given}")
    if hours is not None and not 0 < hours < float("inf"):
        raise ValueError(f"need a time above 0, got {hours} (--hours)")
    hardware = _named(gpu, gpus, utilisation) if gpu else None
    seconds = 3600 * (hours or 0.0) if gpu else _seconds(budget or "40m")
    weights, found = _weights(teacher), _look(data)
    proposal = _proposal(found, weights, resolution, seconds, gpu, gpus)
    speed = _rated(_params(proposal), hardware, gpu, utilisation) if gpu and hardware else None
    proposal, params, speed = _fitted(proposal, seconds, speed)
    _write(file, proposal, params)
    print("\n".join(_choices(proposal)))
    if gpu and hardware:
        students = list(plan.plan_students(params, hardware.world))
        print("\n".join(describe(params, students, hardware, gpu, found.images, utilisation)))
        for line in _launched(params, speed):
            print(line)
        print(f"again: fewstep plan --params {file} --gpu {gpu} --gpus {gpus}")
    else:
        print("\n".join(_plan(params, speed, seconds)))
    if weights and re.match("https?://", weights.url):
        print(
            f"teacher: the file that came has sha256 {weights.sha256}, which {file} now names; "
            "compare it with a source that you trust"
        )
    print(f"new: {file}; next: {_next(file)}")


def _refuse_taken(file: Path) -> None:
    """Refuse a file whose content is nowhere else.

    Raises:
        ValueError: it is there, and no copy of a shipped preset.
    """
    shipped = [] if file.resolve().parent == PRESETS.resolve() else PRESETS.glob("*.yaml")
    if file.exists() and not any(cmp(file, preset, shallow=False) for preset in shipped):
        raise ValueError(
            f"need a new file, got {file}, which is there; name another, such as "
            f"--out {PRESETS}/mine.yaml"
        )


def _half_given(gpu: str | None, hours: float | None, budget: str | None) -> str:
    """What was given of times that do not go together; empty if they do."""
    options = {"--gpu": gpu, "--hours": hours, "--budget": budget}
    given = [name for name, value in options.items() if value is not None]
    return "" if given in ([], ["--budget"], ["--gpu", "--hours"]) else " and ".join(given)


def _look(data: str) -> Look:
    """What images there are.

    Raises:
        ValueError: see `look`.
    """
    try:
        return look(data)
    except ValueError as error:
        raise ValueError(str(error).replace("(params.yaml: data.source)", "(--data)")) from error


def _weights(teacher: str | None) -> Weights | None:
    """The teacher that is there, read and not executed; fetched first if it is far away.

    Raises:
        ValueError: it is not there, or not the weights of a network that is known here.
    """
    if teacher is None:
        return None
    far = re.match("https?://", teacher) is not None
    if not far and not Path(teacher).exists():
        raise ValueError(f"need a file or folder, got nothing at {teacher} (--teacher)")
    _, about = import_checkpoint(measured(teacher, CACHE) if far else Path(teacher))
    return Weights(teacher, about["sha256"], about)


def _proposal(
    found: Look,
    teacher: Weights | None,
    resolution: int | None,
    seconds: float,
    gpu: str | None,
    gpus: int,
) -> Proposal:
    """What the images and the weights decide, and a first guess at the rest.

    Raises:
        ValueError: they do not fit together.
    """
    on_gpu = gpu is not None or torch.cuda.is_available()
    size = _resolution(found, teacher, resolution, seconds, on_gpu)
    small = not on_gpu or size < 32
    network = network_block(teacher.about) if teacher else propose.sized_network(size, WIDTHS[1])
    preset = propose.SMALL if small else propose.MEDIUM if size <= 32 else propose.LARGE
    sizes = Sizes.of(found.images, 2000 if small else 10000)
    title = f"# {found.images:,} images of {Path(found.source).name} at {size}x{size}, sized to "
    title += f"{duration(seconds / 3600)} by `fewstep new`.\n# Keys and units: docs/params.md."
    few, precision = not on_gpu and seconds < FEW, "bf16" if on_gpu else "fp32"
    return Proposal(found, teacher, preset, size, network, sizes, few, title, precision, gpus)


def _resolution(
    found: Look, teacher: Weights | None, asked: int | None, seconds: float, on_gpu: bool
) -> int:
    """The size of the images: the teacher's, the one they have to keep, or a power of two."""
    if teacher is not None:
        about = teacher.about
        size, classes = int(about["img_resolution"]), int(about["label_dim"])
        if classes and classes != found.classes:
            raise ValueError(
                f"need data of {classes} classes, as the teacher's, got {found.classes} in "
                f"{found.source} (--data, --teacher)"
            )
        if found.fixed and found.channels != about["img_channels"]:
            raise ValueError(
                f"need images of {about['img_channels']} channels, as the teacher's, got "
                f"{found.channels} in {found.source} (--data, --teacher)"
            )
    elif found.fixed:
        size = found.side
    else:
        most = 64 if on_gpu else 32 if seconds > 4 * 3600 else 16
        size = asked or min(most, 2 ** max(found.side.bit_length() - 1, 3))
    whose = "the teacher's" if teacher else "that of the images, which keep theirs"
    if found.fixed and found.side != size:
        raise ValueError(
            f"need images of {size}x{size}, as {whose}, got {found.side}x{found.side} in "
            f"{found.source} (--data, --teacher)"
        )
    if (asked or size) != size:
        raise ValueError(f"need the resolution {size}, {whose}, got {asked} (--resolution)")
    return size


def _fitted(
    proposal: Proposal, seconds: float, speed: Speed | None
) -> tuple[Proposal, Params, Speed]:
    """The proposal with sizes and times that fit into so many seconds, and its params.

    Args:
        speed: of other machines; None for this one's, which is measured.
    """
    params, here = _params(proposal), speed is None
    speed = speed or measure(params)
    left, starting = seconds - _fixed(params, speed, here), _starting(params, here)
    while left < TRAINING * (seconds - starting) and proposal.sizes.images >= 2 * DRAWN:
        fewer = proposal.sizes.images // 2
        sizes = replace(Sizes.of(3 * fewer, fewer), validation=min(proposal.sizes.validation, 64))
        params = _params(proposal := replace(proposal, sizes=sizes))
        left = seconds - _fixed(params, speed, here)
    if left < LEAST * seconds:
        fixed = seconds - left
        raise ValueError(
            f"need a budget of {ceil(fixed / (1 - LEAST) / 60)}m or more, as starting, rows and "
            f"scores alone take {fixed / 60:.1f} min, got {seconds / 60:.1f} min "
            f"({'--budget' if here else '--hours'})"
        )
    share = TEACHER if proposal.teacher is None else 0.0
    if share:
        proposal, params = _sized(proposal, share * left, speed)
        speed = measure(params) if here else speed  # a wider network reaches more FLOP/s
    each = {name: _image_seconds(block, params, speed) for name, block in _trainings(params)}
    students = sum(1000 * s.kimg * each[name] for name, s in params.students.items())
    kimg = share * left / each["teacher"] / 1000 if share else None
    proposal = proposal.scaled((1 - share) * left / students, kimg)
    return proposal, _params(proposal), speed


def _trainings(params: Params) -> list[tuple[str, Student]]:
    teacher = [("teacher", params.teacher.train)] if params.teacher.train else []
    return [*teacher, *params.students.items()]


def _image_seconds(block: Student, params: Params, speed: Speed) -> float:
    """Seconds of training on one image."""
    method = build_method(block, params, torch.device("meta"))
    flops, (forward, _) = image_flops(method, params), plan.forward_flops(method.student, params)
    return max(flops / speed.flops, flops / forward * speed.launching / block.batch_gpu)


def _sized(proposal: Proposal, seconds: float, speed: Speed) -> tuple[Proposal, Params]:
    """The widest network whose teacher sees enough images in so many seconds, or the smallest."""
    best: Proposal | None = None
    params = _params(proposal)
    for width in WIDTHS:
        network = propose.sized_network(proposal.resolution, width)
        forward, _ = plan.forward_flops(plan.meta_network(replace(params, network=network)), params)
        if best is not None and 3 * forward * ENOUGH * 1000 / speed.flops > seconds:
            break
        best = replace(proposal, network=network)
    assert best is not None, "there are widths"
    return best, _params(best)


def _fixed(params: Params, speed: Speed, here: bool) -> float:
    """Seconds of all but training: starting stages, drawing and scoring rows and validations."""
    forward, _ = plan.forward_flops(plan.meta_network(params), params)
    rows = params.rows.values()
    drawing = sum(plan.row_flops(row, params, forward) for row in rows)
    scored = params.metric.reference_images + params.generate.images
    scored += sum(plan.row_images(row, params) for row in rows)
    for student in params.students.values():
        if (v := student.validation) is not None:
            drawing += plan.validation_images(student) * forward
            scored += v.images * student.kimg / v.every_kimg + v.reference_images
    return drawing / speed.flops + scored * speed.scoring + _starting(params, here)


def _starting(params: Params, here: bool) -> float:
    """Seconds that all stages take to start."""
    return STAGE * (4 + len(params.students) + 2 * len(params.rows)) * here


def _params(proposal: Proposal) -> Params:
    """The params that a proposal would be read as."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "new.yaml"
        file.write_text(proposal.text(), encoding="utf-8")
        return load_params(file)


def _write(file: Path, proposal: Proposal, params: Params) -> None:
    """Write the file if the data fits it.

    Raises:
        ValueError: it does not, or the file has come to be meanwhile.
    """
    if problems := list(data_problems(params, str(file))):
        raise ValueError("\n".join(problems))
    _refuse_taken(file)
    with atomic_path(file) as new:
        new.write_text(proposal.text(), encoding="utf-8")


def _choices(proposal: Proposal) -> list[str]:
    """What was chosen, and why."""
    seen, n, s = proposal.look, proposal.network, proposal.sizes
    size, teacher = proposal.resolution, proposal.teacher
    colours = "RGB" if seen.channels == 3 else "grey"
    why = "as they are" if seen.fixed else "a power of two that most images reach"
    if not seen.fixed and 2 * size <= seen.side:
        why = "as much as this time allows, of images that have more"
    if teacher is not None:
        why = "as the teacher's"
    classes = f"{proposal.classes} classes"
    if proposal.classes < 2:
        classes = "one class" if proposal.classes else "no classes, as the teacher's"
    if seen.class_names and proposal.classes:
        shown = [f"{c} ({k})" for c, k in zip(seen.class_names, seen.counts, strict=True)]
        classes += f": {', '.join(shown[:10])}" + (", ..." if len(shown) > 10 else "")
    whose = "the widest whose teacher sees enough images in this time"
    if teacher is not None:
        whose = f"read from {Path(teacher.url).name}, not executed"
    return [
        f"data: {seen.images:,} images, {colours}, shorter sides {seen.sides[0]} to "
        f"{seen.sides[-1]}; {classes}",
        f"resolution {size}: {why}; channels {proposal.channels}",
        f"network {n.type}, {n.model_channels} x {list(n.channel_mult)}, {n.num_blocks} blocks, "
        f"attention at {list(n.attn_resolutions)}, sigma_data {n.sigma_data}: {whose}",
        f"students and rows: those of config/{proposal.preset}.yaml"
        + (", the first student alone for so short a time" if proposal.few else "")
        + f", with times {number(proposal.students_scale)} as long",
        f"images: {s.images} a row, {s.reference} to compare with, {s.validation} a validation: "
        "what the data gives and the time allows",
    ]


def _plan(params: Params, speed: Speed, seconds: float) -> list[str]:
    """The plan for this machine."""
    lines, training = [f"this machine: {speed.flops / 1e9:.1f} GFLOP/s in training, measured"], 0.0
    if speed.busy > BUSY:
        lines.append(
            f"warning: other programs took {speed.busy:.0%} of the time while this was measured; "
            "the times are those without them"
        )
    for name, block in _trainings(params):
        image = _image_seconds(block, params, speed)
        training += (taken := 1000 * block.kimg * image)
        lines.append(
            f"train {name}: {number(block.kimg)} kimg, {1 / image:,.0f} images/s, "
            f"{duration(taken / 3600)}"
        )
    rest = _fixed(params, speed, here=True)
    return [
        *lines,
        f"in all: {duration((training + rest) / 3600)} of {duration(seconds / 3600)}: training "
        f"{duration(training / 3600)}, starting, rows, validations and scores "
        f"{duration(rest / 3600)}",
    ]


def _launched(params: Params, speed: Speed) -> Iterator[str]:
    """The time of training, where GPUs wait for launches and not for arithmetic."""
    taken, bare = (_training_seconds(params, s) for s in (speed, replace(speed, launching=0.0)))
    if taken > 1.01 * bare:
        yield (
            f"training is sized to {duration(taken / 3600)}: launching kernels takes longer than "
            f"computing them, {1000 * LAUNCHING:.0f} ms a pass (guess)"
        )


def _training_seconds(params: Params, speed: Speed) -> float:
    return sum(1000 * b.kimg * _image_seconds(b, params, speed) for _, b in _trainings(params))


def _next(file: Path) -> str:
    if file == Path("params.yaml"):
        return "make repro"
    if file.parent == PRESETS:
        return f"make preset NAME={file.stem} && make repro"
    return f"cp {file} params.yaml && make repro"


def _rated(params: Params, hardware: Hardware, gpu: str, utilisation: float | None) -> Speed:
    """The speed of those GPUs: what the slowest of the trainings reaches.

    Scoring and starting come on top of a plan for other machines.
    """
    methods = [block.method for _, block in _trainings(params)]
    shares = [share_of(gpu, m, params.performance.compile).utilisation for m in methods]
    flops = hardware.peak(params.precision) * (utilisation or min(shares))
    return Speed(flops, 0.0, launching=LAUNCHING / hardware.world)


def _named(gpu: str, gpus: int, utilisation: float | None) -> Hardware:
    """The GPUs that were asked for.

    Raises:
        ValueError: impossible numbers.
    """
    if gpus < 1 or not 0 < (1 if utilisation is None else utilisation) <= 1:
        raise ValueError(
            f"need --gpus >= 1 and --utilisation in (0, 1], got {gpus} and {utilisation}"
        )
    return Hardware(GPUS[gpu], gpus, 1, 1000 * GB)


def _seconds(text: str) -> float:
    """A time such as 20m, 1.5h or 90s.

    Raises:
        ValueError: another text.
    """
    match = re.fullmatch(r"([0-9]{1,6}(?:\.[0-9]{1,3})?)([smh])", text.strip())
    if match is None or float(match[1]) == 0:
        raise ValueError(f"need a time such as 20m or 2h, got {text[:40]!r} (--budget)")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]
