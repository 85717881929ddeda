"""Pickles of EDM and EDM2 (teachers, snapshots) as a state dict and a config, never executed.

Their persistence wrapper stores the Python source of a network beside the state of each module.
The original loader executes that source; here it is ignored.
"""

import os
from typing import Any

from torch import Tensor

from fewstep.budgets import regular, within
from fewstep.interop.opcodes import NN_CLASS, Inert, Reader, Rule, require
from fewstep.interop.stream import Span, Stream
from fewstep.interop.tensors import CALLS, STORAGES, Storage, Stored
from fewstep.interop.torch_file import mapped, read_legacy
from fewstep.quoting import quoted


def import_edm_pickle(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """As `read_edm_pickle`, with the tensors in memory."""
    weights, about = read_edm_pickle(path)
    return {name: stored.load() for name, stored in weights.items()}, about


def read_edm_pickle(path: str | os.PathLike[str]) -> tuple[dict[str, Stored], dict[str, Any]]:
    """Weights and architecture of the `ema` network in a teacher file of EDM (Karras et al. 2022)
    or EDM2 (Karras et al. 2024).

    Returns:
        The state dict under the file's names (`model.enc....`, EDM2's `unet.enc....`), in the
        file's dtypes, not read yet; and the arguments that built the network (img_resolution,
        img_channels, label_dim, model_type, model_channels, channel_mult, ...), with EDM's or
        EDM2's defaults for missing ones. For a training snapshot also `loss`, the class of its
        loss, and `nimg`, if it records them.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, is not an EDM pickle, has another preconditioning than
            EDMPrecond or EDM2's Precond, is of latents instead of images, has other constants than
            EDM2's configuration G, claims more than it holds, names something that weights do not
            need, or passes a budget.
    """
    with open(regular(path), "rb") as file:
        if not (size := os.fstat(file.fileno()).st_size):
            raise ValueError(f"need an EDM pickle, got an empty file: {path}")
        try:
            pickle = Reader(Stream(str(path), mapped(file)), _CALLS).read()
            network = _ema(pickle)
            return _state_dict(network, size), _config(network) | _training(pickle)
        except ValueError as error:
            raise ValueError(f"refused {path}: {error}") from error


def _storage(reader: Reader, data: Span | bytes) -> Storage:
    stream = reader.stream.inside(require(data, Span, bytes))
    reader.charge(stream.size)
    storages: dict[str, Rule | None] = dict.fromkeys(STORAGES)
    return require(read_legacy(stream, storages), Storage)


_CALLS: dict[str, Rule | None] = {**CALLS, "torch.storage._load_from_bytes": _storage}


_PRECOND_ARGS = {  # the order of positional arguments
    "EDMPrecond": (
        *("img_resolution", "img_channels", "label_dim", "use_fp16"),
        *("sigma_min", "sigma_max", "sigma_data", "model_type"),
    ),
    "Precond": (
        *("img_resolution", "img_channels", "label_dim", "use_fp16"),
        *("sigma_data", "logvar_channels"),
    ),
}
_PRECOND_DEFAULTS = {
    "EDMPrecond": {"label_dim": 0, "sigma_data": 0.5, "model_type": "DhariwalUNet"},
    "Precond": {"sigma_data": 0.5, "model_type": "EDM2"},
}
_CONSTANTS = {  # of EDM2's configuration G, which our network has too
    "label_balance": 0.5,
    "concat_balance": 0.5,
    "res_balance": 0.3,
    "attn_balance": 0.3,
    "resample_filter": [1, 1],
    "channels_per_head": 64,
    "clip_act": 256,
}
# The files contain only arguments that were given; these are the defaults in EDM's code.
_NETWORK_DEFAULTS: dict[str, dict[str, Any]] = {
    "DhariwalUNet": {
        "model_channels": 192,
        "channel_mult": [1, 2, 3, 4],
        "num_blocks": 3,
        "attn_resolutions": [32, 16, 8],
        "augment_dim": 0,
    },
    "SongUNet": {
        "model_channels": 128,
        "channel_mult": [1, 2, 2, 2],
        "num_blocks": 4,
        "attn_resolutions": [16],
        "augment_dim": 0,
        "embedding_type": "positional",
        "encoder_type": "standard",
        "decoder_type": "standard",
        "channel_mult_noise": 1,
        "resample_filter": [1, 1],
    },
    "EDM2": {
        "model_channels": 192,
        "channel_mult": [1, 2, 3, 4],
        "num_blocks": 3,
        "attn_resolutions": [16, 8],
    },
}


def _ema(snapshot: object) -> Inert:
    if isinstance(snapshot, Inert):
        name = _persistent(snapshot).get("class_name")
        raise ValueError(f"need a network under 'ema', got one object of class {_class(name)}")
    content: dict[Any, Any] = require(snapshot, dict)
    network = content.get("ema")
    if network is None:
        raise ValueError("need a network under 'ema', got none: not an EDM pickle")
    name = _persistent(require(network, Inert)).get("class_name")
    # a tuple of tuples may take forever to hash
    if not isinstance(name, str) or name not in _PRECOND_ARGS:
        known = "EDMPrecond, or EDM2's Precond"
        raise ValueError(f"need a network of class {known}, got {_class(name)}")
    if isinstance(encoder := content.get("encoder"), Inert):
        kind = _persistent(encoder).get("class_name")
        if kind != "StandardRGBEncoder":
            raise ValueError(f"need a network of images, got one of the latents of {_class(kind)}")
    return network


def _class(name: object) -> str:
    """A class by its name, which may be anything: a nest of tuples took for ever to be written."""
    return (
        name if isinstance(name, str) and len(name) <= 80 and name.isidentifier() else quoted(name)
    )


def _persistent(module: Inert) -> dict[str, Any]:
    """What EDM's persistence wrapper stores of an object: class_name, state, module_src, ..."""
    if not module.name.endswith("._reconstruct_persistent_obj"):
        raise ValueError(f"need an object of EDM's persistence wrapper, got {module.name}")
    return require(module.args[0] if module.args else None, dict)


def _attributes(module: Inert) -> dict[str, Any]:
    plain = NN_CLASS.fullmatch(module.name)
    return require(module.state if plain else _persistent(module).get("state"), dict)


def _state_dict(network: Inert, size: int) -> dict[str, Stored]:
    weights: dict[str, Stored] = {}
    seen: set[int] = set()
    total = 0

    def visit(module: Inert, prefix: str) -> None:
        nonlocal total
        if id(module) in seen or len(prefix) > 300:  # a module inside itself would never end
            raise ValueError(
                f"the module {quoted(prefix, 300)} occurs twice, or is nested too deeply"
            )
        seen.add(id(module))
        attributes = _attributes(module)
        hidden = require(attributes.get("_non_persistent_buffers_set", set()), set)
        for kind in ("_parameters", "_buffers", "_modules"):
            for key, value in require(attributes.get(kind, {}), dict).items():
                name = prefix + require(key, str)
                # Shared weights would be copied for each module on saving: a small file could
                # fill the disk.
                total += value.nbytes if isinstance(value, Stored) else 1
                if total > size:
                    raise ValueError("its modules share weights: more than the file holds")
                if value is None or (kind == "_buffers" and key in hidden):
                    continue
                if kind == "_modules":
                    visit(require(value, Inert), f"{name}.")
                else:
                    weights[name] = require(value, Stored)

    visit(network, "")
    return weights


def _config(network: Inert) -> dict[str, Any]:
    attributes, kind = _attributes(network), _persistent(network)["class_name"]
    args = require(attributes.get("_init_args", ()), tuple)
    given = dict(zip(_PRECOND_ARGS[kind], args, strict=False))
    given |= require(attributes.get("_init_kwargs"), dict)
    within(len(given), 64, "arguments of a network")
    config = _PRECOND_DEFAULTS[kind] | {
        _class(name): _plain(value) for name, value in given.items()
    }
    model_type = require(config["model_type"], str)
    if model_type not in _NETWORK_DEFAULTS:
        raise ValueError(f"need a network DhariwalUNet or SongUNet, got {_class(model_type)}")
    for name, ours in _CONSTANTS.items():
        if kind == "Precond" and (theirs := config.get(name, ours)) != ours:
            raise ValueError(
                f"need {name} {ours}, as in EDM2's configuration G, got {quoted(theirs)}"
            )
    for name in ("img_resolution", "img_channels"):
        require(config.get(name), int)
    return _NETWORK_DEFAULTS[model_type] | config


def _training(pickle: dict[str, Any]) -> dict[str, Any]:
    """What a snapshot records about its training: the class of its loss, and the images seen."""
    about: dict[str, Any] = {}
    if isinstance(loss := pickle.get("loss_fn"), Inert):
        about["loss"] = _class(_persistent(loss).get("class_name"))
    if isinstance(nimg := pickle.get("nimg"), int):
        about["nimg"] = _plain(nimg)
    return about


def _plain(value: object) -> object:
    if isinstance(value, list | tuple):
        return [_scalar(item) for item in value[: within(len(value), 64, "values in a list")]]
    return value if value is None else _scalar(value)


def _scalar(value: object) -> int | float | str | bool:
    if isinstance(value, int) and abs(value) >= 1 << 53:
        raise ValueError("need small integers in the config, got a large one")
    if isinstance(value, str):
        within(len(value), 1000, "characters in a value of the config")
    return require(value, int, float, str, bool)
