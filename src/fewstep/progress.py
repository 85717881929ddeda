"""Progress with rate and time left: a tqdm bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Self, TextIO, TypeVar

from tqdm import tqdm

T = TypeVar("T")

QUIET = 2.0  # seconds; work that ends sooner prints nothing
EVERY = 10.0  # seconds between plain lines: a log of a day's training stays below 10,000 lines


class progress(Iterable[T]):
    """Shows progress on stderr: `build-lmdb: 20000/50000 images, 8123/s, 4 s left`.

    Iterate over it, or advance it by hand:

        with progress(kimg * 1000, "train", initial=nimg) as bar:
            bar.update(64, f"loss {loss:.3f}")

    Args:
        work: what to iterate over, or the number of units (None: unknown).
        unit: plural noun; "B" means bytes, printed as MB.
        initial: units done by an interrupted run; they do not count towards the rate.
        silent: print nothing, for ranks other than 0.
    """

    def __init__(
        self,
        work: Iterable[T] | int | None,
        desc: str,
        unit: str = "images",
        *,
        initial: int = 0,
        silent: bool = False,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._items: Iterable[T] = () if work is None or isinstance(work, int) else work
        self._total = (
            work if isinstance(work, int) else len(work) if isinstance(work, Sized) else None
        )
        self.n, self._initial, self._desc, self._unit = initial, initial, desc, unit
        self._silent, self._stream, self._clock = silent, stream or sys.stderr, clock
        self._postfix = ""
        self._start = clock()
        self._next_line = self._start + QUIET
        self._bar: tqdm | None = None
        if not silent and self._stream.isatty():
            self._bar = tqdm(
                total=self._total,
                desc=desc,
                initial=initial,
                unit="B" if unit == "B" else f" {unit}",
                unit_scale=unit == "B",
                file=self._stream,
                delay=QUIET,
                dynamic_ncols=True,
            )

    def update(self, n: int = 1, postfix: str = "") -> None:
        """Count `n` more units; `postfix` (a loss, for example) replaces the end of the line."""
        self.n += n
        self._postfix = postfix or self._postfix
        if self._bar is not None:
            if postfix:
                self._bar.set_postfix_str(postfix, refresh=False)
            self._bar.update(n)
        elif not self._silent and (now := self._clock()) >= self._next_line:
            self._next_line = now + EVERY
            self._print(now, finished=False)

    def close(self) -> None:
        """Print the final state if the work took at least QUIET seconds."""
        now = self._clock()
        if self._bar is not None:
            self._bar.close()
        elif not self._silent and now - self._start >= QUIET:
            self._print(now, finished=True)
        self._silent, self._bar = True, None

    def __iter__(self) -> Iterator[T]:
        with self:
            for item in self._items:
                yield item
                self.update()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _print(self, now: float, finished: bool) -> None:
        elapsed = max(now - self._start, 1e-9)
        rate = (self.n - self._initial) / elapsed
        scale, unit = (1e-6, "MB") if self._unit == "B" else (1, self._unit)
        count = _number(self.n * scale)
        if self._total is not None:
            count += f"/{_number(self._total * scale)}"
        speed = f"{_number(rate * scale)}{' MB' if unit == 'MB' else ''}/s"
        parts = [f"{self._desc}: {count} {unit}", speed]
        if finished:
            parts.append(f"{_duration(elapsed)} in all")
        elif self._total is not None and rate > 0:
            parts.append(f"{_duration(max(self._total - self.n, 0) / rate)} left")
        if self._postfix:
            parts.append(self._postfix)
        print(", ".join(parts), file=self._stream, flush=True)


def _number(value: float) -> str:
    """Whole and large numbers without decimals, others with three significant digits."""
    return f"{value:.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"


def _duration(seconds: float) -> str:
    """`4 s`, `3 min 20 s`, `2 h 5 min`."""
    whole = round(seconds)
    if whole < 100:
        return f"{whole} s"
    if whole < 6000:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
