"""A folder as one small file: Snakemake does not see edits below an input that is a folder.

DVC does: it hashes all files there, but for those behind links.
"""

import json
import os
import time
from pathlib import Path

from fewstep.data.stream import fingerprint
from fewstep.data.tree import survey
from fewstep.files import write_json


def watch(folder: Path, file: Path) -> None:
    """Rewrite `file` if any name, size or time below `folder` differs from what it says.

    A new file gets the time of the newest change, so that outputs made since then stay valid.

    Raises:
        ValueError: a folder that cannot be read, or links that unfold without end.
    """
    tree = survey(folder)
    facts = fingerprint([name, *facts] for name, facts in tree.files.items())
    known = json.loads(file.read_text()) if file.exists() else None
    if known == facts:
        return
    write_json(file, facts)
    if known is None:
        newest = min(tree.newest, time.time_ns())  # other machines' clocks may be ahead
        os.utime(file, ns=(newest, newest))
