"""ADM, the U-Net of Dhariwal & Nichol 2021, as EDM trains it on ImageNet-64."""

import math

import torch.nn.functional as F
from torch import Tensor

from fewstep.networks.layers import Conv2d, GroupNorm, Init, Linear, Style
from fewstep.networks.protocol import Architecture
from fewstep.networks.unet import EDMUNet

_INIT = Init("kaiming_uniform", gain=3**-0.5, bias_gain=3**-0.5)


class ADM(EDMUNet):
    """Embeddings scale and shift; every decoder block of a level attends; 64 channels a head.

    Parameters have the names of EDM's checkpoints (`DhariwalUNet`), which load as they are.
    """

    attends_last = endpoint = False
    style = Style(
        init=_INIT,
        attention_init=_INIT,
        zero=Init("kaiming_uniform", gain=0.0),
        eps=1e-5,
        adaptive_scale=True,
        channels_per_head=64,
        resample_proj=False,
        skip_scale=1.0,
    )

    def __init__(self, architecture: Architecture) -> None:
        super().__init__(architecture)
        a = architecture
        self.map_label = None
        if a.classes:
            label_init = Init("kaiming_normal", gain=math.sqrt(a.classes))
            self.map_label = Linear(a.classes, self.n_emb, label_init, bias=False)
        width = self.build_levels(a.model_channels * a.channel_mult[0])
        self.out_norm = GroupNorm(width, self.style.eps)
        self.out_conv = Conv2d(width, a.channels, 3, self.style.zero)

    def embed(self, c_noise: Tensor, labels: Tensor) -> Tensor:
        emb = self.map_layer1(F.silu(self.map_layer0(self.map_noise(c_noise))))
        if self.map_label is not None:
            emb = emb + self.map_label(self.drop_labels(labels))
        return F.silu(emb)

    def output(self, x: Tensor) -> Tensor:
        return self.out_conv(self.out_norm(x, silu=True))


NETWORK = ADM
