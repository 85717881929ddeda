"""`fewstep preflight NAME`: all that can be checked before a training; trains nothing."""

from fewstep.launch import ranks
from fewstep.methods import student_block
from fewstep.params import Params
from fewstep.preflight import preflight


def run(params: Params, name: str) -> None:
    student_block(name, params)
    with ranks(params.device) as rank:
        preflight(name, params, rank, thorough=True)
