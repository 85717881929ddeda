"""What is exported, how it is sampled, and what is known of where it comes from."""

from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fewstep.budgets import HEADER, read_json, read_small
from fewstep.files import sha256_file
from fewstep.model import Model
from fewstep.params import Row, plain
from fewstep.paths import MODELS, SCORES, trained
from fewstep.quoting import plain as cut

UNSTATED = "not stated"
DERIVED = (
    "The weights derive from their training images and, of a student, from its teacher. The "
    "licences of those bind what may be done with the weights, whatever the licence of the code "
    "that trained them; fewstep (Apache-2.0) neither knows nor grants them."
)


@dataclass(frozen=True)
class Order:
    """A student, a row that says how it is sampled, and its origin.

    Attributes:
        source: the file or folder that it was loaded from.
        license: of the weights, as the exporting person states it; None: not stated.
    """

    student: Model
    row: Row
    source: Path
    license: str | None = None

    @property
    def weights(self) -> Path:
        """The file of the weights."""
        return self.source / "model.safetensors" if self.source.is_dir() else self.source

    @property
    def folder(self) -> Path:
        """The folder of that file."""
        return self.weights.absolute().parent

    @cached_property
    def sha256(self) -> str | None:
        """Of the file of the weights, where there is a single one."""
        return sha256_file(self.weights) if self.weights.is_file() else None

    @property
    def project(self) -> Path | None:
        """The checkout whose pipeline trained it; None of a file from elsewhere."""
        folder = self.folder
        root = folder.parents[len(MODELS.parts)] if len(folder.parts) > 3 else folder
        return root if folder.parent == root / MODELS else None

    def about(self) -> dict[str, Any]:
        """The JSON of the exported weights, with all that `fewstep.load` needs, without folders."""
        said, d = self.student.about, self.student.description
        data = said["data"] if isinstance(said.get("data"), dict) else {}
        if isinstance(place := data.get("source"), str):  # may name a person's folders
            data = {**data, "source": Path(place).name}
        grid = {} if "sampling" in said else {"noise": vars(self.student.grid)}
        network = plain(d.network)
        return {**said, "network": network, "data": {**data, **vars(d.data)}, **grid}

    def origin(self) -> dict[str, str]:
        """Where the weights come from, as far as their JSON says it."""
        said, data = self.student.about, self.about()["data"]
        train = said["train"] if isinstance(said.get("train"), dict) else {}
        found = {
            "method": train.get("method"),
            "started from": train.get("init_from"),
            "thousands of training images": said.get("kimg"),
            "seed": said.get("seed"),
            "training data": data.get("source"),
            "sha256 of the training data": data.get("sha256"),
            "imported from": said.get("source"),
            "sha256 of the imported file": said.get("sha256"),
            "sha256 of the exported weights": self.sha256,
            **self._teacher(),
        }
        return {key: plain_text(value) for key, value in found.items() if value is not None}

    def _teacher(self) -> dict[str, str | None]:
        """The file of the teacher, where the pipeline that trained the student still has it."""
        if self.project is None or self.student.about.get("name") == "teacher":
            return {}
        file = self.project / MODELS / "teacher" / "model.json"
        if not file.is_file():
            return {}
        said = read_json(read_small(file, HEADER, "JSON"), HEADER, str(file))
        found = said if isinstance(said, dict) else {}
        return {"teacher's file": found.get("source"), "sha256 of the teacher": found.get("sha256")}

    def scores(self) -> list[dict[str, Any]]:
        """The rows of the results that measured exactly these weights."""
        if self.project is None or self.sha256 is None:
            return []
        files = sorted((self.project / SCORES).glob("*.json"))
        rows = [read_json(read_small(f, HEADER, "JSON"), HEADER, str(f)) for f in files]
        return [r for r in rows if isinstance(r, dict) and r.get("model_sha256") == self.sha256]

    def log(self) -> tuple[str, Path] | None:
        """The training whose log the pipeline still has, and the checkout."""
        name = trained(self.folder.name)
        if self.project is None:
            return None
        file = self.project / MODELS / name / "log.jsonl"
        return (name, self.project) if file.is_file() and file.stat().st_size else None

    def notes(self) -> dict[str, str]:
        """What a file says of itself, in formats that keep such things."""
        r, origin = self.row, "; ".join(f"{k}: {v}" for k, v in self.origin().items())
        return {
            "name": self.student.name,
            "producer": f"fewstep {version('fewstep')}",
            "sampler": f"{r.sampler}, {r.steps} steps, guidance scale {r.guidance_scale:g}",
            "license": f"{self.license or UNSTATED}. {DERIVED}",
            "origin": origin,
        }


def plain_text(value: object) -> str:
    """One line of a value from a JSON that anyone may have written, safe in Markdown tables."""
    if not isinstance(value, str | int | float):
        return f"an object of type {type(value).__name__}"
    return cut(str(value), 200).translate({ord(c): f"\\{c}" for c in "|<>[]`*"})
