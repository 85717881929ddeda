"""Pickles as EDM and torch write them, and hostile ones, for the tests of fewstep.interop."""

import io
import pickle
import struct
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._utils import _rebuild_tensor_v2

MAGIC = 0x1950A86A20F9469CFC6C
BUFFERS = ("freqs", "phases", "resample_filter")  # other tensors are parameters


class EasyDict(dict[str, Any]):
    """Pickled under EDM's name, which no installed package has."""


def _reconstruct_persistent_obj(meta: EasyDict) -> None:
    raise AssertionError("the importer called the persistence wrapper")


def as_edm_modules() -> dict[str, types.ModuleType]:
    """Give `pickle.dumps` the names that EDM's own modules have, until the process ends."""
    modules = {}
    for item, name in (
        (EasyDict, "dnnlib.util"),
        (_reconstruct_persistent_obj, "torch_utils.persistence"),
    ):
        item.__module__ = name
        modules[name] = types.ModuleType(name)
        setattr(modules[name], item.__name__, item)
        package = name.split(".")[0]
        modules[package] = types.ModuleType(package)
    sys.modules |= modules
    return modules


@pytest.fixture
def edm_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `pickle.dumps` write the names that EDM's own modules have."""
    for item in (EasyDict, _reconstruct_persistent_obj):
        monkeypatch.setattr(item, "__module__", item.__module__)
    for name in ("dnnlib.util", "dnnlib", "torch_utils.persistence", "torch_utils"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    as_edm_modules()


class Call:
    """Pickles as a call of a function, which `pickle.load` makes."""

    def __init__(self, function: Callable[..., Any], *args: object) -> None:
        self.call = function, args

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[object, ...]]:
        return self.call


def persistent(class_name: str, **state: object) -> Call:
    """An object as EDM's persistence wrapper pickles it."""
    empty = {
        "_parameters": {},
        "_buffers": {},
        "_modules": {},
        "_init_args": (),
        "_init_kwargs": {},
    }
    source = "raise SystemExit('executed')"
    meta = {"type": "class", "version": 6, "module_src": source, "class_name": class_name}
    return Call(_reconstruct_persistent_obj, EasyDict(meta, state=empty | state))


def module(weights: dict[str, torch.Tensor], class_name: str, **extra: object) -> Call:
    """Modules as the persistence wrapper pickles them, nested as the names of the weights are."""
    own = {name: w for name, w in weights.items() if "." not in name}
    buffers = {name: w for name, w in own.items() if name in BUFFERS}
    parts = {name.partition(".")[0]: None for name in weights if "." in name}
    children = {
        part: module(
            {n[len(part) + 1 :]: w for n, w in weights.items() if n.startswith(f"{part}.")}, part
        )
        for part in parts
    }
    parameters = {name: w for name, w in own.items() if name not in buffers}
    return persistent(
        class_name, _parameters=parameters, _buffers=buffers, _modules=children, **extra
    )


def storage_bytes(count: int, held: int, claimed: int | None = None, where: str = "cpu") -> bytes:
    """torch's inner file of a storage of `count` floats that holds `held` of them."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: object) -> tuple[object, ...] | None:
            return (
                ("storage", torch.FloatStorage, "7", where, count, None) if obj is MAGIC else None
            )

    buffer = io.BytesIO()
    for item in (MAGIC + 0, 1001, {"little_endian": True}):
        buffer.write(pickle.dumps(item, 2))
    Pickler(buffer, 2).dump(MAGIC)
    buffer.write(pickle.dumps(["7"], 2))
    buffer.write(struct.pack("<q", count if claimed is None else claimed) + bytes(4 * held))
    return buffer.getvalue()


def tensor(inner: bytes, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> Call:
    storage = Call(torch.storage._load_from_bytes, inner)
    return Call(_rebuild_tensor_v2, storage, offset, size, stride, False, {})


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Hostile files run here; every one of them leaves `canary` behind when executed."""
    monkeypatch.chdir(tmp_path)
    return tmp_path / "canary"


def imported() -> set[str]:
    """Modules but for text codecs, which Python itself loads."""
    return {name for name in sys.modules if not name.startswith("encodings.")}
