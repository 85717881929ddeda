"""One denoiser is found in whatever is wrapped around it; what else there is, is named."""

import io
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file
from torch import Tensor

from conftest import small_denoiser
from fewstep.interop.checkpoint import import_checkpoint

GOOD = dict(small_denoiser(0).state_dict())
ONLINE = dict(small_denoiser(1).state_dict())


def torch_file(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def prefixed(prefix: str, weights: dict[str, Tensor] = GOOD) -> dict[str, Tensor]:
    return {prefix + name: weight.clone() for name, weight in weights.items()}


def bare(weights: dict[str, Tensor] = GOOD) -> dict[str, Tensor]:
    return {name.removeprefix("model."): weight for name, weight in weights.items()}


def compiled(weights: dict[str, Tensor] = GOOD) -> dict[str, Tensor]:
    return {name.replace("model.", "model._orig_mod."): w for name, w in weights.items()}


UNIFIED = (
    prefixed("feedforward_model.")
    | prefixed("guidance_model.real_unet.", ONLINE)
    | prefixed("guidance_model.fake_unet.", ONLINE)
    | {"guidance_model.karras_sigmas": torch.zeros(1000)}
)
FILES: dict[str, tuple[Callable[[], bytes], str]] = {
    "state_dict": (lambda: torch_file({"state_dict": GOOD, "epoch": 3}), "state_dict"),
    "model, bare": (lambda: torch_file({"model": bare(), "step": 1, "args": None}), ""),
    "bare": (lambda: save(bare()), ""),
    "compiled": (lambda: save(compiled()), ""),
    "compiled as a whole": (lambda: save(prefixed("_orig_mod.")), ""),
    "compiled and parallel": (lambda: save(prefixed("module._orig_mod.")), ""),
    "parallel in a dict": (lambda: torch_file({"net": prefixed("module.")}), "net"),
    "averaged model": (lambda: torch_file(prefixed("module.") | {"n_averaged": torch.ones(1)}), ""),
    "EMA and online": (lambda: save(prefixed("ema.") | prefixed("net.", ONLINE)), "ema"),
    "EMA beside it": (lambda: save(prefixed("model_ema.") | ONLINE), "model_ema"),
    "EMA in dicts": (lambda: torch_file({"ema": GOOD, "model": ONLINE, "step": 1}), "ema"),
    "EMA, bare, in dicts": (lambda: torch_file({"ema": bare(), "model": bare(ONLINE)}), "ema"),
    "DMD2's unified": (lambda: torch_file(UNIFIED), "feedforward_model"),
    "DMD2's unified, safe": (lambda: save(UNIFIED), "feedforward_model"),
}


@pytest.mark.parametrize("kind", FILES)
def test_wrappers_are_taken_off(tmp_path: Path, kind: str) -> None:
    content, name = FILES[kind]
    (tmp_path / "x.bin").write_bytes(content())
    weights, about = import_checkpoint(tmp_path / "x.bin")
    assert weights.keys() == GOOD.keys()
    assert all(torch.equal(weights[name], GOOD[name]) for name in GOOD)
    assert about.get("found_as", "") == name


def test_what_is_left_out_is_named_as_in_the_file(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(save(prefixed("ema.") | prefixed("net.module.", ONLINE)))
    _, about = import_checkpoint(tmp_path / "x.bin")
    assert set(about["left_out"]) == set(prefixed("net.module."))


@pytest.mark.parametrize("name", ["real_unet", "guidance_model.real_unet"])
def test_another_network_of_a_file_can_be_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "x.bin").write_bytes(save(UNIFIED))
    weights, about = import_checkpoint(tmp_path / "x.bin", name)
    assert all(torch.equal(weights[name], ONLINE[name]) for name in ONLINE)
    assert about["found_as"] == "guidance_model.real_unet"
    with pytest.raises(ValueError, match=r"one network called 'unet', got feedforward_model\., gu"):
        import_checkpoint(tmp_path / "x.bin", "unet")


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards_are_put_together(tmp_path: Path, suffix: str) -> None:
    names = list(GOOD)
    for i, part in enumerate((names[:20], names[20:]), 1):
        file = tmp_path / f"model-{i:05d}-of-00002.{suffix}"
        tensors = {name: GOOD[name] for name in part}
        save_file(tensors, file) if suffix == "safetensors" else torch.save(tensors, file)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    weights, about = import_checkpoint(tmp_path)
    assert all(torch.equal(weights[name], GOOD[name]) for name in GOOD)
    assert about["left_out"] == ["model.safetensors.index.json"] and len(about["sha256"]) == 64


def test_a_shared_tensor_is_read_once_and_kept_apart(tmp_path: Path) -> None:
    flat = torch.cat([weight.flatten() for weight in GOOD.values()])
    parts = flat.split([weight.numel() for weight in GOOD.values()])
    views = {n: p.view(GOOD[n].shape) for n, p in zip(GOOD, parts, strict=True)}
    (tmp_path / "x.bin").write_bytes(torch_file(views))
    weights, _ = import_checkpoint(tmp_path / "x.bin")
    assert all(torch.equal(weights[name], GOOD[name]) for name in GOOD)


def test_bytes_of_old_protocols_are_read(tmp_path: Path) -> None:
    """Protocol 2 writes bytes as a call of _codecs.encode."""
    (tmp_path / "x.bin").write_bytes(torch_file(GOOD | {"note": b"\xff\x00" * 40}))
    assert import_checkpoint(tmp_path / "x.bin")[0].keys() == GOOD.keys()
    assert b"_codecs" in pickle.dumps(b"\xff", 2)
