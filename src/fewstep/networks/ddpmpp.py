"""DDPM++, the U-Net of Song et al. 2021, as EDM trains it on CIFAR-10."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.networks.layers import Conv2d, GroupNorm, Init, Linear, Style
from fewstep.networks.protocol import Architecture
from fewstep.networks.unet import EDMUNet


class DDPMpp(EDMUNet):
    """Embeddings shift only; residual sums are scaled by sqrt(1/2); one head.

    Parameters have the names of EDM's checkpoints (`SongUNet`), which load as they are.

    Args:
        augment_dim: length of EDM's augmentation labels, whose weights some checkpoints have and
            which are not used here; 0 for none.
    """

    attends_last = endpoint = True
    style = Style(
        init=Init("xavier_uniform"),
        attention_init=Init("xavier_uniform", gain=0.2**0.5),
        zero=Init("xavier_uniform", gain=1e-5),
        eps=1e-6,
        adaptive_scale=False,
        channels_per_head=None,
        resample_proj=True,
        skip_scale=math.sqrt(0.5),
    )
    map_augment: Linear | None = None

    def __init__(self, architecture: Architecture, augment_dim: int = 0) -> None:
        super().__init__(architecture)
        a, init = architecture, self.style.init
        self.map_label = Linear(a.classes, self.n_noise, init) if a.classes else None
        if augment_dim:
            self.map_augment = Linear(augment_dim, self.n_noise, init, bias=False)
        width, res = self.build_levels(a.model_channels), a.resolution
        self.dec[f"{res}x{res}_aux_norm"] = GroupNorm(width, self.style.eps)
        self.dec[f"{res}x{res}_aux_conv"] = Conv2d(width, a.channels, 3, self.style.zero)

    def embed(self, c_noise: Tensor, labels: Tensor) -> Tensor:
        cos, sin = self.map_noise(c_noise).chunk(2, dim=1)
        emb = torch.cat([sin, cos], dim=1)
        if self.map_label is not None:
            labels = self.drop_labels(labels) * math.sqrt(self.architecture.classes)
            emb = emb + self.map_label(labels)
        return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))

    def output(self, x: Tensor) -> Tensor:
        norm, conv = list(self.dec.values())[-2:]  # EDM's names put them into the decoder
        return conv(norm(x, silu=True))


NETWORK = DDPMpp
