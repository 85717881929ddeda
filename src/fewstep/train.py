"""The one training loop, for all methods: clock, ranks, optimisers, averages, logs, states.

`nimg`, the number of training images seen, is the only clock. A batch is a sequence of
micro-batches of batch_gpu images; all that is random in one follows from (seed, nimg of its first
image), so a resumed run draws what an uninterrupted one would have drawn, on any number of ranks.
"""

import csv
import hashlib
import math
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, cast

import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn

from fewstep import ema
from fewstep.batch import Batch
from fewstep.checkpoint import SCRATCH, Checkpoints
from fewstep.consistency import Consistency
from fewstep.data.batches import batch_indices
from fewstep.data.lmdb import ImageDataset
from fewstep.denoiser import Denoiser, one_hot
from fewstep.denoising import Denoising
from fewstep.distributed import Rank, any_rank, average_gradients, barrier
from fewstep.dmd2 import Critic, Dmd2
from fewstep.files import atomic_path, sha256_file
from fewstep.models import MODELS, build_denoiser, load_model, save_model
from fewstep.params import (
    ConsistencySettings,
    DenoisingSettings,
    Dmd2Settings,
    Params,
    Student,
    digest,
)
from fewstep.progress import progress

DATA = Path("artifacts/data.lmdb")
LOG_ROWS = 200


