"""NCSN++, the U-Net of Song et al. 2021 (arXiv:2011.13456, appendix H), as EDM trains it.

EDM's checkpoints named `ve` are of this network (Karras et al. 2022, arXiv:2206.00364, Table 7).
"""

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from fewstep.networks.ddpmpp import DDPMpp
from fewstep.networks.layers import Conv2d, Style, filtered

SPREAD = 16.0  # standard deviation of the frequencies


class NoiseFourier(nn.Module):
    """cos and sin of 2 pi f c of numbers c (B,), float32 (B, channels).

    The buffer `freqs` is f, drawn once and never trained. The weights of what follows belong to it,
    so it is copied, saved and imported with them.
    """

    freqs: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("freqs", SPREAD * torch.randn(channels // 2))

    def forward(self, c: Tensor) -> Tensor:
        # float32: half precision cannot tell angles of hundreds of radians apart
        angle = c.to(torch.float32).outer(2 * math.pi * self.freqs)
        return torch.cat([angle.cos(), angle.sin()], dim=1)


class PyramidConv(Conv2d):
    """A level of the image pyramid: 3x3 convolution, then filter and every second pixel.

    Both are linear and see zeros around x alone, so their order does not matter. EDM filters last.
    Here the filter comes first, and the convolution computes only the pixels that stay, a quarter.
    """

    def __init__(self, n_in: int, n_out: int, style: Style) -> None:
        super().__init__(n_in, n_out, 3, style.init, down=True, taps=style.taps)

    def forward(self, x: Tensor) -> Tensor:
        assert self.resample_filter is not None, "it goes down"
        padding = self.resample_filter.shape[-1] // 2  # of the filter and the convolution together
        return self.convolve(filtered(x, self.resample_filter, padding=padding), stride=2)


class NCSNpp(DDPMpp):
    """DDPM++ with random frequencies, a smoother filter, and an image pyramid beside the encoder.

    Parameters have the names of EDM's checkpoints (`SongUNet`), which load as they are.
    """

    style = replace(DDPMpp.style, taps=(1, 3, 3, 1))
    noise_mult = 2

    def noise_features(self, channels: int) -> NoiseFourier:
        return NoiseFourier(channels)

    def after_down(self, resolution: int, width: int) -> None:
        above = [part.n_out for part in self.enc.values() if isinstance(part, PyramidConv)]
        n_in = above[-1] if above else self.architecture.channels
        name = f"{resolution}x{resolution}_aux_residual"
        self.enc[name] = PyramidConv(n_in, width, self.style)

    def descend(self, x: Tensor, emb: Tensor) -> list[Tensor]:
        first, *parts = self.enc.values()
        outputs = [first(x).contiguous(memory_format=self.layout)]
        for part in parts:
            if isinstance(part, PyramidConv):
                # set here for the same reason as in the first layer
                residual = part(x).contiguous(memory_format=self.layout)
                outputs[-1] = x = self.style.scaled(outputs[-1] + residual)
            else:
                outputs.append(part(outputs[-1], emb))
        return outputs


NETWORK = NCSNpp
