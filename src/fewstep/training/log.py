"""Files of rows that a training writes while it runs, one JSON object per line."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fewstep.files import atomic_path


class Log:
    """A file of rows, each with the nimg at which it was written."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rows(self) -> list[dict[str, Any]]:
        """All complete rows; a last line that a dying process cut off is ignored.

        Raises:
            ValueError: a line is not a row.
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

    def write(self, row: Mapping[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(_line(row))

    def rewind(self, nimg: int) -> None:
        """Remove rows after nimg, which a resumed training will write again."""
        kept = [_line(row) for row in self.rows() if row["nimg"] <= nimg]
        with atomic_path(self.path) as path:
            path.write_text("".join(kept))

    def sync(self) -> None:
        """Force rows to the disk, so that a power cut cannot lose rows that precede a state."""
        with self.path.open("a") as file:
            os.fsync(file.fileno())


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, allow_nan=False) + "\n"
