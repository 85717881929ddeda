"""EDM's pickles: the real structure imports, and nothing in a hostile file is ever executed."""

import builtins
import collections
import copyreg
import functools
import importlib
import io
import marshal
import operator
import os
import pickle
import shutil
import struct
import subprocess
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import parity
from fewstep.interop.edm_pickle import import_edm_pickle
from pickles import MAGIC, Call, imported, persistent, storage_bytes, tensor
from places import VECTORS

pytestmark = pytest.mark.usefixtures("edm_modules")


def teacher(weight: object = None, **state: object) -> bytes:
    """A teacher file with one weight, `model.weight`; `state` replaces attributes of EDMPrecond."""
    weight = nn.Parameter(torch.arange(6.0).reshape(2, 3)) if weight is None else weight
    model = persistent("DhariwalUNet", _parameters={"weight": weight, "bias": None})
    kwargs = {
        "img_resolution": 64,
        "img_channels": 3,
        "label_dim": 1000,
        "model_type": "DhariwalUNet",
    }
    given = {"_modules": {"model": model}, "_init_kwargs": kwargs} | state
    snapshot = {"ema": persistent("EDMPrecond", **given), "loss_fn": None, "augment_pipe": None}
    return pickle.dumps(snapshot)


def load(folder: Path, data: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    file = folder / "teacher.pkl"
    file.write_bytes(data)
    return import_edm_pickle(file)


# --- files that import -----------------------------------------------------------------------


def test_the_structure_of_published_teachers_imports(tmp_path: Path) -> None:
    weights, config = load(tmp_path, parity.structure_pickle(VECTORS))
    recorded = parity.Vectors(VECTORS, "weights_a.npz").under("weights/")
    assert list(weights) == list(recorded)
    assert all(torch.equal(weights[name], recorded[name]) for name in recorded)
    assert config.items() >= parity.Vectors(VECTORS, "network_adm.npz").config().items()


def test_arguments_that_the_file_leaves_out_are_those_of_edm(tmp_path: Path) -> None:
    weights, config = load(tmp_path, teacher())
    torch.testing.assert_close(weights, {"model.weight": torch.arange(6.0).reshape(2, 3)})
    assert (config["model_channels"], config["channel_mult"]) == (192, [1, 2, 3, 4])
    assert (config["num_blocks"], config["attn_resolutions"]) == (3, [32, 16, 8])
    song = {"img_resolution": 32, "img_channels": 3, "model_type": "SongUNet", "augment_dim": 9}
    _, config = load(tmp_path, teacher(_init_kwargs=song))
    assert (config["model_channels"], config["num_blocks"], config["augment_dim"]) == (128, 4, 9)
    assert config["label_dim"] == 0
    _, config = load(tmp_path, teacher(_init_args=(16, 1), _init_kwargs={"label_dim": 10}))
    assert [config[k] for k in ("img_resolution", "img_channels", "label_dim")] == [16, 1, 10]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64])
def test_tensors_keep_type_shape_and_stride(tmp_path: Path, dtype: torch.dtype) -> None:
    view = torch.arange(24).to(dtype).reshape(4, 6)[1:, ::2].T
    weights, _ = load(tmp_path, teacher(view))
    assert weights["model.weight"].dtype == dtype
    assert torch.equal(weights["model.weight"], view)


def test_live_objects_beside_the_network_are_read_as_inert(tmp_path: Path) -> None:
    state = {
        "_buffers": {"kept": torch.ones(1), "hidden": torch.ones(1), "none": None},
        "_non_persistent_buffers_set": {"hidden"},
        "_backward_hooks": collections.OrderedDict(a=1),
        "block": nn.ModuleDict({"norm": nn.SiLU()}),
        "gain": np.float64(0.5),
        "array": np.ones(3),
        "like": (torch.device("cpu"), torch.float32, torch.Size([2])),
    }
    data = teacher(**state)
    old = data.replace(
        b"\x16numpy._core.multiarray", b"\x15numpy.core.multiarray"
    )  # numpy 1's name
    for written in (data, old):
        weights, _ = load(tmp_path, written)
        assert list(weights) == ["kept", "model.weight"]


