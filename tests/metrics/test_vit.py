"""DINOv2 and CLIP with random weights: against torch's encoder layer and torch-fidelity's CLIP;
their preprocessing; their files."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fewstep.files import sha256_file
from fewstep.metrics.clip import MEAN, STD, load_clip
from fewstep.metrics.dinov2 import fit_positions, load_dinov2
from fewstep.metrics.features import load_features
from fewstep.metrics.vit import Block, Vit, normalise
from fidelity import fidelity_module

WIDTH, DEPTH, PATCH = 128, 2, 14


def randomise(module: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.1 + (parameter.ndim == 1 and parameter.mean() == 1))


def images(count: int = 2, size: int = 32, channels: int = 3) -> Tensor:
    rng = np.random.default_rng(0)
    return torch.from_numpy(rng.integers(0, 256, (count, channels, size, size), np.uint8))


def save(state: dict[str, Tensor], path: Path) -> tuple[Path, str]:
    torch.save(state, path)
    return path, sha256_file(path)


def dinov2_state(side: int = 37) -> dict[str, Tensor]:
    """As in Meta's files."""
    vit = Vit(WIDTH, DEPTH, PATCH, side)
    randomise(vit)
    return {**vit.state_dict(), "mask_token": torch.zeros(1, WIDTH)}


def clip_state(theirs: nn.Module) -> dict[str, Tensor]:
    """Weights of torch-fidelity's image tower under the names of Hugging Face's files."""
    tower, found = "vision_model.", {}
    names = {
        "class_embedding": "embeddings.class_embedding",
        "positional_embedding": "embeddings.position_embedding.weight",
        "conv1.weight": "embeddings.patch_embedding.weight",
        **{f"ln_pre.{p}": f"pre_layrnorm.{p}" for p in ("weight", "bias")},
        **{f"ln_post.{p}": f"post_layernorm.{p}" for p in ("weight", "bias")},
    }
    state = theirs.state_dict()
    for key, value in state.items():
        if key in names:
            found[tower + names[key]] = value
        if key.startswith("transformer.resblocks."):
            index, _, rest = key.removeprefix("transformer.resblocks.").partition(".")
            layer = f"{tower}encoder.layers.{index}."
            if rest.startswith("attn.in_proj_"):
                kind = rest.removeprefix("attn.in_proj_")
                for which, part in zip("qkv", value.chunk(3), strict=True):
                    found[f"{layer}self_attn.{which}_proj.{kind}"] = part.clone()
                continue
            for old, new in (
                ("attn.out_proj", "self_attn.out_proj"),
                ("ln_", "layer_norm"),
                ("mlp.c_fc", "mlp.fc1"),
                ("mlp.c_proj", "mlp.fc2"),
            ):
                rest = rest.replace(old, new)
            found[layer + rest] = value
    found["visual_projection.weight"] = state["proj"].T.contiguous()
    found[f"{tower}embeddings.position_ids"] = torch.arange(5)[None]
    found["text_model.final_layer_norm.weight"] = torch.zeros(3)
    return found


