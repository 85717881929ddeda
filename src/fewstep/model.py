"""A trained network that draws images: all it takes is its file, no params.yaml and no folder.

`fewstep.load` and `fewstep.Model` are these. The command `fewstep sample` and the exported formats
draw through the same code.
"""

import operator
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter
from torch import Tensor

from fewstep.budgets import SEEDS, STEPS, within
from fewstep.distributed import pick_device
from fewstep.interop.architecture import blocks_of
from fewstep.interop.checkpoint import import_checkpoint
from fewstep.networks.denoiser import PRECISIONS, Denoiser, one_hot
from fewstep.networks.registry import build_denoiser
from fewstep.networks.weights import load_weights, read_safetensors
from fewstep.params import Performance, Row, Settings, settings_of
from fewstep.params.described import Description, read_description
from fewstep.quoting import plain, quoted
from fewstep.sampling.batches import Images, batches, generate_batches
from fewstep.theory.noise import Levels, Schedule
from fewstep.theory.sample import SAMPLERS

BATCH = 64  # images at a time; another number can change a pixel by one grey level
EDM_GRID = Schedule(0.002, 80.0, 7.0)  # of networks that name none (Karras et al. 2022, Table 1)
OFFERED = tuple(name for name in SAMPLERS if name != "churn")  # which needs four more numbers
JSON_KEYS = "the `network` and `data` of its JSON"


class Model:
    """A frozen denoiser, and how it is to be sampled.

    Attributes:
        name: what messages and folders call it.
        denoiser: D(x; sigma), in eval mode, on `device`.
        about: the JSON of its file.
        description: network, resolution, channels, classes, precision.
        grid: the noise levels that its steps cut.
        sampler, steps: what it was trained for; of a teacher, EDM's Heun of 18 steps.
    """

    def __init__(
        self,
        name: str,
        denoiser: Denoiser,
        about: dict[str, Any],
        description: Description,
        grid: Schedule,
        device: torch.device,
    ) -> None:
        self.name, self.about, self.description = name, about, description
        self.denoiser = denoiser.to(device).eval().requires_grad_(False)
        self.grid, self.device = grid, device
        said = about.get("sampling")
        usual = Settings().sampling
        self.sampler, self.steps = (said.get("sampler"), said.get("steps")) if said else usual

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        d = self.description.data
        return d.channels, d.resolution, d.resolution

    @property
    def classes(self) -> int:
        """The number of classes; labels are 0 to classes - 1, or 0 where there are none."""
        return self.description.data.classes

    @torch.no_grad()
    def sample(
        self,
        count: int | None = None,
        *,
        labels: int | Iterable[int] | None = None,
        seeds: Iterable[int] | None = None,
        steps: int | None = None,
        guidance_scale: float = 1.0,
        sampler: str | None = None,
        batch: int = BATCH,
    ) -> NDArray[np.uint8]:
        """Draw images. An image depends on its own seed and label alone.

        They are those of `fewstep generate` and `fewstep sample`, bit for bit at the same `batch`.

        Args:
            count: how many; None: as many as there are seeds, else labels, else 1.
            labels: a class for all, or one for each image; None: the seed modulo the classes.
            seeds: in [0, 2^63), one for each image; None: 0, 1, 2, ...
            steps, sampler: None for those that the model was trained for.
            guidance_scale: of classifier-free guidance; 1 is off, others double the network calls.
            batch: images at a time. Another number may change a pixel by one grey level.

        Returns:
            uint8, (B, H, W, C).

        Raises:
            ValueError: no such sampler, label or seed; numbers that do not match; guidance of a
                model that was trained without unconditional images.
            FloatingPointError: an image is not finite.
        """
        chosen, classes = _choose(count, seeds, labels)
        if batch < 1:
            raise ValueError(f"need a batch of at least 1 image, got {batch}")
        row = self.row(sampler, steps, guidance_scale)
        made = [images for images, _ in self.draw(row, chosen, classes, batch)]
        return np.ascontiguousarray(np.concatenate(made).transpose(0, 2, 3, 1))

    def draw(
        self, row: Row, seeds: list[int], labels: Sequence[int] | None, batch: int
    ) -> Iterator[Images]:
        """Draw batch by batch.

        Args:
            row: of `self.row`.

        Yields:
            Images (B, C, H, W) and their classes (B,).

        Raises:
            ValueError: a label that is no class.
            FloatingPointError: an image is not finite.
        """
        if labels is not None:
            self._check_labels(labels)
        parts = batches(seeds, batch)
        return generate_batches(
            self.description, row, self.denoiser, self.grid, parts, self.device, labels
        )

    def denoise(
        self,
        x: Tensor,
        sigma: Tensor | float,
        labels: int | Sequence[int] | Tensor | None = None,
    ) -> Tensor:
        """D(x; sigma), the expected clean images.

        Args:
            x: noisy images (B, C, H, W), clean pixels in [-1, 1] plus noise of std sigma.
            sigma: one for all, or (B,); above 0.
            labels: class indices, one for all or (B,), or rows (B, classes); None: no label, the
                unconditional denoiser, which means something if label dropout trained it.

        Returns:
            float32, (B, C, H, W), on the model's device. Gradients reach x, not the weights.

        Raises:
            ValueError: images of another shape, or labels that are no classes.
        """
        if x.ndim != 4 or tuple(x.shape[1:]) != self.shape:
            want = ", ".join(map(str, ("B", *self.shape)))
            raise ValueError(f"need images of shape ({want}), got {tuple(x.shape)}")
        x = x.to(self.device, torch.float32)
        sigmas = torch.as_tensor(sigma, dtype=torch.float32, device=self.device)
        if sigmas.numel() not in (1, len(x)) or not bool((sigmas > 0).all()):
            raise ValueError(f"need sigmas above 0, one or {len(x)}, got {_brief(sigmas)}")
        return self.denoiser(x, sigmas, self._rows(labels, len(x)))

    def _rows(self, labels: int | Sequence[int] | Tensor | None, count: int) -> Tensor:
        """Label rows (count, classes)."""
        if labels is None:
            return torch.zeros(count, self.classes, device=self.device)
        given = torch.as_tensor(labels)
        if given.ndim == 2:
            if tuple(given.shape) != (count, self.classes):
                want = (count, self.classes)
                raise ValueError(f"need label rows of shape {want}, got {tuple(given.shape)}")
            return given.to(self.device, torch.float32)
        if given.is_floating_point() or given.numel() not in (1, count) or given.ndim > 1:
            raise ValueError(f"need class indices, one or {count}, got {_brief(given)}")
        self._check_labels(given.flatten().tolist())
        return one_hot(given.flatten().expand(count).long(), self.classes).to(self.device)

    def _check_labels(self, labels: Sequence[int]) -> None:
        last = max(self.classes, 1) - 1
        if wrong := [c for c in labels if not 0 <= c <= last]:
            raise ValueError(
                f"need labels from 0 to {last}, the classes of {self.name}, got {quoted(wrong[0])}"
            )

    def row(self, sampler: str | None, steps: int | None, guidance_scale: float) -> Row:
        """How to sample: as asked, else as the model says.

        Raises:
            ValueError: no such sampler; less than a step; guidance that means nothing.
        """
        name = self.sampler if sampler is None else sampler
        if name not in OFFERED:
            raise ValueError(f"need a sampler of {', '.join(OFFERED)}, got {quoted(name)}")
        count = self.steps if steps is None else steps
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ValueError(f"need steps, an integer >= 1, got {quoted(count)}")
        within(count, STEPS, "steps")
        if not np.isfinite(guidance_scale):
            raise ValueError(f"need a finite guidance scale, got {guidance_scale}")
        if guidance_scale != 1 and self.trains_unconditional() is False:
            raise ValueError(
                f"need guidance_scale 1 for {self.name}, got {guidance_scale:g}: it was trained "
                "without label dropout, so its unconditional branch means nothing"
            )
        if "sampling" in self.about and count != self.steps:
            warnings.warn(
                f"{self.name} was trained for {self.steps} steps and is sampled in {count}: at "
                "other noise levels than it was trained for",
                stacklevel=3,
            )
        return Row(self.name, name, count, float(guidance_scale))  # pyright: ignore[reportArgumentType]

    def trains_unconditional(self) -> bool | None:
        """Whether it saw images without labels, as guidance needs; None if its JSON is silent."""
        train = self.about.get("train")
        try:
            kind = settings_of(train["method"])  # pyright: ignore[reportOptionalSubscript]
            settings = TypeAdapter(kind).validate_python(train["settings"])  # pyright: ignore[reportOptionalSubscript]
        except (TypeError, KeyError, ValueError):
            return None
        return settings.trains_unconditional


