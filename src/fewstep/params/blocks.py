"""The blocks of params.yaml: frozen dataclasses whose fields are its keys.

Each field says its type, range, unit and meaning, here and nowhere else: the JSON schema, the
messages about wrong values and the tables of docs/params.md are made from it. No field has a
default but those of `performance`: each number has its one home in params.yaml.
"""

from dataclasses import field
from typing import Annotated, Any, Literal

from fewstep import networks
from fewstep.params.fields import (
    Amount,
    Count,
    Frozen,
    Kimg,
    Model,
    Natural,
    Pixels,
    Positive,
    Resolutions,
    Sigma,
    SigmaOrZero,
    Steps,
    Text,
    asks,
    block,
    one_of,
    only_when,
    together,
)
from fewstep.params.scoring import Metric
from fewstep.params.training import Import, Sampler, Student, Teacher
from fewstep.params.values import plain


@block(together("url", "sha256"), kw_only=True)
class Data:
    """Without `workers` as many processes as there are cores; without `on_error` stop; `url` and
    `sha256` go together, for a source that can be fetched."""

    source: Annotated[str, asks("a path", minLength=1)]
    """file or folder of labelled images. Of a kind listed below"""
    url: Annotated[str, asks("an https: or file: address", minLength=1)] | None = None
    """where source is fetched from if it is not there. Needs `sha256`. `make repro` and `make
    snakemake` fetch it first; before a plain `dvc repro` or `snakemake` run `fewstep
    download-data`, since both want their inputs there"""
    sha256: (
        Annotated[str, asks("64 lowercase hex digits", pattern="^[0-9a-f]{64}$", maxLength=64)]
        | None
    ) = None
    """checksum of source. Needs `url`"""
    resolution: Pixels
    """height and width. Divisible by 2 for each level of `channel_mult` after the first"""
    channels: Count
    """1 grey, 3 RGB"""
    classes: Natural
    """number of labels. 1: the network has a label that is always the same; 0: it has none, as
    EDM's unconditional teachers, and labels of the data do not count"""
    class_names: Annotated[tuple[Text, ...], asks("a list of names", minItems=1)] | None = None
    """of class 0, 1, ...; absent = the source's own, such as the names of class folders"""
    on_error: Literal["stop", "skip"] | None = None
    """what an image that cannot be decoded does; absent = stop. `skip` leaves it out and lists it
    in `artifacts/data.json`"""
    workers: Count | None = None
    """processes that decode images; absent = one a core. Changes no byte of the result"""


@block()
class Network:
    type: Annotated[str, one_of(networks.names())]
    """architecture. Of EDM's teachers those named `vp` are `ddpmpp`, those named `ve` `ncsnpp`.
    `edm2` takes larger learning rates than the others: its weights have magnitude 1 and its
    teachers were trained with 1.0e-2"""
    model_channels: Count
    """channels at multiplier 1"""
    channel_mult: Annotated[
        tuple[Count, ...], asks("a non-empty list of integers >= 1", minItems=1)
    ]
    """channel multiplier of each resolution, finest first. Each level halves the resolution"""
    num_blocks: Count
    """residual blocks a resolution"""
    attn_resolutions: Resolutions
    """resolutions with self-attention. May be `[]`"""
    sigma_data: Sigma
    """standard deviation of the data, for EDM's preconditioning"""


@block()
class Noise:
    sigma_min: Sigma
    """lowest noise level of the schedule. Below sigma_max"""
    sigma_max: Sigma
    """highest noise level of the schedule"""
    rho: Positive
    """warp of the schedule; EDM uses 7. A larger one puts more steps at low noise"""


@block()
class Generate:
    """Without `seed_ranges` there is one range of `images` seeds; a row may say otherwise."""

    images: Count
    """images a row, of each seed range"""
    batch: Count
    """images at a time. Another one may change a pixel by one grey level"""
    first_seed: Natural
    """image i uses seed first_seed + i. An image depends on nothing else"""
    labels: Literal["balanced", "random"]
    """balanced: seed modulo classes; random: drawn from the seed"""
    seed_ranges: Count | None = None
    """disjoint ranges of so many images a row; absent = 1. One after the other; values are means
    over them, with their standard deviation. Each costs as much as the first, so expensive rows
    may have fewer"""


