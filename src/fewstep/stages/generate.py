"""`fewstep generate ROW`: the images of a row -> artifacts/samples/ROW.npz."""

from fewstep.params import Params
from fewstep.paths import SAMPLES, trained
from fewstep.report.provenance import remember
from fewstep.sampling.row import draw_row, row_of
from fewstep.training.finished import forget_finished
from fewstep.training.launch import ranks

HELP = "sample the images of a row"
NAME = "a row of params.yaml"


def run(params: Params, name: str) -> None:
    row = row_of(params, name)
    with ranks(params.device, if_several=True) as rank:
        draw_row(name, params, rank)
        if rank.first:
            remember(f"samples/{name}", SAMPLES / f"{name}.npz")
            forget_finished(trained(row.model))  # the model is in use, so its training was recorded
