"""The one training loop, for all methods: clock, ranks, optimisers, averages, logs, states.

`nimg`, the number of training images seen, is the only clock. A batch is a sequence of
micro-batches of batch_gpu images; all that is random in one follows from (seed, nimg of its first
image), so a resumed run draws what an uninterrupted one would have drawn, on any number of ranks.
"""

import resource
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fewstep.averages import SNAPSHOTS, Averages
from fewstep.batch import Batch, derived_seed
from fewstep.checkpoint import SCRATCH, Checkpoints, forget_finished
from fewstep.data.batches import batch_indices
from fewstep.data.lmdb import ImageDataset
from fewstep.data.prefetch import Prefetch
from fewstep.denoiser import one_hot
from fewstep.distributed import AnyRank, Rank, barrier, gather, over_ranks, to_device
from fewstep.evaluate import Validator
from fewstep.files import atomic_path, replace_folder, sha256_file
from fewstep.fingerprint import fingerprint
from fewstep.flops import forward_flops, matmul_rate
from fewstep.meter import Meter, readable
from fewstep.methods import Method, Objective, build_method, student_block
from fewstep.models import MODELS, save_model, save_weights
from fewstep.optimizer import NonFinite, Updates, learning_rate_factor
from fewstep.params import Params, Student, key_of, plain
from fewstep.progress import progress
from fewstep.report import tile
from fewstep.tracking import Log, Tracker

DATA = Path("artifacts/data.lmdb")
LOG_ROWS = 200
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def train(name: str, params: Params, rank: Rank) -> None:
    """Train `teacher` or a student; write artifacts/models/<name> and artifacts/snapshots/<name>.

    Raises:
        ValueError: data or weights do not fit the params, or another process trains this model.
        FloatingPointError: too many gradients in a row were not finite.
        OSError: a state could not be written.
        SystemExit: a signal asked to stop; the state was saved. The code is 128 + its number.
    """
    block = student_block(name, params)
    dataset = ImageDataset(DATA, params.data.classes)
    dataset.check(params.data.resolution, params.data.channels, params.data.classes)
    check_world(name, block, rank.world)
    with _lock(name, rank), _signals() as caught:
        run = Run(name, block, params, rank, dataset)
        if rank.first:
            run.checkpoints.begin()
            forget_finished(block.init_from or "teacher")
        run.resume()
        some_rank = AnyRank(rank)
        with progress(run.total, f"train {name}", initial=run.nimg, silent=not rank.first) as bar:
            while run.nimg < run.total:
                run.iterate()
                bar.update(block.batch, run.latest)
                if some_rank(bool(caught)):
                    run.stop()
                    raise SystemExit(128 + (caught[0] if caught else signal.SIGTERM))
        run.finish()


def check_world(name: str, block: Student, world: int) -> int:
    """How many micro-batches of a batch each of `world` processes has.

    Raises:
        ValueError: they cannot be shared out evenly.
    """
    rounds = block.batch // block.batch_gpu
    if rounds % world:
        fits = ", ".join(str(n) for n in range(1, rounds + 1) if rounds % n == 0)
        raise ValueError(
            f"need a number of processes that divides batch / batch_gpu = {rounds}, got "
            f"{world}; {fits} would (params.yaml: {key_of(name)}.batch_gpu)"
        )
    return rounds // world


