"""`fewstep preflight NAME`: whatever can be checked before a training; trains nothing."""

from fewstep.method import student_block
from fewstep.params import Params
from fewstep.planning.preflight import preflight
from fewstep.training.launch import ranks

HELP = "check, on all GPUs, what a student's training needs; trains nothing"
NAME = "a student of params.yaml"


def run(params: Params, name: str) -> None:
    student_block(name, params)
    with ranks(params.device) as rank:
        preflight(name, params, rank, thorough=True)
