"""EDM's teacher pickles as a state dict and a config, without executing anything that they hold.

`pickle.load` imports and calls whatever a file names. `_Reader` interprets the opcodes itself and
can do neither: names that it knows become inert objects, tensors come from the bytes in the file,
and every other name is refused. Time and memory stay proportional to the size of the file.
"""

import io
import math
import mmap
import os
import pickletools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


def import_edm_pickle(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and architecture of the `ema` network in a teacher file of EDM (Karras et al. 2022).

    Returns:
        The state dict under EDM's names (`model.enc....`), on the CPU, in the file's types; and the
        arguments that built the network (img_resolution, img_channels, label_dim, model_type,
        model_channels, channel_mult, ...), with EDM's defaults for those that the file leaves out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is cut short, is no EDM pickle, holds another preconditioning than
            EDMPrecond, claims more than it holds, or names anything that weights do not need.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if not size:
            raise ValueError(f"need an EDM pickle, got an empty file: {path}")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as stream:
            try:
                network = _ema(_Reader(stream, size, _OUTER).read())
                return _state_dict(network, size), _config(network)
            except ValueError as error:
                raise ValueError(f"refused {path}: {error}") from error


# --- from opcodes to inert objects -----------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Name:
    """A class or function that the file names. Nothing is imported."""

    name: str


@dataclass(eq=False)
class _Inert:
    """What calling `name` on `args` would have made, and the state it would have been given."""

    name: str
    args: tuple[Any, ...]
    state: Any = None


_MARK = object()
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": (), "MARK": _MARK}
_CONTAINERS: dict[str, type] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_SET": set}
_LITERALS = frozenset(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT "
    "UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 STRING BINSTRING SHORT_BINSTRING "
    "BINBYTES SHORT_BINBYTES BINBYTES8".split()
)


class _Reader:
    """One pass over a pickle: a stack machine that knows no call and no import.

    `rules` maps each permitted name to what stands for a call of it: a function of the reader and
    the arguments, or None for an inert object. Names of torch.nn's classes are always permitted.
    Dict keys are strings, bytes or small integers, because hashing anything else can be made slow.
    """

    def __init__(self, stream: Any, size: int, rules: dict[str, "_Rule | None"]) -> None:  # noqa: ANN401
        self.stream, self.size, self.rules = stream, size, rules
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.charged = 0

    def read(self) -> Any:  # noqa: ANN401
        """The next object of the stream, which is left behind its end."""
        self.stack, self.memo = [], {}
        try:
            for op, arg, at in pickletools.genops(self.stream):
                if op.name == "STOP":
                    return self.pop()
                self.step(op.name, arg, at)
        except (IndexError, KeyError, AttributeError, TypeError, OverflowError) as error:
            raise ValueError(f"the pickle is malformed ({type(error).__name__})") from error
        raise AssertionError("genops ends at STOP or raises")

    def step(self, op: str, arg: Any, at: int | None) -> None:  # noqa: ANN401
        push = self.stack.append
        if op in _LITERALS:
            push(arg)
        elif op in _CONSTANTS:
            push(_CONSTANTS[op])
        elif op in _CONTAINERS:
            push(_CONTAINERS[op]())
        elif op in ("TUPLE1", "TUPLE2", "TUPLE3"):
            push(tuple(reversed([self.pop() for _ in range(int(op[-1]))])))
        elif op in ("TUPLE", "LIST"):
            push(tuple(self.pop_mark()) if op == "TUPLE" else self.pop_mark())
        elif op in ("DICT", "SETITEMS", "SETITEM"):
            items = [self.pop(), self.pop()][::-1] if op == "SETITEM" else self.pop_mark()
            target = {} if op == "DICT" else self.pop()
            for key, value in zip(items[::2], items[1::2], strict=True):
                _require(target, dict)[_key(key)] = value
            push(target)
        elif op in ("APPEND", "APPENDS"):
            items = [self.pop()] if op == "APPEND" else self.pop_mark()
            _require(self.stack[-1], list).extend(items)
        elif op == "ADDITEMS":
            items = self.pop_mark()
            _require(self.stack[-1], set).update(_key(item) for item in items)
        elif op in ("MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT"):
            index = len(self.memo) if op == "MEMOIZE" else arg
            if not 0 <= index < self.size:
                raise ValueError(f"it puts an object at {index:.3g} of its memo")
            self.memo[index] = self.stack[-1]
        elif op in ("GET", "BINGET", "LONG_BINGET"):
            push(self.memo[arg])
        elif op in ("GLOBAL", "INST"):
            push(self.named(*arg.split(" ", 1)))
            if op == "INST":
                raise ValueError("the opcode INST has no place in a file of weights")
        elif op == "STACK_GLOBAL":
            name, module = self.pop(), self.pop()
            push(self.named(_require(module, str), _require(name, str)))
        elif op in ("REDUCE", "NEWOBJ"):
            args, function = self.pop(), self.pop()
            push(self.call(_require(function, _Name).name, _require(args, tuple)))
        elif op == "BUILD":
            state = self.pop()
            _require(self.stack[-1], _Inert).state = state
        elif op == "BINPERSID":
            push(_Inert("persistent id", _require(self.pop(), tuple)))
        elif op == "FRAME":
            if arg > self.size:
                raise ValueError(f"a frame of {arg} bytes in a file of {self.size}")
        elif op != "PROTO":
            raise ValueError(f"the opcode {op} at byte {at} has no place in a file of weights")

    def pop(self) -> Any:  # noqa: ANN401
        item = self.stack.pop()
        if item is _MARK:
            raise IndexError("mark")
        return item

    def pop_mark(self) -> list[Any]:
        items = []
        while (item := self.stack.pop()) is not _MARK:
            items.append(item)
        return items[::-1]

    def charge(self, cost: int) -> None:
        """Count what a call reads: one object named again and again would fill time and memory."""
        self.charged += cost
        if self.charged > self.size:
            raise ValueError("it uses the same bytes again and again: more than the file holds")

    def named(self, module: str, name: str) -> _Name:
        dotted = f"{module}.{name}"
        known = dotted in self.rules or _NN_CLASS.fullmatch(dotted)
        if not known or "." in name:
            raise ValueError(f"it names {dotted[:200]!r}, which weights do not need")
        return _Name(dotted)

    def call(self, name: str, args: tuple[Any, ...]) -> Any:  # noqa: ANN401
        rule = self.rules.get(name)
        return _Inert(name, args) if rule is None else rule(self, *args)


def _require(item: Any, *kinds: type) -> Any:  # noqa: ANN401
    if not isinstance(item, kinds):
        need = " or ".join(kind.__name__.strip("_") for kind in kinds)
        raise ValueError(f"need {need}, got {type(item).__name__.strip('_')}: not an EDM pickle")
    return item


def _key(item: object) -> str | bytes | int:
    if isinstance(item, int) and abs(item) >= 1 << 31:
        raise ValueError("need small integers as keys, got a large one")
    return _require(item, str, bytes, int)


# --- what stands for the calls that teacher files make ---------------------------------------

_Rule = Callable[..., Any]
_NN_CLASS = re.compile(r"torch\.nn\.modules\.[a-z]+\.[A-Za-z0-9]+")
_STORAGES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}