def load(
    path: str | os.PathLike[str],
    *,
    device: str | torch.device = "auto",
    precision: str = "fp32",
    sigma_data: float | None = None,
    noise: Levels | None = None,
    performance: Performance | None = None,
) -> Model:
    """The model in a folder or file: one of ours, an exported hub folder, or a foreign checkpoint.

    Architecture, grid, sampler and steps are those that the file itself names. Nothing in it is
    executed.

    Args:
        path: a folder with model.safetensors, or a file: ours, or any that `fewstep import` reads.
        device: auto (CUDA if there is a GPU), cpu, cuda, or such as cuda:1.
        precision: what the network computes in: fp32, tf32, bf16, fp16. Set TF32 for the process.
        sigma_data: of EDM's preconditioning, for a checkpoint that does not say.
        noise: sigma_min, sigma_max and rho for a model that names no grid, as a teacher; None:
            those it was trained with, else EDM's.
        performance: how the network is computed; None: the defaults of params.yaml.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: another kind of file, one whose JSON does not describe its weights, or unknown
            precision.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"need the folder or file of a model, got {quoted(str(path), 200)}, where nothing is"
        )
    if precision not in PRECISIONS:
        raise ValueError(f"need a precision of {', '.join(PRECISIONS)}, got {quoted(precision)}")
    weights, about = _read(path)
    own = about if "network" in about else blocks_of(about, sigma_data)
    if own is not about and own["network"]["sigma_data"] is None:
        raise ValueError(
            f"need sigma_data for {path}, whose file does not say it: load(..., sigma_data=0.5) "
            "is EDM's"
        )
    fast = performance or Performance()
    try:
        description = read_description(own["network"], own.get("data"), precision, fast)
        grid = _grid(about, noise)
        denoiser = _build(description, weights, path)
    except ValueError as error:
        raise ValueError(f"refused {path}: {error}") from error
    known = device in ("auto", "cpu", "cuda")
    place = pick_device(str(device)) if known else torch.device(device)
    return Model(_name(path, about), denoiser, about, description, grid, place)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and JSON. Ours may be of any network; others' are EDM's under their names."""
    file = path / "model.safetensors" if path.is_dir() else path
    if file.suffix == ".safetensors" and file.is_file():
        weights, about = read_safetensors(file)
        if "network" in about:
            return weights, about
    return import_checkpoint(path)