@pytest.fixture
def reference_clip() -> Any:  # noqa: ANN401
    module = fidelity_module("feature_extractor_clip")
    tower = module.VisionTransformer(56, PATCH, WIDTH, DEPTH, WIDTH // 64, 32)
    randomise(tower)
    return tower.eval()


@torch.no_grad()
def test_block_is_torchs_encoder_layer() -> None:
    block = Block(WIDTH, 1e-6, quick_gelu=False, scaled=True).eval()
    randomise(block)
    layer = nn.TransformerEncoderLayer(
        WIDTH, WIDTH // 64, 4 * WIDTH, 0.0, "gelu", 1e-6, batch_first=True, norm_first=True
    ).eval()
    scales = [p for name, p in block.named_parameters() if "gamma" in name]
    # folded, since torch's layer has none
    copies = (
        (layer.self_attn.in_proj_weight, block.attn.qkv.weight),
        (layer.self_attn.in_proj_bias, block.attn.qkv.bias),
        (layer.self_attn.out_proj.weight, scales[0][:, None] * block.attn.proj.weight),
        (layer.self_attn.out_proj.bias, scales[0] * block.attn.proj.bias),
        (layer.linear1.weight, block.mlp.fc1.weight),
        (layer.linear1.bias, block.mlp.fc1.bias),
        (layer.linear2.weight, scales[1][:, None] * block.mlp.fc2.weight),
        (layer.linear2.bias, scales[1] * block.mlp.fc2.bias),
        *zip(layer.norm1.parameters(), block.norm1.parameters(), strict=True),
        *zip(layer.norm2.parameters(), block.norm2.parameters(), strict=True),
    )
    for target, source in copies:
        target.copy_(source)
    x = torch.randn(3, 11, WIDTH)
    torch.testing.assert_close(block(x), layer(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("safetensors", [False, True])
def test_clip_is_torch_fidelitys(
    reference_clip: Any,  # noqa: ANN401
    safetensors: bool,
    tmp_path: Path,
) -> None:
    path = tmp_path / "weights"
    if safetensors:
        save_file(clip_state(reference_clip), path)
    else:
        torch.save(clip_state(reference_clip), path)
    ours = load_clip(path, sha256_file(path))
    expected = reference_clip(normalise(images(), 56, MEAN, STD, antialias=False))
    assert expected.shape == (2, 32) and float((expected[0] - expected[1]).abs().max()) > 0.01
    torch.testing.assert_close(ours(images())["features"], expected, rtol=1e-4, atol=1e-5)


def cubic(distance: float) -> float:
    """Keys' kernel with the -0.75 that torch uses."""
    x, a = abs(distance), -0.75
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def test_positions_are_sampled_with_the_scale_of_a_tenth_of_a_patch_more() -> None:
    column = np.random.default_rng(0).normal(size=37)
    square = torch.from_numpy(np.stack([np.tile(column, 37), np.repeat(column, 37)], 1)).float()
    positions = torch.cat([torch.full((1, 2), -5.0), square])[None]
    fitted = fit_positions(positions, 16)
    assert fitted.shape == (1, 257, 2) and fitted[0, 0].tolist() == [-5, -5]
    expected = []
    for j in range(16):
        at = (j + 0.5) * 37 / 16.1 - 0.5
        near = range(int(np.floor(at)) - 1, int(np.floor(at)) + 3)
        expected.append(sum(cubic(at - i) * column[min(max(i, 0), 36)] for i in near))
    columns, rows = fitted[0, 1:].T.reshape(2, 16, 16).numpy()
    np.testing.assert_allclose(columns, np.tile(expected, (16, 1)), atol=1e-4)
    np.testing.assert_allclose(rows.T, np.tile(expected, (16, 1)), atol=1e-4)
    assert fit_positions(positions, 37) is positions


def test_normalised_images_have_the_stated_mean_and_scale() -> None:
    flat = torch.full((1, 1, 16, 16), 255, dtype=torch.uint8)
    x = normalise(flat, 28, MEAN, STD, antialias=True)
    assert x.shape == (1, 3, 28, 28)
    torch.testing.assert_close(x.mean((0, 2, 3)), (1 - MEAN) / STD)


def test_features_say_what_they_are_and_take_grey_images(
    tmp_path: Path,
    reference_clip: Any,  # noqa: ANN401
) -> None:
    dino, dino_sha = save(dinov2_state(), tmp_path / "dino.pth")
    clip, clip_sha = save(clip_state(reference_clip), tmp_path / "clip.bin")
    for name, label, path, sha256, dim in (
        ("dinov2", "FD-DINOv2", dino, dino_sha, WIDTH),
        ("clip", "FD-CLIP", clip, clip_sha, 32),
    ):
        extractor = load_features(name, "cpu", path, sha256)
        assert (extractor.label, extractor.dim, extractor.sha256) == (label, dim, sha256)
        grey = images(channels=1)
        assert extractor(grey).shape == (2, dim)
        colour = extractor(grey.expand(-1, 3, -1, -1))
        torch.testing.assert_close(extractor(grey), colour, rtol=1e-4, atol=1e-5)
        with pytest.raises(ValueError, match=f"need the weights of {name}, https.*metric.weights"):
            load_features(name, "cpu", path)


@pytest.mark.parametrize("load", [load_dinov2, load_clip])
def test_weights_of_other_networks_are_refused(load: Any, tmp_path: Path) -> None:  # noqa: ANN401
    for number, state in enumerate(
        (
            {"conv.weight": torch.zeros(3)},
            {k: v for k, v in dinov2_state().items() if "mlp" not in k},
            {"patch_embed.proj.weight": torch.zeros(3), "pos_embed": torch.zeros(3)},
            {"vision_model.encoder.layers.0.self_attn.q_proj.weight": torch.zeros(3)},
        )
    ):
        path, sha256 = save(state, tmp_path / f"{number}.pth")
        with pytest.raises(ValueError, match=f"got other names or shapes in .*{number}.pth"):
            load(path, sha256)
