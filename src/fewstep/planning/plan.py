"""What an experiment costs, before it runs: FLOPs, memory, time, disk.

Networks are built on the meta device, where tensors have shapes but no memory.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil

import torch
from torch import Tensor, nn

from fewstep.download import downloads
from fewstep.method import Method, build_method
from fewstep.networks.denoiser import Denoiser
from fewstep.networks.layers import fused_attention
from fewstep.networks.registry import build_denoiser
from fewstep.params import Params, Row, Student, key_of
from fewstep.paths import trained
from fewstep.planning.flops import forward_flops, image_flops, matmul_rate
from fewstep.planning.sight import image_needs
from fewstep.sampling.batches import seed_ranges
from fewstep.theory.sample import nfe
from fewstep.theory.solve import ConditionalDenoise
from fewstep.training.feed import check_world

GB = 1e9
CONTEXT = 2 * GB  # for CUDA itself and cuDNN's workspaces
PAGE = 4096  # bytes; in LMDB each image starts a new page
SMALL = 5e9  # FLOPs of a forward pass; with fewer, launching kernels takes longer than running them


@dataclass(frozen=True)
class Gpu:
    """Memory in bytes and dense FLOP/s for each precision, from the data sheet."""

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


def this_cpu(precision: str) -> Gpu:
    """This machine's processor as a device: its memory, and the rate of a product measured now."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Gpu(memory, {precision: matmul_rate(torch.device("cpu"), precision)})


@dataclass(frozen=True)
class Hardware:
    """`gpus` of one kind on each of `nodes`, and `disk` bytes."""

    gpu: Gpu
    gpus: int
    nodes: int
    disk: float

    @property
    def world(self) -> int:
        return self.gpus * self.nodes

    def peak(self, precision: str) -> float:
        """FLOP/s of all GPUs together by their data sheet, of which some share is reached."""
        return self.world * self.gpu.flops[precision]


@dataclass(frozen=True)
class Saved:
    """Bytes that a forward pass keeps for its backward pass."""

    image: int  # for each image
    encoder_image: int  # for each image, in the encoder alone
    cast: int  # independent of images: weights cast to the precision or reordered


@dataclass(frozen=True)
class StudentPlan:
    """What training one student takes. Memory and disk are in bytes."""

    name: str
    block: Student
    flops: float  # per image
    memory: dict[str, float]  # of a GPU, by part
    training_flops: float
    validation_flops: float
    state: float  # one training state on the disk
    model: float
    snapshots: float  # all of phema's

    @property
    def total_memory(self) -> float:
        return sum(self.memory.values())

    def hours(self, rate: float) -> float:
        """Of training and validation, at that many FLOP/s."""
        return (self.training_flops + self.validation_flops) / rate / 3600

    @property
    def best(self) -> float:
        """The model of the best validation, on the disk."""
        return self.model if self.block.validation else 0.0

    @property
    def disk_after(self) -> float:
        return self.model + self.best + self.snapshots

    @property
    def disk_left(self) -> float:
        """What a finished training keeps until its model is used."""
        return self.state + self.best + self.snapshots

    @property
    def disk_while(self) -> float:
        """Disk during training, on top of disk_after: states, the best one and one being written,
        and the best model and the snapshots, which are copied at the end."""
        return (self.block.keep_checkpoints + 2) * self.state + self.best + self.snapshots


def plan_students(params: Params, world: int = 2) -> Iterator[StudentPlan]:
    """What each student costs on `world` GPUs; before them a teacher, if it is trained."""
    blocks = {"teacher": params.teacher.train} if params.teacher.train else {}
    for name, block in {**blocks, **params.students}.items():
        yield plan_student(name, block, params, world)


def plan_student(name: str, block: Student, params: Params, world: int = 2) -> StudentPlan:
    """What a student costs on `world` GPUs."""
    method = build_method(block, params, torch.device("meta"))
    forward, _ = forward_flops(method.student, params)
    flops = image_flops(method, params)
    size, trained = 4 * count(method.student), [4 * count(n) for n in method.trained.values()]
    stds = len(block.phema.stds) if block.phema else 0
    memory = {
        "weights": 4 * count(*networks(method)),
        # DistributedDataParallel holds buckets for all phases; one process frees each phase's
        "gradients": sum(trained) if world > 1 else max(trained),
        "optimiser": 2 * sum(trained),
        "average": size,
        "phema": stds * size,
        "activations": activations(method, block, params),
    }
    snapshots = stds * block.kimg / block.phema.snapshot_kimg * size if block.phema else 0.0
    return StudentPlan(
        name,
        block,
        flops,
        memory,
        training_flops=flops * block.kimg * 1000,
        validation_flops=validation_images(block) * forward,
        state=3 * sum(trained) + (1 + stds) * size,  # Adam's two moments beside the weights
        model=size,
        snapshots=snapshots,
    )


