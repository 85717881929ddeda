"""The calls in files of weights, and their replacements: tensors, dicts, plain numbers."""

import math
import re
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.interop.opcodes import Inert, Name, OrderedDict, Reader, Rule, key_of, require

STORAGES = {
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


def storage_id(pid: tuple[Any, ...]) -> tuple[str, torch.dtype, int]:
    """Key, dtype and number of elements of the storage that torch's persistent id describes."""
    kind, storage, key, _, count, *view = pid if len(pid) in (5, 6) else (None,) * 5
    if kind != "storage" or any(part is not None for part in view):
        raise ValueError("need a whole storage, got another object saved by torch")
    name = require(storage, Name).name
    if name not in STORAGES:
        raise ValueError(f"need a storage of numbers, got {name}")
    return require(key, str), STORAGES[name], require(count, int)


def as_storage(data: bytes, dtype: torch.dtype) -> Tensor:
    """The bytes of a storage as a flat tensor, (N,)."""
    return torch.from_numpy(np.frombuffer(data, np.uint8).copy()).view(dtype)


def _tensor(
    reader: Reader,
    storage: Tensor,
    offset: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    *_: object,
) -> Tensor:
    have = require(storage, Tensor).numel()
    if len(require(size, tuple)) > 8 or len(require(stride, tuple)) != len(size):
        raise ValueError("need a tensor of at most 8 dimensions with a stride for each")
    # A stride of 0 would let four bytes stand for terabytes, once the tensor is copied.
    small = all(0 <= require(n, int) <= have for n in (offset, *size, *stride))
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if not small or 0 in size or max(last + 1, math.prod(size)) > have:
        raise ValueError(f"a tensor claims more numbers than its storage has: {have}")
    return storage.as_strided(size, stride, offset)


def _list(reader: Reader, items: Any = (), *_: object) -> list[Any]:  # noqa: ANN401
    reader.charge(len(require(items, list, tuple)))
    return list(items)


def _set(reader: Reader, items: Any = ()) -> set[Any]:  # noqa: ANN401
    return {key_of(item) for item in _list(reader, items)}


def _dict(reader: Reader, pairs: Any = ()) -> dict[Any, Any]:  # noqa: ANN401
    each = (require(pair, list, tuple) for pair in _list(reader, pairs))
    return {key_of(key): value for key, value in each}


def _counter(reader: Reader, counts: Any) -> dict[Any, Any]:  # noqa: ANN401
    reader.charge(len(require(counts, dict)))
    return dict(counts)


def _scalar(reader: Reader, dtype: Inert, data: bytes) -> float | int | bool:
    code = str(require(require(dtype, Inert).args[0], str))
    order = require(dtype.state, tuple)[1] if dtype.state else "<"
    if dtype.name != "numpy.dtype" or not re.fullmatch("[fiub][1248]", code) or order not in "<|>=":
        raise ValueError("need a plain number, got another numpy scalar")
    return np.frombuffer(require(data, bytes), np.dtype(f"{order}{code}"), 1)[0].item()


REBUILD = ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter")
CALLS: dict[str, Rule | None] = {
    "torch_utils.persistence._reconstruct_persistent_obj": None,
    REBUILD[0]: _tensor,
    REBUILD[1]: lambda reader, data, *_: require(data, Tensor),
    "collections.OrderedDict": lambda reader, pairs=(): OrderedDict(_dict(reader, pairs)),
    "collections.Counter": _counter,
    "collections.defaultdict": lambda reader, *factory: {},
    "collections.deque": _list,
    "dnnlib.util.EasyDict": _dict,
    "builtins.set": _set,
    "__builtin__.set": _set,
    "torch.Size": None,
    "torch.device": None,
    "numpy.dtype": None,
    "numpy.ndarray": None,
    **{
        f"builtins.{kind}": None for kind in ("int", "float", "list", "dict")
    },  # factories of a defaultdict
    **{f"torch.{dtype}": None for dtype in ("float16", "bfloat16", "float32", "float64", "int64")},
    **{f"numpy.{core}.multiarray._reconstruct": None for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": _scalar for core in ("core", "_core")},
}
