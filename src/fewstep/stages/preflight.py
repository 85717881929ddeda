"""`fewstep preflight NAME`: all that can be checked before a training; trains nothing."""

from fewstep import distributed, launch
from fewstep.methods import student_block
from fewstep.params import Params
from fewstep.preflight import preflight


def run(params: Params, name: str) -> None:
    student_block(name, params)
    if not launch.launched():
        launch.launch(params.device)
    rank = distributed.start(params.device)
    try:
        preflight(name, params, rank, thorough=True)
    finally:
        distributed.stop(rank)
