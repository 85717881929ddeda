"""Inception-v3 as of 2015-12-05, the network of the FID (Szegedy et al. 2016, arXiv:1512.00567).

Attribute names are the state-dict keys of torch-fidelity's file, which holds the weights of
Google's TensorFlow graph. The published numbers depend on four differences between that graph and
torchvision's Inception-v3: images are resized without half-pixel centres and antialiasing, average
pools leave the padding out of the mean, the last block uses a max pool, and there are 1008 classes.
"""

from functools import reduce
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.metrics.weights import fold_norm, load_network

URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth"
)
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
RESOLUTION = 299
DIM, CLASSES = 2048, 1008
SPATIAL_CHANNELS = 7  # sFID: 7 * 17 * 17 = 2023 numbers, about as many as the pool features

Kernel = int | tuple[int, int]
ACROSS, DOWN = (1, 7), (7, 1)


class Conv(NamedTuple):
    channels: int
    kernel: Kernel
    stride: int = 1


Chains = dict[str, list[Conv]]

A = {
    "1x1": [Conv(64, 1)],
    "5x5": [Conv(48, 1), Conv(64, 5)],
    "3x3dbl": [Conv(64, 1), Conv(96, 3), Conv(96, 3)],
}
B = {
    "3x3": [Conv(384, 3, stride=2)],
    "3x3dbl": [Conv(64, 1), Conv(96, 3), Conv(96, 3, stride=2)],
}
D = {
    "3x3": [Conv(192, 1), Conv(320, 3, stride=2)],
    "7x7x3": [Conv(192, 1), Conv(192, ACROSS), Conv(192, DOWN), Conv(192, 3, stride=2)],
}


def _c(width: int) -> Chains:
    """7x7 in two parts, with `width` channels inside."""
    last = [Conv(width, DOWN), Conv(width, ACROSS), Conv(width, DOWN), Conv(192, ACROSS)]
    return {
        "1x1": [Conv(192, 1)],
        "7x7": [Conv(width, 1), Conv(width, ACROSS), Conv(192, DOWN)],
        "7x7dbl": [Conv(width, 1), *last],
    }


