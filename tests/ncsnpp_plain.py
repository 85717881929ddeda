"""NCSN++ in float64, one equation after the other, for comparison with ours.

Written from the papers (Song et al. 2021, arXiv:2011.13456, appendix H; Karras et al. 2022,
arXiv:2206.00364, appendix C and Table 7) without any of our layers. Weights have the names of EDM's
checkpoints.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]

# resolution 16, grey, 5 classes, levels of 32, 64 and 64 channels, 2 blocks each, attention at 8x8
RESOLUTION, CHANNELS, CLASSES, WIDTH, MULT, BLOCKS, ATTENDS = 16, 1, 5, 32, (1, 2, 2), 2, (8,)
HALF = math.sqrt(0.5)


def filter4() -> Tensor:
    row = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=torch.float64)
    return torch.outer(row, row) / 64


def down(x: Tensor) -> Tensor:
    """Channel by channel: filter, and keep every second pixel."""
    one = [F.conv2d(c[:, None], filter4()[None, None], stride=2, padding=1) for c in x.unbind(1)]
    return torch.cat(one, dim=1)


def up(x: Tensor) -> Tensor:
    """Put zeros between the pixels, and filter with four times the weight."""
    n, c, height, width = x.shape
    wide = torch.zeros(n, c, 2 * height + 3, 2 * width + 3, dtype=x.dtype)
    wide[:, :, 2:-2:2, 2:-2:2] = x
    weight = 4 * filter4()[None, None]
    return torch.cat([F.conv2d(part[:, None], weight) for part in wide.unbind(1)], dim=1)


def pyramid(x: Tensor, w: Weights, name: str) -> Tensor:
    """3x3 convolution over padding for both filters, then the filter, then the bias."""
    y = F.conv2d(x, w[f"{name}.weight"], padding=2)
    one = [F.conv2d(c[:, None], filter4()[None, None], stride=2) for c in y.unbind(1)]
    return torch.cat(one, dim=1) + w[f"{name}.bias"][:, None, None]


def conv(x: Tensor, w: Weights, name: str) -> Tensor:
    weight = w[f"{name}.weight"]
    return F.conv2d(x, weight, w[f"{name}.bias"], padding=weight.shape[-1] // 2)


def norm(x: Tensor, w: Weights, name: str) -> Tensor:
    groups = min(32, x.shape[1] // 4)
    return F.group_norm(x, groups, w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)


def linear(x: Tensor, w: Weights, name: str) -> Tensor:
    return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def embed(c_noise: Tensor, labels: Tensor, w: Weights) -> Tensor:
    angle = 2 * math.pi * torch.outer(c_noise, w["map_noise.freqs"])
    emb = torch.cat([angle.sin(), angle.cos()], dim=1)
    if "map_label.weight" in w:
        emb = emb + linear(labels * math.sqrt(labels.shape[1]), w, "map_label")
    return F.silu(linear(F.silu(linear(emb, w, "map_layer0")), w, "map_layer1"))


def block(x: Tensor, emb: Tensor, w: Weights, name: str) -> Tensor:
    resample = down if name.endswith("_down") else up if name.endswith("_up") else lambda x: x
    h = conv(resample(F.silu(norm(x, w, f"{name}.norm0"))), w, f"{name}.conv0")
    h = h + linear(emb, w, f"{name}.affine")[:, :, None, None]
    h = conv(F.silu(norm(h, w, f"{name}.norm1")), w, f"{name}.conv1")
    if f"{name}.skip.weight" in w:
        x = conv(resample(x), w, f"{name}.skip")
    x = (x + h) * HALF
    if f"{name}.qkv.weight" in w:
        n, c, height, width = x.shape
        q, k, v = conv(norm(x, w, f"{name}.norm2"), w, f"{name}.qkv").reshape(n, c, 3, -1).unbind(2)
        share = (q.transpose(1, 2) @ k / math.sqrt(c)).softmax(dim=2)
        a = (v @ share.transpose(1, 2)).reshape(n, c, height, width)
        x = (x + conv(a, w, f"{name}.proj")) * HALF
    return x


def run(x: Tensor, c_noise: Tensor, labels: Tensor, w: Weights) -> tuple[Tensor, Tensor]:
    """F(x; c_noise, labels), and the bottleneck."""
    w = {name: weight.double() for name, weight in w.items()}
    emb = embed(c_noise.double(), labels.double(), w)
    aux = x = x.double()
    x = conv(x, w, "enc.16x16_conv")
    skips = [x]
    for name in ("16x16_block0", "16x16_block1"):
        skips.append(block(skips[-1], emb, w, f"enc.{name}"))
    for level in ("8x8", "4x4"):
        x = block(skips[-1], emb, w, f"enc.{level}_down")
        aux = (x + pyramid(aux, w, f"enc.{level}_aux_residual")) * HALF
        skips.append(aux)
        for i in range(2):
            skips.append(block(skips[-1], emb, w, f"enc.{level}_block{i}"))
    bottleneck = x = skips[-1]
    for name in ("4x4_in0", "4x4_in1"):
        x = block(x, emb, w, f"dec.{name}")
    for level in ("4x4", "8x8", "16x16"):
        if level != "4x4":
            x = block(x, emb, w, f"dec.{level}_up")
        for i in range(3):
            x = block(torch.cat([x, skips.pop()], dim=1), emb, w, f"dec.{level}_block{i}")
    assert not skips
    x = F.silu(norm(x, w, "dec.16x16_aux_norm"))
    return conv(x, w, "dec.16x16_aux_conv"), bottleneck


def shapes() -> dict[str, tuple[int, ...]]:
    """Of all weights, by their published names."""
    a, b = WIDTH, 2 * WIDTH
    found: dict[str, tuple[int, ...]] = {"map_noise.freqs": (WIDTH,)}

    def layer(name: str, *shape: int) -> None:
        found[f"{name}.weight"], found[f"{name}.bias"] = shape, shape[:1]

    layer("map_label", 2 * WIDTH, CLASSES)
    layer("map_layer0", 4 * WIDTH, 2 * WIDTH)
    layer("map_layer1", 4 * WIDTH, 4 * WIDTH)
    layer("enc.16x16_conv", a, CHANNELS, 3, 3)
    layer("enc.8x8_aux_residual", a, CHANNELS, 3, 3)
    layer("enc.4x4_aux_residual", b, a, 3, 3)
    layer("dec.16x16_aux_norm", a)
    layer("dec.16x16_aux_conv", CHANNELS, a, 3, 3)
    # name, input and output channels, attention
    blocks = [
        *(("enc.16x16_block0", a, a, 0), ("enc.16x16_block1", a, a, 0)),
        *(("enc.8x8_down", a, a, 0), ("enc.8x8_block0", a, b, 1), ("enc.8x8_block1", b, b, 1)),
        *(("enc.4x4_down", b, b, 0), ("enc.4x4_block0", b, b, 0), ("enc.4x4_block1", b, b, 0)),
        *(("dec.4x4_in0", b, b, 1), ("dec.4x4_in1", b, b, 0), ("dec.4x4_block0", 2 * b, b, 0)),
        *(("dec.4x4_block1", 2 * b, b, 0), ("dec.4x4_block2", 2 * b, b, 0)),
        *(("dec.8x8_up", b, b, 0), ("dec.8x8_block0", 2 * b, b, 0)),
        *(("dec.8x8_block1", 2 * b, b, 0), ("dec.8x8_block2", b + a, b, 1)),
        *(("dec.16x16_up", b, b, 0), ("dec.16x16_block0", b + a, a, 0)),
        *(("dec.16x16_block1", 2 * a, a, 0), ("dec.16x16_block2", 2 * a, a, 0)),
    ]
    for name, n_in, n_out, attends in blocks:
        layer(f"{name}.norm0", n_in)
        layer(f"{name}.conv0", n_out, n_in, 3, 3)
        layer(f"{name}.affine", n_out, 4 * WIDTH)
        layer(f"{name}.norm1", n_out)
        layer(f"{name}.conv1", n_out, n_out, 3, 3)
        resamples = name.endswith(("_up", "_down"))
        if n_in != n_out or resamples:
            layer(f"{name}.skip", n_out, n_in, 1, 1)
        if resamples:
            found[f"{name}.conv0.resample_filter"] = (1, 1, 4, 4)
            found[f"{name}.skip.resample_filter"] = (1, 1, 4, 4)
        if attends:
            layer(f"{name}.norm2", n_out)
            layer(f"{name}.qkv", 3 * n_out, n_out, 1, 1)
            layer(f"{name}.proj", n_out, n_out, 1, 1)
    for level in ("8x8", "4x4"):
        found[f"enc.{level}_aux_residual.resample_filter"] = (1, 1, 4, 4)
    return found


def weights() -> Weights:
    """Random ones, of a size that keeps activations near 1."""
    generator, found = torch.Generator().manual_seed(0), Weights()
    for name, shape in shapes().items():
        if name.endswith("resample_filter"):
            found[name] = filter4()[None, None].float()
            continue
        w = torch.randn(shape, generator=generator)
        if len(shape) > 1:
            w = w / math.sqrt(math.prod(shape[1:]))
        elif name == "map_noise.freqs":
            w = 16 * w
        else:
            w = 0.3 * w + ("norm" in name and name.endswith("weight"))
        found[name] = w
    return found


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Images, noise levels as the network gets them, and labels, the last of which is missing."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, CHANNELS, RESOLUTION, RESOLUTION, generator=generator)
    labels = torch.eye(CLASSES)[:3] * torch.tensor([[1], [1], [0]])
    return x, torch.tensor([-1.2, 0.03, 1.0]), labels