def networks(method: Method) -> list[nn.Module]:
    """The networks that a training holds on the GPU, without averages."""
    return [*method.trained.values(), *method.frozen.values()]


def count(*modules: nn.Module) -> int:
    """Number of parameters of all modules together."""
    return sum(p.numel() for module in modules for p in module.parameters())


def activations(method: Method, block: Student, params: Params) -> float:
    """Bytes kept between forward and backward pass of a micro-batch, in the largest phase."""
    saved = saved_bytes(method.student.train(), params)
    image = saved.image + method.encoders * saved.encoder_image
    return block.batch_gpu * image + saved.cast * (1 + method.encoders)


def saved_bytes(denoiser: Denoiser, params: Params) -> Saved:
    """What autograd keeps of a denoiser on the meta device, extrapolated from 1 and 2 images."""
    one, two = (_kept(denoiser, denoiser, params, images) for images in (1, 2))
    half = [_kept(denoiser, denoiser.bottleneck, params, images) for images in (1, 2)]
    return Saved(two - one, half[1] - half[0], 2 * one - two)


def _kept(denoiser: Denoiser, call: ConditionalDenoise, params: Params, images: int) -> int:
    """Bytes of the storages that a call saves for its backward pass, without the weights."""
    d, kept = params.data, dict[int, torch.UntypedStorage]()
    for block in denoiser.model.blocks():
        if block.attention is fused_attention:
            block.attention = _fused_attention
    own = {p.untyped_storage()._cdata for p in denoiser.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage  # held, so that no later storage gets the same address
        return tensor

    with torch.device("meta"), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        x = torch.empty(images, d.channels, d.resolution, d.resolution)
        call(x, torch.empty(images), torch.empty(images, d.classes))
    return sum(storage.nbytes() for storage in kept.values())


def _fused_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What real devices do; `meta` would keep the whole attention matrix."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0]


def validation_images(block: Student) -> float:
    """Forward passes, one image each, of all validations of a training."""
    v = block.validation
    if v is None:
        return 0.0
    scores = block.kimg / v.every_kimg
    return scores * v.images * nfe(v.sampler, v.steps, v.guidance_scale)


def row_flops(row: Row, params: Params, forward: int) -> float:
    """FLOPs for a row's images in all seed ranges, given those of a forward pass."""
    calls = nfe(row.sampler, row.steps, row.guidance_scale)
    return calls * row_images(row, params) * forward


def images_needed(params: Params) -> int:
    """The fewest images that the data must have for all references and rows."""
    return max(need.images for need in image_needs(params))


def row_images(row: Row, params: Params) -> int:
    """Images of all seed ranges of a row."""
    return sum(map(len, seed_ranges(params.generate, row)))


def disk_parts(
    params: Params, students: list[StudentPlan], images: int | None = None
) -> dict[str, float]:
    """Bytes of the experiment by part, when it needs most.

    DVC's cache has copies of all outputs, except on a disk with reflinks; Snakemake has none.

    Args:
        images: number of images in the data; None for the fewest that will do.
    """
    images, d = images or images_needed(params), params.data
    size = d.channels * d.resolution**2
    names = {trained(row.model) for row in params.rows.values()} | {"teacher"}
    model, given = 4 * count(meta_network(params)), len(names - set(params.students))
    lmdb = images * ceil(size / PAGE + 1e-9) * PAGE
    outputs, left = sum(s.disk_after for s in students), sum(s.disk_left for s in students)
    samples = sum(row_images(row, params) for row in params.rows.values()) * size
    return {
        "data": lmdb + images * size,  # while the LMDB is built
        "teacher and imports": given * 2 * model,  # the fetched files are kept
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
    """What will go wrong on that hardware, or waste it, each with the key to edit.

    Args:
        images: as in `disk_parts`.
    """
    for key, file in downloads(params):
        if file.sha256 == "unknown":
            yield (
                f"{key}: the sha256 of {file.url} is unknown; `fewstep download-all` fetches the "
                f"file and prints it (params.yaml: {key}.sha256)"
            )
    for student in students:
        yield from _memory_warnings(student, params, hardware)
        try:
            check_world(student.name, student.block, hardware.world)
        except ValueError as error:
            yield f"{student.name}: {error}"
        method = build_method(student.block, params, torch.device("meta"))
        for key, text in method.warnings(student.block.kimg):
            yield f"{student.name}: {text} (params.yaml: {key_of(student.name)}.settings.{key})"
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