@block()
class Churn:
    S_churn: Amount
    """amount of noise added over all steps"""
    S_min: SigmaOrZero
    """lowest noise level that gets noise"""
    S_max: Sigma
    """highest noise level that gets noise"""
    S_noise: Positive
    """std of the added noise; 1 = as derived"""


RowSampler = Literal[Sampler, "churn"]


@block(only_when("sampler", "churn", "churn"))
class Row:
    """A row of the results table. `churn` is set exactly when `sampler` is churn; `seed_ranges`
    where generate.seed_ranges is not the row's."""

    model: Model
    """whose images are measured. `NAME@best` is the model that the validation of the training NAME
    chose, `NAME` its last"""
    sampler: RowSampler
    """how images are drawn. `renoise` adds fresh noise at each step, `ancestral` a part of it, from
    the posterior; `churn` is EDM's stochastic sampler. Noise levels are those of the model: a
    student's own, else `noise`"""
    steps: Steps
    """steps of the sampler. Not network calls: `heun` calls twice in all but the last. `own`: as
    many as the model is trained for; 18 of a teacher"""
    guidance_scale: float
    """classifier-free guidance; 1 = off. Any other doubles the network calls"""
    churn: Churn | None = None
    """EDM's stochastic sampler, Algorithm 2"""
    seed_ranges: Count | None = None
    """disjoint seed ranges of this row; absent = generate.seed_ranges"""


@block()
class Sweep:
    """Rows from one block: each of `steps` with each of `guidance_scale`; see `swept_rows`."""

    model: Model
    """whose images are measured. `NAME@best` is the model that the validation of the training NAME
    chose, `NAME` its last"""
    sampler: RowSampler
    """how images are drawn. `renoise` adds fresh noise at each step, `ancestral` a part of it, from
    the posterior; `churn` is EDM's stochastic sampler. Noise levels are those of the model: a
    student's own, else `noise`"""
    steps: Annotated[
        tuple[Count, ...], asks("a list of different integers >= 1", minItems=1, uniqueItems=True)
    ]
    """steps of the sampler, a row each. Drawn as a curve"""
    guidance_scale: Annotated[
        tuple[float, ...], asks("a list of different numbers", minItems=1, uniqueItems=True)
    ]
    """guidance scales, a row each. With each of `steps`"""
    churn: Churn | None = None
    """EDM's stochastic sampler, Algorithm 2"""
    seed_ranges: Count | None = None
    """disjoint seed ranges of each row; absent = generate.seed_ranges"""


@block()
class Wandb:
    mode: Literal["disabled", "offline", "online"]
    """offline writes runs that `wandb sync` uploads later"""
    project: Text
    """name of the W&B project"""
    entity: Text | None = None
    """W&B user or team; absent = yours"""


@block()
class Tracking:
    """Where a training is shown beside its log; no result depends on it."""

    dvclive: bool
    """live curves for `dvc plots show dvclive`. In `dvclive/<name>`"""
    wandb: Wandb
    """Weights & Biases. When it fails, training goes on"""
    log_rows: Count | None = None
    """rows of a training's log, at equal distances; absent = 200"""
    first_row_kimg: Kimg | None = None
    """time of one more row, near the start; absent = none. In a long training the first of equally
    distant rows is minutes away"""