def _build(description: Description, weights: dict[str, Tensor], path: Path) -> Denoiser:
    """The denoiser with these weights.

    A JSON may ask for terabytes, so shapes are compared before memory is taken.
    """
    n = description.network
    within(n.num_blocks * len(n.channel_mult), len(weights), "blocks, one a tensor of the file")
    try:
        with torch.device("meta"):
            shapes = build_denoiser(description).state_dict()
    except (RuntimeError, TypeError, OverflowError, ZeroDivisionError, MemoryError) as error:
        raise ValueError(f"need a network that can be built, got: {plain(str(error))}") from error
    wrong = [k for k in shapes if k not in weights or weights[k].shape != shapes[k].shape]
    if wrong or weights.keys() - shapes:
        _describe_misfit(shapes, weights)
    with torch.random.fork_rng(devices=[]):  # the weights that are drawn first are nobody's
        denoiser = build_denoiser(description)
    load_weights(denoiser, weights, path)
    return denoiser


def _describe_misfit(wanted: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
    """Raise what differs between the network of the JSON and the tensors."""
    problems = [f"no {name}" for name in wanted if name not in weights]
    problems += [f"unknown {plain(name)}" for name in weights if name not in wanted]
    problems += [
        f"{name} {tuple(weights[name].shape)} instead of {tuple(shape.shape)}"
        for name, shape in wanted.items()
        if name in weights and weights[name].shape != shape.shape
    ]
    raise ValueError(
        f"need weights of the network that its JSON describes, got {len(problems)} differences: "
        f"{'; '.join(problems[:4])}{'; ...' * (len(problems) > 4)} (edit {JSON_KEYS})"
    )


def _grid(about: dict[str, Any], noise: Levels | None) -> Schedule:
    """The grid of the model's steps: its own, else that of the caller, of its training, EDM's."""
    if noise is None and isinstance(said := about.get("noise"), dict) and "sampling" not in about:
        return Schedule.of_model({"sampling": said}, EDM_GRID)
    return Schedule.of_model(about, noise or EDM_GRID)


def _name(path: Path, about: dict[str, Any]) -> str:
    """The name in its JSON, else that of its folder or file."""
    said = about.get("name")
    if isinstance(said, str) and said:
        return plain(said)
    return path.absolute().name if path.is_dir() else path.stem


def _choose(
    count: int | None, seeds: Iterable[int] | None, labels: int | Iterable[int] | None
) -> tuple[list[int], list[int] | None]:
    """Seeds and classes of as many images as the arguments ask for.

    Raises:
        ValueError: the arguments ask for different numbers, or for none; a seed out of range.
    """
    numbers = None if seeds is None else _integers(seeds, "seeds")
    one = isinstance(labels, int | np.integer) and not isinstance(labels, bool)
    classes = None if labels is None or one else _integers(labels, "labels")
    asked = [n for n in (count, *(len(e) for e in (numbers, classes) if e is not None)) if n]
    wanted = count if count is not None else max(asked, default=1)
    for what, given in (("seeds", numbers), ("labels", classes)):
        if given is not None and len(given) != wanted:
            raise ValueError(f"need {wanted} {what}, one an image, got {len(given)}")
    if wanted < 1:
        raise ValueError(f"need at least 1 image, got {wanted}")
    within(wanted, SEEDS, "images at once")
    numbers = list(range(wanted)) if numbers is None else numbers
    if wrong := [s for s in numbers if not 0 <= s < 2**63]:
        raise ValueError(f"need seeds from 0 to 2^63 - 1, got {quoted(wrong[0])}")
    return numbers, [operator.index(labels)] * wanted if one else classes  # pyright: ignore[reportArgumentType]


def _integers(values: Any, what: str) -> list[int]:  # noqa: ANN401
    if isinstance(values, range):  # not written out before it is known to be short enough
        within(len(values), SEEDS, what)
    try:
        return [operator.index(value) for value in values]
    except TypeError as error:
        raise ValueError(f"need {what} that are integers, got {type(values).__name__}") from error


def _brief(values: Tensor) -> str:
    return f"{values.dtype} of shape {tuple(values.shape)}".removeprefix("torch.")
