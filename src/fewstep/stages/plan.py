"""`fewstep plan`: what the experiment of params.yaml costs on given hardware; trains nothing."""

import shutil
from argparse import ArgumentParser

from fewstep.params import Params
from fewstep.planning import plan
from fewstep.planning.describe import describe
from fewstep.planning.plan import GB, GPUS, Hardware

HELP = "print what the experiment costs: FLOPs, memory, hours, disk; runs nothing"


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--gpu", default="h100", help="kind of GPU; default: h100")
    parser.add_argument("--gpus", type=int, default=8, help="GPUs per node; default: 8")
    parser.add_argument("--nodes", type=int, default=1, help="number of nodes; default: 1")
    text = "share of the data sheet's FLOP/s that is reached; default: as measured, or a guess"
    parser.add_argument("--utilisation", type=float, help=text)
    parser.add_argument("--disk", type=float, help="free GB on the disk; default: as on this one")
    text = "number of images in the data; default: the fewest that will do"
    parser.add_argument("--images", type=int, help=text)


def run(
    params: Params,
    gpu: str,
    gpus: int,
    nodes: int,
    utilisation: float | None,
    disk: float | None,
    images: int | None = None,
) -> None:
    """Print the plan.

    Args:
        utilisation: None for that of planning/utilisation.csv.
        disk: free GB; None for the free space of this disk.
        images: number of images in the data; None for the fewest that the params need.

    Raises:
        ValueError: an unknown GPU, impossible numbers, or too few images.
    """
    share = 1 if utilisation is None else utilisation
    if gpu not in GPUS or min(gpus, nodes) < 1 or not 0 < share <= 1:
        raise ValueError(
            f"need --gpu of {', '.join(GPUS)}, --gpus and --nodes >= 1 and --utilisation in "
            f"(0, 1], got {gpu}, {gpus}, {nodes} and {utilisation or 'none'}"
        )
    if images is not None and images < (needed := plan.images_needed(params)):
        raise ValueError(
            f"need --images of at least {needed}, got {images} (params.yaml: "
            "metric.reference_images, generate.images)"
        )
    free = shutil.disk_usage(".").free if disk is None else disk * GB
    hardware = Hardware(GPUS[gpu], gpus, nodes, free)
    students = list(plan.plan_students(params, hardware.world))
    print("\n".join(describe(params, students, hardware, gpu, images, utilisation)))
