"""The calls in files of weights, and their replacements: tensors, dicts, plain numbers.

Tensors are not read while a file is looked through, only described. So whether it holds a network
of ours is known before any of its numbers take memory.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.budgets import number
from fewstep.interop.opcodes import (
    Inert,
    Name,
    OrderedDict,
    Reader,
    Rule,
    bytes_of,
    key_of,
    require,
)
from fewstep.interop.stream import Span

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
    "torch.ComplexFloatStorage": torch.complex64,
    "torch.ComplexDoubleStorage": torch.complex128,
    "torch.storage.UntypedStorage": torch.uint8,  # of types without a storage class, as float8
}
# Types that some files name; as weights they are refused, but by what they are.
_DTYPES = (
    *("float64", "float32", "float16", "bfloat16", "half", "float", "double"),
    *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "bool"),
    *("complex32", "complex64", "complex128", "qint8", "quint8", "qint32"),
    *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"),
    "float4_e2m1fn_x2",
)


@dataclass(eq=False)
class Storage:
    """Numbers of one or more tensors that are still in the file."""

    dtype: torch.dtype
    count: int
    span: Span | None = None
    _flat: Tensor | None = None

    def flat(self) -> Tensor:
        """The numbers, (count,); read once, for tensors may share them."""
        if self._flat is None:
            assert self.span is not None, "the file's reader finds every storage"
            self._flat = self.span.read().view(self.dtype)
        return self._flat


@dataclass(frozen=True, eq=False)
class Stored:
    """A tensor that is still in the file: its type, shape and bytes, and how it is read."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    load: Callable[[], Tensor]

    def numel(self) -> int:
        return math.prod(self.shape)


def storage_id(pid: tuple[Any, ...]) -> tuple[str, torch.dtype, int]:
    """Key, dtype and number of elements of the storage that torch's persistent id describes."""
    kind, storage, key, _, count, *view = pid if len(pid) in (5, 6) else (None,) * 5
    if kind != "storage" or any(part is not None for part in view):
        raise ValueError("need a whole storage, got another object saved by torch")
    name = require(storage, Name).name
    if name not in STORAGES:
        raise ValueError(f"need a storage of numbers, got {name}")
    numbers: int = require(count, int)
    if abs(numbers) >= 1 << 60:
        raise ValueError(f"a tensor claims {number(numbers)} numbers")
    return require(key, str), STORAGES[name], numbers


def _tensor(
    reader: Reader,
    storage: Storage,
    offset: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    *_: object,
) -> Stored:
    have = require(storage, Storage).count
    if len(require(size, tuple)) > 8 or len(require(stride, tuple)) != len(size):
        raise ValueError("need a tensor of at most 8 dimensions with a stride for each")
    # A stride of 0 would let four bytes stand for terabytes, once the tensor is copied.
    small = all(0 <= require(n, int) <= have for n in (offset, *size, *stride))
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if not small or 0 in size or max(last + 1, math.prod(size)) > have:
        raise ValueError(f"a tensor claims more numbers than its storage has: {have}")
    kind, count = storage.dtype, math.prod(size)
    return Stored(
        str(kind).removeprefix("torch."),
        size,
        count * kind.itemsize,
        lambda: storage.flat().as_strided(size, stride, offset),
    )


def _typed_tensor(reader: Reader, storage: Storage, *rest: Any) -> Stored:  # noqa: ANN401
    """A tensor of a type that has no storage class: it is described, and never read."""
    dtype = require(rest[5], Name).name.removeprefix("torch.")

    def refuse() -> Tensor:
        raise ValueError(f"need numbers of a type with a storage, got {dtype}")

    return Stored(dtype, (), require(storage, Storage).count, refuse)


def _encode(reader: Reader, text: str, codec: str) -> bytes:
    """Bytes, as protocol 2 and older write them."""
    if require(codec, str) not in ("latin1", "latin-1"):
        raise ValueError("need bytes that are encoded as latin1")
    reader.charge(len(require(text, str)))
    return text.encode("latin1")


def _list(reader: Reader, items: Any = (), *_: object) -> list[Any]:  # noqa: ANN401
    reader.stream.spent.step(len(require(items, list, tuple)))
    return list(items)


def _set(reader: Reader, items: Any = ()) -> set[Any]:  # noqa: ANN401
    return {key_of(item) for item in _list(reader, items)}


def _dict(reader: Reader, pairs: Any = ()) -> dict[Any, Any]:  # noqa: ANN401
    each = (require(pair, list, tuple) for pair in _list(reader, pairs))
    return {key_of(key): value for key, value in each}


def _counter(reader: Reader, counts: Any) -> dict[Any, Any]:  # noqa: ANN401
    reader.stream.spent.step(len(require(counts, dict)))
    return dict(counts)


def _scalar(reader: Reader, dtype: Inert, data: Span | bytes) -> float | int | bool:
    code = require(require(dtype, Inert).args[0], str)[:8]
    order = require(require(dtype.state, tuple)[1], str) if dtype.state else "<"
    if dtype.name != "numpy.dtype" or not re.fullmatch("[fiub][1248]", code) or order not in "<|>=":
        raise ValueError("need a plain number, got another numpy scalar")
    return np.frombuffer(bytes_of(data), np.dtype(f"{order}{code}"), 1)[0].item()


CALLS: dict[str, Rule | None] = {
    "torch_utils.persistence._reconstruct_persistent_obj": None,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _typed_tensor,
    "torch._utils._rebuild_parameter": lambda reader, data, *_: require(data, Stored),
    "_codecs.encode": _encode,
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
    **{  # factories of a defaultdict
        f"{builtins}.{kind}": None
        for builtins in ("builtins", "__builtin__")
        for kind in ("int", "float", "list", "dict")
    },
    **{f"torch.{dtype}": None for dtype in _DTYPES},
    **{f"numpy.{core}.multiarray._reconstruct": None for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": _scalar for core in ("core", "_core")},
}
