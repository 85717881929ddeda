"""`fewstep train NAME`: a student by its method -> artifacts/models/NAME."""

from fewstep import distributed, launch
from fewstep.params import Params
from fewstep.train import student_block, train


def run(params: Params, name: str) -> None:
    student_block(name, params)
    if not launch.launched():
        launch.launch(params.device)
    rank = distributed.start(params.device)
    try:
        train(name, params, rank)
    finally:
        distributed.stop(rank)
