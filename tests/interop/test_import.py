"""`import_checkpoint`: every known kind of file gives one network; hostile files are refused."""

import builtins
import functools
import io
import json
import os
import pickle
import struct
import subprocess
import time
import zipfile
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file
from torch import Tensor, nn
from torch._utils import _rebuild_tensor_v2

import parity
from conftest import CLASSES, small_denoiser
from fewstep.interop.architecture import architecture
from fewstep.interop.checkpoint import import_checkpoint
from fewstep.networks.denoiser import one_hot
from fewstep.networks.weights import load_weights
from pickles import MAGIC, Call, imported, persistent, storage_bytes, tensor
from places import VECTORS

GOOD = dict(small_denoiser(0).state_dict())
HUNDRED_GB = 10**11

pytestmark = pytest.mark.usefixtures("edm_modules")


def torch_file(content: object, zipped: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def as_edm(module: nn.Module, **extra: object) -> Call:
    """A module of ours as EDM's persistence wrapper pickles its own."""
    children = {name: as_edm(child) for name, child in module.named_children()}
    tensors = {"_parameters": dict(module._parameters), "_buffers": dict(module._buffers)}
    return persistent(type(module).__name__, **tensors, _modules=children, **extra)


def edm_network() -> Call:
    denoiser = small_denoiser(0)
    kwargs = {"img_resolution": 8, "img_channels": 1, "label_dim": CLASSES, "sigma_data": 0.5}
    return persistent("EDMPrecond", _modules={"model": as_edm(denoiser.model)}, _init_kwargs=kwargs)


def snapshot(**extra: object) -> bytes:
    """What EpiGenomics' fork saves: the loss holds the teacher, with tensors of a GPU."""
    there = tensor(storage_bytes(6, 6, where="cuda:0"), 0, (2, 3), (3, 1))
    teacher = persistent("EDMPrecond", _parameters={"weight": there})
    seen = {"edges": Counter(a=3), "last": deque([1, 2], 9), "sums": defaultdict(float, a=1.0)}
    loss = persistent("MultistepConsistency", net=teacher, device=torch.device("cuda:0"), **seen)
    content = {"ema": edm_network(), "loss_fn": loss, "augment_pipe": None, "dataset_kwargs": {}}
    return pickle.dumps(content | extra)


def prefixed(prefix: str) -> dict[str, Tensor]:
    return {prefix + name: weight.clone() for name, weight in GOOD.items()}


AUGMENT = {"model.map_augment.weight": torch.zeros(32, 9)}
CLASSIFIER = {"cls_pred_branch.0.weight": torch.zeros(4), "karras_sigmas": torch.zeros(1000)}
FILES: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "torch archive": ("pytorch_model.bin", lambda: torch_file(GOOD), "torch archive"),
    "state dict with metadata": (
        "pytorch_model.bin",
        lambda: torch_file(small_denoiser(0).state_dict()),
        "torch archive",
    ),
    "parameters": (
        "pytorch_model.bin",
        lambda: torch_file({name: nn.Parameter(weight) for name, weight in GOOD.items()}),
        "torch archive",
    ),
    "old torch file": ("x.pth", lambda: torch_file(GOOD, zipped=False), "torch file before 1.6"),
    "safetensors": ("model.safetensors", lambda: save(GOOD), "safetensors"),
    "a name that lies": ("model.pkl", lambda: save(GOOD), "safetensors"),
    "map_augment": ("pytorch_model.bin", lambda: torch_file(GOOD | AUGMENT), "torch archive"),
    "ddp": ("model.safetensors", lambda: save(prefixed("module.")), "safetensors"),
    "with a classifier": (
        "pytorch_model.bin",
        lambda: torch_file(prefixed("feedforward_model.") | CLASSIFIER),
        "torch archive",
    ),
    "EDM teacher": ("teacher.pkl", lambda: pickle.dumps({"ema": edm_network()}), "EDM pickle"),
    "snapshot": ("network-snapshot-000100.pkl", snapshot, "EDM pickle"),
}


