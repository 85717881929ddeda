"""What the rest of the code asks of a network and of its blocks."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Of q, k and v, each (B, heads, H W, channels of a head)."""


@dataclass(frozen=True)
class Architecture:
    """What every network is built from. Levels halve the resolution, beginning with the images'."""

    resolution: int  # height and width of the images
    channels: int  # of the images
    classes: int  # length of a label row
    model_channels: int  # width that the multipliers refer to
    channel_mult: tuple[int, ...]  # one for each level
    num_blocks: int  # residual blocks of a level
    attn_resolutions: tuple[int, ...]  # the levels with attention
    dropout: float = 0.0
    label_dropout: float = 0.0  # see Network
    dropout_resolutions: tuple[int, ...] | None = None  # of blocks with dropout; None: all

    def dropout_at(self, resolution: int) -> float:
        """The rate of dropout in a block whose output has that resolution."""
        where = self.dropout_resolutions
        return self.dropout if where is None or resolution in where else 0.0


class Block(nn.Module):
    """A part of a network whose activations can be recomputed; `compute` is what it does.

    Attributes:
        resolution: height and width of its output.
        attention: how its attention is computed, where it has any.
        recompute: the backward pass computes the activations again instead of keeping them.
        takes_skip: its input is joined by an encoder output (in the decoder of a U-Net).
    """

    attention: Attention
    recompute = False
    takes_skip = False

    def __init__(self, resolution: int) -> None:
        super().__init__()
        self.resolution = resolution

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self.compute, x, emb, use_reentrant=False)
        return self.compute(x, emb)

    def compute(self, x: Tensor, emb: Tensor) -> Tensor:
        raise NotImplementedError


class Network(nn.Module):
    """F(x; c_noise, labels), built from an Architecture.

    Attributes:
        architecture: what it was built from.
        label_dropout: probability with which train mode zeroes a label row.
        layout: the order in which activations lie in memory.
        logvar: u(sigma) (B,) from c_noise (B,), which weights the denoising loss (EDM2, eq. 16);
            None in networks without one. Only `denoising` trains it.
        bottleneck_channels: C' of what `encode` returns.
        bottleneck_resolution: H' and W' of what `encode` returns.
    """

    bottleneck_channels: int
    bottleneck_resolution: int
    layout = torch.channels_last

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture, self.label_dropout = architecture, architecture.label_dropout
        # an attribute of the class would hide the module that a subclass sets
        self.logvar: nn.Module | None = None

    def forward(self, x: Tensor, c_noise: Tensor, labels: Tensor) -> Tensor:
        """F, of the shape of x.

        Args:
            x: images (B, C, H, W).
            c_noise: noise levels (B,).
            labels: one-hot rows (B, classes); a zero row means no label.
        """
        raise NotImplementedError

    def encode(self, x: Tensor, c_noise: Tensor, labels: Tensor) -> Tensor:
        """The bottleneck (B, C', H', W') of the same arguments, which a discriminator sees."""
        raise NotImplementedError

    def blocks(self) -> Iterator[Block]:
        """The blocks in the order of computation."""
        return (part for part in self.modules() if isinstance(part, Block))

    def drop_labels(self, labels: Tensor) -> Tensor:
        """The labels, in train mode without those that `label_dropout` hits."""
        if not (self.training and self.label_dropout):
            return labels
        keep = torch.rand(len(labels), 1, device=labels.device) >= self.label_dropout
        return labels * keep.to(labels.dtype)

    def after_step(self) -> None:
        """What must happen to the weights after each optimiser step; nothing, by default."""


def networks_in(module: nn.Module) -> Iterator[Network]:
    """The networks inside a module: of a denoiser one, of a critic that of its fake score."""
    return (part for part in module.modules() if isinstance(part, Network))
