"""The launch under torchrun: one process a GPU."""

import logging
import os
import sys
from typing import NoReturn

import torch

from fewstep.distributed import pick_device


def launched() -> bool:
    """Whether torchrun (or srun with torchrun's variables) started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def launch(device: str) -> NoReturn:
    """Run this command line again under torchrun, one process a GPU, and exit as it does.

    A CPU gets one process with all its cores: two with half of them are no faster.
    """
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # what went wrong is said by the process that it went wrong in
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    kind = pick_device(device).type
    count = torch.cuda.device_count() if kind == "cuda" else 1
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))  # torchrun would say 1
    print(f"torchrun: {count} x {kind}", flush=True)
    here = ["--standalone", f"--nproc-per-node={count}", "-m", "fewstep", *sys.argv[1:]]
    try:
        run.main(here)
    except ChildFailedError as error:
        sys.exit(next(iter(error.failures.values())).exitcode)
    except SignalException as error:
        sys.exit(128 + error.sigval)
    sys.exit(0)


def spread_over_gpus(device: str) -> None:
    """Launch where there are several GPUs; a single device needs no further process."""
    several = pick_device(device).type == "cuda" and torch.cuda.device_count() > 1
    if several and not launched():
        launch(device)