class Run:
    """The state of one training, and what an iteration does to it."""

    def __init__(
        self, name: str, block: Student, params: Params, rank: Rank, dataset: ImageDataset
    ) -> None:
        self.name, self.block, self.params, self.rank = name, block, params, rank
        self.dataset, self.total = dataset, round(block.kimg * 1000)
        self.fingerprint = fingerprint(name, block, params, dataset)
        self.checkpoints = Checkpoints(name, self.fingerprint, block.keep_checkpoints)
        self.snapshots = self.checkpoints.folder / "snapshots"
        self.log = Log(self.checkpoints.folder / "log.jsonl")
        torch.manual_seed(params.seed)  # initial weights that come from no file
        self.method, rates = build_method(name, params, rank.device)
        for network in self.method.trained.values():
            network.train()
        how = params.performance
        self.updates = {
            phase: Updates(
                network, block, rates[phase], params.precision, rank, how.updates, how.shard
            )
            for phase, network in self.method.trained.items()
        }
        self.objectives = {
            phase: over_ranks(Objective(self.method, phase), rank) for phase in self.updates
        }
        share = rank if how.shard and rank.world > 1 else None
        self.averages = Averages(self.method.student, block, how.updates != "loop", share)
        self.nonfinite = NonFinite(block.max_nonfinite, rank)
        self.nimg, self.seconds = 0, 0.0
        self.best: dict[str, Any] | None = None
        self.meter, self.prefetch = Meter(), Prefetch(self.share)
        self.latest = ""
        self.flops = image_flops(self.method, params)
        self.peak = matmul_rate(rank.device, params.precision) * rank.world
        self.tracker: Tracker | None = None
        self.validator: Validator | None = None
        self.started = self.row_at = time.monotonic()
        self.row_nimg = 0

    def resume(self) -> None:
        """Go on from the newest state, if there is one.

        Raises:
            ValueError: not all ranks see the same states.
        """
        optimizers = {phase: u.optimizer for phase, u in self.updates.items()}
        averages = self.averages.modules()
        modules = {**self.method.trained, **averages}
        about = self.checkpoints.restore(modules, optimizers) or {}
        if about:
            self.averages.take(averages)
            self.nimg, self.seconds, self.best = about["nimg"], about["seconds"], about["best"]
            self.nonfinite.total, self.nonfinite.in_a_row = about["nonfinite"]
            for phase, state in about["scalers"].items():
                self.updates[phase].scaler.load_state_dict(state)
            if self.rank.first:
                self.meter = Meter.restore(about["meter"], self.rank.device)
                print(f"resuming at {self.nimg / 1000:.1f} kimg from {self.checkpoints.folder}")
        if len(places := set(gather(self.nimg, self.rank))) > 1:
            raise ValueError(
                f"need {SCRATCH}/ on a file system that all nodes share: processes found states of "
                f"nimg {', '.join(map(str, sorted(places)))}"
            )
        if self.rank.first:
            self.log.rewind(self.nimg if about else -1)
            config = {"fingerprint": self.fingerprint, **self.params.as_dict()}
            self.tracker = Tracker(
                self.log, self.name, self.params.tracking, config, about.get("wandb")
            )
        self.row_nimg = self.nimg
        if not about:
            self.score_teacher()

    def iterate(self) -> None:
        """One iteration: each phase of the method, the averages, the log, the state."""
        block, nimg = self.block, self.nimg
        batches = list(self.micro_batches())
        for phase in self.method.phases(nimg // block.batch):
            self.update(phase, batches)
        self.averages.update(nimg)
        self.nimg += block.batch
        done = self.nimg >= self.total
        log = done or self.crossed(self.total / LOG_ROWS / 1000)
        if log or self.nonfinite.due():
            self.write_nonfinite()
        if log:
            self.write_row()
        if block.phema and (done or self.crossed(block.phema.snapshot_kimg)):
            self.averages.snapshot(self.snapshots, self.nimg, self.rank.first)
        validate = block.validation and (done or self.crossed(block.validation.every_kimg))
        improved = bool(validate) and self.score()
        if not done and (improved or self.crossed(block.checkpoint_kimg)):
            self.save_state()

    def micro_batches(self) -> Iterator[Batch]:
        """This rank's share of the batch at nimg, on its device."""
        seed = self.params.seed
        following = self.nimg + self.block.batch
        ahead = following if following < self.total else None
        for first, *rows in self.prefetch(self.nimg, ahead):
            another = partial(self.another, first)
            yield Batch(*self.on_device(*rows), first, self.nimg, seed, another)

    def share(self, nimg: int) -> list[tuple[int, Tensor, Tensor]]:
        """Place, pixels and labels of each micro-batch that this rank has of the batch at nimg."""
        places = range(nimg, nimg + self.block.batch, self.block.batch_gpu)
        mine = places[self.rank.index :: self.rank.world]
        return [(first, *self.read(first, self.params.seed)) for first in mine]

    def read(self, first: int, seed: int) -> tuple[Tensor, Tensor]:
        """Pixels and labels of the micro-batch at `first` in that seed's order, on the CPU."""
        indices = batch_indices(first, self.block.batch_gpu, len(self.dataset), seed)
        pixels, labels = (torch.from_numpy(a) for a in self.dataset.read(indices))
        if self.rank.device.type == "cuda":
            pixels, labels = pixels.pin_memory(), labels.pin_memory()
        return pixels, labels

    def another(self, first: int) -> tuple[Tensor, Tensor]:
        """Images and labels of the micro-batch at `first` in an unrelated order."""
        return self.on_device(*self.read(first, derived_seed(self.params.seed, "another order")))

    def on_device(self, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Images in [-1, 1], (B, C, H, W), and one-hot labels, (B, classes)."""
        device = self.rank.device
        images = to_device(pixels, device).float() / 127.5 - 1
        return images, one_hot(to_device(labels, device), self.params.data.classes)

    def update(self, phase: str, batches: list[Batch]) -> None:
        """One optimiser step of the network of that phase."""
        for other, module in self.method.trained.items():
            module.requires_grad_(other == phase)
        updates, objective, losses = self.updates[phase], self.objectives[phase], []
        for batch in batches:
            torch.manual_seed(batch.dropout_seed)
            last = batch is batches[-1]
            with nullcontext() if last else _without_exchange(objective):
                loss, values = objective(batch)
                updates.backward(loss / len(batches))
            self.meter.add(values)
            losses.append(loss.detach())
        norm = updates.step(self.nimg)
        self.meter.add({f"grad_norm_{phase}": (norm.double(), torch.ones_like(norm).double())})
        self.nonfinite.note(phase, self.nimg, norm, torch.stack(losses).mean())

    def crossed(self, every_kimg: float) -> bool:
        """Whether this iteration's images passed a multiple of that many thousand."""
        every = max(round(every_kimg * 1000), 1)
        return self.nimg // every > (self.nimg - self.block.batch) // every

    def elapsed(self) -> float:
        return self.seconds + time.monotonic() - self.started

    @contextmanager
    def off_the_clock(self) -> Iterator[None]:
        """Leave what is done out of the seconds and rates of the log, which are training's."""
        began = time.monotonic()
        yield
        spent = time.monotonic() - began
        self.started, self.row_at = self.started + spent, self.row_at + spent

    def write(self, row: dict[str, Any]) -> None:
        if self.tracker is not None:
            self.tracker.write(row)

    def write_nonfinite(self) -> None:
        for event in self.nonfinite.check():
            self.write(event)

    def write_row(self) -> None:
        """A row of means over all ranks since the last one, and the progress text."""
        values = self.meter.over_ranks(self.rank).means()
        self.meter = Meter()
        main = next((k for k in ("loss", "loss_dm", "loss_fake") if k in values), "")
        self.latest = f"{main} {values[main]:.4g}" if main else ""
        rate = (self.nimg - self.row_nimg) / max(time.monotonic() - self.row_at, 1e-9)
        self.row_at, self.row_nimg = time.monotonic(), self.nimg
        lr = next(iter(self.updates.values())).rate * learning_rate_factor(self.block, self.nimg)
        self.write({
            "nimg": self.nimg,
            "kimg": self.nimg / 1000,
            "lr": lr,
            "nonfinite_gradients": self.nonfinite.total,
            **readable(values),
            **readable({
                "seconds": self.elapsed(),
                "images_per_second": rate,
                "utilisation": rate * self.flops / self.peak,
                "memory_gib": peak_memory(self.rank.device) / 2**30,
                "checkpoint_seconds": self.checkpoints.stall,
            }),
        })  # fmt: skip

    def score(self) -> bool:
        """Validate the averaged student; whether it is the best so far."""
        with self.off_the_clock():
            average = self.averages.whole("average")
            value, images = self.validating().student(average, self.name)
        self.write_score(f"validation/{self.validating().extractor.label}", value)
        if self.tracker is not None:
            self.tracker.image("samples", tile(images[:40], 10, 2), self.nimg)
        if self.best is not None and value >= self.best["value"]:
            return False
        self.best = {"nimg": self.nimg, "value": value}
        if self.rank.first:
            best = self.snapshots / "best.safetensors"
            save_weights(best, average.state_dict(), self.best)
        return True

    def score_teacher(self) -> None:
        """The teacher's validation, when asked for, as the first row of the log."""
        teacher = getattr(self.method, "teacher", None)
        if self.block.validation and self.block.validation.teacher and teacher is not None:
            with self.off_the_clock():
                value = self.validating().teacher(teacher)
            self.write_score(f"validation/teacher_{self.validating().extractor.label}", value)

    def validating(self) -> Validator:
        """The validator, whose feature network and reference are loaded when first needed."""
        if self.validator is None:
            assert self.block.validation is not None
            self.validator = Validator(self.params, self.block.validation, self.dataset, self.rank)
        return self.validator

    def write_score(self, name: str, value: float | None) -> None:
        self.write({"nimg": self.nimg, "kimg": self.nimg / 1000, name: value})

    def save_state(self) -> None:
        """Begin to write the state of this moment; the first rank does, for all hold the same."""
        self.write_nonfinite()
        meter = self.meter.over_ranks(self.rank)
        self.meter = meter if self.rank.first else Meter()
        for updates in self.updates.values():
            updates.collect()
        modules = {**self.method.trained, **self.averages.modules(self.rank.first)}
        if self.tracker is None:
            return
        self.log.sync()
        about = {
            "seconds": self.elapsed(),
            "best": self.best,
            "meter": meter.state(),
            "nonfinite": (self.nonfinite.total, self.nonfinite.in_a_row),
            "scalers": {phase: u.scaler.state_dict() for phase, u in self.updates.items()},
            "wandb": self.tracker.wandb.id,
        }
        optimizers = {phase: u.optimizer for phase, u in self.updates.items()}
        self.checkpoints.save(self.nimg, modules, optimizers, about)

    def stop(self) -> None:
        """Save the state and leave what is shown in order."""
        self.save_state()
        self.checkpoints.wait()
        barrier(self.rank)
        if self.tracker is not None:
            print(f"stopped at {self.nimg / 1000:.1f} kimg; the same command goes on", flush=True)
            self.tracker.close()

    def save_kept(self) -> dict[str, str]:
        """Write what the method keeps beside the student to the snapshots; the files' sha256.

        As part of the model they let it stand for these files wherever something depends on it.
        """
        shas = {}
        for name, network in self.method.kept.items():
            file = self.snapshots / f"{name}.safetensors"
            save_weights(file, network.state_dict(), {"name": self.name, "kimg": self.nimg / 1000})
            shas[f"{name}_sha256"] = sha256_file(file)
        return shas

    def finish(self) -> None:
        """Write the averaged student, the log and the snapshots."""
        average = self.averages.whole("average")
        if self.tracker is not None:
            about = {
                "name": self.name,
                "kimg": self.nimg / 1000,
                "train": plain(self.block),
                "network": plain(self.params.network),
                "data": {**plain(self.params.data), "sha256": self.dataset.content_sha256()},
                "noise": plain(self.params.noise),
                "seed": self.params.seed,
                "best": self.best,
                **self.save_kept(),
            }
            replace_folder(self.snapshots, SNAPSHOTS / self.name)
            save_model(MODELS / self.name, average.state_dict(), about)
            with atomic_path(MODELS / self.name / "log.jsonl") as path:
                shutil.copyfile(self.log.path, path)
            self.checkpoints.finish()
            self.tracker.close()
        barrier(self.rank)


def image_flops(method: Method, params: Params) -> float:
    """FLOPs that training on one image takes on average."""
    forward, encoder = forward_flops(method.student, params)
    return forward * method.forwards(encoder / forward)


def peak_memory(device: torch.device) -> int:
    """Most bytes that this process held so far, of the GPU or of main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _without_exchange(objective: nn.Module) -> Any:  # noqa: ANN401
    """Let gradients of the inner micro-batches of a batch stay on their ranks."""
    is_exchanged = isinstance(objective, DistributedDataParallel)
    return objective.no_sync() if is_exchanged else nullcontext()


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
    """Collect signals that ask to stop instead of dying, so that the loop can save first."""
    caught: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        caught.append(number)

    before = {kind: signal.signal(kind, remember) for kind in STOPPING}
    try:
        yield caught
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