def test_numpy_scalars_in_the_config_are_numbers(tmp_path: Path) -> None:
    kwargs = {"img_resolution": np.int64(8), "img_channels": 1, "sigma_data": np.float32(0.25)}
    _, config = load(tmp_path, teacher(_init_kwargs=kwargs))
    assert (config["img_resolution"], config["sigma_data"]) == (8, 0.25)
    assert type(config["sigma_data"]) is float


# --- files that name what weights do not need --------------------------------------------------


class Stateful:
    """Unpickles by BUILD, which calls `__setstate__`."""

    def __setstate__(self, state: str) -> None:
        os.system(state)

    def __getstate__(self) -> str:
        return "touch canary"


def stack_global(module: bytes, name: bytes) -> bytes:
    parts = (b"\x8c" + bytes([len(text)]) + text for text in (module, name))
    return b"\x80\x04" + b"".join(parts) + b"\x93)R."


CALLS: list[tuple[Callable[..., Any], tuple[object, ...]]] = [
    (os.system, ("touch canary",)),
    (os.popen, ("touch canary",)),
    (os.execvp, ("touch", ["touch", "canary"])),
    (os.remove, ("teacher.pkl",)),
    (builtins.eval, ("__import__('os').system('touch canary')",)),
    (builtins.exec, ("open('canary', 'w')",)),
    (builtins.getattr, (os, "system")),
    (builtins.__import__, ("antigravity",)),
    (builtins.open, ("canary", "w")),
    (builtins.compile, ("1", "a", "exec")),
    (builtins.bytearray, (10**12,)),
    (builtins.map, (len, "a")),
    (subprocess.Popen, (["touch", "canary"],)),
    (subprocess.check_output, (["touch", "canary"],)),
    (functools.partial, (len,)),
    (functools.reduce, (len, "a")),
    (importlib.import_module, ("antigravity",)),
    (operator.attrgetter("system").__class__, ("system",)),
    (marshal.loads, (b"N",)),
    (pickle.loads, (b"N.",)),
    (shutil.rmtree, ("nowhere",)),
    (types.SimpleNamespace, ()),
    (torch.load, ("nowhere",)),
    (torch.hub.load, ("nowhere", "model")),
    (torch.save, (1, "canary")),
    (np.load, ("nowhere",)),
    (np.save, ("canary", 1)),
    (io.FileIO, ("canary", "w")),
    (copyreg.add_extension, ("os", "system", 1)),
    (copyreg._reconstructor, (int, int, 0)),  # pyright: ignore[reportAttributeAccessIssue]
    (Path, ("canary",)),
]
NAMES = [f"{function.__module__}.{function.__qualname__}" for function, _ in CALLS]


def hostile(index: int) -> Call:
    function, args = CALLS[index]
    return Call(function, *(a for a in args if not isinstance(a, types.ModuleType)))


def refused(folder: Path, data: bytes, message: str) -> None:
    before = imported()
    started = time.monotonic()
    with pytest.raises(ValueError, match=rf"refused .*teacher\.pkl: .*{message}"):
        load(folder, data)
    assert time.monotonic() - started < 5
    assert {file.name for file in folder.iterdir()} == {"teacher.pkl"}
    assert imported() == before


def test_the_canary_sings_when_python_loads_the_file(canary: Path) -> None:
    pickle.loads(pickle.dumps(hostile(0)))
    assert canary.exists()


