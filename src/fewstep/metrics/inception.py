"""Inception-v3 as of 2015-12-05, the network of the FID (Szegedy et al. 2016, arXiv:1512.00567).

Attribute names are the state-dict keys of torch-fidelity's file, which holds the weights of
Google's TensorFlow graph. What that graph does differently from torchvision's Inception-v3, and
what the published numbers therefore hang on: images are resized without half-pixel centres and
without antialiasing, average pools leave the padding out of the mean, the last block pools by
maximum, and there are 1008 classes.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.metrics.weights import fold_norm, read_weights

URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth"
)
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
RESOLUTION = 299
DIM, CLASSES = 2048, 1008
SPATIAL_CHANNELS = 7  # sFID: 7 * 17 * 17 = 2023 numbers, about as many as pool features


class ConvNorm(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        kernel: int | tuple[int, int],
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        """(B, c_in, H, W) -> (B, c_out, H', W')."""
        return F.relu(self.bn(self.conv(x)), inplace=True)


def _mean_pool(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class MixedA(nn.Module):
    """Three chains, up to 5x5, and a pool, on 35x35."""

    def __init__(self, c_in: int, c_pool: int) -> None:
        super().__init__()
        self.branch1x1 = ConvNorm(c_in, 64, 1)
        self.branch5x5_1 = ConvNorm(c_in, 48, 1)
        self.branch5x5_2 = ConvNorm(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = ConvNorm(c_in, 64, 1)
        self.branch3x3dbl_2 = ConvNorm(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = ConvNorm(96, 96, 3, padding=1)
        self.branch_pool = ConvNorm(c_in, c_pool, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, c_in, H, W) -> (B, 224 + c_pool, H, W)."""
        chains = [
            self.branch1x1(x),
            self.branch5x5_2(self.branch5x5_1(x)),
            self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
            self.branch_pool(_mean_pool(x)),
        ]
        return torch.cat(chains, 1)


class MixedB(nn.Module):
    """Halves the resolution, 35x35 to 17x17."""

    def __init__(self, c_in: int) -> None:
        super().__init__()
        self.branch3x3 = ConvNorm(c_in, 384, 3, stride=2)
        self.branch3x3dbl_1 = ConvNorm(c_in, 64, 1)
        self.branch3x3dbl_2 = ConvNorm(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = ConvNorm(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, c_in, H, W) -> (B, c_in + 480, (H - 1) / 2, (W - 1) / 2)."""
        chains = [
            self.branch3x3(x),
            self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
            F.max_pool2d(x, 3, stride=2),
        ]
        return torch.cat(chains, 1)


class MixedC(nn.Module):
    """7x7 in two parts, 1x7 and 7x1, `width` channels inside, on 17x17."""

    def __init__(self, width: int) -> None:
        super().__init__()
        across: dict[str, Any] = {"kernel": (1, 7), "padding": (0, 3)}
        down: dict[str, Any] = {"kernel": (7, 1), "padding": (3, 0)}
        self.branch1x1 = ConvNorm(768, 192, 1)
        self.branch7x7_1 = ConvNorm(768, width, 1)
        self.branch7x7_2 = ConvNorm(width, width, **across)
        self.branch7x7_3 = ConvNorm(width, 192, **down)
        self.branch7x7dbl_1 = ConvNorm(768, width, 1)
        self.branch7x7dbl_2 = ConvNorm(width, width, **down)
        self.branch7x7dbl_3 = ConvNorm(width, width, **across)
        self.branch7x7dbl_4 = ConvNorm(width, width, **down)
        self.branch7x7dbl_5 = ConvNorm(width, 192, **across)
        self.branch_pool = ConvNorm(768, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 768, H, W) -> (B, 768, H, W)."""
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        chains = [
            self.branch1x1(x),
            self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x))),
            self.branch7x7dbl_5(self.branch7x7dbl_4(double)),
            self.branch_pool(_mean_pool(x)),
        ]
        return torch.cat(chains, 1)


