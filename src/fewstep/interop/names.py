"""Which tensors of a file are the one denoiser, whatever is wrapped around it.

A state dict comes inside dicts ({"state_dict": ...}), with the prefixes of DistributedDataParallel
(`module.`) and torch.compile (`_orig_mod.`), beside an averaged copy, or among DMD2's networks.
"""

import re
from collections.abc import Mapping
from typing import Any

from fewstep.budgets import TENSORS, within
from fewstep.interop.tensors import Stored
from fewstep.interop.torch_file import TRAINING_STATE
from fewstep.quoting import listed, plain, quoted

_ANCHORS = ("map_layer0.weight", "emb_noise.weight")  # one, once, in every network of EDM or EDM2
_UNET, _LOGVAR = "unet.", "logvar_"  # EDM2's network, and beside it what we have inside: `logvar.`
_UNUSED = "model.map_augment.weight"  # for EDM's augmentations, which sampling does not use
_WRAPPERS = ("module", "_orig_mod")
_DEPTH = 6  # of dicts around a state dict
_GENERATOR = "feedforward_model"  # DMD2's
_OTHERS = {  # by names that they have and networks of EDM do not
    r"Conv2d_1a_3x3\.": "Inception, a feature network",
    r"(^|\.)input_blocks\.0\.0\.": "a U-Net of OpenAI's code (guided-diffusion)",
    r"(^|\.)time_embedding\.linear_1\.": "a U-Net of diffusers",
    r"(^|\.)x_embedder\.": "a diffusion transformer (DiT)",
    r"(^|\.)all_modules\.\d": "a network of Song's score_sde",
}


def tensors_in(content: object) -> dict[str, Stored]:
    """The tensors in dicts of dicts, by their names with those of the dicts before them.

    Raises:
        ValueError: no tensors, or a training state of the reference consistency distillation.
    """
    if not isinstance(content, dict):
        raise ValueError(f"need a dict of named tensors, got {type(content).__name__}")
    if "optimizer_state" in content:
        raise ValueError(TRAINING_STATE)
    found: dict[str, Stored] = {}
    open_dicts: list[tuple[str, int, Mapping[Any, Any]]] = [("", 0, content)]
    seen = 0
    while open_dicts:
        prefix, depth, items = open_dicts.pop()
        for name, value in items.items():
            seen = within(seen + 1, TENSORS, "names of tensors")
            if isinstance(name, str) and isinstance(value, Stored):
                found[prefix + name] = value
            elif isinstance(name, str) and isinstance(value, dict) and depth < _DEPTH:
                open_dicts.append((f"{prefix}{name}.", depth + 1, value))
    if not found:
        first = next(iter(content), None)
        what = f"something else at {quoted(first)}" if content else "an empty one"
        raise ValueError(f"need a dict of named tensors, got {what}")
    return found


def one_network(
    tensors: Mapping[str, Stored], chosen: str | None = None
) -> tuple[str, dict[str, Stored], list[str]]:
    """The one denoiser among the tensors of a file.

    Args:
        chosen: the beginning of its names, where there are several.

    Returns:
        What it is called in the file, "" if its names stand alone; its tensors as `model.`...; and
        the names of all other tensors.

    Raises:
        ValueError: none, or several without a choice.
    """
    unwrapped = _unwrapped(tensors)
    prefixes = [n.removesuffix(anchor) for n in unwrapped for anchor in _ANCHORS if _is(anchor, n)]
    if not prefixes:
        raise ValueError(f"need model.{_ANCHORS[0]} of EDM's networks, got {_what(tensors)}")
    prefix = _choose(sorted(prefixes), chosen)
    deeper = tuple(p for p in prefixes if p != prefix and p.startswith(prefix))
    network, left_out = {}, []
    beside = prefix.removesuffix(_UNET) + _LOGVAR
    for name, original in unwrapped.items():
        inside = name.startswith(prefix) and not (deeper and name.startswith(deeper))
        ours = f"model.{name.removeprefix(prefix)}"
        if prefix.endswith(_UNET) and name.startswith(beside):
            inside, ours = True, f"model.logvar.{name.removeprefix(beside)}"
        if inside and ours != _UNUSED:
            network[ours] = tensors[original]
        else:
            left_out.append(original)
    return _label(prefix), network, left_out


def _unwrapped(tensors: Mapping[str, Stored]) -> dict[str, str]:
    """The names in the file by those without the parts that wrappers add."""
    found: dict[str, str] = {}
    for name in tensors:
        short = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
        if short in found:
            raise ValueError(f"need each tensor once, got {plain(found[short])} and {plain(name)}")
        found[short] = name
    return found


def _is(anchor: str, name: str) -> bool:
    return name == anchor or name.endswith(f".{anchor}")


def _label(prefix: str) -> str:
    """`ema.model.` as people call it: ema."""
    parts = prefix.split(".")[:-1]
    return ".".join(parts[:-1] if parts[-1:] in (["model"], ["unet"]) else parts)


def _choose(prefixes: list[str], chosen: str | None) -> str:
    labels = {_label(prefix): prefix for prefix in prefixes}
    if chosen is not None:
        fits = [label for label in labels if chosen in (label, *label.split("."))]
    elif len(labels) == 1:
        fits = list(labels)
    else:
        fits = [label for label in labels if _GENERATOR in label.split(".")]
        fits = fits or [label for label in labels if "ema" in re.split("[._]", label)]
    if len(fits) == 1 and len(labels) == len(prefixes):
        return labels[fits[0]]
    names = listed([f"{label}." if label else "/" for label in labels], 4)
    if chosen is not None:
        raise ValueError(f"need one network called {quoted(chosen)}, got {names} (--network)")
    guidance = any(label.split(".")[-1] in ("real_unet", "fake_unet") for label in labels)
    raise ValueError(
        f"need one network, got {len(prefixes)} ({names}): "
        + (
            "the guidance networks of DMD2; import its generator, model.safetensors or "
            "pytorch_model.bin in the same folder"
            if guidance
            else "name one of them with --network"
        )
    )


def _what(tensors: Mapping[str, Stored]) -> str:
    """What else the tensors are, or their first names."""
    for pattern, what in _OTHERS.items():
        if any(re.search(pattern, name[:300]) for name in tensors):
            return what
    return f"tensors {listed(list(tensors), 3) or 'none'}"
