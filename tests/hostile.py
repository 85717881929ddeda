"""Files that would hang, fill memory, end in a traceback or write to the terminal, and a process
that reads them all: `python tests/hostile.py FOLDER` prints how each was refused, a line of JSON.

Each is small on the disk: what is large in it is a claim, a hole or packed.
"""

import bz2
import gzip
import io
import json
import os
import pickle
import resource
import socket
import struct
import sys
import tarfile
import time
import zipfile
import zlib
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor
from torch._utils import _rebuild_tensor_v2

import pickles
from conftest import small_denoiser
from fewstep.data.sources import open_source
from fewstep.interop.checkpoint import import_checkpoint
from fewstep.metrics.published import published_stats
from fewstep.params import load_params
from pickles import MAGIC, Call, persistent
from places import CONFIG

GIB = 1 << 30
HUGE = 10**400
Build = Callable[[Path], object]
CASES: dict[str, "Case"] = {}


@dataclass(frozen=True)
class Case:
    """A file that `build` makes at a path, what reads it, and the message."""

    read: Callable[[Path], object]
    name: str
    build: Build
    message: str


def case(read: Callable[[Path], object], name: str, what: str, build: Build, message: str) -> None:
    assert what not in CASES, what
    CASES[what] = Case(read, name, build, message)


def content(make: Callable[[], bytes]) -> Build:
    return lambda path: path.write_bytes(make())


def sparse(head: bytes, size: int, tail: bytes = b"") -> Build:
    """A file with a hole."""

    def build(path: Path) -> None:
        with path.open("wb") as file:
            file.write(head)
            file.truncate(size - len(tail))
            file.seek(0, os.SEEK_END)
            file.write(tail)

    return build


def unix_socket(path: Path) -> None:
    folder = os.getcwd()
    os.chdir(path.parent)  # the names of sockets are short
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(folder)


SPECIAL: dict[str, tuple[Build, str]] = {
    "a pipe": (os.mkfifo, r"need a file, got a pipe \(FIFO\) at"),
    "a socket": (unix_socket, "need a file, got a socket at"),
    "a device without end": (lambda p: p.symlink_to("/dev/zero"), "need a file, got a device"),
    "a link to a pipe": (
        lambda p: (os.mkfifo(p.with_name("pipe")), p.symlink_to("pipe")),
        r"got a pipe \(FIFO\)",
    ),
}

# --- checkpoints ---------------------------------------------------------------------------------

GOOD = dict(small_denoiser(0).state_dict())


def checkpoint(what: str, build: Build, message: str, name: str = "checkpoint.bin") -> None:
    case(import_checkpoint, name, f"checkpoint: {what}", build, message)


