"""When one process of a run fails, the others end within seconds, and its message is the last.

Otherwise they would wait in a collective for the one that is gone: for ten minutes, or for ever.
torchrun's store carries the news, over all nodes; a thread of each process looks there, because the
main thread may be stuck. Nobody loses more than what was not saved anyway.
"""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager, suppress
from typing import NoReturn

from torch.distributed import (
    PrefixStore,  # pyright: ignore[reportPrivateImportUsage]
    TCPStore,  # pyright: ignore[reportPrivateImportUsage]
)

from fewstep.quoting import printable

EVERY = 0.5  # seconds between two looks
PATIENCE = 10.0  # seconds that the others have for leaving
LAST = 60  # seconds until a process that failed ends, even if CUDA hangs while it does


@contextmanager
def ending_together(environ: Mapping[str, str] = os.environ) -> Iterator[None]:
    """Tell the other processes of torchrun of an error in this one, and end when one has another.

    An error that follows from that of another process is not shown.
    """
    if environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or environ.get("WORLD_SIZE") == "1":
        yield
        return
    others = Others(environ)
    try:
        yield
    except Exception as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, once the others have ended
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(LAST)
        with suppress(RuntimeError):  # the store is gone: so are the others
            others.failed(str(error) or type(error).__name__)
        raise
    finally:
        others.leave()


class Others:
    """What this process knows of the others, by torchrun's store."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self.index, self.world = int(environ["RANK"]), int(environ["WORLD_SIZE"])
        local, count = int(environ["LOCAL_RANK"]), int(environ["LOCAL_WORLD_SIZE"])
        self.here = range(self.index - local, self.index - local + count)
        # a connection of its own: on the process group's, a look would wait for slow requests
        store = TCPStore(environ["MASTER_ADDR"], int(environ["MASTER_PORT"]), is_master=False)
        attempt = environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self.store = PrefixStore(f"fewstep/{attempt}", store)
        self.store.set(f"pid/{self.index}", str(os.getpid()))
        self.over, self.ending = threading.Event(), threading.Lock()
        threading.Thread(target=self._watch, daemon=True).start()

    def failed(self, reason: str) -> None:
        """Tell the others of an error here and wait until they left; end if it was not the first.

        A connection breaks before torchrun notices that the other side was killed, so one look
        comes first.
        """
        self.over.set()
        time.sleep(EVERY)
        with self.ending:
            self._look()
            self._tell(reason)

    def leave(self) -> None:
        """This process takes part no more."""
        self.over.set()
        with suppress(RuntimeError):
            self.store.set(f"left/{self.index}", "")

    def _watch(self) -> None:
        with suppress(RuntimeError):  # torchrun has ended
            while not self.over.wait(EVERY):
                with self.ending:
                    self._look()

    def _look(self) -> None:
        """End if another process failed, or was killed on this machine."""
        if self.store.check(["failed"]):
            self._follow()
        for index in self.here:
            if self._killed(index):
                reason = f"process {index} was killed (out of memory? see dmesg)"
                self._tell(reason, {index})
                self._end(reason)

    def _killed(self, index: int) -> bool:
        if not self.store.check([f"pid/{index}"]):
            return False
        try:
            os.kill(int(self.store.get(f"pid/{index}")), 0)
        except ProcessLookupError:
            return not self.store.check([f"left/{index}"])
        return False

    def _tell(self, reason: str, gone: Set[int] = frozenset()) -> None:
        """Be the first to fail, or end; return when the others have left."""
        mine = f"{self.index} {socket.gethostname()} {reason}"
        if self.store.compare_set("failed", "", mine).decode() != mine:
            self._follow()
        end = time.monotonic() + PATIENCE
        others = [f"left/{i}" for i in range(self.world) if i not in {self.index, *gone}]
        while time.monotonic() < end and not all(self.store.check([key]) for key in others):
            time.sleep(EVERY / 5)

    def _follow(self) -> NoReturn:
        """End because another process failed; if that is on another machine, say why."""
        index, host, reason = self.store.get("failed").decode().split(" ", 2)
        elsewhere = host != socket.gethostname() and self.index == self.here.start
        self._end(f"process {index} on {host} failed: {reason}" if elsewhere else None)

    def _end(self, text: str | None) -> NoReturn:
        """At once: the main thread may be stuck."""
        if text is not None:
            print(f"fewstep: {printable(text)}", file=sys.stderr)
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        self.leave()
        os._exit(1)