class Method(Protocol):
    """What the loop asks of a method.

    Attributes:
        student: the network that is averaged and saved.
        trained: the networks that have an optimiser, by the name of their phase.
    """

    student: Denoiser
    trained: dict[str, nn.Module]

    def phases(self, iteration: int) -> tuple[str, ...]:
        """Which networks are updated in this iteration, in order."""
        ...

    def loss(self, phase: str, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss of a micro-batch for that phase, and values to log, whose mean counts."""
        ...


def train(name: str, params: Params, rank: Rank) -> None:
    """Train `teacher` or a student and write artifacts/models/<name>.

    Raises:
        ValueError: data or weights do not fit the params, or another process trains this model.
        FloatingPointError: a loss or gradient is not finite.
        SystemExit: a signal asked to stop; the state was saved.
    """
    block = student_block(name, params)
    dataset = ImageDataset(DATA, params.data.classes)
    dataset.check(params.data.resolution, params.data.channels, params.data.classes)
    rounds = block.batch // block.batch_gpu
    if rounds % rank.world:
        fits = [n for n in range(1, rounds + 1) if rounds % n == 0]
        raise ValueError(
            f"need a number of processes that divides batch / batch_gpu = {rounds}, got "
            f"{rank.world}; {', '.join(map(str, fits))} would (params.yaml: students.{name}.batch)"
        )
    checkpoints = Checkpoints(name, fingerprint(name, params, dataset))
    with _lock(name, rank), _signals() as stop:
        torch.manual_seed(params.seed)  # initial weights that come from no file
        method, rates = build_method(name, params, rank.device)
        run = Run(block, params, rank, dataset, method, rates, checkpoints)
        run.resume()
        with progress(
            round(block.kimg * 1000), f"train {name}", initial=run.nimg, silent=not rank.first
        ) as bar:
            while run.nimg < block.kimg * 1000:
                run.iterate()
                bar.update(block.batch, run.latest)
                if any_rank(bool(stop), rank):
                    run.save_state()
                    raise SystemExit(128 + (stop[0] if stop else signal.SIGTERM))
        run.finish(name)


def student_block(name: str, params: Params) -> Student:
    """The params of what is trained under that name.

    Raises:
        ValueError: no such student, or a teacher that is downloaded.
    """
    block = params.teacher.train if name == "teacher" else params.students.get(name)
    if block is None:
        known = ", ".join(params.students)
        raise ValueError(f"need a student of {known}, got {name!r} (params.yaml: students)")
    return block


def fingerprint(name: str, params: Params, dataset: ImageDataset) -> str:
    """Hash of all that the training depends on: params, data, weights it starts from, code."""
    block = student_block(name, params)
    needed = {"teacher", block.init_from} - {None} if name != "teacher" else set()
    code = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        if file.stem in CODE:
            code.update(file.read_bytes())
    return digest(
        {
            "student": block,
            "network": params.network,
            "noise": params.noise,
            "precision": params.precision,
            "seed": params.seed,
            "data": dataset.content_sha256(),
            "models": {n: sha256_file(MODELS / str(n) / "model.safetensors") for n in needed},
            "code": code.hexdigest(),
        }
    )


CODE = (
    "batch",
    "consistency",
    "denoiser",
    "denoising",
    "dmd2",
    "ema",
    "losses",
    "noise",
    "solve",
    "train",
    "unet",
)


def build_method(
    name: str, params: Params, device: torch.device
) -> tuple[Method, dict[str, float]]:
    """The method with its networks on the device, and the learning rate of each phase."""
    block = student_block(name, params)
    s = block.settings
    own_drop = s.label_dropout if isinstance(s, Dmd2Settings) and not s.shared_label_drop else 0.0
    student = build_denoiser(params, block.dropout, own_drop)
    if isinstance(s, DenoisingSettings):
        return Denoising(student.to(device), s), {"student": block.lr}
    teacher, _ = load_model("teacher", params)
    start, _ = load_model(block.init_from or "teacher", params)
    student.load_state_dict(start.state_dict())
    teacher, student = teacher.to(device), student.to(device)
    if isinstance(s, ConsistencySettings):
        return Consistency(student, teacher, s, params.noise), {"student": block.lr}
    bottleneck = params.data.resolution >> (len(params.network.channel_mult) - 1)
    if (s.gan_student_weight or s.gan_critic_weight) and bottleneck != 8:
        raise ValueError(
            f"need an 8x8 bottleneck for the discriminator, got {bottleneck}x{bottleneck} (params."
            f"yaml: network.channel_mult; or students.{name}.settings.gan_*_weight: 0.0)"
        )
    fake_score = deepcopy(student)
    fake_score.load_state_dict(teacher.state_dict())
    teacher.model.label_dropout = own_drop
    channels = params.network.model_channels * params.network.channel_mult[-1]
    critic = Critic(fake_score, channels, s.gan_groups).to(device)
    rates = {"student": block.lr, "critic": s.fake_score_lr}
    return Dmd2(student, teacher, critic, s, params.noise), rates


def learning_rate_factor(block: Student, nimg: int) -> float:
    """Share of the learning rate after nimg images: linear warm-up, then the schedule to 0."""
    warmup, total = block.lr_warmup_kimg * 1000, block.kimg * 1000
    if nimg < warmup:
        return nimg / warmup
    left = (total - nimg) / max(total - warmup, 1)
    shapes = {"constant": 1.0, "linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2}
    return shapes[block.lr_schedule]


class Run:
    """The state of one training, and what an iteration does to it."""

    def __init__(
        self,
        block: Student,
        params: Params,
        rank: Rank,
        dataset: ImageDataset,
        method: Method,
        rates: dict[str, float],
        checkpoints: Checkpoints,
    ) -> None:
        self.block, self.params, self.rank = block, params, rank
        self.dataset, self.method, self.checkpoints = dataset, method, checkpoints
        for network in method.trained.values():
            network.train()
        self.average = deepcopy(method.student).requires_grad_(False)
        self.optimizers = {
            phase: torch.optim.AdamW(
                network.parameters(),
                lr=rates[phase],
                betas=block.betas,
                weight_decay=block.weight_decay,
                fused=True,
            )
            for phase, network in method.trained.items()
        }
        self.rates = rates
        self.modules: dict[str, nn.Module] = {**method.trained, "average": self.average}
        self.nimg = 0
        self.meter = Meter()
        self.seconds = 0.0
        self.started = time.monotonic()
        self.latest = ""
        self.log = checkpoints.folder / "log.csv"

    def resume(self) -> None:
        """Go on from the newest state, if there is one."""
        about = self.checkpoints.restore(self.modules, self.optimizers)
        if about is None:
            if self.rank.first:
                self.log.unlink(missing_ok=True)
            return
        self.nimg, self.seconds = about["nimg"], about["seconds"]
        self.meter.sums = {k: (s, n) for k, (s, n) in about["meter"].items()}
        if self.rank.first:
            print(f"resuming at {self.nimg / 1000:.1f} kimg from {self.checkpoints.folder}")
            _drop_rows_after(self.log, self.nimg)

    def iterate(self) -> None:
        """One iteration: each phase of the method, the average, the log, the state."""
        block, nimg = self.block, self.nimg
        batches = list(self.micro_batches())
        for phase in self.method.phases(nimg // block.batch):
            self.update(phase, batches)
        beta = self.average_beta()
        ema.update_average(self.average.parameters(), self.method.student.parameters(), beta)
        self.nimg += block.batch
        total = round(block.kimg * 1000)
        if self.crossed(max(total // LOG_ROWS, 1)) or self.nimg >= total:
            self.write_log()
        if self.crossed(round(block.checkpoint_kimg * 1000)) and self.nimg < total:
            self.save_state()

    def micro_batches(self) -> Iterator[Batch]:
        """This rank's share of the batch at nimg, on its device."""
        block, seed = self.block, self.params.seed
        for i in range(self.rank.index, block.batch // block.batch_gpu, self.rank.world):
            first = self.nimg + i * block.batch_gpu
            indices = batch_indices(first, block.batch_gpu, len(self.dataset), seed)
            pixels, labels = (torch.from_numpy(a) for a in self.dataset.read(indices))
            images = pixels.to(self.rank.device).float() / 127.5 - 1
            hot = one_hot(labels.to(self.rank.device), self.params.data.classes)
            yield Batch(images, hot, first, self.nimg, seed)

    def update(self, phase: str, batches: list[Batch]) -> None:
        """One optimiser step of the network of that phase.

        Raises:
            FloatingPointError: the gradient is not finite; nothing was updated.
        """
        network, optimizer = self.method.trained[phase], self.optimizers[phase]
        for other, module in self.method.trained.items():
            module.requires_grad_(other == phase)
        optimizer.zero_grad(set_to_none=True)
        losses = []
        for batch in batches:
            torch.manual_seed(batch.dropout_seed)
            loss, values = self.method.loss(phase, batch)
            (loss / len(batches)).backward()
            self.meter.add(values)
            losses.append(loss.detach())
        average_gradients(network.parameters(), self.rank)
        limit = self.block.grad_clip or math.inf
        norm = nn.utils.clip_grad_norm_(network.parameters(), limit)
        if not torch.isfinite(norm):
            raise FloatingPointError(
                f"the {phase} gradient is {float(norm)} at nimg {self.nimg}, its loss "
                f"{float(torch.stack(losses).mean())}; lower lr or raise precision (params.yaml)"
            )
        self.meter.add({f"grad_norm_{phase}": norm.detach()})
        factor = learning_rate_factor(self.block, self.nimg)
        for group in optimizer.param_groups:
            group["lr"] = self.rates[phase] * factor
        optimizer.step()

    def average_beta(self) -> float:
        """How much of the running average stays in this iteration."""
        block, e = self.block, self.block.ema
        if e.kind == "half_life":
            return ema.half_life_beta(block.batch, self.nimg, e.kimg or 0.0, e.rampup or 0.0)
        if e.kind == "power":
            return ema.power_beta(block.batch, self.nimg + block.batch, e.std or 0.0)
        return 0.0

    def crossed(self, every: int) -> bool:
        """Whether this iteration's images passed a multiple of `every`."""
        return self.nimg // every > (self.nimg - self.block.batch) // every

    def elapsed(self) -> float:
        return self.seconds + time.monotonic() - self.started

    def write_log(self) -> None:
        """A row of means since the last one (this rank's images), and the progress text."""
        values = self.meter.means()
        self.meter = Meter()
        main = next((k for k in ("loss", "loss_dm", "loss_fake") if k in values), "")
        self.latest = f"{main} {values[main]:.4g}" if main else ""
        if not self.rank.first:
            return
        row = {
            "nimg": self.nimg,
            "kimg": self.nimg / 1000,
            "lr": self.rates["student"] * learning_rate_factor(self.block, self.nimg),
            "seconds": round(self.elapsed(), 1),
            "images_per_second": round(self.nimg / max(self.elapsed(), 1e-9), 1),
            **{k: "" if math.isnan(v) else f"{v:.6g}" for k, v in values.items()},
        }
        self.log.parent.mkdir(parents=True, exist_ok=True)
        columns = list(row)  # the first iteration runs every phase, so its row has all columns
        if self.log.exists():
            columns = self.log.read_text().splitlines()[0].split(",")
        with self.log.open("a", newline="") as file:
            writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(row)

    def save_state(self) -> None:
        """Write the state of this moment; all ranks hold the same, the first one writes."""
        if self.rank.first:
            about = {"seconds": self.elapsed(), "meter": self.meter.totals()}
            self.checkpoints.save(self.nimg, self.modules, self.optimizers, about)
        barrier(self.rank)

    def finish(self, name: str) -> None:
        """Write the averaged student and the log, then drop the states."""
        if self.rank.first:
            about = {
                "name": name,
                "kimg": self.nimg / 1000,
                "train": _plain(self.block),
                "network": _plain(self.params.network),
                "data": {**_plain(self.params.data), "sha256": self.dataset.content_sha256()},
                "noise": _plain(self.params.noise),
                "seed": self.params.seed,
            }
            save_model(MODELS / name, self.average.state_dict(), about)
            with atomic_path(MODELS / name / "log.csv") as path:
                shutil.copyfile(self.log, path)
            self.checkpoints.remove()
        barrier(self.rank)


class Meter:
    """Sums and counts of logged values, kept on the device until a row is written."""

    def __init__(self) -> None:
        self.sums: dict[str, tuple[Tensor | float, int]] = {}

    def add(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            total, count = self.sums.get(name, (0.0, 0))
            self.sums[name] = (total + value.double().sum(), count + value.numel())

    def totals(self) -> dict[str, tuple[float, int]]:
        return {name: (float(total), count) for name, (total, count) in self.sums.items()}

    def means(self) -> dict[str, float]:
        """Mean of each; NaN where nothing was counted."""
        totals = self.totals().items()
        return {name: total / count if count else math.nan for name, (total, count) in totals}


def _plain(block: object) -> dict[str, Any]:
    return {k: v for k, v in asdict(cast(Any, block)).items() if v is not None}


def _drop_rows_after(log: Path, nimg: int) -> None:
    if log.exists():
        header, *rows = log.read_text().splitlines(keepends=True)
        log.write_text(header + "".join(r for r in rows if int(r.split(",")[0]) <= nimg))


@contextmanager
def _lock(name: str, rank: Rank) -> Iterator[None]:
    """Keep a second trainer off this model's states.

    Raises:
        ValueError: another process holds the lock.
    """
    SCRATCH.mkdir(exist_ok=True)
    lock = FileLock(SCRATCH / f"{name}.lock", timeout=0)
    try:
        with lock if rank.first else nullcontext():
            yield
    except Timeout as error:
        raise ValueError(
            f"another process trains {name} here ({SCRATCH / name}.lock); wait for it or stop it"
        ) from error


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of dying, so that the loop can save and stop."""
    caught: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        caught.append(number)

    kinds = (signal.SIGINT, signal.SIGTERM)
    before = {kind: signal.signal(kind, remember) for kind in kinds}
    try:
        yield caught
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
