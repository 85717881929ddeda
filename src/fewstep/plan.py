"""What an experiment costs, known before its first hour: FLOPs, memory, time, disk.

Networks are built on the meta device: shapes without memory.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil, prod

import torch
from torch import Tensor, nn

from fewstep.consistency import Consistency
from fewstep.denoiser import ConditionalDenoise, Denoiser
from fewstep.denoising import Denoising
from fewstep.dmd2 import Critic, Discriminator, Dmd2
from fewstep.download import downloads
from fewstep.flops import forward_flops
from fewstep.methods import Method
from fewstep.models import build_denoiser
from fewstep.params import (
    ConsistencySettings,
    DenoisingSettings,
    Dmd2Settings,
    Params,
    Row,
    Student,
    key_of,
)
from fewstep.sample import nfe
from fewstep.train import check_world
from fewstep.unet import UNetBlock, fused_attention

GB = 1e9
CONTEXT = 2 * GB  # CUDA's own, and cuDNN's workspaces
PAGE = 4096  # bytes of LMDB; an image begins a new one
SEGMENT_SHARE = 1e-3  # of the training's images: a segment that sees fewer is hardly trained
SMALL = 5e9  # FLOPs of a forward pass below which no GPU is kept busy
MOMENTS = 100  # of the training, at which the teacher's grid is looked at


@dataclass(frozen=True)
class Gpu:
    """Memory in bytes and dense FLOP/s by precision, from the data sheet."""

    memory: float
    flops: dict[str, float]

    @classmethod
    def of(cls, memory_gb: float, half_tflops: float, single_tflops: float) -> "Gpu":
        half, single = half_tflops * 1e12, single_tflops * 1e12
        rates = {"bf16": half, "fp16": half, "tf32": half / 2, "fp32": single}
        return cls(memory_gb * GB, rates)


GPUS = {
    "a100-40": Gpu.of(40, 312, 19.5),
    "a100": Gpu.of(80, 312, 19.5),
    "h100": Gpu.of(80, 989, 67),
    "h200": Gpu.of(141, 989, 67),
    "rtx4090": Gpu.of(24, 165, 82.6),
}


@dataclass(frozen=True)
class Hardware:
    """`gpus` of one kind on each of `nodes`; `utilisation` is the share of their FLOP/s reached."""

    gpu: Gpu
    gpus: int
    nodes: int
    utilisation: float
    disk: float

    @property
    def world(self) -> int:
        return self.gpus * self.nodes

    def rate(self, precision: str) -> float:
        """FLOP/s of all GPUs together."""
        return self.world * self.gpu.flops[precision] * self.utilisation


@dataclass(frozen=True)
class Saved:
    """Bytes that a forward pass keeps for its backward pass: each image's, and those of no image
    (weights cast to the precision, or put in order); of the whole network and of its encoder."""

    image: int
    encoder_image: int
    cast: int


@dataclass(frozen=True)
class StudentPlan:
    """What training one student takes. FLOPs are of an image, `memory` is bytes of a GPU by part,
    `state` one training state on the disk, `snapshots` all of phema."""

    name: str
    block: Student
    parameters: int
    flops: float
    memory: dict[str, float]
    training_flops: float
    validation_flops: float
    state: float
    model: float
    snapshots: float

    @property
    def total_memory(self) -> float:
        return sum(self.memory.values())

    def hours(self, hardware: Hardware, precision: str) -> float:
        return (self.training_flops + self.validation_flops) / hardware.rate(precision) / 3600

    @property
    def disk_after(self) -> float:
        return self.model + self.snapshots

    @property
    def disk_left(self) -> float:
        """What a finished training keeps for itself until its model is used."""
        return self.state + self.snapshots

    @property
    def disk_while(self) -> float:
        """Beyond what stays: the states, one being written, and a copy of the snapshots."""
        return (self.block.keep_checkpoints + 2) * self.state + self.snapshots


def plan_students(params: Params, world: int = 2) -> Iterator[StudentPlan]:
    """What each student costs on `world` GPUs, a teacher that is trained first."""
    blocks = {"teacher": params.teacher.train} if params.teacher.train else {}
    for name, block in {**blocks, **params.students}.items():
        yield plan_student(name, block, params, world)


def plan_student(name: str, block: Student, params: Params, world: int = 2) -> StudentPlan:
    """What a student costs; alone (`world` 1) it keeps no buckets of gradients."""
    method = meta_method(block, params)
    forward, encoder = forward_flops(method.student, params)
    flops = forward * method.forwards(encoder / forward)
    size, trained = 4 * count(method.student), [4 * count(n) for n in method.trained.values()]
    stds = len(block.phema.stds) if block.phema else 0
    shares = world if params.performance.shard else 1
    memory = {
        "weights": 4 * count(*networks(method)),
        "gradients": sum(trained) if world > 1 else max(trained),
        "optimiser": 2 * sum(trained) / shares,
        "average": size / shares,
        "phema": stds * size / shares,
        "activations": activations(method, block, params),
    }
    snapshots = stds * block.kimg / block.phema.snapshot_kimg * size if block.phema else 0.0
    return StudentPlan(
        name,
        block,
        count(method.student),
        flops,
        memory,
        training_flops=flops * block.kimg * 1000,
        validation_flops=validation_images(block) * forward,
        state=3 * sum(trained) + (1 + stds) * size,
        model=size,
        snapshots=snapshots,
    )


def meta_method(block: Student, params: Params) -> Method:
    """The method of a block around networks of shapes without numbers."""
    s = block.settings
    with torch.device("meta"):
        student = build_denoiser(params, block.dropout, 0.0, block.dropout_resolutions)
        teacher, fake_score = build_denoiser(params), build_denoiser(params)
        discriminator = None
        if isinstance(s, Dmd2Settings) and s.gan_critic_weight:
            n = params.network
            discriminator = Discriminator(n.model_channels * n.channel_mult[-1], s.gan_groups)
    if isinstance(s, DenoisingSettings):
        return Denoising(student, s)
    if isinstance(s, ConsistencySettings):
        return Consistency(student, teacher, s, params.noise)
    return Dmd2(student, teacher, Critic(fake_score, discriminator), s, params.noise)


def networks(method: Method) -> list[nn.Module]:
    """All that a training holds on the GPU, without averages."""
    teacher = getattr(method, "teacher", None)
    return [*method.trained.values(), *([teacher] if teacher is not None else [])]


def count(*modules: nn.Module) -> int:
    """Their parameters."""
    return sum(p.numel() for module in modules for p in module.parameters())


def activations(method: Method, block: Student, params: Params) -> float:
    """Bytes kept between a micro-batch's forward and backward pass, in the phase with most."""
    saved = saved_bytes(method.student.train(), params)
    s, encoders = block.settings, 0
    if isinstance(s, Dmd2Settings):
        encoders = max(2 * bool(s.gan_critic_weight), int(bool(s.gan_student_weight)))
    image = saved.image + encoders * saved.encoder_image
    return block.batch_gpu * image + saved.cast * (1 + encoders)


