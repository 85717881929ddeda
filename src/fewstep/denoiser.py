"""EDM preconditioning D(x; sigma) around a network; guidance as a denoiser around a denoiser."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.noise import per_image
from fewstep.unet import UNet

ConditionalDenoise = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x, sigma, labels) -> D(x; sigma): x (B, C, H, W), sigma scalar or (B,), labels (B, classes)."""

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

    def __init__(self, model: UNet, sigma_data: float = 0.5, precision: str = "fp32") -> None:
        super().__init__()
        self.model, self.sigma_data, self.dtype = model, sigma_data, PRECISIONS[precision]

    def precondition(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x and sigma in float32, (B, C, H, W) and (B, 1, 1, 1); and c_in, (B, 1, 1, 1)."""
        x = x.to(torch.float32)
        sigma = per_image(sigma.to(x, non_blocking=True)).expand(len(x), 1, 1, 1)
        return x, sigma, 1 / (sigma**2 + self.sigma_data**2).sqrt()

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        x, sigma, c_in = self.precondition(x, sigma)
        c_skip = self.sigma_data**2 / (sigma**2 + self.sigma_data**2)
        c_out = sigma * self.sigma_data * c_in
        c_noise = sigma.flatten().log() / 4
        F_x = self.model((c_in * x).to(self.dtype), c_noise, labels)
        return c_skip * x + c_out * F_x.to(torch.float32)

    def bottleneck(self, x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        """The last encoder output for preconditioned x, float32, shape (B, C', H', W')."""
        x, sigma, c_in = self.precondition(x, sigma)
        c_noise = sigma.flatten().log() / 4
        emb = self.model.embed(c_noise, labels)
        return self.model.encode((c_in * x).to(self.dtype), emb)[-1].to(torch.float32)


def guided(denoise: ConditionalDenoise, scale: float) -> ConditionalDenoise:
    """Classifier-free guidance D_0 + scale (D_c - D_0) (Ho & Salimans 2022); 1 is the denoiser.

    D_0 is the denoiser with all-zero labels. Costs 2 NFE a call, in one batched call.
    """
    if scale == 1:
        return denoise

    def denoise_guided(x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        both = torch.cat([labels, torch.zeros_like(labels)])
        sigmas = sigma.reshape(-1).expand(len(x)).repeat(2)
        D_c, D_0 = denoise(torch.cat([x, x]), sigmas, both).chunk(2)
        return D_0 + scale * (D_c - D_0)

    return denoise_guided


def one_hot(labels: Tensor, classes: int) -> Tensor:
    """Class indices (B,) as float32 rows (B, classes)."""
    return F.one_hot(labels, classes).to(torch.float32)
