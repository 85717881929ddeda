"""EDM preconditioning D(x; sigma) around a network."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.networks.protocol import Network
from fewstep.theory.noise import per_image

PRECISIONS = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


class Denoiser(nn.Module):
    """D(x; sigma) = c_skip x + c_out F(c_in x; c_noise) (EDM, eq. 7 and Table 1).

    Weights, x and D_x are float32; `precision` is what F computes in.
    """

    def __init__(self, model: Network, sigma_data: float, precision: str) -> None:
        super().__init__()
        self.model, self.sigma_data, self.dtype = model, sigma_data, PRECISIONS[precision]

    def precondition(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x and sigma in float32, (B, C, H, W) and (B, 1, 1, 1); c_in alike; c_noise, (B,)."""
        x = x.to(torch.float32)
        sigma = per_image(sigma.to(x, non_blocking=True)).expand(x.shape[0], 1, 1, 1)
        c_in = 1 / (sigma**2 + self.sigma_data**2).sqrt()
        return x, sigma, c_in, sigma.flatten().log() / 4

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        x, sigma, c_in, c_noise = self.precondition(x, sigma)
        c_skip = self.sigma_data**2 / (sigma**2 + self.sigma_data**2)
        c_out = sigma * self.sigma_data * c_in
        F_x = self.model((c_in * x).to(self.dtype), c_noise, labels)
        return c_skip * x + c_out * F_x.to(torch.float32)

    def log_variance(self, sigma: Tensor) -> Tensor | None:
        """u(sigma), (B,), of sigma (B,), where the network has such an output (EDM2, eq. 16)."""
        return None if self.model.logvar is None else self.model.logvar(sigma.log() / 4)

    def bottleneck(self, x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        """The network's bottleneck for preconditioned x, float32, shape (B, C', H', W')."""
        x, _, c_in, c_noise = self.precondition(x, sigma)
        return self.model.encode((c_in * x).to(self.dtype), c_noise, labels).to(torch.float32)


def one_hot(labels: Tensor, classes: int) -> Tensor:
    """Class indices (B,) as float32 rows (B, classes), which are empty without classes."""
    if classes == 0:
        return torch.zeros(len(labels), 0, device=labels.device)
    return F.one_hot(labels, classes).to(torch.float32)