def saved_bytes(denoiser: Denoiser, params: Params) -> Saved:
    """What autograd keeps of a denoiser on the meta device, told from one image and two."""
    one, two = (_kept(denoiser, denoiser, params, images) for images in (1, 2))
    half = [_kept(denoiser, denoiser.bottleneck, params, images) for images in (1, 2)]
    return Saved(two - one, half[1] - half[0], 2 * one - two)


def _kept(denoiser: Denoiser, call: ConditionalDenoise, params: Params, images: int) -> int:
    """Bytes of the storages that a call saves for its backward pass, weights left out."""
    d, kept = params.data, dict[int, torch.UntypedStorage]()
    for block in (m for m in denoiser.modules() if isinstance(m, UNetBlock)):
        if block.attention is fused_attention:
            block.attention = _fused_attention
    own = {p.untyped_storage()._cdata for p in denoiser.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage  # held: another one may get its number else
        return tensor

    with torch.device("meta"), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        x = torch.empty(images, d.channels, d.resolution, d.resolution)
        call(x, torch.empty(images), torch.empty(images, d.classes))
    return sum(storage.nbytes() for storage in kept.values())


def _fused_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What devices do, of which `meta` is none: it would keep all weights of attention."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0]


def validation_images(block: Student) -> float:
    """Forward passes that all validations of a training take."""
    v = block.validation
    if v is None:
        return 0.0
    scores = block.kimg / v.every_kimg
    return scores * v.images * nfe(v.sampler, v.steps, v.guidance_scale)


def images_by_segment(block: Student, params: Params) -> list[float]:
    """How many images each segment of a consistency student will see, first the noisiest."""
    with_networks = meta_method(block, params)
    assert isinstance(with_networks, Consistency)
    seen = torch.zeros(with_networks.settings.steps, dtype=torch.float64)
    for moment in range(MOMENTS):
        grid = with_networks.grid(block.kimg * (moment + 0.5) / MOMENTS)
        for segment, (first, last) in enumerate(grid.bounds.tolist()):
            seen[segment] += grid.probability[first : last + 1].sum() / grid.probability.sum()
    return (seen / MOMENTS * block.kimg * 1000).tolist()


def row_flops(row: Row, params: Params, forward: int) -> float:
    """To draw a row's images, those of all seed ranges; `forward` FLOPs a network call."""
    calls = nfe(row.sampler, row.steps, row.guidance_scale)
    return calls * row_images(row, params) * forward


def images_needed(params: Params) -> int:
    """The fewest images that the data must have for all references and rows."""
    m = params.metric
    floor = 2 if m.reference else params.generate.images  # stages/ref_stats.py: floor_images
    counts = [m.reference_images + floor]
    if m.memorisation is not None:
        counts.append(m.memorisation.images or 0)
    if m.reference is None:  # else a validation's reference is that file
        counts += [s.validation.reference_images for s in params.students.values() if s.validation]
    return max(counts)


def row_images(row: Row, params: Params) -> int:
    """Images of all seed ranges of a row."""
    return sum(map(len, params.generate.ranges(row)))


def image_bytes(params: Params) -> int:
    d = params.data
    return prod((d.channels, d.resolution, d.resolution))


def disk_parts(
    params: Params, students: list[StudentPlan], images: int | None = None
) -> dict[str, float]:
    """Bytes of the experiment by part, at the moment when it has most.

    DVC keeps a copy of what stages make; Snakemake, and DVC on a disk that can reflink, do not.

    Args:
        images: of the data; None: the fewest that will do.
    """
    images, size = images or images_needed(params), image_bytes(params)
    names = {row.model for row in params.rows.values()} | {"teacher"}
    model, given = 4 * count(meta_network(params)), len(names - set(params.students))
    lmdb = images * ceil(size / PAGE + 1e-9) * PAGE
    outputs, left = sum(s.disk_after for s in students), sum(s.disk_left for s in students)
    samples = sum(row_images(row, params) for row in params.rows.values()) * size
    return {
        "data": lmdb + images * size,  # while the LMDB is built
        "teacher and imports": given * 2 * model,  # as fetched, too
        "models and snapshots": outputs,
        "training states": left + max((s.disk_while - s.disk_left for s in students), default=0.0),
        "samples": samples,
        "DVC's cache": lmdb + given * model + outputs + samples,
    }


def meta_network(params: Params) -> Denoiser:
    with torch.device("meta"):
        return build_denoiser(params)


def warnings(
    params: Params, students: list[StudentPlan], hardware: Hardware, images: int | None = None
) -> Iterator[str]:
    """What will go wrong on that hardware, or is a waste of it; each with the key to edit.

    Args:
        images: as in `disk_parts`.
    """
    for key, file in downloads(params):
        if file.sha256 == "unknown":
            yield (
                f"{key}: the sha256 of {file.url} is unknown; `fewstep download-all` fetches the "
                f"file and tells it (params.yaml: {key}.sha256)"
            )
    for student in students:
        yield from _memory_warnings(student, params, hardware)
        yield from _world_warnings(student, hardware)
        if isinstance(student.block.settings, ConsistencySettings):
            yield from _segment_warnings(student, params)
    need = sum(disk_parts(params, students, images).values())
    if need > hardware.disk:
        yield (
            f"disk: need {need / GB:.0f} GB, got {hardware.disk / GB:.0f} GB free (params.yaml: "
            "students.<name>.phema.snapshot_kimg, keep_checkpoints)"
        )


def _memory_warnings(student: StudentPlan, params: Params, hardware: Hardware) -> Iterator[str]:
    room = hardware.gpu.memory - CONTEXT
    if student.total_memory <= room:
        return
    block, fits = student.block, 0
    for size in (n for n in range(1, block.batch_gpu) if block.batch % n == 0):
        smaller = plan_student(student.name, replace(block, batch_gpu=size), params, hardware.world)
        fits = size if smaller.total_memory <= room else fits
    repair = f"{fits} would do" if fits else "no batch_gpu would do"
    yield (
        f"{student.name}: need {student.total_memory / GB:.0f} GB of {room / GB:.0f} GB a GPU for "
        f"batch_gpu {block.batch_gpu}; {repair} (params.yaml: {key_of(student.name)}.batch_gpu; "
        "or performance.recompute)"
    )


def _world_warnings(student: StudentPlan, hardware: Hardware) -> Iterator[str]:
    try:
        check_world(student.name, student.block, hardware.world)
    except ValueError as error:
        yield f"{student.name}: {error}"


def _segment_warnings(student: StudentPlan, params: Params) -> Iterator[str]:
    steps = images_by_segment(student.block, params)
    for segment, images in enumerate(steps):
        if images < SEGMENT_SHARE * student.block.kimg * 1000:
            yield (
                f"{student.name}: segment {segment + 1} of {len(steps)} (1 has most noise) will "
                f"see {images:,.0f} of {student.block.kimg * 1000:,.0f} images "
                f"(params.yaml: students.{student.name}.settings.uniform_share)"
            )