class MixedD(nn.Module):
    """Halves the resolution, 17x17 to 8x8."""

    def __init__(self) -> None:
        super().__init__()
        self.branch3x3_1 = ConvNorm(768, 192, 1)
        self.branch3x3_2 = ConvNorm(192, 320, 3, stride=2)
        self.branch7x7x3_1 = ConvNorm(768, 192, 1)
        self.branch7x7x3_2 = ConvNorm(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = ConvNorm(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = ConvNorm(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 768, H, W) -> (B, 1280, (H - 1) / 2, (W - 1) / 2)."""
        long = self.branch7x7x3_2(self.branch7x7x3_1(x))
        chains = [
            self.branch3x3_2(self.branch3x3_1(x)),
            self.branch7x7x3_4(self.branch7x7x3_3(long)),
            F.max_pool2d(x, 3, stride=2),
        ]
        return torch.cat(chains, 1)


class MixedE(nn.Module):
    """Chains that fork into 1x3 and 3x1, on 8x8."""

    def __init__(self, c_in: int, max_pool: bool) -> None:
        super().__init__()
        self.max_pool = max_pool
        across: dict[str, Any] = {"kernel": (1, 3), "padding": (0, 1)}
        down: dict[str, Any] = {"kernel": (3, 1), "padding": (1, 0)}
        self.branch1x1 = ConvNorm(c_in, 320, 1)
        self.branch3x3_1 = ConvNorm(c_in, 384, 1)
        self.branch3x3_2a = ConvNorm(384, 384, **across)
        self.branch3x3_2b = ConvNorm(384, 384, **down)
        self.branch3x3dbl_1 = ConvNorm(c_in, 448, 1)
        self.branch3x3dbl_2 = ConvNorm(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = ConvNorm(384, 384, **across)
        self.branch3x3dbl_3b = ConvNorm(384, 384, **down)
        self.branch_pool = ConvNorm(c_in, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, c_in, H, W) -> (B, 2048, H, W)."""
        single, double = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = F.max_pool2d(x, 3, stride=1, padding=1) if self.max_pool else _mean_pool(x)
        chains = [
            self.branch1x1(x),
            self.branch3x3_2a(single),
            self.branch3x3_2b(single),
            self.branch3x3dbl_3a(double),
            self.branch3x3dbl_3b(double),
            self.branch_pool(pooled),
        ]
        return torch.cat(chains, 1)


class Inception(nn.Module):
    """The whole network of the published file; `forward` gives what the metrics need of it."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNorm(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = ConvNorm(32, 32, 3)
        self.Conv2d_2b_3x3 = ConvNorm(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = ConvNorm(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvNorm(80, 192, 3)
        self.Mixed_5b = MixedA(192, 32)
        self.Mixed_5c = MixedA(256, 64)
        self.Mixed_5d = MixedA(288, 64)
        self.Mixed_6a = MixedB(288)
        self.Mixed_6b = MixedC(128)
        self.Mixed_6c = MixedC(160)
        self.Mixed_6d = MixedC(160)
        self.Mixed_6e = MixedC(192)
        self.Mixed_7a = MixedD()
        self.Mixed_7b = MixedE(1280, max_pool=False)
        self.Mixed_7c = MixedE(2048, max_pool=True)
        self.fc = nn.Linear(DIM, CLASSES)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Features of images.

        Args:
            images: uint8, shape (B, C, H, W) with C = 1 (grey, replicated to RGB) or 3.

        Returns:
            features: spatial means of the last block, (B, 2048), of FID, KID, precision, recall.
            logits: without the bias, as the Inception Score has always been computed, (B, 1008).
            spatial: 7 channels of Mixed_6d's first branch, row by row, channels last, (B, 2023):
                TensorFlow's `mixed_6/conv:0`, which sFID (Nash et al. 2021, arXiv:2103.03841) is
                of in ADM's evaluation (Dhariwal & Nichol 2021, arXiv:2105.05233).
        """
        x = (resize_like_tensorflow1(images.float(), RESOLUTION) - 128) / 128
        x = x.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
        x = self._stem(x)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))
        x = self.Mixed_6d(x)
        # the first of the concatenated branches
        spatial = x[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        x = self.Mixed_7a(self.Mixed_6e(x))
        features = self.Mixed_7c(self.Mixed_7b(x)).mean((2, 3))
        logits = features @ self.fc.weight.T
        return {"features": features, "logits": logits, "spatial": spatial}

    def _stem(self, x: Tensor) -> Tensor:
        """(B, 3, 299, 299) -> (B, 192, 35, 35)."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))
        return F.max_pool2d(x, 3, stride=2)


def resize_like_tensorflow1(images: Tensor, size: int) -> Tensor:
    """Bilinear resize of TensorFlow 1: output pixel j samples input position j * W / size.

    No half-pixel centres and no antialiasing, so the image shifts by up to half a pixel; scores
    with another resize are other scores (Parmar et al. 2022, arXiv:2104.11222).

    Args:
        images: float, shape (B, C, H, W).

    Returns:
        Shape (B, C, size, size).
    """
    images = _lerp(images, size, dim=3)
    return _lerp(images, size, dim=2)


def _lerp(images: Tensor, size: int, dim: int) -> Tensor:
    last = images.shape[dim] - 1
    position = torch.arange(size, device=images.device) * torch.tensor((last + 1) / size)
    low = position.long()
    fraction = (position - low).reshape([-1 if d == dim else 1 for d in range(4)])
    left = images.index_select(dim, low)
    right = images.index_select(dim, (low + 1).clamp(max=last))
    return left + (right - left) * fraction


def load_inception(path: Path, sha256: str = SHA256) -> Inception:
    """The network with weights from a file, in eval mode, batch norms folded.

    Args:
        path: torch-fidelity's file, downloaded from URL.
        sha256: of the file; default: of the published one.

    Raises:
        ValueError: no such file, another sha256, a pickle (NVIDIA's .pkl, which would have to be
            executed), or the weights of another network.
    """
    network = Inception()
    try:
        state = read_weights(path, sha256, URL, "metric.weights")
        network.load_state_dict(state)
    except RuntimeError as error:  # keys or shapes
        raise ValueError(
            f"need the weights of {URL}, got other names or shapes in {path} "
            "(params.yaml: metric.weights)"
        ) from error
    network.eval().requires_grad_(False)
    for module in network.modules():
        if isinstance(module, ConvNorm):
            fold_norm(module, "conv", "bn")
    return network