def _storage(reader: _Reader, data: bytes) -> Tensor:
    """The storage, as a flat tensor, in a `torch.save` file of the format before torch 1.6.

    Five pickles (magic number, version, system, a persistent id that describes the storage, and
    the storage's key) are followed by its length and its bytes.
    """
    reader.charge(len(_require(data, bytes)))
    stream = io.BytesIO(data)
    inner = _Reader(stream, len(data), dict.fromkeys(_STORAGES))
    magic, version, system, storage, keys = (inner.read() for _ in range(5))
    little = _require(system, dict)["little_endian"]
    if (magic, version, little) != (0x1950A86A20F9469CFC6C, 1001, True):
        raise ValueError("need little-endian tensors in torch's format of 2016, version 1001")
    kind, name, key, _, count, view = _require(storage, _Inert).args
    dtype = _STORAGES[_require(name, _Name).name]
    start, length = stream.tell() + 8, _require(count, int) * dtype.itemsize
    if kind != "storage" or view is not None or keys != [_require(key, str)]:
        raise ValueError("need a whole storage, got another object saved by torch")
    if length < 0 or len(data) != start + length or data[start - 8 : start] != _int64(count):
        raise ValueError(f"a tensor claims {length:.4g} bytes, {len(data) - start} are there")
    return torch.from_numpy(np.frombuffer(data, np.uint8, offset=start).copy()).view(dtype)


def _int64(number: int) -> bytes:
    return number.to_bytes(8, "little")


def _tensor(
    reader: _Reader,
    storage: Tensor,
    offset: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    *_: object,
) -> Tensor:
    have = _require(storage, Tensor).numel()
    if len(_require(size, tuple)) > 8 or len(_require(stride, tuple)) != len(size):
        raise ValueError("need a tensor of at most 8 dimensions with a stride for each")
    small = all(0 <= _require(n, int) <= have for n in (offset, *size, *stride))
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if not small or 0 in size or max(last + 1, math.prod(size)) > have:
        raise ValueError(f"a tensor claims more numbers than its storage has: {have}")
    return storage.as_strided(size, stride, offset)


def _parameter(reader: _Reader, data: Tensor, *_: object) -> Tensor:
    return _require(data, Tensor)


def _dict(reader: _Reader, pairs: Any = ()) -> dict[Any, Any]:  # noqa: ANN401
    reader.charge(len(_require(pairs, list, tuple)))
    return {_key(key): value for key, value in (_require(pair, list, tuple) for pair in pairs)}