def torch_file(obj: object, zipped: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(obj, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def archive(pickled: bytes, **records: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, data in {"data.pkl": pickled, "byteorder": b"little", **records}.items():
            file.writestr(f"archive/{name}", data)
    return buffer.getvalue()


def nest(levels: int = 60) -> object:
    """((), ()) of ((), ()) of ...: a hundred bytes as a pickle, and 2^levels as text."""
    inner: object = ()
    for _ in range(levels):
        inner = (inner, inner)
    return inner


def dicts(levels: int = 60) -> object:
    inner: object = {}
    for _ in range(levels):
        inner = {"a": inner, "b": inner}
    return inner


def ema(network: object, **rest: object) -> Callable[[], bytes]:
    return lambda: pickle.dumps({"ema": network, **rest})


def named(class_name: object) -> Call:
    network = persistent("x")
    network.call[1][0]["class_name"] = class_name  # pyright: ignore[reportIndexIssue]
    return network


def configured(**kwargs: object) -> Callable[[], bytes]:
    usual = {"img_resolution": 8, "img_channels": 1}
    return ema(persistent("EDMPrecond", _init_kwargs=usual | kwargs))


def opcodes(*parts: bytes) -> Callable[[], bytes]:
    return lambda: b"\x80\x04" + b"".join(parts) + b"."


def text(data: bytes) -> bytes:
    return b"X" + struct.pack("<I", len(data)) + data


def bytes8(size: int) -> bytes:
    return b"\x8e" + struct.pack("<Q", size)


def loaded(inner: bytes) -> bytes:
    """A call of torch's _load_from_bytes with these bytes."""
    return b"ctorch.storage\n_load_from_bytes\n" + bytes8(len(inner)) + inner + b"\x85R"


def legacy(*parts: object) -> bytes:
    return b"".join(pickle.dumps(part, 2) for part in (MAGIC, 1001, {"little_endian": True}))


def weight(count: object, offset: object = 0, size: object = (4,), stride: object = (1,)) -> bytes:
    """data.pkl with one tensor of a storage of `count` numbers."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: object) -> object:
            return ("storage", torch.FloatStorage, "0", "cpu", count) if obj is marker else None

    marker, buffer = ["storage"], io.BytesIO()
    rebuilt = Call(_rebuild_tensor_v2, marker, offset, size, stride, False, OrderedDict())
    Pickler(buffer, 2).dump({"model.map_layer0.weight": rebuilt})
    return buffer.getvalue()


def tensor_archive(*args: object) -> Callable[[], bytes]:
    return lambda: archive(weight(*args), **{"data/0": bytes(16)})


def padded_storage(padding: bytes) -> bytes:
    """torch's inner file of four numbers, with opcodes that do nothing."""
    data, start = pickles.storage_bytes(4, 4), len(legacy()) + 2
    return data[:start] + padding + data[start:]


def old_file(count: int) -> bytes:
    return legacy() + weight(count) + pickle.dumps(["0"], 2) + struct.pack("<q", 4) + bytes(16)


def zip64(data: bytes, field: int, value: int) -> bytes:
    """A zip whose first entry has, by its zip64 field, another size (24, 20) or offset (42)."""
    at = data.index(b"PK\x01\x02")
    entry = bytearray(data[at:])
    name, extra = struct.unpack_from("<HH", entry, 28)
    entry[field : field + 4] = b"\xff\xff\xff\xff"
    more = struct.pack("<HHQ", 1, 8, value)
    struct.pack_into("<H", entry, 30, extra + len(more))
    entry[46 + name : 46 + name] = more
    end = entry.rindex(b"PK\x05\x06")
    (size,) = struct.unpack_from("<I", entry, end + 12)
    struct.pack_into("<I", entry, end + 12, size + len(more))
    return data[:at] + bytes(entry)


def header(obj: object, size: int | None = None) -> bytes:
    data = obj if isinstance(obj, bytes) else json.dumps(obj).encode()
    return struct.pack("<Q", size or len(data)) + data


def safe(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Callable[[], bytes]:
    return lambda: save(tensors, metadata)


def with_type(dtype: torch.dtype) -> dict[str, Tensor]:
    name = "model.map_layer1.weight"
    return GOOD | {name: torch.ones(GOOD[name].shape).to(dtype)}


def renamed(*prefixes: str) -> dict[str, Tensor]:
    return {p + name: w.clone() for p in prefixes for name, w in GOOD.items()}


def reshaped(name: str, *shape: int) -> dict[str, Tensor]:
    return GOOD | {name: torch.zeros(shape)}


def quantised(dtype: torch.dtype, zipped: bool = True) -> Callable[[], bytes]:
    return lambda: torch_file(with_type(dtype), zipped)


for what, (build, message) in SPECIAL.items():
    checkpoint(what, build, message)
checkpoint("an empty folder", Path.mkdir, "need model.safetensors or pytorch_model.bin")
checkpoint("a link to itself", lambda p: p.symlink_to(p.name), "symbolic links")
checkpoint(
    "a folder with a pipe",
    lambda p: (p.mkdir(), os.mkfifo(p / "model.safetensors")),
    "need model.safetensors or pytorch_model.bin",
)
checkpoint(
    "a shard alone",
    content(safe(GOOD)),
    r"shard 1 of 2: name the folder",
    "model-00001-of-00002.safetensors",
)
checkpoint(
    "a shard is missing",
    lambda p: (p.mkdir(), (p / "model-00002-of-00002.safetensors").write_bytes(save(GOOD))),
    "need all shards .* got no model-00001-of-00002.safetensors",
)

NEST, BOMB = nest(), 12_000_000
checkpoint("class name unfolds", content(ema(named(NEST))), "class EDMPrecond, .*got an object of")
checkpoint(
    "class name unfolds, alone",
    content(lambda: pickle.dumps(named(NEST))),
    "one object of class an object of type tuple",
)
checkpoint("loss unfolds", content(configured(x=1, y=NEST)), "need int")
checkpoint("config unfolds", content(configured(channel_mult=[NEST])), "got tuple")
checkpoint("config of 1000 values", content(configured(m=[1] * 1000)), "at most 64 values")
checkpoint(
    "config of 1000 keys",
    content(configured(**{f"k{i}": i for i in range(1000)})),
    "at most 64 arguments",
)
checkpoint("config with a long text", content(configured(t="x" * 10**6)), "at most 1,000 charac")
checkpoint("config with 10^400", content(configured(sigma_max=HUGE)), "small integers")
checkpoint("resolution 10^400", content(configured(img_resolution=HUGE)), "small integers")
checkpoint("model type unfolds", content(configured(model_type=NEST)), "need int or float or str")
checkpoint("escapes in a class", content(ema(named("\x1b]0;x\x07"))), r"got '\\x1b\]0;x\\x07'")
checkpoint("escapes in a name", content(opcodes(b"cos\n\x1b[2J\n")), r"names 'os\.\\x1b\[2J'")
checkpoint("a name of 60,000 bytes", content(opcodes(b"c" + b"a" * 60_000 + b"\nb\n")), "names 'a")
checkpoint("a name without end", content(opcodes(b"c" + b"a" * BOMB)), "bytes of a line")
checkpoint(
    "STACK_GLOBAL of long names",
    content(
        opcodes(
            text(b"torch.nn.modules." + b"a" * 4_000_000),
            b"q\x00" + text(b"A") + b"q\x01\x930" + b"h\x00h\x01\x930" * 100_000,
        )
    ),
    "longer than a name is",
)
for op, what in ((b"}", "dicts"), (b"\x8f", "sets"), (b"N\x94", "memo"), (b"(t", "tuples")):
    checkpoint(f"12 MB of {what}", content(opcodes(op * (BOMB // len(op)))), "at most 600,000 op")
checkpoint("12 MB in a zip", content(lambda: archive(opcodes(b"]" * BOMB)())), "600,000 opcodes")
checkpoint(
    "12 MB of integers", content(opcodes((b"\x8a\xff" + b"\x7f" * 255) * 46_000)), "need dict"
)
checkpoint("17 MB of text", content(opcodes(text(b"x" * 17 * 2**20))), "16,777,216 bytes of text")
checkpoint("18 MB of short texts", content(opcodes(text(b"x" * 200) * 90_000)), "bytes of text")
checkpoint(
    "opcodes inside a tensor",
    content(opcodes(loaded(legacy() + b"\x80\x02" + b"}" * 6_000_000 + b"."))),
    "600,000 opcodes",
)
checkpoint(
    "opcodes inside 30 tensors",
    content(opcodes(*[loaded(padded_storage(b"N" * 50_000))] * 30)),
    "600,000 opcodes",
)
checkpoint(
    "a list copied 9000 times",
    content(
        lambda: pickle.dumps([shared := [0] * 1000, *(Call(deque, shared) for _ in range(9000))])
    ),
    "opcodes and copied objects",
)
checkpoint("hole of 8 GB as bytes", sparse(b"\x80\x04" + bytes8(8 * GIB - 99), 8 * GIB), "opcode")
checkpoint(
    "hole of 8 GB as text",
    sparse(b"\x80\x04\x8d" + struct.pack("<Q", 8 * GIB - 99), 8 * GIB),
    "text",
)
checkpoint("hole of 100 GB", sparse(b"\x80\x04", 100 * GIB), "need an opcode at byte 2")
checkpoint("hole of 100 GB alone", sparse(b"", 100 * GIB), "need an EDM pickle, a file of")
checkpoint("hole of 8 GB as a name", sparse(b"\x80\x04c", 8 * GIB), "bytes of a line")
checkpoint("integer of 2 GB", content(opcodes(b"\x8b\xff\xff\xff\x7f")), "bytes of text")
checkpoint("integer of 9000 digits", content(opcodes(b"I" + b"9" * 9000 + b"\n")), "limit")
checkpoint("memo at 10^400", content(opcodes(b"Np" + b"9" * 400 + b"\n")), "a large number")
checkpoint("no pickle inside", content(opcodes(b"\xff")), "need an opcode at byte 2")

for name, count in {"10^400": HUGE, "-10^400": -HUGE, "2^62": 1 << 62}.items():
    build = content(tensor_archive(count))
    checkpoint(f"storage of {name}", build, r"claims -?10\^(400|18) numbers")
    checkpoint(f"old storage of {name}", content(lambda c=count: old_file(c)), "claims .* numbers")
checkpoint("offset 10^400", content(tensor_archive(4, HUGE)), "more numbers than its storage")
checkpoint("size 10^400", content(tensor_archive(4, 0, (HUGE,))), "more numbers than its storage")
checkpoint("stride 10^400", content(tensor_archive(4, 0, (2,), (HUGE,))), "more numbers than its")
TORCH = torch_file(GOOD)
for field, name in ((42, "offset"), (24, "size"), (20, "packed size")):
    for value in (1 << 63, (1 << 64) - 1):
        checkpoint(
            f"zip64 {name} {value}",
            content(lambda f=field, v=value: zip64(TORCH, f, v)),
            "refused .*checkpoint.bin",
        )
checkpoint("data.pkl of 20 MB", content(lambda: archive(bytes(20 << 20))), "bytes of 'archive/data")
checkpoint(
    "dicts that unfold",
    content(lambda: torch_file({"state_dict": dicts()})),
    "a dict of named tensors|names of tensors",
)
checkpoint(
    "members with escapes", content(lambda: archive(b"N.", **{"\x1b[2J": b""})), r"\\x1b\[2J"
)
checkpoint(
    "hole of 8 GB as a zip's directory",
    sparse(
        b"PK\x03\x04", 8 * GIB, struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 9, 9, 1 << 31, 9, 0)
    ),
    "refused",
)

for dtype in (torch.int8, torch.uint8, torch.int64, torch.bool, torch.complex64):
    kind = str(dtype).removeprefix("torch.")
    checkpoint(f"{kind} in a zip", content(quantised(dtype)), f"weights of float32.* got {kind}")
    checkpoint(f"{kind}, old", content(quantised(dtype, False)), f"got {kind} at 'model.map_layer1")
for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
    kind = str(dtype).removeprefix("torch.")
    checkpoint(f"{kind} in a zip", content(quantised(dtype)), f"weights of float32.* got {kind}")
for dtype, kind in ((torch.int8, "I8"), (torch.bool, "BOOL"), (torch.float8_e4m3fn, "F8_E4M3")):
    checkpoint(f"{kind} in safetensors", content(safe(with_type(dtype))), f"got {kind} at 'model")
checkpoint(
    "int8 in an EDM pickle", content(lambda: pickles_of(torch.int8)), "got int8 at 'model.map"
)

F32 = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
checkpoint("header of 96 MB", sparse(header(b"{", 96 << 20), 97 << 20), "8,388,608 bytes of header")
checkpoint("header of 2^63", sparse(header(b"{", 1 << 63), 1 << 20), "need a safetensors file")
checkpoint(
    "metadata of 9 MB",
    content(safe(GOOD, {"fewstep": '"' + "x" * (9 << 20) + '"'})),
    "8,388,608 bytes of header",
)
checkpoint(
    "metadata of 2 million lists",
    content(safe(GOOD, {"fewstep": "[" + "[]," * (1 << 21) + "0]"})),
    "lists and objects in its metadata",
)
checkpoint("metadata nested", content(safe(GOOD, {"fewstep": "[" * 10**5})), "nested too deeply")
checkpoint("metadata of 9000 digits", content(safe(GOOD, {"fewstep": "9" * 9000})), "limit")
checkpoint(
    "hole of 8 GB as a tensor",
    sparse(
        header(
            {"model.map_layer0.weight": F32 | {"shape": [1 << 31], "data_offsets": [0, 1 << 33]}}
        ),
        (1 << 33) + 8 + 93,
    ),
    "need a safetensors file|need an ADM or DDPM",
)
checkpoint(
    "escapes in tensors' names",
    content(lambda: header({"\x1b[2Jx": F32}) + bytes(16)),
    r"got tensors \\x1b\[2Jx",
)
checkpoint(
    "escapes in an unknown type",
    content(lambda: header({"a": F32 | {"dtype": "\x1b[2J"}}) + bytes(16)),
    "need a safetensors file",
)

PYRAMID = {"weight": torch.zeros(1), "resample_filter": torch.zeros(1, 1, 4, 4)}
checkpoint(
    "NCSN++",
    content(safe(GOOD | {"model.map_noise.freqs": torch.zeros(16)})),
    r"together, as NCSN\+\+ .* got embedding_type fourier in a DhariwalUNet",
)
checkpoint(
    "NCSN++ by its residuals",
    content(safe(GOOD | {f"model.enc.4x4_aux_residual.{name}": w for name, w in PYRAMID.items()})),
    r"got encoder_type residual, resample_filter of 4x4 without embedding_type fourier in a Dhari",
)
checkpoint(
    "filters of four taps",
    content(safe(GOOD | {"model.enc.4x4_down.conv0.resample_filter": torch.zeros(1, 1, 4, 4)})),
    r"got resample_filter of 4x4 without embedding_type fourier, encoder_type residual",
)
checkpoint(
    "filters of six taps",
    content(safe(GOOD | {"model.enc.4x4_down.conv0.resample_filter": torch.zeros(1, 1, 6, 6)})),
    r"filters of 1x1x2x2, or 1x1x4x4 in NCSN\+\+, got \(1, 1, 6, 6\)",
)
checkpoint(
    "a filter of many channels",
    content(safe(GOOD | {"model.enc.4x4_down.conv0.resample_filter": torch.zeros(9, 1, 2, 2)})),
    r"filters of 1x1x2x2, .*got \(9, 1, 2, 2\)",
)
checkpoint(
    "a skip encoder",
    content(safe(GOOD | {"model.enc.4x4_aux_skip.weight": torch.zeros(1)})),
    r"need encoder_type standard or residual, got skip, .* it has model.enc.4x4_aux_skip",
)
checkpoint(
    "a skip decoder",
    content(safe(GOOD | {"model.dec.8x8_aux_up.resample_filter": torch.zeros(1, 1, 4, 4)})),
    r"need decoder_type standard, got skip, .* it has model.dec.8x8_aux_up",
)
checkpoint(
    "channel_mult_emb 8",
    content(safe(reshaped("model.map_layer0.weight", 256, 32))),
    r"need a network with channel_mult_emb 4, got 8",
)
checkpoint(
    "two networks", content(safe(renamed("a.", "b."))), r"got 2 \(a\., b\.\): name one .*--network"
)
checkpoint(
    "two averages",
    content(safe(renamed("ema_1.", "ema_2."))),
    r"got 2 \(ema_1\., ema_2\.\): name one",
)
checkpoint("wrapped twice", content(safe(renamed("", "module."))), "each tensor once")
for name, message in {
    "input_blocks.0.0.weight": "OpenAI",
    "time_embedding.linear_1.weight": "diffusers",
    "x_embedder.proj.weight": "DiT",
    "all_modules.0.W": "score_sde",
    "Conv2d_1a_3x3.conv.weight": "Inception",
}.items():
    checkpoint(f"a network of {message}", content(safe({name: torch.zeros(1)})), message)
STATE = {"net": persistent("EDMPrecond", a=np.float64(1)), "optimizer_state": {"state": {0: 1}}}
checkpoint("training state", content(lambda: torch_file(STATE)), "training state; import the aver")
checkpoint(
    "training state with a class of its own",
    content(lambda: torch_file(STATE | {"phema": Call(os.getcwd)})),
    "training state; import the averaged",
)


def pickles_of(dtype: torch.dtype) -> bytes:
    inner = persistent(
        "DhariwalUNet", _parameters={"map_layer0.weight": torch.ones(4, 4).to(dtype)}
    )
    kwargs = {"img_resolution": 8, "img_channels": 1}
    return pickle.dumps(
        {"ema": persistent("EDMPrecond", _modules={"model": inner}, _init_kwargs=kwargs)}
    )


# --- data.source ---------------------------------------------------------------------------------


def read_source(path: Path) -> None:
    source = open_source(path, 8, 1, 3)
    for index in range(len(source)):
        source[index]


def source(what: str, name: str, build: Build, message: str) -> None:
    case(read_source, name, f"source: {what}", build, message)


def npy(shape: str, descr: str = "'|u1'", version: int = 1, length: int | None = None) -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode() + b"\n"
    size = struct.pack("<H" if version == 1 else "<I", len(text) if length is None else length)
    return b"\x93NUMPY" + bytes([version, 0]) + size + text


def zipped(members: dict[str, bytes]) -> Callable[[], bytes]:
    def make() -> bytes:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as file:
            for name, data in members.items():
                file.writestr(name, data)
        return buffer.getvalue()

    return make


def packed(name: str, head: bytes, mebibytes: int, rest: dict[str, bytes]) -> Callable[[], bytes]:
    """A zip with a member that unpacks to the head and that many MiB of blanks."""

    def make() -> bytes:
        pack = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
        start = pack.compress(head) + pack.flush(zlib.Z_FULL_FLUSH)
        block = pack.compress(b" " * (1 << 20)) + pack.flush(zlib.Z_FULL_FLUSH)
        data, size = start + block * mebibytes + pack.flush(), len(head) + (mebibytes << 20)
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as file:
            file.writestr(name, data)
            for other, plain in rest.items():
                file.writestr(other, plain)
            info = file.getinfo(name)
            info.compress_type, info.file_size = zipfile.ZIP_DEFLATED, size
        made = bytearray(buffer.getvalue())
        struct.pack_into("<H", made, 8, zipfile.ZIP_DEFLATED)
        return bytes(made)

    return make


LABELS = {"labels.npy": npy("(3,)", "'<i8'") + bytes(24)}
PNG = {f"{i}/a.png": b"\x89PNG" for i in range(3)}
for what, (build, message) in SPECIAL.items():
    for name in ("x.npz", "x.zip", "x.parquet", "x.tar.gz", "train_data_batch_1.npz"):
        source(f"{what}, {name}", name, build, message)
for shape in ("(3, 1, 1000000, 1000000)", f"(3, {HUGE})", "(-3, 1, 8, 8)", "(3, 1, 8, 8)"):
    source(
        f"npz of {shape[:24]}",
        "x.npz",
        content(zipped(LABELS | {"images.npy": npy(shape)})),
        "'images' claims .* 0 are there",
    )
source(
    "npz, packed",
    "x.npz",
    content(packed("images.npy", npy("(3, 1, 8, 8)"), 3000, LABELS)),
    "more than 200 times",
)
source(
    "npz, long header",
    "x.npz",
    content(packed("images.npy", npy("(3,)", version=2, length=1 << 31), 3000, LABELS)),
    "more than 200 times|bytes of an array's header",
)
source(
    "npz, header of 60 MB",
    "x.npz",
    content(packed("images.npy", npy("(3,)", version=2, length=60 << 20), 60, LABELS)),
    "bytes of an array's header",
)
source(
    "npz, header that is no dict",
    "x.npz",
    content(zipped({"images.npy": npy("(" * 900)})),
    "need an intact .npz",
)
source(
    "npz, objects",
    "x.npz",
    content(zipped(LABELS | {"images.npy": npy("(3,)", "'|O'")})),
    "Python objects",
)
source(
    "npz, items of 1 GB",
    "x.npz",
    content(zipped(LABELS | {"images.npy": npy("(3,)", "'|V1000000000'")})),
    "claims 3e[+]09",
)
source("npz, escapes", "x.npz", content(zipped({"\x1b[2J.npy": npy("(0,)")})), r"\\x1b\[2J")
for field, name in ((42, "offset"), (24, "size"), (20, "packed size")):
    for value in (1 << 63, (1 << 64) - 1):
        data = zipped(PNG | {"dataset.json": b"{}"})
        source(
            f"zip64 {name} {value}",
            "x.zip",
            content(lambda f=field, v=value, d=data: zip64(d(), f, v)),
            "need an intact zip|need readable",
        )
        source(
            f"npz, zip64 {name} {value}",
            "x.npz",
            content(lambda f=field, v=value: zip64(zipped(LABELS)(), f, v)),
            "need an intact .npz|need the array",
        )
source(
    "zip with dataset.json of 3 GB",
    "x.zip",
    content(packed("dataset.json", b'{"labels": null}', 3000, PNG)),
    "bytes of dataset.json for 3 images",
)
for what, listing in {
    "nested": "[" * 10**5,
    "of lists": '{"labels": [' + "[]," * 300_000 + "[]]}",
    "label 10^400": json.dumps({"labels": [[name, HUGE] for name in PNG]}),
    "label infinite": '{"labels": [["0/a.png", 1e999]]}',
    "label NaN": '{"labels": [["0/a.png", NaN]]}',
    "label of 9000 digits": '{"labels": [["0/a.png", ' + "9" * 9000 + "]]}",
    "escapes": json.dumps({"labels": [["\x1b[2J.png", 0], *([name, 0] for name in PNG)]}),
}.items():
    for name in ("x.zip", "x"):
        source(
            f"dataset.json {what}, {name}",
            name,
            content(zipped(PNG | {"dataset.json": listing.encode()}))
            if name == "x.zip"
            else lambda p, text=listing: (
                [(p / n).parent.mkdir(parents=True) for n in PNG],
                [(p / n).write_bytes(d) for n, d in PNG.items()],
                (p / "dataset.json").write_text(text),
            ),
            "dataset.json|need labels in|need a file and a label",
        )
source("zip with escapes", "x.zip", content(zipped({"\x1b[2Ja.png": b"", **PNG})), r"\\x1b\[2Ja")
source("zip with lzma", "x.zip", content(lambda: bz2.compress(b"x")), "need an intact zip")


def tar(*blocks: bytes, mebibytes: int = 0) -> Callable[[], bytes]:
    """A .tar.gz of blocks, followed by that many MiB of zeros, packed by repetition."""

    def make() -> bytes:
        if not mebibytes:
            return gzip.compress(b"".join(blocks) + bytes(1024))
        pack = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
        start = pack.compress(b"".join(blocks)) + pack.flush(zlib.Z_FULL_FLUSH)
        block = pack.compress(bytes(1 << 20)) + pack.flush(zlib.Z_FULL_FLUSH)
        head = b"\x1f\x8b\x08" + bytes(7)
        return head + start + block * mebibytes + pack.flush() + bytes(8)

    return make


def tar_header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def pax(text: bytes) -> list[bytes]:
    padded = text.ljust(-(-len(text) // 512) * 512, b"\0")
    return [tar_header("x", len(text), tarfile.XHDTYPE), padded, tar_header("data_batch_1.bin", 0)]


for what, kind in (
    ("name", tarfile.GNUTYPE_LONGNAME),
    ("link", tarfile.GNUTYPE_LONGLINK),
    ("pax header", tarfile.XHDTYPE),
    ("global header", tarfile.XGLTYPE),
):
    source(
        f"tar with a {what} of 3 GB",
        "x.tar.gz",
        content(tar(tar_header("x", 3 * GIB, kind), mebibytes=3100)),
        "at most 1,048,576 bytes of an unpacked .tar.gz at once",
    )
source(
    "tar with a member of 8 GB",
    "x.tar.gz",
    content(tar(tar_header("x", 8 * GIB), mebibytes=3000)),
    "at most 268,435,456 bytes of an unpacked",
)
source(
    "tar that claims", "x.tar.gz", content(tar(tar_header("data_batch_1.bin", 8 * GIB))), "need "
)
source(
    "tar with a size of 400 digits",
    "x.tar.gz",
    content(tar(*pax(b"410 size=" + b"9" * 400 + b"\n"))),
    "need ",
)
source(
    "tar with a name of 400 digits",
    "x.tar.gz",
    content(tar(tar_header("data_batch_" + "9" * 60 + ".bin", 0))),
    "need the data_batch",
)
source("gz of a pipe's noise", "x.tar.gz", content(lambda: gzip.compress(b"x" * 5000)), "need ")


def lmdb_file(**entries: bytes) -> Build:
    def build(path: Path) -> None:
        whole = {"images_shape": b"2 1 8 8", "labels_shape": b"2"}
        for i in range(2):
            whole |= {f"images_{i}_data": bytes(64), f"labels_{i}_data": bytes(8)}
        with lmdb.open(str(path), subdir=False, lock=False, map_size=64 << 20) as env:
            with env.begin(write=True) as txn:
                for name, value in (whole | entries).items():
                    txn.put(name.encode(), value)

    return build


ABOUT = {"images": 2, "shape": [1, 8, 8], "classes": 3, "content_sha256": "0"}
for what, about in {
    "nested": "[" * 10**5,
    "nested objects": '{"images":' * 10**5,
    "nested shape": json.dumps(ABOUT).replace("[1, 8, 8]", "[" * 900 + "]" * 900),
    "of other images": json.dumps(ABOUT | {"images": HUGE}),
    "of 10^400 classes": json.dumps(ABOUT | {"classes": HUGE}),
    "with text for classes": json.dumps(ABOUT | {"classes": "\x1b[2J"}),
    "of 9 MB": " " * (9 << 20),
}.items():
    source(f"lmdb metadata {what}", "x.lmdb", lmdb_file(fewstep_metadata=about.encode()), "need ")
for shape in ("2 1 1000000 1000000", f"2 1 8 {HUGE}", f"{10**18} 1 8 8", "2 1 8 " + "9" * 9000):
    source(
        f"lmdb of {shape[:20]}, {len(shape)}",
        "x.lmdb",
        lmdb_file(images_shape=shape.encode(), labels_shape=shape.split()[0].encode()),
        "need ",
    )
source("lmdb with escapes", "x.lmdb", lmdb_file(images_shape=b"\x1b[2J"), r"\\x1b\[2J")

# --- statistics and params -----------------------------------------------------------------------


def stats(what: str, build: Build, message: str) -> None:
    case(lambda path: published_stats(path, 4), "ref.npz", f"statistics: {what}", build, message)


MU = {"mu.npy": npy("(4,)", "'<f8'") + bytes(32)}
for what, (build, message) in SPECIAL.items():
    stats(what, build, message)
stats(
    "of petabytes",
    content(zipped(MU | {"sigma.npy": npy("(9999999, 99999999)", "'<f8'")})),
    "claims 8e[+]15",
)
stats(
    "packed", content(packed("sigma.npy", npy("(4, 4)", "'<f8'"), 3000, MU)), "more than 200 times"
)
stats("hole of 8 GB", sparse(b"PK\x03\x04", 8 * GIB), "need an .npz file")


def params(what: str, build: Build, message: str) -> None:
    case(load_params, "params.yaml", f"params: {what}", build, message)


def tiny(old: str, new: str) -> Build:
    text = (CONFIG / "tiny.yaml").read_text()
    assert old in text
    return lambda path: path.write_text(text.replace(old, new, 1))


ALIASES = "a0: &a0 [1, 1]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
for what, (build, message) in SPECIAL.items():
    params(what, build, message)
params("nested 20,000 deep", content(lambda: b"[" * 20_000 + b"]" * 20_000), "nested too deeply")
params("nested mappings", content(lambda: b"{a: " * 20_000), "nested too deeply")
params("nested blocks", content(lambda: b"- " * 20_000), "nested too deeply")
params("nested inside", tiny("seed: 0", "seed: " + "[" * 20_000 + "]" * 20_000), "nested too deep")
params("aliases that unfold", content(ALIASES.encode), "values with aliases written out")
params("of 10 MB", content(lambda: b"a: 1\n" * 2_000_000), "at most 262,144 bytes of params")
params("hole of 8 GB", sparse(b"", 8 * GIB), "at most 262,144 bytes of params")
params("escapes in a key", tiny("seed: 0", '"\\e[2J": 0\nseed: 0'), r"unknown key '\\x1b\[2J'")
params("escapes in a value", tiny("device: cpu", 'device: "\\e[2J"'), r"got '\\x1b\[2J'")
params("integer of 9000 digits", tiny("seed: 0", "seed: " + "9" * 9000), "seed|valid YAML")


# --- the process that reads them -----------------------------------------------------------------


def peak() -> int:
    """The largest memory of this process since `reset`, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


def reset() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def outcome(what: str, folder: Path) -> dict[str, Any]:
    """How the file was refused."""
    folder.mkdir()
    path = folder / CASES[what].name
    CASES[what].build(path)
    before, started = reset(), time.monotonic()
    try:
        CASES[what].read(path)
        kind, message = "taken", ""
    except Exception as error:
        kind, message = type(error).__name__, str(error)
    seconds = time.monotonic() - started
    return {
        "case": what,
        "kind": kind,
        "message": message,
        "seconds": seconds,
        "memory": peak() - before,
    }


def main(root: Path) -> None:
    root.mkdir(exist_ok=True)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    # what is mapped and not read costs nothing, and 100 GB of it may be
    limit = pages * resource.getpagesize() + 130 * GIB
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CPU, (120, 120))
    for number, what in enumerate(CASES):
        print(json.dumps(outcome(what, root / str(number))), flush=True)


if __name__ == "__main__":
    pickles.as_edm_modules()
    main(Path(sys.argv[1]))
