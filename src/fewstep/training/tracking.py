"""What a training reports while it runs: always log.jsonl, and optionally DVCLive and W&B.

The log is the record. The others only show it and may fail; DVCLive is rebuilt from it after a
restart.
"""

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fewstep.files import atomic_path
from fewstep.params import Wandb
from fewstep.paths import TIMES
from fewstep.planning.flops import image_flops, matmul_rate
from fewstep.progress import progress
from fewstep.report import tile
from fewstep.report.moments import save_moment
from fewstep.report.worsening import scores_in, worsened
from fewstep.training.log import Log
from fewstep.training.meter import readable
from fewstep.training.watcher import Row, Watched, Watcher

if TYPE_CHECKING:  # it and wandb take seconds to import, so they are imported only when used
    from dvclive.live import Live

DVCLIVE = Path("dvclive")
PATIENCE = 30  # seconds that W&B may take to begin, and again to end


class Tracker(Watcher):
    """The log of one training, its progress line, and the displays that are asked for.

    There are two files of rows. `log.jsonl` is part of a hashed output and has the same bytes in
    every run; `times.jsonl` has whatever depends on the machine and its clock.
    """

    def begin(self, training: Watched) -> None:
        self.name, params, saved = training.name, training.params, training.saved
        self.snapshots = training.snapshots
        files = ("log.jsonl", "times.jsonl")
        self.log, self.times = (Log(training.folder / file) for file in files)
        for log in (self.log, self.times):
            log.rewind(-1 if saved is None else training.nimg)
        # utilisation is relative to a product measured here and now: no data sheet is needed
        rate = matmul_rate(training.rank.device, params.precision) * training.rank.world
        self.share = image_flops(training.method, params) / rate
        config = {"fingerprint": training.fingerprint, **params.as_dict()}
        live = params.tracking.dvclive
        self.live = Display("DVCLive", (lambda: _live(self.name)) if live else None)
        run_id = (saved or {}).get("wandb")
        self.wandb = WandbRun(self.name, params.tracking.wandb, config, run_id)
        for row in self.log.rows():
            self._show_live(row)
        self.bar = progress(training.total, f"train {self.name}", initial=training.nimg)

    def advance(self, images: int, text: str) -> None:
        self.bar.update(images, text)

    def write(self, row: Row, times: Row | None = None) -> None:
        self.log.write(row)
        if scores_in([row]) and (text := worsened(self.name, scores_in(self.log.rows()))):
            print(text, flush=True)
        if times:
            used = readable({"utilisation": times["images_per_second"] * self.share})
            times = {"nimg": row["nimg"], **times, **used}
            self.times.write(times)
        shown = {**row, **(times or {})}
        self._show_live(shown)
        self.wandb.do("W&B log", lambda run: run.log(_numbers(shown), step=row["nimg"]))

    def show(self, images: NDArray[np.uint8], nimg: int) -> None:
        """Show the first 40 in one picture, and keep the first ten for the page."""
        save_moment(self.snapshots, images, nimg)
        pixels = tile(images[:40], 10, 2)
        self.live.do("DVCLive", lambda live: live.log_image("samples.png", pixels))

        def log(run: Any) -> None:  # noqa: ANN401
            import wandb

            run.log({"samples": wandb.Image(pixels)}, step=nimg)

        self.wandb.do("W&B log", log)

    def saved(self) -> dict[str, Any]:
        self.log.sync()
        self.times.sync()
        return {"wandb": self.wandb.id}

    def finish(self, folder: Path) -> None:
        targets = {self.log: folder / "log.jsonl", self.times: TIMES / f"{self.name}.jsonl"}
        for log, target in targets.items():
            with atomic_path(target) as path:
                shutil.copyfile(log.path, path)

    def __exit__(self, *_: object) -> None:
        if hasattr(self, "bar"):  # a training can fail before `begin`
            self.bar.close()
            self.wandb.finish()

    def _show_live(self, row: Row) -> None:
        def log(live: "Live") -> None:
            live.step = row["nimg"]
            for name, value in _numbers(row).items():
                live.log_metric(name, value)

        if "kimg" in row:  # events, such as a non-finite gradient, are no points of a curve
            self.live.do("DVCLive", log)


class Display:
    """A service that shows a training. If it fails, it is given up with one printed line.

    Attributes:
        run: the service's own object; None when it is off.
    """

    def __init__(self, name: str, begin: Callable[[], Any] | None) -> None:
        self.run = None if begin is None else _attempt(name, begin)

    def do(self, what: str, call: Callable[[Any], object]) -> None:
        """Call with the run, unless it is off; a failure ends the run, not the training."""
        if self.run is not None and not _attempt(what, lambda: [call(self.run)]):
            self.run = None


class WandbRun(Display):
    """A Weights & Biases run.

    Attributes:
        id: the run's, which a restart resumes even if this process gave the run up.
    """

    def __init__(self, name: str, settings: Wandb, config: Row, run_id: str | None) -> None:
        def begin() -> Any:  # noqa: ANN401
            import wandb

            # without a key, a terminal would otherwise wait forever for one to be typed
            wandb.setup(wandb.Settings(login_timeout=PATIENCE))
            return wandb.init(
                project=settings.project,
                entity=settings.entity,
                name=name,
                id=run_id,
                resume="allow",
                mode=settings.mode,
                config=dict(config),
                settings=wandb.Settings(init_timeout=PATIENCE, console="off", silent=True),
            )

        super().__init__("W&B", None if settings.mode == "disabled" else begin)
        self.id = run_id if self.run is None else self.run.id

    def finish(self) -> None:
        """Upload what is left, for PATIENCE seconds at most: without a network it never ends."""
        call = ("W&B finish", lambda run: run.finish())
        ending = threading.Thread(target=self.do, args=call, daemon=True)
        ending.start()
        ending.join(PATIENCE)
        if ending.is_alive():
            print(f"W&B is off: the upload did not finish within {PATIENCE} s", flush=True)


def _live(name: str) -> "Live":
    from dvclive.live import Live

    shutil.rmtree(DVCLIVE / name, ignore_errors=True)  # `begin` writes it again from the log
    return Live(
        str(DVCLIVE / name), dvcyaml=None, save_dvc_exp=False, report=None, monitor_system=False
    )


def _attempt(what: str, call: Callable[[], Any]) -> Any:  # noqa: ANN401
    """The result of a call that training does not depend on; None, and a line, if it fails."""
    try:
        return call()
    except Exception as error:  # these libraries raise errors of all kinds
        reason = " ".join(f"{type(error).__name__}: {error}".split())  # on one line
        print(f"{what} is off: {reason}; training goes on", flush=True)
        return None


def _numbers(row: Row) -> dict[str, float]:
    return {k: v for k, v in row.items() if isinstance(v, int | float) and k != "nimg"}
