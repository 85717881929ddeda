"""What is trained: students, and a teacher that is not downloaded."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, TypeAdapter, ValidationInfo, WithJsonSchema

from fewstep.methods import names
from fewstep.params import methods
from fewstep.params.fields import (
    Amount,
    Betas,
    Count,
    Kimg,
    KimgOrZero,
    Natural,
    Positive,
    Rate,
    Resolutions,
    Several,
    Steps,
    Width,
    asks,
    block,
    by_choice,
    one_of,
    unless,
)

Sampler = Literal["heun", "euler", "ddim", "renoise", "ancestral"]
Url = Annotated[str, asks("a path, or an https: or file: address", minLength=1)]
Origin = Annotated[str, asks("teacher, the name of another student or of an import")]
# The length refuses a last newline, which Python's `$` lets pass.
Sha256 = Annotated[
    str, asks("64 lowercase hex digits", pattern="^([0-9a-f]{64}|unknown)$", maxLength=64)
]


@block()
class Download:
    """A file of someone else: where it is, and its sha256 or `unknown`."""

    url: Url
    """the weights"""
    sha256: Sha256
    """checksum of the file at url. `unknown` is refused when the file is wanted, with the checksum
    that it has (config/README.md: an unknown sha256)"""


@block()
class Import:
    """A network of someone else: where it is, its checksum, and which one of several."""

    url: Url
    """the weights. A file, a folder (of accelerate, or a model of ours) or an address"""
    sha256: Sha256 | None = None
    """checksum of the file at url; absent = whatever a local file or folder has. It is recorded in
    `model.json`; of an address it is needed, or `unknown`"""
    network: Annotated[str, asks(minLength=1)] | None = None
    """how the names of its tensors begin, where the file holds several networks; absent = the
    averaged one, or DMD2's generator"""


@block(by_choice("kind", half_life=("kimg", "rampup"), power=("std",), none=()))
class Ema:
    """`kimg` and `rampup` belong to half_life, `std` to power; the others are None."""

    kind: Literal["half_life", "power", "none"]
    """profile of the average. `half_life` is an exponential average, `power` EDM2's power-function
    average"""
    kimg: Kimg | None = None
    """half-life"""
    rampup: Amount | None = None
    """half-life is at most this share of the images seen; 0 = off"""
    std: Width | None = None
    """relative width of the profile, share of training"""


@block()
class Phema:
    """Power-function averages kept beside the saved one, for `fewstep phema`."""

    stds: Annotated[
        tuple[Width, ...],
        asks("a list of different numbers in (0, 0.289)", minItems=1, uniqueItems=True),
    ]
    """relative widths of the profiles. EDM2 uses 0.05 and 0.1"""
    snapshot_kimg: Kimg
    """time between two snapshots"""


@block()
class Baseline:
    """How the teacher is sampled for the validation's first value."""

    sampler: Literal["heun", "euler", "ddim"]
    """how the teacher's images are drawn"""
    steps: Count
    """steps of the sampler"""


@block()
class Validation:
    """Scoring of the averaged student while it trains."""

    every_kimg: Kimg
    """time between two scores"""
    images: Several
    """images a score"""
    first_seed: Natural
    """image i uses seed first_seed + i. Choose seeds that no row uses"""
    reference_images: Several
    """training images that they are compared with. None beside a `metric.reference`"""
    sampler: Sampler
    """how images are drawn"""
    steps: Steps
    """steps of the sampler. `own`: as many as the settings are for"""
    guidance_scale: float
    """classifier-free guidance; 1 = off"""
    teacher: Baseline | None = None
    """scores the teacher first, at 0 kimg; absent = does not"""


def _settings(value: object, info: ValidationInfo) -> object:
    """Settings as the class that the student's method names."""
    if isinstance(value, Mapping) and "method" in info.data:
        return TypeAdapter(methods.settings_of(info.data["method"])).validate_python(value)
    return value


@block(kw_only=True)
class Student:
    """A network to train. A teacher that is trained has no `init_from`."""

    method: Annotated[str, one_of(names())]
    """how it is trained. `settings` holds the method's own keys"""
    init_from: Origin | None = None
    """whose weights it starts from. Every student needs it; a teacher that is trained has none"""
    kimg: Kimg
    """length of training"""
    batch: Count
    """images an optimiser step over all GPUs"""
    batch_gpu: Count
    """images of one micro-batch. Divides `batch`; draws the same numbers on any number of GPUs"""
    lr: Positive
    """peak learning rate"""
    lr_warmup_kimg: KimgOrZero
    """linear warm-up of lr"""
    lr_schedule: Literal["constant", "linear", "cosine", "inverse_sqrt"]
    """lr after the warm-up; linear and cosine end at 0. `inverse_sqrt` is EDM2's: constant until
    `lr_ref_kimg`, then lr sqrt(lr_ref_kimg / kimg)"""
    lr_ref_kimg: Kimg | None = None
    """where `inverse_sqrt` begins to fall. 71680.0 for EDM2's teachers of ImageNet-64"""
    optimizer: Literal["adamw", "adam", "radam"]
    """the optimiser. In `adam` and `radam` weight decay is an L2 penalty"""
    betas: Betas
    """Adam's decay rates"""
    weight_decay: Amount
    """weight decay of the optimiser"""
    grad_clip: Amount
    """global gradient norm to clip at; 0 = off"""
    max_nonfinite: Count
    """non-finite gradients in a row that stop the training. Fewer are skipped and logged"""
    nonfinite_to: Positive | None = None
    """what infinity in a gradient becomes, NaN 0; absent = such a step is skipped. With it the step
    is made, logged and counted for `max_nonfinite`"""
    loss_scale: Positive | None = None
    """fixed scale of the loss in fp16; absent = adaptive. Gradients are divided by it again.
    Adaptive: as large as gradients allow"""
    dropout: Rate
    """probability of dropout in the network"""
    dropout_resolutions: Resolutions | None = None
    """resolutions of the blocks with dropout; absent = all"""
    ema: Ema
    """the averaged weights that are saved"""
    checkpoint_kimg: Kimg
    """time between two checkpoints"""
    keep_checkpoints: Count
    """newest checkpoints that are kept beside the best"""
    phema: Phema | None = None
    """power-function averages kept for `fewstep phema`; absent = none"""
    validation: Validation | None = None
    """scoring of the averaged student while it trains; absent = none"""
    settings: Annotated[
        methods.Settings, BeforeValidator(_settings), WithJsonSchema({"type": "object"})
    ]
    """the method's own settings"""


_NO_ORIGIN: Any = {"init_from": {"not": {}, "title": "no such key in a teacher"}}
Orphan = Annotated[Student, asks(properties=_NO_ORIGIN)]


@block(unless("train", "url", optional=("sha256",)))
class Teacher:
    """Either `url` is set (weights that are there), or `train` is."""

    url: Url | None = None
    """the weights. Safetensors, a folder, or a `.pkl` of EDM or EDM2, which is read without
    executing it. Refused, by name, are `VPPrecond`, `VEPrecond` and `iDDPMPrecond` of EDM's
    baselines, which are networks of another preconditioning, and EDM2's networks of latents"""
    sha256: Sha256 | None = None
    """checksum of the file at url; absent = whatever a local file or folder has. Of an address it
    is needed; `unknown` is refused when the file is wanted, with the checksum that it has
    (config/README.md: an unknown sha256)"""
    train: Orphan | None = None
    """how to train the teacher, as a student without init_from"""
