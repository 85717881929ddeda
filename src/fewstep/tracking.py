"""What a training says while it runs: log.jsonl always; DVCLive and Weights & Biases beside it.

The log is the record: the others show it, are rebuilt from it after a restart, and may fail.
"""

import json
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fewstep.files import atomic_path
from fewstep.params import Tracking, Wandb

if TYPE_CHECKING:  # they take seconds to import: only who asks for them pays
    from dvclive.live import Live

DVCLIVE = Path("dvclive")
PATIENCE = 30  # seconds that W&B may take to begin or to end

TIMED = ("seconds", "images_per_second", "utilisation", "memory_gib", "checkpoint_seconds")
"""What of a row depends on the machine and its clock; all else is the same in every run."""

Row = Mapping[str, Any]


class Log:
    """A file of rows, one JSON object a line, each with the nimg it was written at."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rows(self) -> list[dict[str, Any]]:
        """All whole rows; a last line that a dying process cut off is none.

        Raises:
            ValueError: a line that is no row.
        """
        if not self.path.exists():
            return []
        lines = self.path.read_text().splitlines(keepends=True)
        try:
            rows = [json.loads(line) for line in lines if line.endswith("\n")]
            _ = [row["nimg"] + 0 for row in rows]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"need JSON objects with nimg in {self.path}, got {type(error).__name__}: {error}"
            ) from error
        return rows

    def write(self, row: Row) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(_line(row))

    def rewind(self, nimg: int) -> None:
        """Forget what was written after nimg images: a resumed training writes it again."""
        kept = [_line(row) for row in self.rows() if row["nimg"] <= nimg]
        with atomic_path(self.path) as path:
            path.write_text("".join(kept))

    def sync(self) -> None:
        """Put the rows on the disk before a state that follows them."""
        with self.path.open("a") as file:
            os.fsync(file.fileno())


class Tracker:
    """The log of one training and the places that show it.

    Args:
        config: what W&B shows as the run's configuration.
        wandb_id: the run to go on with; None begins one.
    """

    def __init__(
        self, log: Log, name: str, tracking: Tracking, config: Row, wandb_id: str | None = None
    ) -> None:
        self.log, self.name = log, name
        self.live = _attempt("DVCLive", lambda: _live(name)) if tracking.dvclive else None
        self.wandb = WandbRun(name, tracking.wandb, config, wandb_id)
        for row in log.rows():
            self._show_live(row)

    def write(self, row: Row) -> None:
        self.log.write(row)
        self._show_live(row)
        self.wandb.do("log", lambda run: run.log(_numbers(row), step=row["nimg"]))

    def image(self, name: str, pixels: NDArray[np.uint8], nimg: int) -> None:
        """Show a picture (H, W, 3)."""
        self._do_live(lambda live: live.log_image(f"{name}.png", pixels))

        def log(run: Any) -> None:  # noqa: ANN401
            import wandb

            run.log({name: wandb.Image(pixels)}, step=nimg)

        self.wandb.do("log", log)

    def close(self) -> None:
        self.wandb.finish()

    def _show_live(self, row: Row) -> None:
        def log(live: "Live") -> None:
            live.step = row["nimg"]
            for name, value in _numbers(row).items():
                live.log_metric(name, value)

        if "kimg" in row:
            self._do_live(log)

    def _do_live(self, call: Callable[["Live"], object]) -> None:
        """Call with DVCLive, if it is there; a failure ends its part, not the training."""
        live = self.live
        if live is not None and not _attempt("DVCLive", lambda: [call(live)]):
            self.live = None


class WandbRun:
    """A Weights & Biases run that is given up, with a line that says so, when it fails.

    Attributes:
        id: of the run, which a restart goes on with even when this process gave it up.
    """

    def __init__(self, name: str, settings: Wandb, config: Row, run_id: str | None) -> None:
        self.run: Any = None
        self.id = run_id
        if settings.mode == "disabled":
            return

        def begin() -> Any:  # noqa: ANN401
            import wandb

            # a terminal without a key would wait for ever for an answer
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

        self.run = _attempt("W&B", begin)
        if self.run is not None:
            self.id = self.run.id

    def do(self, what: str, call: Callable[[Any], object]) -> None:
        """Call with the run, if there is one; a failure ends the run, not the training."""
        if self.run is not None and not _attempt(f"W&B {what}", lambda: [call(self.run)]):
            self.run = None

    def finish(self) -> None:
        """Let the run upload what is left, for a while."""
        ending = threading.Thread(target=self.do, args=("finish", lambda run: run.finish()))
        ending.daemon = True
        ending.start()
        ending.join(PATIENCE)
        if ending.is_alive():
            print(f"W&B is off: not all was uploaded within {PATIENCE} s", flush=True)


def _live(name: str) -> "Live":
    from dvclive.live import Live

    shutil.rmtree(DVCLIVE / name, ignore_errors=True)  # written again from the log
    return Live(
        str(DVCLIVE / name), dvcyaml=None, save_dvc_exp=False, report=None, monitor_system=False
    )


def _attempt(what: str, call: Callable[[], Any]) -> Any:  # noqa: ANN401
    """The answer of a call that training does not depend on; None and a line when it fails."""
    try:
        return call()
    except Exception as error:  # whatever it is: these libraries raise all kinds
        reason = " ".join(f"{type(error).__name__}: {error}".split())  # in one line
        print(f"{what} is off: {reason}; training goes on", flush=True)
        return None


def _line(row: Row) -> str:
    return json.dumps(row, allow_nan=False) + "\n"


def _numbers(row: Row) -> dict[str, float]:
    return {k: v for k, v in row.items() if isinstance(v, int | float) and k != "nimg"}