@pytest.mark.parametrize("index", range(len(CALLS)), ids=NAMES)
def test_a_call_is_refused_by_name_wherever_it_hides(canary: Path, index: int) -> None:
    message = rf"it names '{NAMES[index]}'".replace(".", r"\.")
    for protocol in range(6):
        refused(canary.parent, pickle.dumps({"ema": hostile(index)}, protocol), "")
    refused(canary.parent, pickle.dumps({"ema": hostile(index)}), message)
    refused(canary.parent, teacher(_init_kwargs={"img_resolution": hostile(index)}), message)
    refused(
        canary.parent, teacher(loss=persistent("EDMLoss", deep=[{"a": (hostile(index),)}])), message
    )
    refused(canary.parent, teacher(hostile(index)), message)


@pytest.mark.parametrize("index", range(3))
def test_a_call_inside_the_bytes_of_a_tensor_is_refused_by_name(canary: Path, index: int) -> None:
    message = rf"it names '{NAMES[index]}'".replace(".", r"\.")
    from_bytes = torch.storage._load_from_bytes
    head = [pickle.dumps(item, 2) for item in (MAGIC, 1001, {"little_endian": True})]
    for count in range(4):
        inner = b"".join(head[:count]) + pickle.dumps(hostile(index), 2)
        refused(canary.parent, teacher(Call(from_bytes, inner)), message)
    # and as torch itself would write it, in both of its formats
    for zipped in (False, True):
        buffer = io.BytesIO()
        torch.save(hostile(index), buffer, _use_new_zipfile_serialization=zipped)
        refused(
            canary.parent, teacher(Call(from_bytes, buffer.getvalue())), "" if zipped else message
        )


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"cos\nsystem\n(S'touch canary'\ntR.", r"it names 'os\.system'"),
        (b"(S'touch canary'\nios\nsystem\n.", r"it names 'os\.system'"),
        (b"(cos\nsystem\nS'touch canary'\no.", r"it names 'os\.system'"),
        (b"(icollections\nOrderedDict\n.", "the opcode INST"),
        (b"(ccollections\nOrderedDict\no.", "the opcode OBJ"),
        (stack_global(b"collections", b"abc.Mapping"), r"it names 'collections\.abc\.Mapping'"),
        (stack_global(b"collections", b"OrderedDict.fromkeys"), r"it names '.*\.fromkeys'"),
        (stack_global(b"torch", b"_utils._rebuild_parameter"), "it names"),
        (stack_global(b"torch.nn.modules.container", b"os.system"), r"it names '.*\.os\.system'"),
        (stack_global(b"torch.nn.modules.container.os", b"system"), "it names"),
        (stack_global(b"torch.nn.modules", b"Sequential"), "it names"),
        (stack_global(b"", b""), r"it names '\.'"),
        (b"\x80\x04K\x01K\x02\x93.", "need str, got int"),
        (b"\x80\x02\x82\x01.", "the opcode EXT1"),
        (b"\x80\x02\x83\x01\x00.", "the opcode EXT2"),
        (b"\x80\x02\x84\x01\x00\x00\x00.", "the opcode EXT4"),
        (b"Pos.system\n.", "the opcode PERSID"),
        (b"\x80\x05\x97.", "the opcode NEXT_BUFFER"),
        (b"ccollections\nOrderedDict\n}S'__call__'\nNsb.", "need Inert, got Name"),
        (b"cdnnlib.util\nEasyDict\n)\x81}b.", "need Inert, got dict"),
        (b"cdnnlib.util\nEasyDict\n)\x81N\x86b.", ""),
        (b"}.", "need a network under 'ema'"),
        (b"]Na.", "need dict, got list"),
        (b"N.", "need dict, got NoneType"),
        (pickle.dumps({"ema": {}}), "need Inert, got dict"),
    ],
)
def test_opcodes_and_names_outside_the_format_are_refused(
    canary: Path, data: bytes, message: str
) -> None:
    refused(canary.parent, data, message)


def test_an_object_with_setstate_is_refused_by_name(canary: Path) -> None:
    refused(
        canary.parent, pickle.dumps({"ema": Stateful()}), r"it names '.*test_interop\.Stateful'"
    )


