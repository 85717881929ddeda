"""The network that a state dict belongs to, from its names and shapes; does it fit params.yaml?"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fewstep.params import Params

# at most 6 digits, because int() takes quadratic time
_STAGE = re.compile(r"model\.enc\.([0-9]{1,6})x\1_(?:conv|down|block([0-9]{1,6}))\.")
_KEYS = {  # EDM's names of the arguments to keys of params.yaml
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
        img_resolution, img_channels, label_dim. Not sigma_data and dropout, which leave no trace
        in the weights.

    Raises:
        ValueError: the weights belong to another kind of network.
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
        about: from `architecture`, and sigma_data if it is known.
        origin: the file, for the message.

    Raises:
        ValueError: they differ; the message names each key of params.yaml and the value it needs.
    """
    wrong = {}
    for name, key in _KEYS.items():
        block, field = key.split(".")
        ours, theirs = getattr(getattr(params, block), field), about.get(name)
        if name == "model_type":
            theirs = _TYPES.get(str(theirs), theirs)
        if name == "attn_resolutions":  # params may list resolutions that the network never reaches
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
