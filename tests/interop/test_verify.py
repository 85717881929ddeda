"""Does a network denoise? A right teacher passes; other preconditionings and scales do not."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fewstep.data.labelled import ArraySource
from fewstep.data.lmdb import ImageDataset, build_lmdb
from fewstep.interop.checkpoint import import_checkpoint
from fewstep.interop.verify import (
    Known,
    denoising_report,
    images_to_denoise,
    remaining_noise,
    verify,
)
from fewstep.networks.denoiser import Denoiser
from fewstep.networks.registry import build_denoiser
from fewstep.networks.weights import load_weights
from fewstep.params import load_params
from places import DEFAULT, ROOT

PARAMS = load_params(DEFAULT)
TEACHER = ROOT / "assets" / "teacher-fmnist16.safetensors"
WEIGHTS, ABOUT = import_checkpoint(TEACHER)


@pytest.fixture(scope="module")
def teacher() -> Denoiser:
    denoiser = build_denoiser(PARAMS)
    load_weights(denoiser, WEIGHTS, TEACHER)
    return denoiser.eval().requires_grad_(False)


@pytest.fixture(scope="module", params=["data", "shapes"])
def known(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Known:
    if request.param == "shapes":
        return images_to_denoise(PARAMS)
    with np.load(ROOT / "assets" / "fmnist16.npz") as file:
        images, labels = file["images"][:300], file["labels"][:300].astype(np.int64)
    path = tmp_path_factory.mktemp("data") / "data.lmdb"
    build_lmdb(ArraySource("fmnist16.npz", images, labels, 10), path, silent=True)
    return images_to_denoise(PARAMS, ImageDataset(path))


class Changed(nn.Module):
    """A network of another training, as its state dict would answer under EDM's preconditioning."""

    def __init__(self, denoiser: Denoiser, kind: str) -> None:
        super().__init__()
        self.denoiser, self.kind = denoiser, kind

    def forward(self, x: Tensor, c_noise: Tensor, labels: Tensor) -> Tensor:
        model = self.denoiser.model
        if self.kind.startswith("out"):
            return float(self.kind[3:]) * model(x, c_noise, labels)
        if self.kind == "in2":
            return model(2 * x, c_noise, labels)
        if self.kind == "VE":  # c_in 1, c_noise log(sigma / 2), D = x + sigma F
            sigma = 2 * c_noise.exp()
            return (self.denoiser(x, sigma, labels) - x) / sigma[:, None, None, None]
        t = (c_noise / 999).clamp(1e-5, 1)  # VP: c_noise 999 t, D = x - sigma F
        sigma = (0.5 * 19.9 * t**2 + 0.1 * t).expm1().sqrt()
        noisy = x * (sigma**2 + 1).sqrt()[:, None, None, None]
        return (noisy - self.denoiser(noisy, sigma, labels)) / sigma[:, None, None, None]


def changed(denoiser: Denoiser, kind: str) -> Denoiser:
    return Denoiser(Changed(denoiser, kind), 0.5, "fp32")  # pyright: ignore[reportArgumentType]


def test_a_right_teacher_passes(teacher: Denoiser, known: Known) -> None:
    report = denoising_report(teacher, known)
    assert report.startswith(f"denoising: of noise with sigma 0.2, 0.5, 1 on {known.what} it leav")
    power = float(known.images.square().mean())
    for sigma in (0.2, 0.5, 1.0):
        assert remaining_noise(teacher, known, sigma) < 0.6 * power / (power + sigma**2)


@pytest.mark.parametrize("kind", ["VP", "VE", "out0", "out2", "out-1", "in2"])
def test_another_preconditioning_or_scale_is_reported(
    teacher: Denoiser, known: Known, kind: str
) -> None:
    if kind == "in2" and not known.own:
        pytest.skip("drawn shapes do not tell it")
    assert denoising_report(changed(teacher, kind), known).startswith("WARNING: it does not denoi")


def test_the_exact_denoiser_of_any_data_passes() -> None:
    """Of few images with known probabilities: the mean of the posterior."""
    rng = torch.Generator().manual_seed(0)
    images = torch.randn(16, 1, 8, 8, generator=rng).clamp(-1, 1)

    class Exact(Denoiser):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.sigma_data = 0.5

        def forward(self, x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
            distances = (x[:, None] - images).square().sum((2, 3, 4))
            return torch.einsum(
                "bn,nchw->bchw", (-distances / (2 * sigma[:, None] ** 2)).softmax(1), images
            )

    known = Known(images, torch.zeros(16, 1), "those images", own=True)
    assert denoising_report(Exact(), known).startswith("denoising: ")


def test_verifying_says_it() -> None:
    assert verify(WEIGHTS, ABOUT, PARAMS, "x").startswith("denoising: of noise")
    twice = {n: w * (1 + n.startswith("model.out_conv")) for n, w in WEIGHTS.items()}
    assert verify(twice, ABOUT, PARAMS, "x").startswith("WARNING")


def test_images_are_evenly_spread(known: Known) -> None:
    assert known.images.shape == (16, 1, 16, 16) and known.labels.shape == (16, 10)
    assert known.images.abs().max() <= 1 and Path(known.what).name
