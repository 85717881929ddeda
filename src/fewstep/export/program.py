"""A whole sampler as one function of tensors, which exporters can trace."""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from fewstep.model import Model
from fewstep.networks.denoiser import Denoiser
from fewstep.networks.registry import build_denoiser
from fewstep.params import Performance, Row
from fewstep.theory.guidance import guided
from fewstep.theory.noise import Schedule
from fewstep.theory.sample import SAMPLERS, SeededNoise, sample, to_uint8
from fewstep.theory.solve import ConditionalDenoise

PORTABLE = Performance(layout="contiguous", norm="plain", attention="fused")  # no kernels of ours


class Levels(list[Tensor]):
    """A schedule (steps + 1,) as scalars: a trace knows their values, and not a tensor's entries.

    Heun's sampler compares them with 0.
    """

    def to(self, *_: object) -> "Levels":
        return self


class Program(nn.Module):
    """Latents and labels in, images out; steps, sampler and guidance are built in.

    Args:
        denoise: D(x; sigma, labels).
        grid: the noise levels that the row's steps cut.
    """

    def __init__(self, denoise: ConditionalDenoise, row: Row, grid: Schedule, classes: int) -> None:
        super().__init__()
        self.denoise, self.row, self.classes = denoise, row, classes
        self.sigmas = grid.nodes(row.steps).tolist()

    def forward(self, latents: Tensor, labels: Tensor, noise: Tensor | None = None) -> Tensor:
        """Images, uint8, (B, H, W, C).

        Args:
            latents: standard normal, float32, (B, C, H, W).
            labels: class indices, int64, (B,); -1 is no label.
            noise: standard normal, float32, (B, `draws`, C, H, W), for a sampler that draws.
        """
        sigmas: Any = Levels(torch.tensor(sigma, dtype=torch.float64) for sigma in self.sigmas)
        rows = (labels[:, None] == torch.arange(self.classes)).to(torch.float32)
        parts = iter(() if noise is None else noise.unbind(1))
        denoise = guided(self.denoise, self.row.guidance_scale)
        x = sample(self.row.sampler, denoise, lambda: next(parts), latents, rows, sigmas)
        return to_uint8(x).permute(0, 2, 3, 1)


def draws(row: Row) -> int:
    """How often its sampler draws noise after the latents: before each step but the first."""
    return row.steps - 1 if SAMPLERS[row.sampler].draws else 0


def inputs(student: Model, row: Row, seeds: Sequence[int]) -> tuple[Tensor, ...]:
    """Latents, labels and noise, as a program takes them, of images that `Model.sample` draws."""
    stream = SeededNoise(seeds, student.shape)
    latents = stream()
    stream.labels(max(student.classes, 1))  # drawn in between, whether used or not
    labels = torch.tensor([seed % max(student.classes, 1) for seed in seeds])
    noise = [stream() for _ in range(draws(row))]
    return (latents, labels, torch.stack(noise, dim=1)) if noise else (latents, labels)


def traced_quietly(
    program: nn.Module, example: tuple[Tensor, ...], shapes: tuple[Any, ...]
) -> ExportedProgram:
    """A `torch.export` program, without PyTorch's warnings about its own internals."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return torch.export.export(program, example, dynamic_shapes=shapes)


def names_of(row: Row) -> tuple[str, ...]:
    """The names of a program's inputs."""
    return ("latents", "labels", "noise") if draws(row) else ("latents", "labels")


def portable(student: Model) -> Denoiser:
    """The same denoiser on the CPU in float32, computed by operators of PyTorch alone."""
    description = replace(student.description, precision="fp32", performance=PORTABLE)
    with torch.random.fork_rng(devices=[]):
        denoiser = build_denoiser(description)
    denoiser.load_state_dict(student.denoiser.state_dict())
    return denoiser.eval().requires_grad_(False)
