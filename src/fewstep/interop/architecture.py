"""The network that a state dict belongs to, from its names and shapes; does it fit params.yaml?"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from fewstep.interop.tensors import Stored
from fewstep.networks.layers import filter_of
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
_TYPES = {"DhariwalUNet": "adm", "SongUNet": "ddpmpp", "NCSN++": "ncsnpp", "EDM2": "edm2"}
_EMB = 4  # channels of the embedding, in multiples of the model's: EDM's channel_mult_emb
_NOISE = {"SongUNet": 1, "NCSN++": 2}  # of the features of the noise level: channel_mult_noise
_FREQS, _RESIDUAL = "model.map_noise.freqs", re.compile(r"model\.enc\..*_aux_residual\.")
_SKIP = re.compile(r"model\.(?:(enc)\..*_aux_(?:skip|down)|dec\..*_aux_up)\b")
_FILTER = ".resample_filter"
_TAPS = {2: (1, 1), 4: (1, 3, 3, 1)}  # of filters by their size
_SUPPORTED = "an ADM, DDPM++, NCSN++ or EDM2 network under EDM's names"


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
        weights: a state dict of ADM, DDPM++, NCSN++ or EDM2 under EDM's names (`model.enc....`).

    Returns:
        model_type, model_channels, channel_mult, num_blocks, attn_resolutions (finest first),
        img_resolution, img_channels, label_dim. The model_type of NCSN++ is `NCSN++`, where EDM
        says SongUNet and its other arguments. Not sigma_data and dropout, which leave no trace
        in the weights. Of EDM2 the widths alone are known: model_channels is the largest that all
        of them are multiples of.

    Raises:
        ValueError: the weights belong to another kind of network; says which, where it is known.
    """
    kind = _model_type(weights)
    edm2 = kind == "EDM2"
    names = _EDM2 if edm2 else _EDM
    stages = [match.groups() for name in weights if (match := _STAGE.match(name))]
    levels = sorted({int(resolution) for resolution, _ in stages}, reverse=True)
    first = {level: f"model.enc.{level}x{level}_block0" for level in levels}
    try:
        emb, width = (int(n) for n in weights[names.emb].shape[:2])
        outs = [int(weights[f"{first[level]}.{names.conv}.weight"].shape[0]) for level in levels]
        image = weights[f"model.enc.{levels[0]}x{levels[0]}_conv.weight"]
        unit = math.gcd(*outs) if edm2 else int(image.shape[0]) if kind in _NOISE else width
        about = {
            "model_type": kind,
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
    if not edm2 and emb != _EMB * unit:
        raise ValueError(
            f"need a network with channel_mult_emb {_EMB}, got {emb / unit:.4g}: an embedding of "
            f"{emb} channels for model_channels {unit}"
        )
    if kind in _NOISE and width != _NOISE[kind] * unit:
        raise ValueError(
            f"need channel_mult_noise {_NOISE[kind]} of {_TYPES[kind]}, got {width / unit:.4g}: "
            f"{width} features of the noise level for model_channels {unit}"
        )
    return about


def _model_type(weights: Mapping[str, Stored | Tensor]) -> str:
    """Which network it is; refuses EDM's other ones, and others under its names, by what they are.

    EDM builds DDPM++, NCSN++ and whatever lies between them from one class.
    """
    if odd := next((match for name in weights if (match := _SKIP.match(name))), None):
        part, known = ("encoder", "standard or residual") if odd[1] else ("decoder", "standard")
        raise ValueError(
            f"need {part}_type {known}, got skip, which is not supported: it has {plain(odd[0])}"
        )
    shapes = {tuple(w.shape) for name, w in weights.items() if name.endswith(_FILTER)}
    if odd := shapes - {(1, 1, size, size) for size in _TAPS}:
        raise ValueError(
            f"need resampling filters of 1x1x2x2, or 1x1x4x4 in NCSN++, got {sorted(odd)[0]}"
        )
    if any(len(w.shape) > 8 or 0 in w.shape for w in weights.values()):
        raise ValueError("need weights of at most 8 dimensions, none of them empty")
    adm = "model.out_conv.weight" in weights
    base = "EDM2" if _EDM2.emb in weights else "DhariwalUNet" if adm else "SongUNet"
    signs = {"embedding_type fourier": _FREQS in weights}
    if shapes:  # a network of one level resamples nothing
        signs["encoder_type residual"] = any(map(_RESIDUAL.match, weights))
        signs["resample_filter of 4x4"] = (1, 1, 4, 4) in shapes
    if not any(signs.values()):
        return base
    if all(signs.values()) and base == "SongUNet":
        return "NCSN++"
    have, lack = (", ".join(s for s in signs if signs[s] == has) for has in (True, False))
    raise ValueError(
        f"need {', '.join(signs)} together, as NCSN++ has them (network.type ncsnpp), or none, "
        f"got {have} {f'without {lack} ' if lack else ''}in a {base}"
    )


def check_filters(weights: Mapping[str, Tensor]) -> None:
    """Refuse resampling filters of other values than those that belong to their size.

    Args:
        weights: a state dict that `architecture` accepts.
    """
    for name, found in weights.items():
        if name.endswith(_FILTER):
            taps, values = _TAPS[found.shape[-1]], found.to("cpu", torch.float32)
            if not torch.allclose(values, filter_of(taps), rtol=1e-3):
                sums = ", ".join(f"{total:.3g}" for total in values.sum(dim=(0, 1, 2)).tolist())
                raise ValueError(
                    f"need the resampling filter of {list(taps)} at {plain(name)}, got one whose "
                    f"columns sum to {sums}"
                )


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
