"""Rows from one block."""

import itertools
from collections.abc import Mapping
from typing import Any


def swept_rows(sweeps: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The rows of the blocks of `sweeps`: `NAME-8`, and `NAME-8-g1p5` of several scales."""
    rows: dict[str, dict[str, Any]] = {}
    for name, sweep in sweeps.items():
        for steps, scale in itertools.product(sweep["steps"], sweep["guidance_scale"]):
            several = len(sweep["guidance_scale"]) > 1
            suffix = f"-g{scale:g}".replace(".", "p") if several else ""  # DVC splits keys at dots
            row = {**sweep, "steps": steps, "guidance_scale": scale}
            rows[f"{name}-{steps}{suffix}"] = row
    return rows
