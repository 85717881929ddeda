"""`fewstep train NAME`: a student by its method -> artifacts/models/NAME."""

from fewstep.launch import ranks
from fewstep.params import Params
from fewstep.preflight import preflight
from fewstep.train import student_block, train


def run(params: Params, name: str) -> None:
    student_block(name, params)
    with ranks(params.device) as rank:
        if rank.device.type == "cuda" or rank.world > 1:  # what is slow or dear to get wrong
            preflight(name, params, rank)
        train(name, params, rank)
