"""The one training loop, for all methods.

`nimg`, the number of training images seen, is the only clock. A batch is a sequence of
micro-batches of batch_gpu images, and everything random in a micro-batch follows from the seed and
the nimg of its first image. So a resumed run draws what an uninterrupted one would have drawn, on
any number of ranks.
"""

import signal
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fewstep.data.batch import Batch
from fewstep.data.lmdb import ImageDataset
from fewstep.distributed import AnyRank, Rank, barrier, gather, over_ranks
from fewstep.files import replace_folder
from fewstep.method import Objective, build_method, student_block
from fewstep.networks.compute import accelerate
from fewstep.networks.protocol import networks_in
from fewstep.networks.weights import save_model, save_trained
from fewstep.params import Params, Student, plain
from fewstep.paths import BEST, DATA, MODELS, SCRATCH
from fewstep.theory.noise import Schedule
from fewstep.training.averages import Averages
from fewstep.training.checkpoint import Checkpoints
from fewstep.training.feed import Feed, check_world
from fewstep.training.fingerprint import Fingerprint
from fewstep.training.finished import forget_finished
from fewstep.training.guards import caught_signals, only_trainer
from fewstep.training.meter import Meter, readable
from fewstep.training.optimizer import NonFinite, Updates, learning_rate_factor
from fewstep.training.stopwatch import Stopwatch, peak_memory
from fewstep.training.validation import Validator
from fewstep.training.watcher import LOG_ROWS, Watched, Watcher

EARLY = 10.0  # seconds until the progress shows a loss, whether there was a row or not


def train(name: str, params: Params, rank: Rank, watcher: Watcher | None = None) -> None:
    """Train `teacher` or a student; write its models and snapshots below artifacts.

    artifacts/models/<name> has the last model, <name>@best that of the best validation, if there is
    one, and artifacts/snapshots/<name> what else the training kept.

    Raises:
        ValueError: data or weights do not fit the params, or another process trains this model.
        FloatingPointError: too many gradients in a row were not finite.
        OSError: a state could not be written.
        SystemExit: a signal asked to stop, and the state was saved; the code is 128 + its number.
    """
    block = student_block(name, params)
    dataset = ImageDataset(DATA, params.data.classes)
    dataset.check(params.data.resolution, params.data.channels, params.data.classes)
    check_world(name, block, rank.world)
    with only_trainer(name, rank), caught_signals() as caught:
        run = Run(name, block, params, rank, dataset, watcher)
        if rank.first:
            run.checkpoints.begin()
            forget_finished(block.init_from or "teacher")  # to be used, its model was recorded
        with run.watcher:
            run.resume()
            some_rank = AnyRank(rank)
            while run.nimg < run.total:
                run.iterate()
                # ranks get a signal at different moments and must still stop at the same nimg
                if some_rank(bool(caught)):
                    run.stop()
                    raise SystemExit(128 + (caught[0] if caught else signal.SIGTERM))
            run.finish()


