# pyright: reportMissingImports=false
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from PIL import Image

from fewstep.networks.denoiser import one_hot
from fewstep.theory.guidance import guided
from fewstep.theory.noise import Schedule
from fewstep.theory.sample import SeededNoise, sample, to_uint8


class FewStepPipeline(DiffusionPipeline):
    """Images of a few-step student; an image depends on its own seed and class alone."""

    def __init__(
        self,
        denoiser: Any,  # noqa: ANN401
        sampler: str = "heun",
        steps: int = 18,
        guidance_scale: float = 1.0,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        rho: float = 7.0,
    ) -> None:
        super().__init__()
        self.register_modules(denoiser=denoiser)
        self.register_to_config(
            sampler=sampler,
            steps=steps,
            guidance_scale=guidance_scale,
            sigma_min=sigma_min,
            sigma_max=sigma_max,
            rho=rho,
        )

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int] | None = None,
        seeds: Sequence[int] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:  # noqa: ANN401
        """Draw an image for each seed; without seeds, for each label, from 0 on.

        Args:
            class_labels: a class for each image; None: the seed modulo the classes.
            num_inference_steps, guidance_scale: None for what the student was trained for.
            output_type: pil; or np, uint8 (B, H, W, C).
        """
        c, shape = self.config, self.denoiser.config.architecture
        seeds = range(len(class_labels or [0])) if seeds is None else seeds
        classes = shape["classes"]
        kinds = max(classes, 1)  # without classes every label is 0
        labels = [s % kinds for s in seeds] if class_labels is None else list(class_labels)
        if len(labels) != len(seeds):
            raise ValueError(f"need {len(seeds)} class_labels, one a seed, got {len(labels)}")
        if output_type not in ("pil", "np"):
            raise ValueError(f"need an output_type of pil or np, got {output_type!r}")
        device = self.denoiser.device
        sizes = (shape["channels"], shape["resolution"], shape["resolution"])
        noise = SeededNoise(seeds, sizes, device)
        latents = noise()
        noise.labels(kinds)  # drawn in between, whether used or not
        rows = one_hot(torch.tensor(labels), classes).to(device)
        scale = c.guidance_scale if guidance_scale is None else guidance_scale
        grid = Schedule(c.sigma_min, c.sigma_max, c.rho)
        sigmas = grid.nodes(num_inference_steps or c.steps)
        x = sample(c.sampler, guided(self.denoiser, scale), noise, latents, rows, sigmas)
        images = to_uint8(x).permute(0, 2, 3, 1).cpu().numpy()
        if output_type == "pil":
            images = [Image.fromarray(i[..., 0] if i.shape[-1] == 1 else i) for i in images]
        return ImagePipelineOutput(images=images) if return_dict else (images,)