def _set(reader: _Reader, items: Any = ()) -> set[Any]:  # noqa: ANN401
    reader.charge(len(_require(items, list, tuple)))
    return {_key(item) for item in items}


def _scalar(reader: _Reader, dtype: _Inert, data: bytes) -> float | int | bool:
    code = str(_require(_require(dtype, _Inert).args[0], str))
    order = _require(dtype.state, tuple)[1] if dtype.state else "<"
    if dtype.name != "numpy.dtype" or not re.fullmatch("[fiub][1248]", code) or order not in "<|>=":
        raise ValueError("need a plain number, got another numpy scalar")
    return np.frombuffer(_require(data, bytes), np.dtype(f"{order}{code}"), 1)[0].item()


_OUTER: dict[str, _Rule | None] = {
    "torch_utils.persistence._reconstruct_persistent_obj": None,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch.storage._load_from_bytes": _storage,
    "collections.OrderedDict": _dict,
    "dnnlib.util.EasyDict": _dict,
    "builtins.set": _set,
    "__builtin__.set": _set,
    "torch.Size": None,
    "torch.device": None,
    "numpy.dtype": None,
    "numpy.ndarray": None,
    **{f"torch.{dtype}": None for dtype in ("float16", "bfloat16", "float32", "float64", "int64")},
    **{f"numpy.{core}.multiarray._reconstruct": None for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": _scalar for core in ("core", "_core")},
}


# --- from inert objects to weights and config ------------------------------------------------

_PRECOND_ARGS = (  # the order of EDMPrecond's positional arguments
    *("img_resolution", "img_channels", "label_dim", "use_fp16"),
    *("sigma_min", "sigma_max", "sigma_data", "model_type"),
)
_PRECOND_DEFAULTS = {"label_dim": 0, "sigma_data": 0.5, "model_type": "DhariwalUNet"}
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
}


def _ema(pickle: object) -> _Inert:
    network = _require(pickle, dict).get("ema")
    if network is None:
        raise ValueError("need a network under 'ema', got none: not an EDM pickle")
    name = _persistent(_require(network, _Inert)).get("class_name")
    if name != "EDMPrecond":
        raise ValueError(f"need a network of class EDMPrecond, got {str(name)[:80]}")
    return network


def _persistent(module: _Inert) -> dict[str, Any]:
    """What EDM's persistence wrapper knows of an object: class_name, state, module_src, ..."""
    if not module.name.endswith("._reconstruct_persistent_obj"):
        raise ValueError(f"need an object of EDM's persistence wrapper, got {module.name}")
    return _require(module.args[0] if module.args else None, dict)


def _attributes(module: _Inert) -> dict[str, Any]:
    plain = _NN_CLASS.fullmatch(module.name)
    return _require(module.state if plain else _persistent(module).get("state"), dict)


def _state_dict(network: _Inert, size: int) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    seen: set[int] = set()
    total = 0

    def visit(module: _Inert, prefix: str) -> None:
        nonlocal total
        if id(module) in seen or len(prefix) > 300:  # a module inside itself has no end
            raise ValueError(f"the module {prefix[:300]!r} occurs twice, or is nested too deeply")
        seen.add(id(module))
        attributes = _attributes(module)
        hidden = _require(attributes.get("_non_persistent_buffers_set", set()), set)
        for kind in ("_parameters", "_buffers", "_modules"):
            for key, value in _require(attributes.get(kind, {}), dict).items():
                name = prefix + _require(key, str)
                total += value.nbytes if isinstance(value, Tensor) else 1
                if total > size:
                    raise ValueError("its modules share weights: more than the file holds")
                if value is None or (kind == "_buffers" and key in hidden):
                    continue
                if kind == "_modules":
                    visit(_require(value, _Inert), f"{name}.")
                else:
                    weights[name] = _require(value, Tensor)

    visit(network, "")
    return weights


def _config(network: _Inert) -> dict[str, Any]:
    attributes = _attributes(network)
    args = _require(attributes.get("_init_args", ()), tuple)
    given = dict(zip(_PRECOND_ARGS, args, strict=False))
    given |= _require(attributes.get("_init_kwargs"), dict)
    config = _PRECOND_DEFAULTS | {str(name): _plain(value) for name, value in given.items()}
    model_type = _require(config["model_type"], str)
    if model_type not in _NETWORK_DEFAULTS:
        raise ValueError(f"need a network DhariwalUNet or SongUNet, got {model_type[:80]}")
    for name in ("img_resolution", "img_channels"):
        _require(config.get(name), int)
    return _NETWORK_DEFAULTS[model_type] | config


def _plain(value: object) -> object:
    if not isinstance(value, list | tuple):
        return value if value is None else _require(value, int, float, str, bool)
    if len(value) > 64:
        raise ValueError(f"need a short list in the config, got {len(value)} values")
    return [_require(item, int, float, str, bool) for item in value]
