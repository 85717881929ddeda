"""Which share of a GPU's FLOP/s is reached: measured where somebody did, else a guess.

utilisation.csv says which is which. A line is of one GPU, one method (or `generation`) and one
`performance.compile`; `any` stands for those that no other line is about. benchmarks/gpu_check.py
writes lines that can be added there.
"""

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

FILE = Path(__file__).with_name("utilisation.csv")
ANY = "any"


@dataclass(frozen=True)
class Share:
    """A line of the file.

    Attributes:
        utilisation: share of the data sheet's FLOP/s, in (0, 1].
        kind: `measured` with this code, `published` of other code, `guess`, or `given`.
        source: where the number is from.
    """

    gpu: str
    method: str
    compile: str
    utilisation: float
    kind: str
    source: str

    def about(self, gpu: str, method: str, compiled: str) -> bool:
        asked = zip((self.gpu, self.method, self.compile), (gpu, method, compiled), strict=True)
        return all(own in (ANY, wanted) for own, wanted in asked)


@cache
def shares() -> tuple[Share, ...]:
    """All lines, the most particular first."""
    with FILE.open(newline="", encoding="utf-8") as file:
        lines = [
            Share(**{**line, "utilisation": float(line["utilisation"])})
            for line in csv.DictReader(file)
        ]
    return tuple(sorted(lines, key=lambda s: (s.gpu, s.method, s.compile).count(ANY)))


def share_of(gpu: str, method: str, compiled: str) -> Share:
    """The most particular line about a method on a GPU, compiled as `performance.compile` says."""
    return next(share for share in shares() if share.about(gpu, method, compiled))


def given(utilisation: float) -> Share:
    """What the user says, of everything."""
    return Share(ANY, ANY, ANY, utilisation, "given", "--utilisation")


def kind_of(device: str, known: Iterable[str]) -> str | None:
    """The known GPU that a driver calls "NVIDIA A100-SXM4-40GB": a100-40; None if it is another."""
    plain = device.lower().replace(" ", "")
    found = [kind for kind in known if kind.partition("-")[0] in plain]
    sized = [kind for kind in found if "-" in kind and f"{kind.partition('-')[2]}gb" in plain]
    return next(iter([*sized, *(kind for kind in found if "-" not in kind)]), None)
