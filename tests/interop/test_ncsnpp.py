"""NCSN++'s checkpoints: a pickle as NVIDIA publishes it, a state dict; and what is refused."""

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

import ncsnpp_plain as plain
from fewstep.interop.architecture import check_architecture, network_block
from fewstep.interop.checkpoint import import_checkpoint
from fewstep.interop.verify import as_denoiser
from fewstep.networks.ddpmpp import DDPMpp
from fewstep.networks.ncsnpp import NCSNpp
from fewstep.networks.protocol import Architecture
from fewstep.params import Network, Params, load_params
from pickles import module, persistent
from places import CONFIG

pytestmark = pytest.mark.usefixtures("edm_modules")

KWARGS = {
    "img_resolution": plain.RESOLUTION,
    "img_channels": plain.CHANNELS,
    "label_dim": plain.CLASSES,
    "model_type": "SongUNet",
    "embedding_type": "fourier",
    "encoder_type": "residual",
    "decoder_type": "standard",
    "channel_mult_noise": 2,
    "resample_filter": [1, 3, 3, 1],
    "model_channels": plain.WIDTH,
    "channel_mult": list(plain.MULT),
    "num_blocks": plain.BLOCKS,
    "attn_resolutions": list(plain.ATTENDS),
    "augment_dim": 9,
    "dropout": 0.13,
}
BLOCK = Network("ncsnpp", plain.WIDTH, plain.MULT, plain.BLOCKS, plain.ATTENDS, 0.5)
AUGMENT = {"map_augment.weight": torch.zeros(2 * plain.WIDTH, 9)}


def snapshot(class_name: str = "EDMPrecond") -> bytes:
    """A file of EDM with the averaged network, whose augmentations sampling does not use."""
    unet = module(plain.weights() | AUGMENT, "SongUNet")
    network = persistent(class_name, _modules={"model": unet}, _init_kwargs=KWARGS)
    return pickle.dumps({"ema": network})


def ours(**changes: Tensor | None) -> dict[str, Tensor]:
    """The weights under our names; `a__b` replaces a.b, None removes it."""
    found = {f"model.{name}": w for name, w in plain.weights().items()}
    for name, value in changes.items():
        found.pop(key := f"model.{name.replace('__', '.')}", None)
        if value is not None:
            found[key] = value
    return found


def without(part: str) -> dict[str, Tensor]:
    return {name: w for name, w in ours().items() if part not in name}


def song(kind: type[DDPMpp], channel_mult: tuple[int, ...]) -> dict[str, Tensor]:
    unet = kind(Architecture(16, 1, 5, 32, channel_mult, 1, (8,)))
    return {f"model.{name}": w for name, w in unet.state_dict().items()}


def small(**network: object) -> Params:
    """config/tiny.yaml with the network of the plain equations."""
    params = load_params(CONFIG / "tiny.yaml")
    data = replace(params.data, classes=plain.CLASSES)
    return replace(params, data=data, network=replace(BLOCK, **network))


def load(folder: Path, data: bytes) -> tuple[dict[str, Tensor], dict]:
    (folder / "x.pkl").write_bytes(data)
    return import_checkpoint(folder / "x.pkl")


@pytest.mark.parametrize("content", [snapshot, lambda: save(ours())], ids=["pickle", "state dict"])
def test_a_file_gives_the_network_that_answers_as_the_equations(
    tmp_path: Path, content: Callable[[], bytes]
) -> None:
    weights, about = load(tmp_path, content())
    assert weights.keys() == ours().keys()
    assert all(torch.equal(weights[name], w) for name, w in ours().items())
    constants = sum(
        w.numel() for n, w in ours().items() if n.endswith((".freqs", "resample_filter"))
    )
    assert about["parameters"] == sum(w.numel() for w in weights.values()) - constants
    assert network_block(about) == BLOCK
    network = as_denoiser(weights, about, small(), "x.pkl").model
    x, c_noise, labels = plain.inputs()
    F_x, _ = plain.run(x, c_noise, labels, plain.weights())
    torch.testing.assert_close(network(x, c_noise, labels).double(), F_x, rtol=1e-4, atol=1e-4)


def test_a_network_of_one_level_is_told_by_its_frequencies(tmp_path: Path) -> None:
    for kind, name in ((NCSNpp, "ncsnpp"), (DDPMpp, "ddpmpp")):
        _, about = load(tmp_path, save(song(kind, (1,))))
        assert network_block(about).type == name


def test_params_of_another_network_are_refused_by_key(tmp_path: Path) -> None:
    _, about = load(tmp_path, snapshot())
    for wrong, message in (
        ({"type": "ddpmpp"}, r"need network\.type ncsnpp, got ddpmpp"),
        ({"model_channels": 64}, r"need network\.model_channels 32, got 64"),
        ({"channel_mult": (1, 2)}, r"need network\.channel_mult \[1, 2, 2\], got \[1, 2\]"),
    ):
        with pytest.raises(ValueError, match=message):
            check_architecture(about, small(**wrong), "x.pkl")


TAPS = torch.tensor([1.0, 2.0, 2.0, 1.0])
REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "VE's own preconditioning": (
        lambda: snapshot("VEPrecond"),
        "need a network of class EDMPrecond, .*got VEPrecond",
    ),
    "DDPM++ with Fourier features": (
        lambda: save(song(DDPMpp, (1, 2)) | {"model.map_noise.freqs": torch.ones(32)}),
        "got embedding_type fourier without encoder_type residual, resample_filter of 4x4 in a So",
    ),
    "a standard encoder": (
        lambda: save(without("_aux_residual")),
        "got embedding_type fourier, resample_filter of 4x4 without encoder_type residual",
    ),
    "positional features": (
        lambda: save(without("map_noise")),
        "got encoder_type residual, resample_filter of 4x4 without embedding_type fourier",
    ),
    "a skip encoder": (
        lambda: save(ours(**{"enc__8x8_aux_skip__weight": torch.ones(32, 1, 1, 1)})),
        "need encoder_type standard or residual, got skip, which is not supported: it has model.en",
    ),
    "a skip decoder": (
        lambda: save(ours(**{"dec__8x8_aux_up__resample_filter": plain.filter4()[None, None]})),
        "need decoder_type standard, got skip, which is not supported: it has model.dec.8x8_aux_up",
    ),
    "as many features as channels": (
        lambda: save(ours(map_layer0__weight=torch.ones(128, 32))),
        "need channel_mult_noise 2 of ncsnpp, got 1: 32 features .* for model_channels 32",
    ),
    "a wider embedding": (
        lambda: save(ours(map_layer0__weight=torch.ones(256, 64))),
        "need a network with channel_mult_emb 4, got 8",
    ),
    "another filter": (
        lambda: save(
            ours(**{"enc__4x4_down__skip__resample_filter": TAPS.outer(TAPS)[None, None] / 36})
        ),
        r"need the resampling filter of \[1, 3, 3, 1\] at model.enc.4x4_down.skip.resample_filter, "
        r"got one whose columns sum to 0.167, 0.333, 0.333, 0.167",
    ),
    "another box": (
        lambda: save(
            song(DDPMpp, (1, 2))
            | {"model.dec.16x16_up.skip.resample_filter": torch.full((1, 1, 2, 2), 0.5)}
        ),
        r"need the resampling filter of \[1, 1\] at model.dec.16x16_up.* sum to 1, 1",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_lies_between_the_networks_is_refused_by_what_it_is(tmp_path: Path, case: str) -> None:
    content, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        load(tmp_path, content())
