"""`fewstep plan`: what the experiment of params.yaml costs on given hardware; trains nothing."""

import shutil

from fewstep import plan
from fewstep.flops import forward_flops
from fewstep.params import Params
from fewstep.plan import GB, GPUS, Hardware
from fewstep.sample import nfe


def run(
    params: Params,
    gpu: str,
    gpus: int,
    nodes: int,
    utilisation: float,
    disk: float | None,
    images: int | None = None,
) -> None:
    """Print the plan.

    Args:
        disk: free GB; None: what is free here.
        images: of the data; None: the fewest that the params need.

    Raises:
        ValueError: an unknown GPU, numbers that no machine has, or too few images.
    """
    if gpu not in GPUS or min(gpus, nodes) < 1 or not 0 < utilisation <= 1:
        raise ValueError(
            f"need --gpu of {', '.join(GPUS)}, --gpus and --nodes >= 1 and --utilisation in "
            f"(0, 1], got {gpu}, {gpus}, {nodes} and {utilisation}"
        )
    if images is not None and images < (needed := plan.images_needed(params)):
        raise ValueError(
            f"need --images of at least {needed}, got {images} (params.yaml: "
            "metric.reference_images, generate.images)"
        )
    free = shutil.disk_usage(".").free if disk is None else disk * GB
    hardware = Hardware(GPUS[gpu], gpus, nodes, utilisation, free)
    students = list(plan.plan_students(params, hardware.world))
    print("\n".join(describe(params, students, hardware, gpu, images)))


def describe(
    params: Params,
    students: list[plan.StudentPlan],
    hardware: Hardware,
    gpu: str,
    images: int | None = None,
) -> list[str]:
    """The plan, a line at a time."""
    network = plan.meta_network(params)
    forward, _ = forward_flops(network, params)
    rate = hardware.rate(params.precision)
    lines = [
        f"network: {plan.count(network) / 1e6:.1f} M parameters, forward pass of an image "
        f"{forward / 1e9:.1f} GFLOP",
        f"hardware: {hardware.nodes} x {hardware.gpus} x {gpu}, {params.precision}, "
        f"{hardware.utilisation:.0%} of their FLOP/s (a guess: --utilisation), "
        f"{rate / 1e12:.0f} TFLOP/s",
    ]
    training = drawing = 0.0
    for student in students:
        training += (spent := student.hours(hardware, params.precision))
        lines += student_lines(student, rate, spent)
    for name, row in params.rows.items():
        calls = nfe(row.sampler, row.steps, row.guidance_scale)
        drawing += (spent := plan.row_flops(row, params, forward) / rate / 3600)
        drawn = plan.row_images(row, params)
        lines.append(f"row {name}: {calls} NFE, {drawn:,} images, {duration(spent)}")
    lines += [
        f"in all: {duration(training + drawing)} on {hardware.world} x {gpu}, "
        f"{(training + drawing) * hardware.world:,.1f} GPU hours: training {duration(training)}, "
        f"rows {duration(drawing)}; scoring the rows and fetching files come on top",
        disk_line(params, students, images),
    ]
    if forward < plan.SMALL:
        lines.append("warning: a network this small keeps no GPU busy: it will take far longer")
    return lines + [
        f"warning: {text}" for text in plan.warnings(params, students, hardware, images)
    ]


def student_lines(student: plan.StudentPlan, rate: float, hours: float) -> list[str]:
    """What a training takes: time, then memory."""
    parts = ", ".join(f"{part} {b / GB:.1f}" for part, b in student.memory.items() if b)
    share = student.validation_flops / (student.training_flops + student.validation_flops)
    return [
        f"train {student.name}: {student.block.kimg:,.0f} kimg, "
        f"{student.flops / 1e9:,.1f} GFLOP an image, {rate / student.flops:,.0f} images/s, "
        f"{duration(hours)}, of which validation {share:.0%}",
        f"  memory of a GPU: {student.total_memory / GB:.1f} GB ({parts})",
    ]


def disk_line(params: Params, students: list[plan.StudentPlan], images: int | None) -> str:
    disk = plan.disk_parts(params, students, images)
    parts = ", ".join(f"{part} {b / GB:.1f}" for part, b in disk.items())
    data = f"{images:,}" if images else f"{plan.images_needed(params):,}, the fewest that will do"
    return f"disk: {sum(disk.values()) / GB:.1f} GB ({parts}); images of the data: {data}"


def duration(hours: float) -> str:
    """`23 h`, `1.5 h`, `12 min`, `8 s`."""
    if hours >= 1:
        return f"{hours:.0f} h" if hours >= 10 else f"{hours:.1f} h"
    return f"{hours * 60:.0f} min" if hours >= 1 / 60 else f"{hours * 3600:.0f} s"
