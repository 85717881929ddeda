"""A toy experiment in a temporary folder: config/tiny.yaml with overrides, data, a teacher."""

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from fewstep.data.lmdb import build_lmdb
from fewstep.data.sources import open_source
from fewstep.networks.protocol import Architecture
from fewstep.networks.registry import build_denoiser
from fewstep.networks.weights import save_model
from fewstep.params import Params, load_params
from fewstep.paths import DATA, MODELS
from places import CONFIG


def architecture_of(plain: ModuleType) -> Architecture:
    """The small network that a module of plain equations describes by its constants."""
    sizes = plain.RESOLUTION, plain.CHANNELS, plain.CLASSES, plain.WIDTH, plain.MULT
    return Architecture(*sizes, plain.BLOCKS, plain.ATTENDS)


def tiny_params(folder: Path, **overrides: Any) -> Params:  # noqa: ANN401
    """config/tiny.yaml in folder/params.yaml; `a__b=value` overrides key a.b, None removes it.

    It has no optional metric and one seed range: a test names those that it is about.
    """
    raw = yaml.safe_load((CONFIG / "tiny.yaml").read_text())
    raw["metric"] = {key: raw["metric"][key] for key in ("features", "reference_images")}
    raw["generate"].pop("seed_ranges")
    for path, value in overrides.items():
        *parents, key = path.replace("dmd2_", "dmd2-").replace("mm_", "mm-").split("__")
        block = raw
        for parent in parents:
            block = block[parent]
        if value is None:
            block.pop(key, None)
        else:
            block[key] = value
    if "validation" not in raw["students"].get("cd", {}):
        raw["rows"].pop("cd-4-best", None)
    file = folder / "params.yaml"
    file.write_text(yaml.safe_dump(raw, sort_keys=False))
    return load_params(file)


def set_up(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    images: int = 200,
    **overrides: Any,  # noqa: ANN401
) -> Params:
    """Make `folder` the current one, with params, random images as LMDB and a random teacher."""
    monkeypatch.chdir(folder)
    rng = np.random.default_rng(0)
    labels = np.arange(images) % 10
    np.savez("toy.npz", images=rng.integers(0, 256, (images, 1, 16, 16), np.uint8), labels=labels)
    params = tiny_params(folder, data__source="toy.npz", **overrides)
    d = params.data
    build_lmdb(open_source(d.source, d.resolution, d.channels, d.classes), DATA, silent=True)
    torch.manual_seed(0)
    teacher = build_denoiser(params)
    with torch.no_grad():
        for parameter in teacher.parameters():  # a new network's output layers are zero
            parameter.add_(0.02 * torch.randn_like(parameter))
    save_model(MODELS / "teacher", teacher.state_dict(), {"name": "teacher", "kimg": 0.0})
    return params