def test_a_registered_extension_is_refused(canary: Path) -> None:
    copyreg.add_extension("posix", "system", 77)
    try:
        data = pickle.dumps({"ema": Call(os.system, "touch canary")}, 2)
        assert b"system" not in data
        refused(canary.parent, data, "the opcode EXT1")
    finally:
        copyreg.remove_extension("posix", "system", 77)


# --- files that claim more than they hold ------------------------------------------------------


def test_a_handmade_storage_imports(tmp_path: Path) -> None:
    weights, _ = load(tmp_path, teacher(tensor(storage_bytes(6, 6), 0, (2, 3), (3, 1))))
    assert torch.equal(weights["model.weight"], torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (tensor(storage_bytes(25 * 10**9, 4), 0, (4,), (1,)), "claims 1e[+]11 bytes, 16 are there"),
        (tensor(storage_bytes(4, 4, 5), 0, (4,), (1,)), "claims 16 bytes"),
        (tensor(storage_bytes(-1, 0), 0, (1,), (1,)), "claims -4 bytes"),
        (tensor(storage_bytes(4, 2), 0, (4,), (1,)), "claims 16 bytes, 8 are there"),
        (tensor(storage_bytes(4, 4), 0, (10**6, 10**6), (0, 0)), "more numbers than its storage"),
        (tensor(storage_bytes(4, 4), 0, (4, 4), (0, 1)), "more numbers than its storage"),
        (tensor(storage_bytes(4, 4), 2, (3,), (1,)), "more numbers than its storage"),
        (tensor(storage_bytes(4, 4), -1, (3,), (1,)), "more numbers than its storage"),
        (tensor(storage_bytes(4, 4), 0, (4,), (-1,)), "more numbers than its storage"),
        (tensor(storage_bytes(4, 4), 0, (1,) * 99, (1,) * 99), "at most 8 dimensions"),
        (tensor(storage_bytes(4, 4), 0, (4,), ()), "a stride for each"),
        (tensor(b"PK\x03\x04" + bytes(99), 0, (4,), (1,)), ""),
        (Call(torch.storage._load_from_bytes, "text"), "need bytes, got str"),
        ("text", "need Tensor, got str"),
    ],
)
def test_a_tensor_that_claims_more_than_it_holds_is_refused(
    canary: Path, weight: object, message: str
) -> None:
    refused(canary.parent, teacher(weight), message)


def opcodes(*parts: bytes) -> bytes:
    return b"\x80\x04" + b"".join(parts) + b"."


HUNDRED_GB = struct.pack("<Q", 10**11)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (opcodes(b"\x8e", HUNDRED_GB, b"abc"), "expected 1e[+]11 bytes, 4 are there"),  # bytes
        (opcodes(b"\x8d", HUNDRED_GB, b"abc"), "at most 16,777,216 bytes of text"),  # text
        (opcodes(b"\x95", HUNDRED_GB, b"N"), "a frame of 100000000000 bytes"),
        (opcodes(b"Nr\xff\xff\xff\x7f"), "of its memo"),
        (b"Np-1\n.", "of its memo"),
        (b"Np" + b"9" * 400 + b"\n.", "at a large number of its memo"),
        (b"I" + b"9" * 5000 + b"\n.", ""),
        # a key or member whose hash takes 2^60 steps: ((((), ()), ((), ())), ...)
        (
            opcodes(b"}", b")", *(b"\x94" + b"h" + bytes([i]) + b"\x86" for i in range(60)), b"Ns"),
            "need str",
        ),
        (
            opcodes(b"\x8f(", b")", *(b"\x94h" + bytes([i]) + b"\x86" for i in range(60)), b"\x90"),
            "need str",
        ),
        # integers that all have the hash 0
        (
            opcodes(
                b"}(",
                *(
                    b"\x8a\x0b" + (i * (2**61 - 1)).to_bytes(11, "little") + b"N"
                    for i in range(1, 9)
                ),
                b"u",
            ),
            "small integers",
        ),
        # 100,000 marks over a deep stack, and 100,000 nested lists
        (opcodes(b"N" * 10**5, b"(t" * 10**5), "need dict, got tuple"),
        (opcodes(b"]" * 10**5, b"a" * (10**5 - 1)), "need dict, got list"),
        (opcodes(b"t"), "malformed"),
        (opcodes(b"h\x07"), "malformed"),
        (opcodes(b"(N"), "need dict"),
        (opcodes(b"}NN(s"), "malformed"),
        (opcodes(b"}(Nu"), ""),
        (b"", "x"),
    ],
)
def test_bombs_and_broken_pickles_are_refused_at_once(
    canary: Path, data: bytes, message: str
) -> None:
    if not data:
        with pytest.raises(ValueError, match="got an empty file"):
            load(canary.parent, data)
    else:
        refused(canary.parent, data, message)


