"""EDM2's checkpoints: a pickle as NVIDIA publishes it, a state dict, ours; and what is refused."""

import io
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save
from torch import Tensor

import edm2_plain as plain
from fewstep.interop.architecture import check_architecture
from fewstep.interop.checkpoint import import_checkpoint
from fewstep.interop.verify import as_denoiser, verify
from fewstep.params import Params, load_params
from pickles import module, persistent
from places import CONFIG

pytestmark = pytest.mark.usefixtures("edm_modules")

KWARGS = {
    "img_resolution": plain.RESOLUTION,
    "img_channels": plain.CHANNELS,
    "label_dim": plain.CLASSES,
    "model_channels": plain.WIDTH,
    "channel_mult": list(plain.MULT),
    "num_blocks": plain.BLOCKS,
    "attn_resolutions": list(plain.ATTENDS),
}


def published() -> dict[str, Tensor]:
    """The weights under their published names, in half precision, as averages are published."""
    return {name: torch.from_numpy(np.asarray(w)).half() for name, w in plain.weights().items()}


def snapshot(encoder: str = "StandardRGBEncoder", **kwargs: object) -> bytes:
    """A file of EDM2: the averaged network, its encoder, and how the data set was read."""
    network = module(published(), "Precond", _init_kwargs={**KWARGS, **kwargs}, use_fp16=True)
    content = {"encoder": persistent(encoder), "dataset_kwargs": {"path": "x.zip"}, "ema": network}
    return pickle.dumps(content)


def ours() -> dict[str, Tensor]:
    return {
        name.replace("unet.", "model.").replace("logvar_", "model.logvar."): w
        for name, w in published().items()
    }


def torch_file(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def prefixed(prefix: str) -> dict[str, Tensor]:
    return {prefix + name: w for name, w in published().items()}


FILES: dict[str, tuple[Callable[[], bytes], str]] = {
    "published pickle": (snapshot, ""),
    "state dict": (lambda: save(published()), ""),
    "state dict in a dict": (lambda: torch_file({"ema": published(), "nimg": 3}), "ema"),
    "parallel": (lambda: torch_file(prefixed("module.")), ""),
    "average beside it": (lambda: save(prefixed("ema.") | prefixed("net.")), "ema"),
    "a model of ours": (lambda: save(ours()), ""),
}


def small(**network: object) -> Params:
    """config/tiny.yaml with the network of the vectors."""
    params = load_params(CONFIG / "tiny.yaml")
    shape = {
        "type": "edm2",
        "model_channels": plain.WIDTH,
        "channel_mult": plain.MULT,
        "num_blocks": plain.BLOCKS,
        "attn_resolutions": plain.ATTENDS,
    }
    return replace(
        params,
        data=replace(params.data, classes=plain.CLASSES),
        network=replace(params.network, **shape | network),
    )


def load(folder: Path, data: bytes) -> tuple[dict[str, Tensor], dict]:
    (folder / "x.pkl").write_bytes(data)
    return import_checkpoint(folder / "x.pkl")


@pytest.mark.parametrize("kind", FILES)
def test_every_kind_of_file_gives_the_same_network(tmp_path: Path, kind: str) -> None:
    content, name = FILES[kind]
    weights, about = load(tmp_path, content())
    expected = ours()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[key], expected[key]) for key in expected)
    assert about.get("found_as", "") == name
    assert (about["model_type"], about["model_channels"]) == ("EDM2", 32)
    assert (about["channel_mult"], about["num_blocks"]) == ([1, 4], 2)
    assert (about["attn_resolutions"], about["img_resolution"]) == ([8], 16)
    assert (about["img_channels"], about["label_dim"]) == (1, 5)
    sizes = {n: np.prod(shape) for n, shape in plain.shapes().items()}
    constants = sum(size for n, size in sizes.items() if "fourier" in n)
    assert about["parameters"] == sum(sizes.values()) - constants


def test_an_imported_network_answers_as_the_recorded_one(tmp_path: Path) -> None:
    weights, about = load(tmp_path, snapshot())
    denoiser = as_denoiser(weights, about, small(), "x.pkl")
    x, sigma, labels = (torch.from_numpy(part).float() for part in plain.inputs())
    error = (denoiser(x, sigma, labels) - torch.from_numpy(np.load(plain.FILE)["D_x"])).abs()
    assert float(error.max()) < 0.02, "the weights were rounded to half precision"
    assert "WARNING: it does not denoise" in verify(weights, about, small(), "x.pkl")


def test_other_widths_of_the_same_product_are_the_same_network(tmp_path: Path) -> None:
    weights, about = load(tmp_path, snapshot())
    as_denoiser(weights, about, small(model_channels=16, channel_mult=(2, 8)), "x.pkl")
    for wrong, message in (
        ({"type": "adm"}, r"need network\.type edm2, got adm"),
        ({"model_channels": 64}, r"need network\.model_channels 32, got 64"),
        ({"num_blocks": 1}, r"need network\.num_blocks 2, got 1"),
        ({"attn_resolutions": (16,)}, r"need network\.attn_resolutions \[8\], got \[16\]"),
        ({"sigma_data": 1.0}, r"need network\.sigma_data 0\.5, got 1\.0"),
    ):
        with pytest.raises(ValueError, match=message):
            check_architecture(about, small(**wrong), "x.pkl")


def test_arguments_that_the_file_leaves_out_are_those_of_edm2(tmp_path: Path) -> None:
    _, about = load(tmp_path, snapshot())
    assert about["sigma_data"] == 0.5
    _, about = load(tmp_path, snapshot(sigma_data=0.25, use_fp16=True, dropout=0.1))
    assert about["sigma_data"] == 0.25


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (lambda: snapshot("StabilityVAEEncoder"), "got one of the latents of StabilityVAEEncoder"),
        (lambda: snapshot(res_balance=0.5), "need res_balance 0.3, as in .* G, got 0.5"),
        (lambda: snapshot(clip_act=None), "need clip_act 256, .* got None"),
        (lambda: snapshot(resample_filter=[1, 3, 3, 1]), r"need resample_filter \[1, 1\]"),
        (
            lambda: pickle.dumps({"ema": persistent("VPPrecond")}),
            "EDMPrecond, or EDM2's Precond, g",
        ),
        (
            lambda: save(published() | {"unet.emb_noise.weight": torch.zeros(256, 32)}),
            "without channel_mult_noise and channel_mult_emb, got an embedding of 256",
        ),
        (lambda: torch_file({"a": published(), "b": published()}), r"got 2 \(a\., b\.\)"),
    ],
)
def test_other_networks_are_refused_by_what_they_are(
    tmp_path: Path, data: Callable[[], bytes], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load(tmp_path, data())


def test_a_file_without_the_uncertainty_is_refused_by_name(tmp_path: Path) -> None:
    weights, about = load(tmp_path, save({n: w for n, w in published().items() if "unet" in n}))
    with pytest.raises(ValueError, match=r"no model\.logvar\.fourier\.freqs"):
        as_denoiser(weights, about, small(), "x.pkl")
