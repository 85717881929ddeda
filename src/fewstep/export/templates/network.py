# pyright: reportMissingImports=false
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config

from fewstep.networks.adm import NETWORK
from fewstep.networks.denoiser import Denoiser
from fewstep.networks.protocol import Architecture


class FewStepDenoiser(ModelMixin, ConfigMixin):
    """D(x; sigma, labels) of EDM as a model of diffusers; the network has its own names inside."""

    config_name = "config.json"

    @register_to_config
    def __init__(self, architecture: dict[str, Any], sigma_data: float = 0.5) -> None:
        super().__init__()
        network = NETWORK(Architecture(**architecture))
        self.denoiser = Denoiser(network, sigma_data, "fp32")

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Clean images (B, C, H, W) from noisy ones, sigma () or (B,), label rows (B, classes)."""
        return self.denoiser(x, sigma, labels)