def test_bytes_that_are_used_again_and_again_are_refused(canary: Path) -> None:
    inner = storage_bytes(1000, 1000)
    repeated = [tensor(inner, 0, (1000,), (1,)) for _ in range(100)]  # pickle writes `inner` once
    data = teacher(extra=repeated)
    assert len(data) < 20_000
    refused(canary.parent, data, "the same bytes repeatedly")


def test_weights_under_more_names_than_the_file_holds_are_refused(canary: Path) -> None:
    shared = {f"w{i}": nn.Parameter(torch.zeros(1)) for i in range(5)}
    shared |= dict.fromkeys((f"v{i}" for i in range(300)), nn.Parameter(torch.zeros(5000)))
    refused(canary.parent, teacher(_parameters=shared), "its modules share weights")


def test_a_module_inside_itself_is_refused(canary: Path) -> None:
    inner: dict[str, object] = {}
    loop = persistent("Block", _modules=inner)
    inner["again"] = persistent("Block", _modules={"a": loop, "b": loop})
    refused(canary.parent, teacher(_modules=inner), "")
    twice = persistent("Block")
    refused(canary.parent, teacher(_modules={"a": twice, "b": twice}), "'b.' occurs twice")


@pytest.mark.parametrize("share", [0.001, 0.01, 0.3, 0.9, 0.9999])
def test_a_file_cut_short_is_refused(canary: Path, share: float) -> None:
    data = parity.structure_pickle(VECTORS)
    refused(canary.parent, data[: int(len(data) * share)], "")


def test_random_damage_is_refused_or_harmless(canary: Path) -> None:
    data, random = teacher(), np.random.default_rng(0)
    for _ in range(500):
        damaged = bytearray(data)
        for at in random.integers(len(data), size=3):
            damaged[at] = random.integers(256)
        try:
            load(canary.parent, bytes(damaged))
        except ValueError as error:
            assert "teacher.pkl: " in str(error)
    assert {file.name for file in canary.parent.iterdir()} == {"teacher.pkl"}


# --- other files -------------------------------------------------------------------------------


def test_other_networks_are_refused_by_what_they_are(tmp_path: Path) -> None:
    kwargs = {"img_resolution": 64, "img_channels": 3}
    refused(tmp_path, pickle.dumps({"ema": persistent("VPPrecond")}), "Precond, got VPPrecond")
    unknown = kwargs | {"model_type": "DiT"}
    refused(tmp_path, teacher(_init_kwargs=unknown), "DhariwalUNet or SongUNet, got DiT")
    refused(tmp_path, teacher(_init_kwargs={"img_channels": 3}), "need int, got NoneType")
    nested = kwargs | {"channel_mult": [[1], [2]]}
    refused(tmp_path, teacher(_init_kwargs=nested), "need int or float or str or bool, got list")
    refused(tmp_path, b"not a pickle at all", "")


def test_a_missing_file_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        import_edm_pickle(tmp_path / "nowhere.pkl")
