"""`fewstep phema NAME --std STD`: an average that a finished training did not keep itself."""

from argparse import ArgumentParser
from pathlib import Path

from fewstep.files import read_json
from fewstep.networks.registry import build_denoiser
from fewstep.networks.weights import load_weights, save_model
from fewstep.params import Params
from fewstep.paths import MODELS, SNAPSHOTS
from fewstep.training.averages import reconstruct

HELP = "rebuild a power-function average of a finished training (students.<name>.phema)"
NAME = "a student of params.yaml"


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--std", type=float, required=True, help="relative width, below 0.289")
    parser.add_argument("--kimg", type=float, help="time; default: the last snapshot")
    parser.add_argument("--out", type=Path, help="folder; default: a new one in artifacts")


def run(params: Params, name: str, std: float, kimg: float | None, out: Path | None) -> None:
    """Write the power-function average of that width and time as a model.

    Raises:
        ValueError: the training has no snapshots, or they do not cover that width or time.
    """
    weights, about = reconstruct(SNAPSHOTS / name, std, kimg)
    load_weights(build_denoiser(params), weights, SNAPSHOTS / name)
    folder = out or MODELS / f"{name}-phema-{std:g}-{about['kimg']:g}"
    sampling = read_json(MODELS / name / "model.json").get("sampling")
    about = {"name": folder.name, "student": name, "sampling": sampling, **about}
    save_model(folder, weights, about)
    print(f"phema: {name} at {about['kimg']:g} kimg, std {std:g}, written to {folder}")
