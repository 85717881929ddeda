"""A plan as lines of text."""

from fewstep.params import Params
from fewstep.planning import plan
from fewstep.planning.flops import forward_flops
from fewstep.planning.plan import GB, Hardware
from fewstep.theory.sample import nfe


def describe(
    params: Params,
    students: list[plan.StudentPlan],
    hardware: Hardware,
    gpu: str,
    images: int | None = None,
) -> list[str]:
    """The network, each training and row, the total, the disk, and warnings, one line each."""
    network = plan.meta_network(params)
    forward, _ = forward_flops(network, params)
    rate = hardware.rate(params.precision)
    speed = f"{rate / 1e12:.0f} TFLOP/s" if rate >= 1e12 else f"{rate / 1e9:.0f} GFLOP/s"
    lines = [
        f"network: {plan.count(network) / 1e6:.1f} M parameters, forward pass of an image "
        f"{forward / 1e9:.1f} GFLOP",
        f"hardware: {hardware.nodes} x {hardware.gpus} x {gpu}, {params.precision}, "
        f"{hardware.utilisation:.0%} of their FLOP/s (a guess: --utilisation), "
        f"{speed}",
    ]
    training = drawing = 0.0
    for student in students:
        training += (hours := student.hours(hardware, params.precision))
        lines += student_lines(student, rate, hours, "the process" if gpu == "cpu" else "a GPU")
    for name, row in params.rows.items():
        drawing += (hours := plan.row_flops(row, params, forward) / rate / 3600)
        calls = nfe(row.sampler, row.steps, row.guidance_scale)
        drawn = plan.row_images(row, params)
        lines.append(f"row {name}: {calls} NFE, {drawn:,} images, {duration(hours)}")
    disk, kind = plan.disk_parts(params, students, images), "CPU" if gpu == "cpu" else "GPU"
    data = f"{images:,}" if images else f"{plan.images_needed(params):,}, the fewest that will do"
    lines += [
        f"in all: {duration(training + drawing)} on {hardware.world} x {gpu}, "
        f"{(training + drawing) * hardware.world:,.1f} {kind} hours: "
        f"training {duration(training)}, "
        f"rows {duration(drawing)}; scoring the rows and fetching files come on top",
        f"disk: {sum(disk.values()) / GB:.1f} GB ({in_gb(disk)}); images of the data: {data}",
    ]
    if forward < plan.SMALL and gpu != "cpu":
        lines.append("warning: a network this small cannot keep a GPU busy: expect far more time")
    problems = plan.warnings(params, students, hardware, images)
    return [*lines, *(f"warning: {text}" for text in problems)]


def student_lines(
    student: plan.StudentPlan, rate: float, hours: float, where: str = "a GPU"
) -> list[str]:
    """What a training takes: time, then memory of `where`."""
    share = student.validation_flops / (student.training_flops + student.validation_flops)
    return [
        f"train {student.name}: {student.block.kimg:,.0f} kimg, "
        f"{student.flops / 1e9:,.1f} GFLOP an image, {rate / student.flops:,.0f} images/s, "
        f"{duration(hours)}, of which validation {share:.0%}",
        f"  memory of {where}: {student.total_memory / GB:.1f} GB ({in_gb(student.memory)})",
    ]


def in_gb(parts: dict[str, float]) -> str:
    return ", ".join(f"{part} {size / GB:.1f}" for part, size in parts.items() if size)


def duration(hours: float) -> str:
    """`23 h`, `1.5 h`, `12 min` or `8 s`."""
    if hours >= 1:
        return f"{hours:.0f} h" if hours >= 10 else f"{hours:.1f} h"
    return f"{hours * 60:.0f} min" if hours >= 1 / 60 else f"{hours * 3600:.0f} s"