class ConvNorm(nn.Module):
    """Convolution, batch norm, ReLU; `same` pads so that the size stays."""

    def __init__(
        self, c_in: int, c_out: int, kernel: Kernel, stride: int = 1, same: bool = False
    ) -> None:
        super().__init__()
        height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (height // 2, width // 2) if same else 0
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        """(B, c_in, H, W) -> (B, c_out, H', W')."""
        return F.relu(self.bn(self.conv(x)), inplace=True)


def _mean_pool(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class Mixed(nn.Module):
    """Chains of convolutions side by side and a pool, their outputs concatenated.

    The second convolution of the chain "5x5" has the state-dict key `branch5x5_2`; chains of one
    convolution have no number.

    Args:
        c_pool: channels of a convolution after a mean pool; with 0, a max pool of stride 2, which
            halves the resolution as the chains then do.
    """

    def __init__(self, c_in: int, chains: Chains, c_pool: int = 0) -> None:
        super().__init__()
        self.chains: list[list[str]] = []
        for name, convs in chains.items():
            numbers = [f"_{n + 1}" for n in range(len(convs))] if len(convs) > 1 else [""]
            self.chains.append([f"branch{name}{number}" for number in numbers])
            widths = [c_in, *(conv.channels for conv in convs)]
            for key, width, conv in zip(self.chains[-1], widths, convs, strict=False):
                self.add_module(key, ConvNorm(width, *conv, same=conv.stride == 1))
        self.branch_pool = ConvNorm(c_in, c_pool, 1) if c_pool else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, c_in, H, W) -> (B, channels of all chains, H', W')."""
        ends = [reduce(lambda h, key: getattr(self, key)(h), keys, x) for keys in self.chains]
        pool = self.branch_pool
        return torch.cat([*ends, pool(_mean_pool(x)) if pool else F.max_pool2d(x, 3, stride=2)], 1)


class MixedE(nn.Module):
    """Chains that fork into 1x3 and 3x1, on 8x8."""

    def __init__(self, c_in: int, max_pool: bool) -> None:
        super().__init__()
        self.max_pool = max_pool
        self.branch1x1 = ConvNorm(c_in, 320, 1)
        self.branch3x3_1 = ConvNorm(c_in, 384, 1)
        self.branch3x3_2a = ConvNorm(384, 384, (1, 3), same=True)
        self.branch3x3_2b = ConvNorm(384, 384, (3, 1), same=True)
        self.branch3x3dbl_1 = ConvNorm(c_in, 448, 1)
        self.branch3x3dbl_2 = ConvNorm(448, 384, 3, same=True)
        self.branch3x3dbl_3a = ConvNorm(384, 384, (1, 3), same=True)
        self.branch3x3dbl_3b = ConvNorm(384, 384, (3, 1), same=True)
        self.branch_pool = ConvNorm(c_in, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, c_in, H, W) -> (B, 2048, H, W)."""
        single, double = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = F.max_pool2d(x, 3, stride=1, padding=1) if self.max_pool else _mean_pool(x)
        ends = [
            self.branch1x1(x),
            self.branch3x3_2a(single),
            self.branch3x3_2b(single),
            self.branch3x3dbl_3a(double),
            self.branch3x3dbl_3b(double),
            self.branch_pool(pooled),
        ]
        return torch.cat(ends, 1)


class Inception(nn.Module):
    """The whole network of the published file; `forward` returns what the metrics need of it."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNorm(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = ConvNorm(32, 32, 3)
        self.Conv2d_2b_3x3 = ConvNorm(32, 64, 3, same=True)
        self.Conv2d_3b_1x1 = ConvNorm(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvNorm(80, 192, 3)
        self.Mixed_5b = Mixed(192, A, c_pool=32)  # 35x35
        self.Mixed_5c = Mixed(256, A, c_pool=64)
        self.Mixed_5d = Mixed(288, A, c_pool=64)
        self.Mixed_6a = Mixed(288, B)
        self.Mixed_6b = Mixed(768, _c(128), c_pool=192)  # 17x17
        self.Mixed_6c = Mixed(768, _c(160), c_pool=192)
        self.Mixed_6d = Mixed(768, _c(160), c_pool=192)
        self.Mixed_6e = Mixed(768, _c(192), c_pool=192)
        self.Mixed_7a = Mixed(768, D)
        self.Mixed_7b = MixedE(1280, max_pool=False)  # 8x8
        self.Mixed_7c = MixedE(2048, max_pool=True)
        self.fc = nn.Linear(DIM, CLASSES)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Features of images.

        Args:
            images: uint8, shape (B, C, H, W) with C = 1 (grey, replicated to RGB) or 3.

        Returns:
            features: spatial means of the last block, (B, 2048), for FID, KID, precision, recall.
            logits: without the bias, as the Inception Score has always been computed, (B, 1008).
            spatial: 7 channels of Mixed_6d's first branch, row by row, channels last, (B, 2023):
                TensorFlow's `mixed_6/conv:0`, on which ADM's evaluation (Dhariwal & Nichol 2021,
                arXiv:2105.05233) computes sFID (Nash et al. 2021, arXiv:2103.03841).
        """
        x = (resize_like_tensorflow1(images.float(), RESOLUTION) - 128) / 128
        # channels_last is the faster layout of convolutions, on CPUs and GPUs
        x = x.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))
        spatial = x[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        x = self.Mixed_7a(self.Mixed_6e(x))
        features = self.Mixed_7c(self.Mixed_7b(x)).mean((2, 3))
        logits = features @ self.fc.weight.T
        return {"features": features, "logits": logits, "spatial": spatial}


def resize_like_tensorflow1(images: Tensor, size: int) -> Tensor:
    """Bilinear resize of TensorFlow 1: output pixel j samples input position j * W / size.

    Without half-pixel centres and antialiasing, the image shifts by up to half a pixel. Scores
    after another resize are not comparable (Parmar et al. 2022, arXiv:2104.11222).

    Args:
        images: float, shape (B, C, H, W).

    Returns:
        Shape (B, C, size, size).
    """
    return _lerp(_lerp(images, size, dim=3), size, dim=2)


def _lerp(images: Tensor, size: int, dim: int) -> Tensor:
    last = images.shape[dim] - 1
    # the scale is rounded to float32 before the product, as in TensorFlow's kernel
    position = torch.arange(size, device=images.device) * torch.tensor((last + 1) / size)
    low = position.long()
    fraction = (position - low).reshape([-1 if d == dim else 1 for d in range(4)])
    left = images.index_select(dim, low)
    right = images.index_select(dim, (low + 1).clamp(max=last))
    return left + (right - left) * fraction


def load_inception(path: Path, sha256: str = SHA256) -> Inception:
    """The network in a copy of torch-fidelity's file (URL), frozen, with batch norms folded.

    Raises:
        ValueError: as `load_network`.
    """

    def build(state: dict[str, Tensor]) -> Inception:
        network = Inception()
        network.load_state_dict(state)
        return network

    network = load_network(path, sha256, URL, build)
    for module in network.modules():
        if isinstance(module, ConvNorm):
            fold_norm(module, "conv", "bn")
    return network
