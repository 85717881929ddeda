"""Params as plain values, and their hash."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any


def plain(obj: Any) -> Any:  # noqa: ANN401
    """Dataclasses, mappings and sequences as dicts and lists; optional fields that are None go."""
    if is_dataclass(obj):
        pairs = ((f.name, getattr(obj, f.name)) for f in fields(obj))
        return {name: plain(value) for name, value in pairs if value is not None}
    if isinstance(obj, Mapping):
        return {name: plain(value) for name, value in obj.items()}
    if isinstance(obj, list | tuple):
        return [plain(value) for value in obj]
    return obj


def digest(obj: object) -> str:
    """sha256 of the canonical JSON of dataclasses, mappings, sequences and scalars.

    An optional field that is None counts as absent, so a new one changes no old digest.
    """
    text = json.dumps(plain(obj), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def key_of(name: str) -> str:
    """Where in params a training stands: a student's name, or teacher."""
    return "teacher.train" if name == "teacher" else f"students.{name}"
