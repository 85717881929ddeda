"""EDM2's U-Net (Karras et al. 2024, arXiv:2312.02696), configuration G: ADM made of layers that
preserve magnitudes."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.networks.layers import fused_attention, heads_of
from fewstep.networks.magnitude import (
    Fourier,
    MPConv,
    Uncertainty,
    mp_cat,
    mp_silu,
    mp_sum,
    normalise,
)
from fewstep.networks.protocol import Architecture, Block
from fewstep.networks.unet import UNet

RESIDUAL = 0.3  # share t of a residual branch, and of attention, in their sums
LABEL = SKIP = 0.5  # of the label in the embedding; of the encoder's output in the decoder's input
CLIP = 256.0  # activations that fp16 must hold
CHANNELS_PER_HEAD = 64


class EDM2Block(Block):
    """Residual block, scaled by the embedding between its convolutions; then cosine attention.

    The encoder's blocks normalise their input, pixel by pixel: the magnitude of the main path
    would otherwise grow from block to block.

    Attributes:
        emb_gain: strength of the embedding, learned from 0.
    """

    def __init__(
        self,
        resolution: int,
        n_in: int,
        n_out: int,
        n_emb: int,
        dropout: float = 0.0,
        decoder: bool = False,
        attention: bool = False,
        up: bool = False,
        down: bool = False,
        takes_skip: bool = False,
    ) -> None:
        super().__init__(resolution)
        self.attention, self.takes_skip = fused_attention, takes_skip
        self.dropout, self.decoder, self.up, self.down = dropout, decoder, up, down
        self.emb_gain = nn.Parameter(torch.zeros(()))
        self.conv_res0 = MPConv(n_in if decoder else n_out, n_out, 3)
        self.emb_linear = MPConv(n_emb, n_out)
        self.conv_res1 = MPConv(n_out, n_out, 3)
        self.conv_skip = MPConv(n_in, n_out, 1) if n_in != n_out else None
        self.heads = heads_of(n_out, CHANNELS_PER_HEAD) if attention else 0
        if attention:
            self.attn_qkv, self.attn_proj = MPConv(n_out, 3 * n_out, 1), MPConv(n_out, n_out, 1)

    def compute(self, x: Tensor, emb: Tensor) -> Tensor:
        x = self.resample(x)
        skip = x if self.conv_skip is None else self.conv_skip(x)
        if not self.decoder:
            x = skip = normalise(skip, 1)
        h = self.conv_res0(mp_silu(x))
        scale = self.emb_linear(emb, self.emb_gain) + 1
        h = mp_silu(h * scale[:, :, None, None].to(h.dtype))
        h = self.conv_res1(F.dropout(h, self.dropout, self.training))
        x = mp_sum(skip, h, RESIDUAL)
        if self.heads:
            x = mp_sum(x, self.attend(x), RESIDUAL)
        return x.clamp(-CLIP, CLIP)

    def resample(self, x: Tensor) -> Tensor:
        if self.up:
            return F.interpolate(x, scale_factor=2, mode="nearest")
        return F.avg_pool2d(x, 2) if self.down else x

    def attend(self, x: Tensor) -> Tensor:
        """Self-attention over pixels by the cosines of queries and keys (EDM2, appendix B).

        Checkpoints interleave q, k and v inside each head's channels, as EDM's.
        """
        n, c, height, width = x.shape
        tokens = x.flatten(2).transpose(1, 2)  # no copy where channels lie last
        order = (self.heads, c // self.heads, 3)
        weight = self.attn_qkv.scaled(x.dtype).reshape(*order, c).permute(2, 0, 1, 3)
        qkv = F.linear(tokens, weight.reshape(-1, c)).reshape(n, height * width, 3, *order[:2])
        q, k, v = normalise(qkv, 4).permute(2, 0, 3, 1, 4)
        a = self.attention(q, k, v).transpose(1, 2).reshape(n, height * width, c)
        proj = self.attn_proj.scaled(x.dtype).flatten(1)
        return F.linear(a, proj).transpose(1, 2).reshape(x.shape)


class EDM2(UNet):
    """Weights without biases, of magnitude 1 after each step; gains are learned from 0.

    Parameters have the names of EDM2's checkpoints (`unet.`), which load as they are; `logvar` is
    beside the U-Net there. Levels, blocks and attention are where ADM has them.
    """

    attends_last = False

    def __init__(self, architecture: Architecture) -> None:
        super().__init__(architecture)
        a = architecture
        width = a.model_channels * a.channel_mult[0]
        self.n_emb = a.model_channels * max(a.channel_mult)
        self.emb_fourier, self.emb_noise = Fourier(width), MPConv(width, self.n_emb)
        self.emb_label = MPConv(a.classes, self.n_emb) if a.classes else None
        width = self.build_levels(width)
        self.out_conv, self.out_gain = MPConv(width, a.channels, 3), nn.Parameter(torch.zeros(()))
        self.logvar = Uncertainty()

    def first(self, channels: int, width: int) -> MPConv:
        return MPConv(channels + 1, width, 3)

    def block(
        self, resolution: int, n_in: int, n_out: int, decoder: bool = False, **kind: bool
    ) -> EDM2Block:
        dropout = self.architecture.dropout_at(resolution)
        return EDM2Block(resolution, n_in, n_out, self.n_emb, dropout, decoder, **kind)

    def embed(self, c_noise: Tensor, labels: Tensor) -> Tensor:
        noise = self.emb_noise(self.emb_fourier(c_noise))
        if self.emb_label is None:
            return mp_silu(noise)
        labels = self.drop_labels(labels) * math.sqrt(self.architecture.classes)
        return mp_silu(mp_sum(noise, self.emb_label(labels), LABEL))

    def descend(self, x: Tensor, emb: Tensor) -> list[Tensor]:
        ones = torch.ones_like(x[:, :1])  # what biases did: layers may need a constant
        return super().descend(torch.cat([x, ones], dim=1), emb)

    def join(self, x: Tensor, skip: Tensor) -> Tensor:
        return mp_cat(x, skip, SKIP)

    def output(self, x: Tensor) -> Tensor:
        return self.out_conv(x, self.out_gain)

    def after_step(self) -> None:
        # The paper does this in each forward pass of a training. That would change weights between
        # the passes of one step (GAN terms, recomputed blocks), whose gradients need them, and
        # those of a frozen network in train mode.
        for part in self.modules():
            if isinstance(part, MPConv):
                part.force()


NETWORK = EDM2