@pytest.mark.parametrize("kind", FILES)
def test_every_kind_of_file_gives_the_same_network(tmp_path: Path, kind: str) -> None:
    name, content, form = FILES[kind]
    (tmp_path / name).write_bytes(content())
    weights, about = import_checkpoint(tmp_path / name)
    assert weights.keys() == GOOD.keys()
    assert all(torch.equal(weights[name], GOOD[name]) for name in GOOD)
    assert (about["format"], about["source"], about["tensors"]) == (form, name, len(GOOD))
    assert about["parameters"] == sum(p.numel() for p in small_denoiser(0).parameters())
    network = architecture(GOOD)
    assert about.items() >= network.items()
    assert network == {
        "model_type": "DhariwalUNet",
        "model_channels": 32,
        "channel_mult": [1],
        "num_blocks": 1,
        "attn_resolutions": [],
        "img_resolution": 8,
        "img_channels": 1,
        "label_dim": CLASSES,
    }
    json.dumps(about, allow_nan=False)


@pytest.mark.parametrize("zipped", [True, False])
def test_types_and_views_survive_torch_files(tmp_path: Path, zipped: bool) -> None:
    weights = {name: weight.clone() for name, weight in GOOD.items()}
    both = torch.stack([weights["model.map_layer0.bias"], weights["model.map_layer1.bias"]], 1)
    weights["model.map_layer0.bias"], weights["model.map_layer1.bias"] = both[:, 0], both[:, 1]
    weights["model.out_conv.weight"] = weights["model.out_conv.weight"].to(torch.bfloat16)
    weights["model.map_layer1.weight"] = weights["model.map_layer1.weight"].T.contiguous().T
    (tmp_path / "x.bin").write_bytes(torch_file(weights, zipped))
    imports, _ = import_checkpoint(tmp_path / "x.bin")
    assert all(torch.equal(imports[name], weights[name]) for name in weights)
    assert imports["model.out_conv.weight"].dtype == torch.bfloat16


def test_imported_weights_answer_as_the_recorded_network(tmp_path: Path) -> None:
    (tmp_path / "teacher.pkl").write_bytes(parity.structure_pickle(VECTORS))
    weights, about = import_checkpoint(tmp_path / "teacher.pkl")
    torch.save(weights, tmp_path / "pytorch_model.bin")
    again, read_off = import_checkpoint(tmp_path / "pytorch_model.bin")
    v = parity.Vectors(VECTORS, "network_adm.npz")
    assert read_off.items() >= {k: about[k] for k in architecture(weights)}.items()
    for state in (weights, again):
        checks = list(parity.forwards(v, parity.network(v.config(), state)))
        assert checks and all(check.relative < 1e-4 for check in checks)


def test_what_a_snapshot_says_of_its_training_is_kept(tmp_path: Path) -> None:
    (tmp_path / "network-snapshot-000100.pkl").write_bytes(snapshot(nimg=100_000))
    _, about = import_checkpoint(tmp_path / "network-snapshot-000100.pkl")
    assert (about["nimg"], about["loss"]) == (100_000, "MultistepConsistency")
    assert about["sigma_data"] == 0.5


