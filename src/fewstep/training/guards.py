"""What protects the states of a training: one trainer at a time, and no death by a first signal."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from filelock import FileLock, Timeout

from fewstep.distributed import Rank
from fewstep.paths import SCRATCH

# Ctrl-C and Ctrl-\ send SIGINT and SIGQUIT, a terminal that closes SIGHUP; Slurm warns with SIGUSR1
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)


def heeded() -> list[signal.Signals]:
    """The signals that ask to stop, except those that whoever started this process had it ignore.

    `nohup` does that with SIGHUP, and a script's `&` with SIGINT and SIGQUIT.
    """
    return [kind for kind in STOPPING if signal.getsignal(kind) is not signal.SIG_IGN]


@contextmanager
def only_trainer(name: str, rank: Rank) -> Iterator[None]:
    """Keep other trainers away from this model's states.

    DVC's own lock does not: it is gone when DVC is killed, while its trainer may live on.

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
def caught_signals() -> Iterator[list[int]]:
    """Collect signals that ask to stop, so that the loop can save its state before it does."""
    caught: list[int] = []
    before = {kind: signal.signal(kind, lambda n, _: caught.append(n)) for kind in heeded()}
    try:
        yield caught
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
