"""EDM2's network in numpy, float64, one equation after the other, for comparison with ours.

Written from the paper (Karras et al. 2024, arXiv:2312.02696, appendix B, configuration G) without
any of our layers. Weights have the names of published checkpoints. Run this file to record
tests/data/edm2.npz anew.
"""

from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray
Weights = dict[str, Array]

FILE = Path(__file__).parent / "data" / "edm2.npz"
EPSILON, SIGMA_DATA, HEAD = 1e-4, 0.5, 64
# resolution 16, grey, 5 classes, levels of 32 and 128 channels, 2 blocks each, attention at 8x8
RESOLUTION, CHANNELS, CLASSES, WIDTH, MULT, BLOCKS, ATTENDS = 16, 1, 5, 32, (1, 4), 2, (8,)


def unit(w: Array) -> Array:
    """Algorithm 1: each output's weights, divided by their norm; what a forward pass uses."""
    rows = w.reshape(len(w), -1)
    out = np.empty_like(rows)
    for i, row in enumerate(rows):
        magnitude = np.sqrt((row**2).mean())
        out[i] = row / (magnitude + EPSILON) / np.sqrt(row.size)
    return out.reshape(w.shape)


def conv(x: Array, w: Array) -> Array:
    w, k = unit(w), w.shape[-1]
    x = np.pad(x, ((0, 0), (0, 0), (k // 2,) * 2, (k // 2,) * 2))
    windows = np.lib.stride_tricks.sliding_window_view(x, (k, k), axis=(2, 3))
    return np.einsum("nchwij,ocij->nohw", windows, w)


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x)) / 0.596


def add(a: Array, b: Array, t: float) -> Array:
    return ((1 - t) * a + t * b) / np.sqrt((1 - t) ** 2 + t**2)


def cat(a: Array, b: Array, t: float) -> Array:
    n_a, n_b = a.shape[1], b.shape[1]
    c = np.sqrt((n_a + n_b) / ((1 - t) ** 2 + t**2))
    return np.concatenate([c * (1 - t) / np.sqrt(n_a) * a, c * t / np.sqrt(n_b) * b], axis=1)


def pixel_norm(x: Array) -> Array:
    return x / (np.sqrt((x**2).mean(axis=1, keepdims=True)) + EPSILON)


def fourier(c: Array, w: Weights, name: str) -> Array:
    return np.sqrt(2) * np.cos(np.outer(c, w[f"{name}.freqs"]) + w[f"{name}.phases"])


def attention(x: Array, qkv: Array, proj: Array) -> Array:
    n, c, height, width = x.shape
    heads = max(c // HEAD, 1)
    y = conv(x, qkv).reshape(n, heads, c // heads, 3, height * width)
    out = np.empty((n, heads, c // heads, height * width))
    for i in range(n):
        for h in range(heads):
            q, k, v = (
                part / (np.sqrt((part**2).mean(axis=0)) + EPSILON)
                for part in (y[i, h, :, j] for j in range(3))
            )
            logits = q.T @ k / np.sqrt(c // heads)
            share = np.exp(logits - logits.max(axis=1, keepdims=True))
            out[i, h] = v @ (share / share.sum(axis=1, keepdims=True)).T
    return conv(out.reshape(x.shape), proj)


def block(x: Array, emb: Array, w: Weights, name: str, kind: str) -> Array:
    """One block; kind is enc or dec, with _up or _down."""
    if kind.endswith("down"):
        x = (x[:, :, ::2, ::2] + x[:, :, 1::2, ::2] + x[:, :, ::2, 1::2] + x[:, :, 1::2, 1::2]) / 4
    if kind.endswith("up"):
        x = x.repeat(2, axis=2).repeat(2, axis=3)
    skip = w.get(f"{name}.conv_skip.weight")
    if kind.startswith("enc"):
        x = pixel_norm(x if skip is None else conv(x, skip))
    y = conv(silu(x), w[f"{name}.conv_res0.weight"])
    c = emb @ unit(w[f"{name}.emb_linear.weight"]).T * w[f"{name}.emb_gain"] + 1
    y = conv(silu(y * c[:, :, None, None]), w[f"{name}.conv_res1.weight"])
    if kind.startswith("dec") and skip is not None:
        x = conv(x, skip)
    x = add(x, y, 0.3)
    if f"{name}.attn_qkv.weight" in w:
        qkv, proj = w[f"{name}.attn_qkv.weight"], w[f"{name}.attn_proj.weight"]
        x = add(x, attention(x, qkv, proj), 0.3)
    return np.clip(x, -256, 256)


def run(x: Array, c_noise: Array, labels: Array, w: Weights) -> tuple[Array, Array]:
    """F(x; c_noise, labels), and the bottleneck."""
    emb = fourier(c_noise, w, "unet.emb_fourier") @ unit(w["unet.emb_noise.weight"]).T
    label = labels * np.sqrt(labels.shape[1]) @ unit(w["unet.emb_label.weight"]).T
    emb = silu(add(emb, label, 0.5))
    x = conv(np.concatenate([x, np.ones_like(x[:, :1])], axis=1), w["unet.enc.16x16_conv.weight"])
    skips = [x]
    for name in ("16x16_block0", "16x16_block1", "8x8_down", "8x8_block0", "8x8_block1"):
        x = block(x, emb, w, f"unet.enc.{name}", "enc_down" if "down" in name else "enc")
        skips.append(x)
    bottleneck = x
    for name in ("8x8_in0", "8x8_in1", "8x8_block0", "8x8_block1", "8x8_block2"):
        x = cat(x, skips.pop(), 0.5) if "block" in name else x
        x = block(x, emb, w, f"unet.dec.{name}", "dec")
    for name in ("16x16_up", "16x16_block0", "16x16_block1", "16x16_block2"):
        x = cat(x, skips.pop(), 0.5) if "block" in name else x
        x = block(x, emb, w, f"unet.dec.{name}", "dec_up" if "up" in name else "dec")
    assert not skips
    return conv(x, w["unet.out_conv.weight"]) * w["unet.out_gain"], bottleneck


def denoise(x: Array, sigma: Array, labels: Array, w: Weights) -> tuple[Array, Array, Array]:
    """D(x; sigma), the bottleneck, and u(sigma)."""
    total = np.sqrt(sigma**2 + SIGMA_DATA**2)[:, None, None, None]
    s, c_noise = sigma[:, None, None, None], np.log(sigma) / 4
    F_x, bottleneck = run(x / total, c_noise, labels, w)
    D_x = (SIGMA_DATA / total) ** 2 * x + s * SIGMA_DATA / total * F_x
    u = fourier(c_noise, w, "logvar_fourier") @ unit(w["logvar_linear.weight"]).T
    return D_x, bottleneck, u[:, 0]


def shapes() -> dict[str, tuple[int, ...]]:
    """Of all weights, by their published names."""
    emb = WIDTH * max(MULT)
    found: dict[str, tuple[int, ...]] = {
        "unet.emb_fourier.freqs": (WIDTH,),
        "unet.emb_fourier.phases": (WIDTH,),
        "unet.emb_noise.weight": (emb, WIDTH),
        "unet.emb_label.weight": (emb, CLASSES),
        "unet.enc.16x16_conv.weight": (WIDTH, CHANNELS + 1, 3, 3),
        "unet.out_conv.weight": (CHANNELS, WIDTH, 3, 3),
        "unet.out_gain": (),
        "logvar_fourier.freqs": (128,),
        "logvar_fourier.phases": (128,),
        "logvar_linear.weight": (1, 128),
    }
    a, b = (WIDTH * m for m in MULT)
    # name, input and output channels, attention
    blocks = [
        *(("enc.16x16_block0", a, a, 0), ("enc.16x16_block1", a, a, 0), ("enc.8x8_down", a, a, 0)),
        *(("enc.8x8_block0", a, b, 1), ("enc.8x8_block1", b, b, 1)),
        *(("dec.8x8_in0", b, b, 1), ("dec.8x8_in1", b, b, 0)),
        *(("dec.8x8_block0", b + b, b, 1), ("dec.8x8_block1", b + b, b, 1)),
        *(("dec.8x8_block2", b + a, b, 1), ("dec.16x16_up", b, b, 0)),
        *(("dec.16x16_block0", b + a, a, 0), ("dec.16x16_block1", a + a, a, 0)),
        ("dec.16x16_block2", a + a, a, 0),
    ]
    for name, n_in, n_out, attends in blocks:
        at = f"unet.{name}"
        first = n_out if name.startswith("enc") else n_in
        found[f"{at}.emb_gain"] = ()
        found[f"{at}.conv_res0.weight"] = (n_out, first, 3, 3)
        found[f"{at}.emb_linear.weight"] = (n_out, emb)
        found[f"{at}.conv_res1.weight"] = (n_out, n_out, 3, 3)
        if n_in != n_out:
            found[f"{at}.conv_skip.weight"] = (n_out, n_in, 1, 1)
        if attends:
            found[f"{at}.attn_qkv.weight"] = (3 * n_out, n_out, 1, 1)
            found[f"{at}.attn_proj.weight"] = (n_out, n_out, 1, 1)
    return found


def weights(scale: float = 1.7) -> Weights:
    """Random weights of another magnitude than 1, as averages have it."""
    rng, found = np.random.default_rng(0), Weights()
    for name, shape in shapes().items():
        spread = 2 * np.pi if ".freqs" in name or ".phases" in name else scale
        found[name] = np.asarray(spread * rng.standard_normal(shape)).astype(np.float32)
    return found


def inputs() -> tuple[Array, Array, Array]:
    """Noisy images, their sigma, and labels, the last of which is missing."""
    rng, sigma = np.random.default_rng(1), np.array([0.01, 0.6, 70.0])
    x = rng.standard_normal((3, CHANNELS, RESOLUTION, RESOLUTION)) * sigma[:, None, None, None]
    return x.astype(np.float32), sigma.astype(np.float32), np.eye(CLASSES)[:3] * [[1], [1], [0]]


def vectors() -> dict[str, Array]:
    x, sigma, labels = (part.astype(np.float64) for part in inputs())
    w = {name: value.astype(np.float64) for name, value in weights().items()}
    return dict(zip(("D_x", "bottleneck", "u"), denoise(x, sigma, labels, w), strict=True))


if __name__ == "__main__":
    recorded: dict[str, Any] = {name: v.astype(np.float32) for name, v in vectors().items()}
    np.savez_compressed(FILE, **recorded)
