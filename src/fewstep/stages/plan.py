"""`fewstep plan`: what the experiment of params.yaml costs on given hardware; trains nothing."""

import shutil

from fewstep import plan
from fewstep.flops import forward_flops
from fewstep.params import Params
from fewstep.plan import GB, GPUS, Hardware
from fewstep.sample import nfe


def run(
    params: Params, gpu: str, gpus: int, nodes: int, utilisation: float, disk: float | None
) -> None:
    """Print the plan.

    Raises:
        ValueError: an unknown GPU, or numbers that no machine has.
    """
    if gpu not in GPUS or min(gpus, nodes) < 1 or not 0 < utilisation <= 1:
        raise ValueError(
            f"need --gpu of {', '.join(GPUS)}, --gpus and --nodes >= 1 and --utilisation in "
            f"(0, 1], got {gpu}, {gpus}, {nodes} and {utilisation}"
        )
    free = shutil.disk_usage(".").free if disk is None else disk * GB
    hardware = Hardware(GPUS[gpu], gpus, nodes, utilisation, free)
    students = list(plan.plan_students(params))
    print("\n".join(describe(params, students, hardware, gpu)))


def describe(
    params: Params, students: list[plan.StudentPlan], hardware: Hardware, gpu: str
) -> list[str]:
    """The plan, a line at a time."""
    network = plan.meta_network(params)
    forward, _ = forward_flops(network, params)
    rate = hardware.rate(params.precision)
    lines = [
        f"network: {plan.count(network) / 1e6:.1f} M parameters, forward pass of an image "
        f"{forward / 1e9:.1f} GFLOP",
        f"hardware: {hardware.nodes} x {hardware.gpus} x {gpu}, {params.precision}, "
        f"{hardware.utilisation:.0%} of their FLOP/s: {rate / 1e12:.0f} TFLOP/s",
    ]
    hours = 0.0
    for student in students:
        hours += (spent := student.hours(hardware, params.precision))
        parts = ", ".join(f"{part} {b / GB:.1f}" for part, b in student.memory.items() if b)
        share = student.validation_flops / (student.training_flops + student.validation_flops)
        lines += [
            f"train {student.name}: {student.block.kimg:,.0f} kimg, "
            f"{student.flops / 1e12:.2f} TFLOP an image, {rate / student.flops:,.0f} images/s, "
            f"{spent:.1f} h, of which validation {share:.0%}",
            f"  memory of a GPU: {student.total_memory / GB:.1f} GB ({parts})",
        ]
    for name, row in params.rows.items():
        calls = nfe(row.sampler, row.steps, row.guidance_scale)
        images = plan.row_images(row, params)
        hours += (spent := calls * images * forward / rate / 3600)
        lines.append(f"row {name}: {calls} NFE, {images:,} images, {spent:.2f} h")
    disk = plan.disk_parts(params, students)
    parts = ", ".join(f"{part} {b / GB:.1f}" for part, b in disk.items())
    lines += [
        f"in all: {hours:.1f} h, {hours * hardware.world:.0f} GPU hours",
        f"disk: {sum(disk.values()) / GB:.0f} GB ({parts}), {plan.images_needed(params):,} images "
        "at least",
    ]
    return lines + [f"warning: {text}" for text in plan.warnings(params, students, hardware)]
