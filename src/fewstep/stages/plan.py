"""`fewstep plan`: what the experiment of params.yaml costs on given hardware; trains nothing."""

import shutil
from argparse import ArgumentParser

from fewstep.params import Params
from fewstep.planning import plan
from fewstep.planning.describe import describe
from fewstep.planning.plan import GB, GPUS, Hardware

HELP = "print what the experiment costs: FLOPs, memory, hours, disk; runs nothing"


def arguments(parser: ArgumentParser) -> None:
    text = f"{', '.join(GPUS)}, or cpu for this machine's processor; default: h100"
    parser.add_argument("--gpu", default="h100", help=text)
    parser.add_argument("--gpus", type=int, help="GPUs per node; default: 8")
    parser.add_argument("--nodes", type=int, default=1, help="number of nodes; default: 1")
    text = "share of the rated FLOP/s that is reached; default: as measured, or a guess"
    parser.add_argument("--utilisation", type=float, help=text)
    parser.add_argument("--disk", type=float, help="free GB on the disk; default: as on this one")
    text = "number of images in the data; default: the fewest that will do"
    parser.add_argument("--images", type=int, help=text)


def run(
    params: Params,
    gpu: str,
    gpus: int | None,
    nodes: int,
    utilisation: float | None,
    disk: float | None,
    images: int | None = None,
) -> None:
    """Print the plan.

    Args:
        gpus: per node; None for 8, or for the one processor of a CPU.
        utilisation: in (0, 1]; None for that of planning/utilisation.csv.
        disk: free GB; None for the free space of this disk.
        images: number of images in the data; None for the fewest that the params need.

    Raises:
        ValueError: an unknown GPU, impossible numbers, or too few images.
    """
    share = 1 if utilisation is None else utilisation
    if gpus is None:
        gpus = 1 if gpu == "cpu" else 8
    if gpu not in (*GPUS, "cpu") or min(gpus, nodes) < 1 or not 0 < share <= 1:
        raise ValueError(
            f"need --gpu of {', '.join(GPUS)} or cpu, --gpus and --nodes >= 1 and --utilisation in "
            f"(0, 1], got {gpu}, {gpus}, {nodes} and {utilisation or 'none'}"
        )
    if images is not None and images < (needed := plan.images_needed(params)):
        raise ValueError(
            f"need --images of at least {needed}, got {images} (params.yaml: "
            "metric.reference_images, generate.images)"
        )
    free = shutil.disk_usage(".").free if disk is None else disk * GB
    kind = plan.this_cpu(params.precision) if gpu == "cpu" else GPUS[gpu]
    hardware = Hardware(kind, gpus, nodes, free)
    students = list(plan.plan_students(params, hardware.world))
    print("\n".join(describe(params, students, hardware, gpu, images, utilisation)))
