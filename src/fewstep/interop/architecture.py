"""What network a state dict is of, read off its names and shapes; whether params.yaml says so."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fewstep.params import Params

_STAGE = re.compile(r"model\.enc\.([0-9]{1,6})x\1_(?:conv|down|block([0-9]{1,6}))\.")
_KEYS = {  # EDM's names of the arguments, and the keys of params.yaml
    "model_type": "network.type",
    "model_channels": "network.model_channels",
    "channel_mult": "network.channel_mult",
    "num_blocks": "network.num_blocks",
    "attn_resolutions": "network.attn_resolutions",
    "sigma_data": "network.sigma_data",
    "img_resolution": "data.resolution",
    "img_channels": "data.channels",
    "label_dim": "data.classes",
}
_TYPES = {"DhariwalUNet": "adm", "SongUNet": "ddpmpp"}


def architecture(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments that build a network with these weights, under EDM's names.

    Args:
        weights: a state dict of ADM or DDPM++ under EDM's names (`model.enc....`).

    Returns:
        model_type, model_channels, channel_mult, num_blocks, attn_resolutions (finest first),
        img_resolution, img_channels, label_dim. What leaves no trace in weights (sigma_data,
        dropout) is not there.

    Raises:
        ValueError: the weights are of another network.
    """
    stages = [match.groups() for name in weights if (match := _STAGE.match(name))]
    levels = sorted({int(resolution) for resolution, _ in stages}, reverse=True)
    first = {level: f"model.enc.{level}x{level}_block0" for level in levels}
    try:
        width = int(weights["model.map_layer0.weight"].shape[1])
        outs = [int(weights[f"{first[level]}.conv0.weight"].shape[0]) for level in levels]
        image = weights[f"model.enc.{levels[0]}x{levels[0]}_conv.weight"]
        return {
            "model_type": "DhariwalUNet" if "model.out_conv.weight" in weights else "SongUNet",
            "model_channels": width,
            "channel_mult": [out // width for out in outs],
            "num_blocks": 1 + max(int(block) for _, block in stages if block),
            "attn_resolutions": [n for n in levels if f"{first[n]}.qkv.weight" in weights],
            "img_resolution": levels[0],
            "img_channels": int(image.shape[1]),
            "label_dim": int(weights["model.map_label.weight"].shape[1]),
        }
    except (KeyError, IndexError, ZeroDivisionError) as error:
        raise ValueError(
            "need a class-conditional ADM or DDPM++ network under EDM's names, got another one: "
            f"no {error}"
        ) from error


def check_architecture(about: Mapping[str, Any], params: Params, origin: str | Path) -> None:
    """Compare the network of a file with the one that params.yaml describes.

    Args:
        about: what `architecture` gives, and sigma_data if it is known.
        origin: the file, for the message.

    Raises:
        ValueError: they differ; names each key of params.yaml to edit, and its value.
    """
    wrong = {}
    for name, key in _KEYS.items():
        block, field = key.split(".")
        ours, theirs = getattr(getattr(params, block), field), about.get(name)
        if name == "model_type":
            theirs = _TYPES.get(str(theirs), theirs)
        if name == "attn_resolutions":  # some may lie outside of the network
            levels = {params.data.resolution >> n for n in range(len(params.network.channel_mult))}
            ours = sorted(levels & set(ours), reverse=True)
        ours = list(ours) if isinstance(ours, tuple) else ours
        if name in about and theirs != ours:
            wrong[key] = f"need {key} {theirs}, got {ours}"
    if wrong:
        raise ValueError(
            f"{origin} does not fit the network: {'; '.join(wrong.values())} "
            f"(params.yaml: {', '.join(wrong)})"
        )