def test_an_accelerate_folder_gives_its_generator_and_says_what_it_leaves(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint_model_000100"
    folder.mkdir()
    guidance = prefixed("real_unet.") | prefixed("fake_unet.") | CLASSIFIER
    save_file(guidance, folder / "model_1.safetensors")
    (folder / "random_states_0.pkl").write_bytes(pickle.dumps(Call(os.system, "touch canary")))
    save_file(GOOD, folder / "model.safetensors")
    weights, about = import_checkpoint(folder)
    assert all(torch.equal(weights[name], GOOD[name]) for name in GOOD)
    assert about["left_out"] == ["model_1.safetensors", "random_states_0.pkl"]
    assert about["source"] == folder.name
    (folder / "model.safetensors").unlink()
    with pytest.raises(
        ValueError, match=r"need model.safetensors or pytorch_model.bin in .*model_1"
    ):
        import_checkpoint(folder)
    (folder / "pytorch_model.bin").write_bytes(torch_file(GOOD))
    assert import_checkpoint(folder)[1]["format"] == "torch archive"


def test_a_missing_file_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        import_checkpoint(tmp_path / "nowhere.pkl")


# --- hostile files -----------------------------------------------------------------------------


def archive(
    pickled: bytes, records: dict[str, bytes] | None = None, root: str = "archive"
) -> bytes:
    """A zip as torch writes it, with this data.pkl."""
    members = {"data.pkl": pickled, "byteorder": b"little", "version": b"3\n", **(records or {})}
    return zipped({f"{root}/{name}": data for name, data in members.items()})


def zipped(members: dict[str, bytes], **changes: Any) -> bytes:  # noqa: ANN401
    """A zip of these members; `changes` are set on the ZipInfo of the last one."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, data in members.items():
            info = zipfile.ZipInfo(name)
            if name == list(members)[-1]:
                for key, value in changes.items():
                    setattr(info, key, value)
            file.writestr(info, data)
    return buffer.getvalue()


def with_member(name: str, data: bytes = b"x", **changes: Any) -> bytes:  # noqa: ANN401
    """A good archive with one more member."""
    with zipfile.ZipFile(io.BytesIO(torch_file(GOOD))) as file:
        members = {info.filename: file.read(info) for info in file.infolist()}
    return zipped({**members, name: data}, **changes)


def twice(name: str) -> bytes:
    data = with_member("archive/" + "x" * len(name))
    return data.replace(b"archive/" + b"x" * len(name), b"archive/" + name.encode())


def weight(pid: object, *rest: object) -> bytes:
    """An archive with one tensor: of the storage that `pid` names, rebuilt from `rest`."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: object) -> object:
            return pid if obj is marker else None

    marker, buffer = ["storage"], io.BytesIO()
    rebuilt = Call(_rebuild_tensor_v2, marker, *rest)
    Pickler(buffer, 2).dump({"model.map_layer0.weight": rebuilt})
    return archive(buffer.getvalue(), {"data/0": bytes(16)})


def storage(
    count: object, key: object = "0", kind: object = torch.FloatStorage
) -> tuple[object, ...]:
    return ("storage", kind, key, "cpu", count)


def of_storage(offset: object, size: object, stride: object) -> bytes:
    return weight(storage(4), offset, size, stride, False, OrderedDict())


def patched(data: bytes, old: bytes, new: bytes) -> bytes:
    assert data.count(old) >= 1
    return data.replace(old, new)


def central(data: bytes, offset: int, new: bytes) -> bytes:
    """Overwrite a field of the first entry of a zip's central directory."""
    at = data.index(b"PK\x01\x02") + offset
    return data[:at] + new + data[at + len(new) :]


def header(metadata: object, tail: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with this JSON as its header."""
    text = metadata if isinstance(metadata, bytes) else json.dumps(metadata).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + tail


def f32(start: int, end: int, *shape: int) -> dict[str, object]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}


def legacy(*parts: object, tail: bytes = b"") -> bytes:
    return b"".join(pickle.dumps(part, 2) for part in parts) + tail


def opcodes(*parts: bytes) -> bytes:
    return archive(b"\x80\x02" + b"".join(parts) + b".")


SYSTEM = Call(os.system, "touch canary")
LOOP: dict[str, object] = {}
LOOP["model.map_layer0.weight"] = LOOP
SHARED = torch.zeros(5000)
TORCH = torch_file(GOOD)
OLD = torch_file(GOOD, zipped=False)
SAFE = save(GOOD)
BIG = {f"model.{i}": SHARED for i in range(200)}

HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    # calls, in each format
    "zip: os.system": (lambda: torch_file(SYSTEM), r"names 'posix\.system'"),
    "zip: as a weight": (
        lambda: torch_file({"model.map_layer0.weight": SYSTEM}),
        r"names 'posix\.system'",
    ),
    "zip: protocol 0": (lambda: archive(pickle.dumps(SYSTEM, 0)), r"names 'posix\.system'"),
    "zip: protocol 5": (lambda: archive(pickle.dumps(SYSTEM, 5)), r"names 'posix\.system'"),
    "old: os.system": (lambda: torch_file(SYSTEM, zipped=False), r"names 'posix\.system'"),
    "old: as the magic": (lambda: legacy(SYSTEM), r"names 'posix\.system'"),
    "old: as the system": (lambda: legacy(MAGIC, 1001, SYSTEM), r"names 'posix\.system'"),
    "old: as a key": (
        lambda: legacy(MAGIC, 1001, {"little_endian": True}, {}, [SYSTEM]),
        r"names 'posix\.system'",
    ),
    "pickle: os.system": (lambda: pickle.dumps(SYSTEM), r"names 'posix\.system'"),
    "pickle: in the loss": (lambda: snapshot(loss_fn=SYSTEM), r"names 'posix\.system'"),
    "pickle: nested": (
        lambda: snapshot(dataset_kwargs={"path": [(SYSTEM,)]}),
        r"names 'posix\.system'",
    ),
    "pickle: in the bytes of a tensor": (
        lambda: snapshot(extra=Call(torch.storage._load_from_bytes, torch_file(SYSTEM, False))),
        r"names 'posix\.system'",
    ),
    "pickle: without a protocol": (lambda: pickle.dumps(SYSTEM, 0), "need an EDM pickle, a file"),
    "zip: eval": (
        lambda: torch_file(Call(eval, "open('canary', 'w')")),
        r"names '__builtin__\.eval'",
    ),
    "zip: exec": (
        lambda: torch_file(Call(exec, "open('canary', 'w')")),
        r"names '__builtin__\.exec'",
    ),
    "zip: getattr": (lambda: torch_file(Call(getattr, "a", "b")), r"names '__builtin__\.getattr'"),
    "zip: import": (lambda: torch_file(Call(builtins.__import__, "antigravity")), "__import__"),
    "zip: open": (lambda: torch_file(Call(open, "canary", "w")), r"names '_?io\.open'"),
    "zip: Popen": (
        lambda: torch_file(Call(subprocess.Popen, ["touch", "canary"])),
        r"names '.*\.Popen'",
    ),
    "zip: partial": (
        lambda: torch_file(Call(functools.partial, len)),
        r"names 'functools\.partial'",
    ),
    "zip: a pickle of a pickle": (
        lambda: torch_file(Call(pickle.loads, pickle.dumps(SYSTEM))),
        r"names '_?pickle\.loads'",
    ),
    "zip: an inner torch file": (
        lambda: torch_file(Call(torch.storage._load_from_bytes, torch_file(SYSTEM))),
        r"names 'torch\.storage\._load_from_bytes'",
    ),
    "zip: torch.load": (lambda: torch_file(Call(torch.load, "x")), r"names 'torch\.serialization"),
    "zip: numpy.load": (lambda: torch_file(Call(__import__("numpy").load, "x")), r"names 'numpy"),
    # opcodes
    "opcode GLOBAL": (lambda: opcodes(b"cos\nsystem\n(Vtouch canary\ntR"), r"names 'os\.system'"),
    "opcode INST": (lambda: opcodes(b"(Vtouch canary\nios\nsystem\n"), r"names 'os\.system'"),
    "opcode INST of a known name": (
        lambda: opcodes(b"(icollections\nOrderedDict\n"),
        "opcode INST",
    ),
    "opcode OBJ": (lambda: opcodes(b"(cos\nsystem\nVtouch canary\no"), r"names 'os\.system'"),
    "opcode OBJ of a known name": (lambda: opcodes(b"(ccollections\nOrderedDict\no"), "opcode OBJ"),
    "opcode STACK_GLOBAL": (
        lambda: opcodes(b"\x8c\x02os\x8c\x06system\x93\x8c\x01x\x85R"),
        r"names 'os\.system'",
    ),
    "opcode STACK_GLOBAL, dotted": (
        lambda: opcodes(b"\x8c\x0bcollections\x8c\x14OrderedDict.fromkeys\x93)R"),
        r"names 'collections\.OrderedDict\.fromkeys'",
    ),
    "opcode EXT1": (lambda: opcodes(b"\x82\x01"), "opcode EXT1"),
    "opcode NEWOBJ_EX": (lambda: opcodes(b"ccollections\nOrderedDict\n)}\x92"), "opcode NEWOBJ_EX"),
    "opcode PERSID": (lambda: opcodes(b"Pos.system\n"), "opcode PERSID"),
    "opcode NEXT_BUFFER": (lambda: opcodes(b"\x97"), "opcode NEXT_BUFFER"),
    "opcode BUILD on a plain dict": (lambda: opcodes(b"}}b"), "need Inert, got dict"),
    "opcode REDUCE of text": (lambda: opcodes(b"Vos.system\n(Vx\ntR"), "need Name, got str"),
    "memo: taken before it is put": (lambda: opcodes(b"h\x07"), "malformed"),
    "memo: far away": (lambda: opcodes(b"Nr\xff\xff\xff\x7f"), "of its memo"),
    "memo: a dict in itself": (lambda: torch_file(LOOP), "got something else at 'model.map_layer0"),
    "100,000 nested lists": (lambda: opcodes(b"]" * 10**5, b"a" * (10**5 - 1)), "got list"),
    "a key with a slow hash": (
        lambda: opcodes(
            b"})", *(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(60)), b"Ns"
        ),
        "need str",
    ),
    # the zip around the pickle
    "zip slip": (lambda: with_member("../../canary"), "'../../canary' has an unsafe name"),
    "zip slip below the root": (lambda: with_member("archive/../../canary"), "an unsafe name"),
    "zip slip, absolute": (lambda: with_member("/canary"), "an unsafe name"),
    "zip slip, Windows": (lambda: with_member("archive\\..\\canary"), "an unsafe name"),
    "zip slip, drive": (lambda: with_member("C:canary"), "an unsafe name"),
    "zip, NUL in a name": (
        lambda: patched(with_member("archive/canary@txt"), b"canary@txt", b"canary\0txt"),
        "an unsafe name",
    ),
    "zip, symbolic link": (
        lambda: with_member("archive/data/999", b"/etc/passwd", external_attr=0o120777 << 16),
        "'archive/data/999' is a symbolic link",
    ),
    "zip bomb": (
        lambda: with_member("archive/data/999", bytes(10**7), compress_type=zipfile.ZIP_DEFLATED),
        "'archive/data/999' is compressed",
    ),
    "zip, LZMA": (
        lambda: with_member("archive/data/999", bytes(10**5), compress_type=zipfile.ZIP_LZMA),
        "is compressed",
    ),
    "zip, encrypted": (lambda: central(TORCH, 8, b"\x01\x08"), "is encrypted"),
    "zip, unknown compression": (lambda: central(TORCH, 10, b"\x63\x00"), "is compressed"),
    "zip, a pickle of 4 GB": (
        lambda: central(TORCH, 20, b"\xfe\xff\xff\xff\xfe\xff\xff\xff"),
        "claim 4.296e[+]09 bytes in a file of",
    ),
    "zip, sizes that differ": (lambda: central(TORCH, 24, b"\x07\x00\x00\x00"), "is compressed"),
    "zip, data.pkl twice": (lambda: twice("data.pkl"), "'archive/data.pkl' is there twice"),
    "zip, a storage twice": (lambda: twice("data/0"), "'archive/data/0' is there twice"),
    "zip, two roots": (lambda: with_member("other/data.pkl"), "one root folder, got 2"),
    "zip, no pickle": (lambda: zipped({"archive/data/0": b""}), "a zip without data.pkl"),
    "zip, TorchScript": (lambda: with_member("archive/constants.pkl"), "TorchScript, a program"),
    "zip, big-endian": (
        lambda: archive(b"N.", {"byteorder": b"big"}),
        "need little-endian tensors",
    ),
    "zip, one bit wrong": (
        lambda: patched(TORCH, GOOD["model.map_layer1.weight"].numpy().tobytes()[:64], bytes(64)),
        "Bad CRC-32",
    ),
    "zip, no directory": (lambda: TORCH[: TORCH.index(b"PK\x01\x02")], "not a zip file"),
    "zip, cut in the directory": (lambda: TORCH[:-30], "not a zip file"),
    "zip, cut in the pickle": (lambda: TORCH[:200], "not a zip file"),
    "zip, its front cut off": (lambda: b"PK\x03\x04" + TORCH[5000:], "[Bb]ad|refused"),
    "zip, text of 100 GB": (
        lambda: opcodes(b"\x8d" + struct.pack("<Q", HUNDRED_GB) + b"abc"),
        "at most 16,777,216 bytes of text in a pickle, got 100,000,000,0",
    ),
    # storages
    "storage of 100 GB": (
        lambda: weight(storage(HUNDRED_GB // 4), 0, (4,), (1,)),
        "claims 1e[+]11 bytes, 16 are there",
    ),
    "storage of -1 numbers": (lambda: weight(storage(-1), 0, (4,), (1,)), "claims -4 bytes"),
    "storage of NaN numbers": (lambda: weight(storage(float("nan")), 0, (4,), (1,)), "got float"),
    "storage that is absent": (lambda: weight(storage(4, "1"), 0, (4,), (1,)), "0 are there"),
    "storage outside": (
        lambda: weight(storage(4, "../../../etc/passwd"), 0, (4,), (1,)),
        "0 are there",
    ),
    "storage without a name": (lambda: weight(storage(4, 0), 0, (4,), (1,)), "need str, got int"),
    "storage of another size": (lambda: weight(storage(3), 0, (3,), (1,)), "claims 12 bytes, 16"),
    "storage of another type": (
        lambda: weight(storage(4, kind=OrderedDict), 0, (4,), (1,)),
        "a storage of numbers, got collections.OrderedDict",
    ),
    "storage of a quantised type": (
        lambda: weight(storage(4, kind=torch.QInt8Storage), 0, (4,), (1,)),
        r"names 'torch.*QInt8Storage'",
    ),
    "storage that is a module": (
        lambda: weight(("module", "a", "b", "c", "d"), 0),
        "whole storage",
    ),
    "storage without a description": (lambda: weight((), 0, (4,), (1,)), "need a whole storage"),
    # tensors
    "stride behind the end": (lambda: of_storage(0, (2, 2), (3, 1)), "more numbers than its"),
    "offset behind the end": (lambda: of_storage(3, (2,), (1,)), "more numbers than its"),
    "offset before the start": (lambda: of_storage(-1, (2,), (1,)), "more numbers than its"),
    "negative stride": (lambda: of_storage(3, (2,), (-1,)), "more numbers than its"),
    "stride 0 as a bomb": (lambda: of_storage(0, (10**6, 10**6), (0, 0)), "more numbers than its"),
    "NaN in the shape": (lambda: of_storage(0, (float("nan"),), (1,)), "need int, got float"),
    "infinity in the stride": (lambda: of_storage(0, (1,), (float("inf"),)), "need int, got float"),
    "text in the shape": (lambda: of_storage(0, ("4",), (1,)), "need int, got str"),
    "200 dimensions": (lambda: of_storage(0, (1,) * 200, (1,) * 200), "at most 8 dimensions"),
    "one storage under 200 names": (lambda: torch_file(BIG), "its tensors share storages"),
    # the format before torch 1.6
    "old: 100 GB": (lambda: storage_bytes(HUNDRED_GB // 4, 4), "claims 1e[+]11 bytes, 16 are"),
    "old: text of 100 GB": (
        lambda: legacy(MAGIC, tail=b"\x80\x02\x8d" + struct.pack("<Q", HUNDRED_GB) + b"abc"),
        "at most 16,777,216 bytes of text in a pickle, got 100,000,000,0",
    ),
    "old: another length": (lambda: storage_bytes(4, 4, 5), "claims 16 bytes"),
    "old: another version": (
        lambda: legacy(MAGIC, 1002, {"little_endian": True}, {}, []),
        "version 1001",
    ),
    "old: big-endian": (lambda: legacy(MAGIC, 1001, {"little_endian": False}, {}, []), "endian"),
    "old: keys without tensors": (
        lambda: legacy(MAGIC, 1001, {"little_endian": True}, {}, ["1"]),
        "its storages do not match its tensors",
    ),
    "old: more behind the end": (lambda: OLD + b"x", "1 bytes follow its last storage"),
    "old: one storage under 200 names": (lambda: torch_file(BIG, False), "share storages"),
    "old: cut": (lambda: OLD[:-100], "claims .* bytes"),
    "old: cut in the pickle": (lambda: OLD[:300], "refused"),
    # safetensors
    "safe: header of 100 GB": (lambda: header({}, length=HUNDRED_GB), "(?i)header"),
    "safe: tensor of 100 GB": (
        lambda: header({"model.x": f32(0, HUNDRED_GB, HUNDRED_GB // 4)}, bytes(16)),
        "need a safetensors file",
    ),
    "safe: offsets that overlap": (
        lambda: header({"a": f32(0, 16, 4), "b": f32(0, 16, 4)}, bytes(16)),
        "need a safetensors file",
    ),
    "safe: shape and offsets differ": (
        lambda: header({"a": f32(0, 16, 5)}, bytes(16)),
        "need a safe",
    ),
    "safe: offsets backwards": (lambda: header({"a": f32(16, 0, 4)}, bytes(16)), "need a safe"),
    "safe: a type of its own": (
        lambda: header({"a": f32(0, 16, 4) | {"dtype": "os.system"}}, bytes(16)),
        "need a safetensors file",
    ),
    "safe: no JSON": (lambda: header(b"{os.system('touch canary')}"), "need a safetensors file"),
    "safe: nested metadata": (
        lambda: header({"__metadata__": {"fewstep": "[" * 10**5}}),
        "nested too deeply",
    ),
    "safe: metadata nested a little less": (
        lambda: header({"__metadata__": {"fewstep": '{"a":' * 900 + "1" + "}" * 900}}),
        "nested too deeply|need model.map_layer0",
    ),
    "safe: NaN in the metadata": (
        lambda: header({"__metadata__": {"fewstep": '{"kimg": NaN}'}}),
        "refused .*not JSON compliant",
    ),
    "safe: metadata that are a list": (
        lambda: header({"__metadata__": {"fewstep": "[1]"}}),
        "a JSON object, got list",
    ),
    "safe: metadata that are no JSON": (
        lambda: header({"__metadata__": {"fewstep": "os.system"}}),
        "need a safetensors file at .*Expecting value",
    ),
    "safe: cut": (lambda: SAFE[:-1], "need a safetensors file"),
    # what is whole, and no denoiser
    "an empty file": (lambda: b"", "got an empty file"),
    "a web page": (lambda: b"<!DOCTYPE html><title>404</title>", "an HTML page"),
    "a Git LFS pointer": (lambda: b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "a program": (
        lambda: b"\x7fELF\x02\x01\x01" + bytes(99),
        "need an EDM pickle, a file of torch",
    ),
    "a shell script": (lambda: b"#!/bin/sh\ntouch canary\n", "need an EDM pickle, a file of torch"),
    "a list": (lambda: torch_file([1, 2]), "need a dict of named tensors, got list"),
    "numbers as names": (lambda: torch_file({1: torch.zeros(1)}), "need a dict of named tensors"),
    "a training state": (lambda: torch_file({"net": 1, "optimizer_state": {}}), "network-snapshot"),
    "DMD2's guidance": (
        lambda: torch_file(prefixed("real_unet.") | prefixed("fake_unet.")),
        "need one network, got 2 .*fake_unet., real_unet.*import its generator",
    ),
    "Inception": (
        lambda: torch_file({"Conv2d_1a_3x3.conv.weight": torch.zeros(1)}),
        "need model.map_layer0.weight.*weights-inception-2015-12-05-6726825d.pth",
    ),
    "Inception, pickled": (
        lambda: pickle.dumps(persistent("InceptionV3Detector")),
        "one object of class InceptionV3Detector; .*6726825d.pth",
    ),
    "a GAN": (lambda: pickle.dumps({"G": None, "D": None}), "need a network under 'ema', got none"),
    "another network": (
        lambda: torch_file({"model.map_layer0.weight": torch.zeros(4, 4)}),
        "need an ADM, DDPM",
    ),
}


def refused(path: Path, message: str) -> None:
    before, files = imported(), set(path.parent.iterdir())
    started = time.monotonic()
    with pytest.raises(ValueError, match=message) as caught:
        import_checkpoint(path)
    assert path.name in str(caught.value)
    assert time.monotonic() - started < 5
    assert set(path.parent.iterdir()) == files
    assert imported() == before


def test_the_corpus_holds_more_than_100_files_that_differ() -> None:
    assert len({build() for build, _ in HOSTILE.values()}) == len(HOSTILE) >= 100


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_refused_and_nothing_of_it_runs(canary: Path, case: str) -> None:
    build, message = HOSTILE[case]
    path = canary.with_name("checkpoint.bin")
    path.write_bytes(build())
    refused(path, message)


def test_the_canary_sings_when_torch_loads_the_files(canary: Path) -> None:
    for case in ("zip: os.system", "old: os.system", "zip: a pickle of a pickle", "zip: open"):
        torch.load(io.BytesIO(HOSTILE[case][0]()), weights_only=False)
        assert canary.exists(), case
        canary.unlink()


@pytest.mark.parametrize("content", [TORCH, OLD, SAFE], ids=["zip", "old", "safe"])
def test_a_file_cut_anywhere_is_refused(canary: Path, content: bytes) -> None:
    path = canary.with_name("checkpoint.bin")
    for share in range(1, 40):
        path.write_bytes(content[: len(content) * share // 40])
        refused(path, "checkpoint.bin")


@pytest.mark.parametrize("content", [TORCH, OLD, SAFE], ids=["zip", "old", "safe"])
def test_random_damage_is_refused_or_harmless(canary: Path, content: bytes) -> None:
    path, generator = canary.with_name("checkpoint.bin"), torch.Generator().manual_seed(0)
    places = [*range(2000), *range(len(content) - 4000, len(content))]
    for _ in range(150):
        damaged = bytearray(content)
        for index in torch.randint(len(places), (3,), generator=generator).tolist():
            damaged[places[index]] = int(torch.randint(256, (1,), generator=generator))
        path.write_bytes(damaged)
        try:
            import_checkpoint(path)
        except ValueError as error:
            assert "checkpoint.bin" in str(error)
    assert [file.name for file in canary.parent.iterdir()] == ["checkpoint.bin"]


# --- what is imported ---------------------------------------------------------------------------


def test_an_imported_network_denoises_as_the_original(tmp_path: Path) -> None:
    (tmp_path / "x.pkl").write_bytes(snapshot())
    weights, _ = import_checkpoint(tmp_path / "x.pkl")
    original, ours = small_denoiser(0).eval(), small_denoiser(1).eval()
    load_weights(ours, weights, "x.pkl")
    x, sigma = torch.randn(3, 1, 8, 8), torch.tensor([0.1, 1.0, 10.0])
    labels = one_hot(torch.arange(3), CLASSES)
    assert torch.equal(ours(x, sigma, labels), original(x, sigma, labels))