@block()
class Performance:
    """How networks are computed. Alone in having defaults: none of these decides a result."""

    layout: Literal["channels_last", "contiguous"] = "channels_last"
    """how activations lie in memory. On GPUs PyTorch's GroupNorm returns contiguous tensors, which
    channels_last reorders after each norm; with `compile` they come in that order"""
    attention: Literal["fused", "plain"] = "fused"
    """fused: PyTorch's scaled_dot_product_attention. Plain: its formula with float32 weights"""
    norm: Literal["fused", "plain"] = "fused"
    """fused, on a CPU with channels_last: GroupNorm, scale, shift and SiLU are one function. In
    fp32 and bf16; elsewhere, and with `plain`, they are PyTorch's kernels, which `compile` joins"""
    updates: Literal["fused", "foreach", "loop"] = "fused"
    """how optimisers and averages go over the weights. `radam` has no fused form, but foreach"""
    compile: Literal["none", "blocks", "network"] = "none"
    """what torch.compile compiles. Once for each shape; on a CPU it needs a C++ compiler and gains
    nothing over `norm: fused`, on a GPU it needs gcc"""
    cuda_graphs: bool = False
    """frozen networks run as CUDA graphs. The teacher in training, all networks in `generate`"""
    recompute: Resolutions = ()
    """resolutions whose activations are computed again in the backward pass. Their blocks keep no
    activations"""
    cudnn_benchmark: bool = False
    """cuDNN tries its kernels for each shape and keeps the fastest. Another run may keep others,
    which round apart"""
    deterministic: bool = False
    """GPUs add in a fixed order, so that the same training gives the same bits. Without it
    gradients of convolutions and of attention may round apart in another run. A CPU needs no
    such setting"""


# Names become parts of file names, of DVC's stages and of keys, which DVC splits at dots.
_NAME, _OTHER = "[a-z0-9][a-z0-9-]*$", "^(?!teacher$)"
_LETTERS = "of a-z, 0-9 and '-' that starts with a letter or digit"
_TOO = "and is not 'teacher'"
ImportName = Annotated[str, asks(f"a name {_LETTERS} {_TOO}", pattern=_OTHER + _NAME)]
StudentName = Annotated[str, asks(f"a student name {_LETTERS} {_TOO}", pattern=_OTHER + _NAME)]
RowName = Annotated[str, asks(f"a row name {_LETTERS}", pattern="^" + _NAME)]
SweepName = Annotated[str, asks(f"a sweep name {_LETTERS}", pattern="^" + _NAME)]
Pupil = Annotated[Student, asks(required=["init_from"])]


@block(kw_only=True)
class Params:
    seed: Natural
    """seed of all training randomness"""
    device: Literal["auto", "cpu", "cuda"]
    """auto takes CUDA where there is one, and refuses GPUs that CUDA cannot use"""
    precision: Literal["fp32", "tf32", "bf16", "fp16"]
    """arithmetic inside the networks. Weights and denoised images stay fp32. `tf32` is fp32 whose
    products GPUs since Ampere round to TF32; `fp32` never does that, not even in convolutions,
    and on a CPU both are the same. `bf16` on a CPU is 1.7 to 2.2 times as fast where `grep
    amx_bf16 /proc/cpuinfo` finds it, slower elsewhere
    ([docs/performance.md](performance.md))"""
    data: Data
    """the training images"""
    network: Network
    """the one architecture of teacher, student and fake score"""
    noise: Noise
    """the Karras schedule of every grid"""
    teacher: Teacher
    """url and sha256 of a file to download, or train with a student block"""
    imports: Annotated[Frozen[ImportName, Import], asks("a mapping of names to downloads, or {}")]
    """other people's networks, to start from or to measure"""
    students: Annotated[Frozen[StudentName, Pupil], asks("a mapping of student names to blocks")]
    """what is trained"""
    generate: Generate
    """how many images a row draws, and from which seeds"""
    rows: Annotated[
        Frozen[RowName, Row],
        asks("a mapping of at least one row name to a block", minProperties=1),
    ]
    """what is measured"""
    sweeps: Annotated[
        Frozen[SweepName, Sweep] | None,
        asks("a mapping of sweep names to blocks"),
    ] = None
    """rows from one block, written by `fewstep sweep`; absent = none"""
    metric: Metric
    """how a row is scored"""
    tracking: Tracking
    """where trainings are shown beside their logs; no result depends on it"""
    performance: Performance = field(default_factory=Performance)
    """how networks are computed; results agree up to rounding"""

    def as_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and scalars that `load_params` would read back as these params."""
        return plain(self)