class Run:
    """The state of one training, and what an iteration does to it."""

    def __init__(
        self,
        name: str,
        block: Student,
        params: Params,
        rank: Rank,
        dataset: ImageDataset,
        watcher: Watcher | None = None,
    ) -> None:
        self.name, self.block, self.params, self.rank = name, block, params, rank
        self.dataset, self.nimg, self.total = dataset, 0, round(block.kimg * 1000)
        fingerprint = Fingerprint.of(name, block, params, dataset)
        self.checkpoints = Checkpoints(name, fingerprint, block.keep_checkpoints)
        self.snapshots = self.checkpoints.folder / "snapshots"
        self.best_model = self.checkpoints.folder / "best"
        torch.manual_seed(params.seed)  # for initial weights that come from no file
        self.method = build_method(block, params, rank.device)
        how = params.performance.updates
        for module in self.method.trained.values():
            self.settle(module)  # weights that were imported, too
        self.updates: dict[str, Updates] = {}
        for phase, network in self.method.trained.items():
            rate = self.method.rates.get(phase, block.lr)
            options = block, rate, params.precision, rank, how, self.method.betas.get(phase)
            self.updates[phase] = Updates(network.train(), *options)
        self.objectives = {p: over_ranks(Objective(self.method, p), rank) for p in self.updates}
        self.averages = Averages(self.method.student, block, how != "loop")
        accelerate(self.averages.networks["average"], params.performance)  # the one that is scored
        sizes = block.batch, block.batch_gpu, self.total
        self.feed = Feed(dataset, *sizes, params.seed, rank, self.method.other_images)
        self.nonfinite = NonFinite(block.max_nonfinite, rank)
        grid = Schedule.of(block.settings.grid(params.noise))
        self.validator = Validator(params, block.validation, grid, dataset, rank)
        self.best: dict[str, Any] | None = None
        # only the first rank reports; a trial step has no watcher at all
        self.watcher = watcher if watcher is not None and rank.first else Watcher()
        self.meter, self.stopwatch = Meter(), Stopwatch()
        self.shown = False  # whether the progress has shown a loss

    def resume(self) -> None:
        """Continue from the newest state, if there is one.

        Raises:
            ValueError: not all ranks see the same states.
        """
        about = self.checkpoints.restore(self.modules(), self.optimizers(), self.rank) or {}
        if about:
            self.nimg, self.best = about["nimg"], about["best"]
            self.stopwatch.before = about["seconds"]
            self.nonfinite.total, self.nonfinite.in_a_row = about["nonfinite"]
            for phase, state in about["scalers"].items():
                self.updates[phase].scaler.load_state_dict(state)
            if self.rank.first:  # the state has the sums of all ranks
                self.meter = Meter.restore(about["meter"], self.rank.device)
                print(f"resuming at {self.nimg / 1000:.1f} kimg from {self.checkpoints.folder}")
        if len(places := set(gather(self.nimg, self.rank))) > 1:
            raise ValueError(
                f"need {SCRATCH}/ on a file system that all nodes share: processes found states of "
                f"nimg {', '.join(map(str, sorted(places)))}"
            )
        states = self.checkpoints.folder, self.snapshots, self.checkpoints.fingerprint
        training = self.name, self.params, self.method, self.rank, *states
        self.watcher.begin(Watched(*training, self.nimg, self.total, about.get("watcher")))
        self.stopwatch.nimg = self.nimg
        if not about:
            self.score_teacher()

    def iterate(self) -> None:
        """One iteration: an optimiser step per phase, then whatever is due at this nimg."""
        block, batches, prepared = self.block, self.feed(self.nimg), list[Any]()
        for phase in self.method.phases(self.nimg // block.batch, self.nimg / 1000):
            self.update(phase, batches, prepared)
        self.averages.update(self.nimg)
        self.nimg += block.batch
        done = self.nimg >= self.total
        log = done or self.row_is_due()
        if log or self.nonfinite.due():  # first, because a row has their number
            self.write_nonfinite()
        text = self.write_row() if log else self.early_loss()
        if block.phema and (done or self.crossed(block.phema.snapshot_kimg)):
            self.averages.snapshot(self.snapshots, self.nimg, self.rank.first)
        validate = block.validation and (done or self.crossed(block.validation.every_kimg))
        improved = bool(validate) and self.score()
        # The state comes last: a resumed run neither repeats nor misses a row, snapshot or score.
        # `finish` saves the final one.
        if not done and (improved or self.crossed(block.checkpoint_kimg)):
            self.save_state()
        self.watcher.advance(block.batch, text)

    def update(self, phase: str, batches: list[Batch], prepared: list[Any]) -> None:
        """One optimiser step of the network of that phase.

        Args:
            prepared: what the method prepared for each micro-batch; the iteration's first phase
                fills it, so that phases share it.
        """
        # A loss runs through networks of other phases. Their gradients would cost time and memory,
        # and be added to those of their own phase.
        for other, updates in self.updates.items():
            for parameter in updates.parameters:
                parameter.requires_grad_(other == phase)
        updates, objective, losses = self.updates[phase], self.objectives[phase], []
        for place, batch in enumerate(batches):
            # dropout draws from the global generator; `prepare` too, when it runs the student
            torch.manual_seed(batch.dropout_seed)
            if place == len(prepared):
                prepared.append(self.method.prepare(batch))
            with nullcontext() if batch is batches[-1] else _without_exchange(objective):
                loss, values = objective(batch, prepared[place])
                updates.backward(loss / len(batches))
            self.meter.add(values)
            losses.append(loss.detach())
        norm = updates.step(self.nimg, self.method.rate_factor(self.nimg / 1000))
        self.method.after_update(phase)
        self.settle(self.method.trained[phase])
        self.meter.add({f"grad_norm_{phase}": (norm.double(), torch.ones_like(norm).double())})
        # noted, not read: reading the norm would make the CPU wait for the GPU at every step
        self.nonfinite.note(phase, self.nimg, norm, torch.stack(losses).mean())

    def settle(self, module: nn.Module) -> None:
        """Bring the weights of the networks inside a module to what each step leaves them at."""
        for network in networks_in(module):
            network.after_step()

    def crossed(self, every_kimg: float) -> bool:
        """Whether this iteration's images passed a multiple of that many thousand."""
        every = max(round(every_kimg * 1000), 1)
        return self.nimg // every > (self.nimg - self.block.batch) // every

    def row_is_due(self) -> bool:
        """Rows at equal distances, and one more near the start if params ask for it."""
        tracking = self.params.tracking
        first = tracking.first_row_kimg
        begins = first is not None and self.nimg - self.block.batch < first * 1000 <= self.nimg
        return begins or self.crossed(self.block.kimg / (tracking.log_rows or LOG_ROWS))

    def early_loss(self) -> str:
        """Once, after ten seconds and if no row came before: text for the progress.

        The first row of a large training is minutes away. Reading the loss waits for the GPU.
        """
        if self.shown or not self.rank.first or self.stopwatch.here() < EARLY:
            return ""
        self.shown, main = True, self.method.main_loss
        values = self.meter.means()
        return f"{main} {values[main]:.4g}" if main in values else ""

    def write(self, values: dict[str, Any], times: dict[str, Any] | None = None) -> None:
        self.watcher.write({"nimg": self.nimg, "kimg": self.nimg / 1000, **values}, times)

    def write_nonfinite(self) -> None:
        for event in self.nonfinite.check():
            self.watcher.write(event)

    def write_row(self) -> str:
        """Write a row of means over all ranks since the last row; return text for the progress."""
        values = self.meter.over_ranks(self.rank).means()
        self.meter, self.shown = Meter(), True
        rate = self.stopwatch.lap(self.nimg)
        times = {
            "seconds": self.stopwatch.seconds(),
            "images_per_second": rate,
            "memory_gib": peak_memory(self.rank.device) / 2**30,
            "checkpoint_seconds": self.checkpoints.stall,
        }
        lr = next(iter(self.updates.values())).rate * learning_rate_factor(self.block, self.nimg)
        lr *= self.method.rate_factor(self.nimg / 1000)
        counts = {"lr": lr, "nonfinite_gradients": self.nonfinite.total}
        self.write({**counts, **readable(values)}, readable(times))
        main = self.method.main_loss
        return f"{main} {values[main]:.4g}" if main in values else ""

    def score(self) -> bool:
        """Validate the averaged student; return whether it is the best so far."""
        average = self.averages.networks["average"]
        with self.stopwatch.paused():
            value, images, signs = self.validator.student(average, self.name)
            real = {"real_brightness": self.validator.real_pixels.brightness}
        found = {self.validator.label: value, **signs, **real}
        self.write({f"validation/{name}": number for name, number in found.items()})
        self.watcher.show(images, self.nimg)
        if self.best is not None and value >= self.best["value"]:
            return False
        self.best = {"nimg": self.nimg, "value": value}
        if self.rank.first:
            save_model(self.best_model, average.state_dict(), self.about(self.name + BEST))
        return True

    def score_teacher(self) -> None:
        """If the settings ask for it, write the teacher's score as the first row of the log."""
        teacher, validation = self.method.frozen.get("teacher"), self.block.validation
        if teacher is not None and validation is not None and validation.teacher is not None:
            with self.stopwatch.paused():
                value, _, signs = self.validator.teacher(teacher, validation.teacher)
            found = {self.validator.label: value, **signs}
            self.write({f"validation/teacher_{name}": number for name, number in found.items()})

    def modules(self) -> dict[str, nn.Module]:
        return {**self.method.trained, **self.averages.networks}

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {phase: updates.optimizer for phase, updates in self.updates.items()}

    def save_state(self) -> None:
        """Begin to write the current state, on the first rank: the others hold the same."""
        self.write_nonfinite()
        # Only the meters differ. The first one takes over all sums, so that a state is complete
        # and a resumed run may have another number of ranks.
        meter = self.meter.over_ranks(self.rank)
        self.meter = meter if self.rank.first else Meter()
        if not self.rank.first:
            return
        about = {
            "seconds": self.stopwatch.seconds(),
            "best": self.best,
            "meter": meter.state(),
            "nonfinite": (self.nonfinite.total, self.nonfinite.in_a_row),
            "scalers": {phase: u.scaler.state_dict() for phase, u in self.updates.items()},
            "watcher": self.watcher.saved(),
        }
        self.checkpoints.save(self.nimg, self.modules(), self.optimizers(), about)

    def stop(self) -> None:
        """Save the state, from which the same command continues."""
        self.save_state()
        self.checkpoints.wait()
        barrier(self.rank)
        if self.rank.first:
            print(f"stopped at {self.nimg / 1000:.1f} kimg; run the same command to continue")

    def about(self, name: str) -> dict[str, Any]:
        """What the JSON beside a model of this training says, as of now."""
        return {
            "name": name,
            "kimg": self.nimg / 1000,
            "train": plain(self.block),
            "main_loss": self.method.main_loss,
            "network": plain(self.params.network),
            "data": {
                **plain(self.params.data),
                "sha256": self.dataset.content_sha256(),
                **({"class_names": list(names)} if (names := self.dataset.class_names) else {}),
            },
            "noise": plain(self.params.noise),
            "sampling": self.block.settings.sampled(self.params.noise),
            "seed": self.params.seed,
            "best": self.best,
        }

    def finish(self) -> None:
        """Write the averaged student, that of the best validation, the log and the snapshots.

        The last state is saved first and kept: DVC can die before it records the model, and deletes
        it when the stage runs again. That run then has nothing to train.
        """
        if self.block.validation and self.best is None:  # asked for when all was trained
            self.score()
        self.save_state()
        if self.rank.first:
            self.checkpoints.wait()
            replace_folder(self.best_model, MODELS / f"{self.name}{BEST}")
            average, about = self.averages.networks["average"].state_dict(), self.about(self.name)
            folder = save_trained(self.name, average, about, self.method.kept, self.snapshots)
            self.watcher.finish(folder)
            self.checkpoints.finish()
        barrier(self.rank)


def _without_exchange(objective: nn.Module) -> Any:  # noqa: ANN401
    """Keep gradients on their ranks: exchanging them once per batch is enough."""
    exchanged = isinstance(objective, DistributedDataParallel)
    return objective.no_sync() if exchanged else nullcontext()
