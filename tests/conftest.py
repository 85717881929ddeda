"""What tests share: denoisers, the exact one of Gaussian data and a small network; the GPU."""

import pytest
import torch
from torch import Tensor, nn

from fewstep.networks.adm import ADM
from fewstep.networks.denoiser import Denoiser
from fewstep.networks.protocol import Architecture
from fewstep.theory.noise import Schedule
from pickles import canary, edm_modules

__all__ = ["canary", "edm_modules"]  # fixtures

CLASSES = 3
EDM = Schedule(sigma_min=0.002, sigma_max=80.0, rho=7.0)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs a GPU where there is none."""
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("needs a GPU")


class Gaussian(Denoiser):
    """D(x; sigma) of data N(0, std^2), times a trainable gain of 1; keeps x's type, counts NFE."""

    def __init__(self, std: float = 0.5) -> None:
        nn.Module.__init__(self)
        self.sigma_data, self.std, self.nfe = 0.5, std, 0
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        self.nfe += len(x)
        variance = self.std**2
        return self.gain * x * variance / (variance + sigma.to(x).reshape(-1, 1, 1, 1) ** 2)


def exact_flow(x: Tensor, sigma: Tensor, sigma_next: Tensor, std: float = 0.5) -> Tensor:
    """The probability-flow ODE of data N(0, std^2) from sigma to sigma_next, solved exactly."""
    return x * ((std**2 + sigma_next**2) / (std**2 + sigma**2)).sqrt()


def small_denoiser(
    seed: int, dropout: float = 0.0, label_dropout: float = 0.0, precision: str = "fp32"
) -> Denoiser:
    """ADM on 8x8 grey images, 32 channels, whose zero-initialised layers are not zero."""
    torch.manual_seed(seed)
    unet = ADM(Architecture(8, 1, CLASSES, 32, (1,), 1, (), dropout, label_dropout))
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return Denoiser(unet, 0.5, precision)
