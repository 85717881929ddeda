"""Encoder and decoder with skip connections, which all our networks have in common."""

import torch
from torch import Tensor, nn

from fewstep.networks.layers import Conv2d, Linear, PositionalEmbedding, Style, UNetBlock
from fewstep.networks.protocol import Architecture, Block, Network


class UNet(Network):
    """Levels of residual blocks whose resolution halves on the way down and doubles on the way up.

    The order in which a subclass builds its layers is the order of the random draws that initialise
    them: another order gives other weights for the same seed.

    Attributes:
        attends_last: in the decoder only the last block of a level has attention, not every one.
    """

    attends_last: bool

    def __init__(self, architecture: Architecture) -> None:
        super().__init__(architecture)

    def first(self, channels: int, width: int) -> nn.Module:
        """The layer that sees the images."""
        raise NotImplementedError

    def block(
        self, resolution: int, n_in: int, n_out: int, decoder: bool = False, **kind: bool
    ) -> Block:
        """A block with that output; `kind` may turn on attention, up, down and takes_skip."""
        raise NotImplementedError

    def after_down(self, resolution: int, width: int) -> None:
        """Add to `enc` what follows the block, `width` wide, that goes down to that resolution."""

    def build_levels(self, width: int) -> int:
        """Make `enc`, whose first convolution has `width` channels, and `dec`; dec's channels."""
        skips = self.build_encoder(width)
        self.bottleneck_channels = skips[-1]
        return self.build_decoder(skips)

    def build_encoder(self, width: int) -> list[int]:
        """Make `enc`; the channels of all its outputs."""
        a, self.enc, widths = self.architecture, nn.ModuleDict(), [width]
        for level, mult in enumerate(a.channel_mult):
            res = a.resolution >> level
            if level == 0:
                self.enc[f"{res}x{res}_conv"] = self.first(a.channels, width)
            else:
                self.enc[f"{res}x{res}_down"] = self.block(res, widths[-1], widths[-1], down=True)
                self.after_down(res, widths[-1])
                widths.append(widths[-1])
            for i in range(a.num_blocks):
                n_in, n_out = widths[-1], a.model_channels * mult
                block = self.block(res, n_in, n_out, attention=res in a.attn_resolutions)
                self.enc[f"{res}x{res}_block{i}"] = block
                widths.append(n_out)
            self.bottleneck_resolution = res
        return widths

    def build_decoder(self, skips: list[int]) -> int:
        """Make `dec`, which takes the skip connections from the last; the channels it ends with."""
        a, self.dec, width = self.architecture, nn.ModuleDict(), skips[-1]
        for level, mult in reversed(list(enumerate(a.channel_mult))):
            res = a.resolution >> level
            if level == len(a.channel_mult) - 1:
                self.dec[f"{res}x{res}_in0"] = self.block(res, width, width, True, attention=True)
                self.dec[f"{res}x{res}_in1"] = self.block(res, width, width, True)
            else:
                self.dec[f"{res}x{res}_up"] = self.block(res, width, width, True, up=True)
            for i in range(a.num_blocks + 1):
                attends = i == a.num_blocks or not self.attends_last
                kind = {"attention": attends and res in a.attn_resolutions, "takes_skip": True}
                n_in, width = width + skips.pop(), a.model_channels * mult
                self.dec[f"{res}x{res}_block{i}"] = self.block(res, n_in, width, True, **kind)
        return width

    def embed(self, c_noise: Tensor, labels: Tensor) -> Tensor:
        """The conditioning vector of noise level and label, shape (B, emb channels)."""
        raise NotImplementedError

    def output(self, x: Tensor) -> Tensor:
        """The image (B, C, H, W) from what the last block leaves."""
        raise NotImplementedError

    def join(self, x: Tensor, skip: Tensor) -> Tensor:
        """The input of a decoder block from what is below it and an encoder output."""
        return torch.cat([x, skip], dim=1)

    def descend(self, x: Tensor, emb: Tensor) -> list[Tensor]:
        """Outputs of all encoder stages; the last is the bottleneck (B, C', H', W')."""
        first, *blocks = self.enc.values()
        # set here, not on the image: with one channel both layouts have the same strides
        outputs = [first(x).contiguous(memory_format=self.layout)]
        for block in blocks:
            outputs.append(block(outputs[-1], emb))
        return outputs

    def encode(self, x: Tensor, c_noise: Tensor, labels: Tensor) -> Tensor:
        return self.descend(x, self.embed(c_noise, labels))[-1]

    def forward(self, x: Tensor, c_noise: Tensor, labels: Tensor) -> Tensor:
        emb = self.embed(c_noise, labels)
        skips = self.descend(x, emb)
        x = skips[-1]
        for block in self.dec.values():
            if isinstance(block, Block):
                x = block(self.join(x, skips.pop()) if block.takes_skip else x, emb)
        return self.output(x)


class EDMUNet(UNet):
    """What EDM's networks have in common beyond that: blocks with norms, and the embedding.

    Attributes:
        style: what its blocks are like.
        endpoint: the lowest frequency of the embedding is 1 / 10000 itself.
        noise_mult: features of the noise level, in multiples of the model's channels.
    """

    style: Style
    endpoint: bool
    noise_mult = 1

    def __init__(self, architecture: Architecture) -> None:
        super().__init__(architecture)
        width = architecture.model_channels
        self.n_noise, self.n_emb = self.noise_mult * width, 4 * width
        self.map_noise = self.noise_features(self.n_noise)
        self.map_layer0 = Linear(self.n_noise, self.n_emb, self.style.init)
        self.map_layer1 = Linear(self.n_emb, self.n_emb, self.style.init)

    def noise_features(self, channels: int) -> nn.Module:
        """The layer that makes features (B, channels), first cos and then sin, of c_noise (B,)."""
        return PositionalEmbedding(channels, self.endpoint)

    def first(self, channels: int, width: int) -> Conv2d:
        return Conv2d(channels, width, 3, self.style.init)

    def block(
        self, resolution: int, n_in: int, n_out: int, decoder: bool = False, **kind: bool
    ) -> UNetBlock:
        dropout = self.architecture.dropout_at(resolution)
        return UNetBlock(resolution, n_in, n_out, self.n_emb, self.style, dropout, **kind)
