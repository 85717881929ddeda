"""`fewstep phema NAME --std STD`: an average of a finished training that was not kept in it."""

from pathlib import Path

from fewstep.averages import SNAPSHOTS, reconstruct
from fewstep.models import MODELS, build_denoiser, load_weights, save_model
from fewstep.params import Params


def run(params: Params, name: str, std: float, kimg: float | None, out: Path | None) -> None:
    """Write the power-function average of that width and time as a model.

    Raises:
        ValueError: no snapshots of that training, or a width or time that they do not give.
    """
    weights, about = reconstruct(SNAPSHOTS / name, std, kimg)
    load_weights(build_denoiser(params), weights, SNAPSHOTS / name)
    folder = out or MODELS / f"{name}-phema-{std:g}-{about['kimg']:g}"
    save_model(folder, weights, {"name": folder.name, "student": name, **about})
    print(f"phema: {name} at {about['kimg']:g} kimg, std {std:g}, in {folder}")
