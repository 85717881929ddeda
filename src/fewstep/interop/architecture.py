"""The network that a state dict belongs to, from its names and shapes; does it fit params.yaml?"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from torch import Tensor

from fewstep.interop.tensors import Stored
from fewstep.params import Network, Params
from fewstep.quoting import plain

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
_TYPES = {"DhariwalUNet": "adm", "SongUNet": "ddpmpp", "EDM2": "edm2"}
_EMB = 4  # channels of the embedding, in multiples of the model's: EDM's channel_mult_emb
_NCSNPP = re.compile(r"model\.(map_noise\.freqs|(enc|dec)\..*_aux_(residual|skip|down|up)\b)")
_SUPPORTED = "an ADM, DDPM++ or EDM2 network under EDM's names"


@dataclass(frozen=True)
class _Names:
    """Of the layers that an architecture is read from; `conv` and `qkv` are parts of a block."""

    emb: str
    label: str
    conv: str
    qkv: str


_EDM = _Names("model.map_layer0.weight", "model.map_label.weight", "conv0", "qkv")
_EDM2 = _Names("model.emb_noise.weight", "model.emb_label.weight", "conv_res0", "attn_qkv")


def architecture(weights: Mapping[str, Stored | Tensor]) -> dict[str, Any]:
    """The arguments that build a network with these weights, under EDM's names.

    Args:
        weights: a state dict of ADM, DDPM++ or EDM2 under EDM's names (`model.enc....`).

    Returns:
        model_type, model_channels, channel_mult, num_blocks, attn_resolutions (finest first),
        img_resolution, img_channels, label_dim. Not sigma_data and dropout, which leave no trace
        in the weights. Of EDM2 the widths alone are known: model_channels is the largest that all
        of them are multiples of.

    Raises:
        ValueError: the weights belong to another kind of network; says which, where it is known.
    """
    edm2 = _EDM2.emb in weights
    names = _EDM2 if edm2 else _EDM
    _is_supported(weights, names)
    stages = [match.groups() for name in weights if (match := _STAGE.match(name))]
    levels = sorted({int(resolution) for resolution, _ in stages}, reverse=True)
    first = {level: f"model.enc.{level}x{level}_block0" for level in levels}
    try:
        emb, width = (int(n) for n in weights[names.emb].shape[:2])
        outs = [int(weights[f"{first[level]}.{names.conv}.weight"].shape[0]) for level in levels]
        unit = math.gcd(*outs) if edm2 else width
        image = weights[f"model.enc.{levels[0]}x{levels[0]}_conv.weight"]
        adm = "model.out_conv.weight" in weights
        about = {
            "model_type": "EDM2" if edm2 else "DhariwalUNet" if adm else "SongUNet",
            "model_channels": unit,
            "channel_mult": [out // unit for out in outs],
            "num_blocks": 1 + max(int(block) for _, block in stages if block),
            "attn_resolutions": [n for n in levels if f"{first[n]}.{names.qkv}.weight" in weights],
            "img_resolution": levels[0],
            "img_channels": int(image.shape[1]) - edm2,  # EDM2 adds a channel of ones
            "label_dim": int(weights[names.label].shape[1]) if names.label in weights else 0,
        }
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"need {_SUPPORTED}, got another one: no {error}") from error
    if edm2 and (width, emb) != (outs[0], max(outs)):
        raise ValueError(
            "need a network of EDM2 without channel_mult_noise and channel_mult_emb, got an "
            f"embedding of {emb} channels, from {width}, for levels of {outs}"
        )
    if not edm2 and emb != _EMB * width:
        raise ValueError(
            f"need a network with channel_mult_emb {_EMB}, got {emb / width:.4g}: an embedding of "
            f"{emb} channels for model_channels {width}"
        )
    return about


def _is_supported(weights: Mapping[str, Stored | Tensor], names: _Names) -> None:
    """Refuse EDM's other networks, and other networks under its names, by what they are."""
    if odd := next((name for name in weights if _NCSNPP.match(name)), None):
        raise ValueError(
            "need ADM, DDPM++ or EDM2 (network.type adm, ddpmpp, edm2), got NCSN++, which is not "
            f"supported: it has {plain(odd)}"
        )
    sizes = {w.shape[2:] for name, w in weights.items() if name.endswith(".resample_filter")}
    if odd := sizes - {(2, 2)}:
        raise ValueError(f"need resampling filters of 2x2, got {sorted(odd)[0]}, as in NCSN++")
    if any(len(w.shape) > 8 or 0 in w.shape for w in weights.values()):
        raise ValueError("need weights of at most 8 dimensions, none of them empty")


def network_block(about: Mapping[str, Any]) -> Network:
    """The block of the params that describes a network.

    Args:
        about: from `architecture`; sigma_data is EDM's 0.5 where the file does not say it.
    """
    return TypeAdapter(Network).validate_python(blocks_of(about, 0.5)["network"])


def check_architecture(about: Mapping[str, Any], params: Params, origin: str | Path) -> None:
    """Compare the network of a file with the one that params.yaml describes.

    Args:
        about: from `architecture`, and sigma_data if it is known.
        origin: the file, for the message.

    Raises:
        ValueError: they differ; the message names each key of params.yaml and the value it needs.
    """
    wrong, network = {}, params.network
    if about.get("model_type") == "EDM2":  # whose weights tell the product of these two alone
        theirs = [about["model_channels"] * mult for mult in about["channel_mult"]]
        if theirs == [network.model_channels * mult for mult in network.channel_mult]:
            about = {k: v for k, v in about.items() if k not in ("model_channels", "channel_mult")}
    for name, key in _KEYS.items():
        block, field = key.split(".")
        ours, theirs = getattr(getattr(params, block), field), about.get(name)
        if name == "model_type":
            theirs = _TYPES.get(str(theirs), theirs)
        if name == "attn_resolutions":  # in any order
            ours = sorted(ours, reverse=True)
        ours = list(ours) if isinstance(ours, tuple) else ours
        if name in about and theirs != ours:
            wrong[key] = f"need {key} {plain(str(theirs))}, got {ours}"
    if wrong:
        raise ValueError(
            f"{origin} does not fit the network: {'; '.join(wrong.values())} "
            f"(params.yaml: {', '.join(wrong)})"
        )


def blocks_of(about: Mapping[str, Any], sigma_data: float | None) -> dict[str, dict[str, Any]]:
    """The blocks `network` and `data` of params.yaml that a checkpoint needs.

    Args:
        about: from `architecture`, and sigma_data if it is known.
        sigma_data: otherwise.
    """
    blocks: dict[str, dict[str, Any]] = {"network": {}, "data": {}}
    for name, key in _KEYS.items():
        block, field = key.split(".")
        value = about.get(name, sigma_data if name == "sigma_data" else None)
        blocks[block][field] = _TYPES.get(str(value), value)
    return blocks
