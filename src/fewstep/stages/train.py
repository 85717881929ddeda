"""`fewstep train NAME`: a student by its method -> artifacts/models/NAME."""

from fewstep.method import student_block
from fewstep.params import Params
from fewstep.planning.preflight import preflight
from fewstep.training.launch import ranks
from fewstep.training.loop import train
from fewstep.training.tracking import Tracker

HELP = "train a student on all GPUs"
NAME = "a student of params.yaml"


def run(params: Params, name: str) -> None:
    student_block(name, params)
    with ranks(params.device) as rank:
        # an expensive training is checked first; a small one on a CPU would take longer to check
        if rank.device.type == "cuda" or rank.world > 1:
            preflight(name, params, rank)
        train(name, params, rank, Tracker())
