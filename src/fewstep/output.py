"""Standard output and error that stop nothing: what nobody can read any more is dropped.

The reader of a pipe may end (`fewstep train cd | head`), the terminal may close, or both streams
may have been closed from the start (`>&-`). No training ends for that.
"""

import errno
import io
import os
import sys
from typing import Any

UNREAD = (errno.EPIPE, errno.EIO, errno.EBADF)  # no reader; a terminal that went away; closed


class Unread(io.FileIO):
    """A stream that takes everything, and passes it on while somebody reads."""

    def write(self, data: Any, /) -> int:  # noqa: ANN401
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in UNREAD:
                raise
            return memoryview(data).nbytes


def survive_readers() -> None:
    """Make sys.stdout and sys.stderr such streams, unless something else has replaced them."""
    for number in range(3):  # a closed one: the next file opened would get its number and its text
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for number, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is getattr(sys, f"__{name}__"):
            setattr(sys, name, _unread(number, getattr(sys, name)))


def _unread(number: int, before: io.TextIOWrapper | None) -> io.TextIOWrapper:
    raw = Unread(number, "w", closefd=False)
    unbuffered = before is not None and before.write_through  # python -u
    return io.TextIOWrapper(
        raw if unbuffered else io.BufferedWriter(raw),  # pyright: ignore[reportArgumentType]
        encoding=before.encoding if before else "utf-8",
        errors=before.errors if before else "backslashreplace",
        line_buffering=raw.isatty() or number == 2,
        write_through=unbuffered,
    )
