"""What a training depends on. States in which any of that differs are never resumed."""

import re
from collections.abc import Iterator
from typing import Any

from fewstep.code import UNWRITTEN, identity
from fewstep.data.lmdb import ImageDataset
from fewstep.files import sha256_file
from fewstep.params import Params, Student, digest, plain
from fewstep.paths import MODELS

WATCHING = (*UNWRITTEN, "validation")  # keys of a student that change no weight
SCORING = ("fewstep.training.validation",)  # code that changes no weight


class Fingerprint:
    """Params, data, initial weights and code of a training.

    Attributes:
        facts: all of these by dotted names, flat, so that a message can list what differs.
        digest: their hash, 64 hex digits.
    """

    def __init__(self, facts: dict[str, Any]) -> None:
        self.facts, self.digest = facts, digest(facts)

    @classmethod
    def of(cls, name: str, block: Student, params: Params, dataset: ImageDataset) -> "Fingerprint":
        needed = {"teacher", block.init_from or "teacher"} if name != "teacher" else set()
        facts = {
            "student": {k: v for k, v in plain(block).items() if k not in WATCHING},
            "network": plain(params.network),
            "noise": plain(params.noise),
            "precision": params.precision,
            "seed": params.seed,
            "data": dataset.content_sha256(),
            "models": {n: sha256_file(MODELS / n / "model.safetensors") for n in needed},
            "code": identity("train", block.method, without=SCORING),
        }
        return cls(dict(_flat(facts)))

    def differences(self, facts: dict[str, Any]) -> list[str]:
        """How other facts differ from these, as `student.lr: 0.0004 there, 0.0008 now`."""
        names = [*self.facts, *(name for name in facts if name not in self.facts)]
        return [
            f"{name}: {_short(facts.get(name))} there, {_short(self.facts.get(name))} now"
            for name in names
            if facts.get(name) != self.facts.get(name)
        ]


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:  # noqa: ANN401
    if not isinstance(value, dict):
        yield path, value
        return
    for key, item in value.items():
        yield from _flat(item, f"{path}.{key}" if path else key)


def _short(value: Any) -> str:  # noqa: ANN401
    text = "none" if value is None else str(value)
    return text[:12] if re.fullmatch("[0-9a-f]{64}", text) else text
