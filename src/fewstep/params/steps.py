"""`steps: own`: as many steps as the model was trained for, which stand once, in its settings."""

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import TypeAdapter

from fewstep.params.blocks import Params
from fewstep.params.methods import Settings, settings_of
from fewstep.params.problems import Report
from fewstep.params.sweeps import swept_rows
from fewstep.params.values import key_of, plain
from fewstep.paths import trained

OWN = "own"


def with_own_steps(raw: dict[str, Any], report: Report) -> dict[str, Any]:
    """Merged params with numbers in place of each `steps: own` of a row or validation.

    Where that number is not known the row keeps the word, and the report says so.
    """
    given = raw.get("teacher")
    whole, students = dict(raw), raw.get("students")
    if report.sound("teacher") and isinstance(given, dict) and "train" in given:
        whole["teacher"] = {**given, "train": _validated(given["train"])}
    if isinstance(students, dict):
        sound = {name for name in students if report.sound("students", name)}
        whole["students"] = {
            name: _validated(block) if name in sound else block for name, block in students.items()
        }
    if isinstance(rows := raw.get("rows"), dict):
        whole["rows"] = {
            name: _drawn(name, row, whole, report) if report.sound("rows", name) else row
            for name, row in rows.items()
        }
    return whole


def other_steps(params: Params) -> Iterator[str]:
    """Warnings of rows and validations in other steps than the student was trained for.

    Rows of a sweep are no oversight.
    """
    swept = swept_rows(plain(params.sweeps or {}))
    for name, row in params.rows.items():
        student = params.students.get(trained(row.model))
        if student is not None and name not in swept:
            yield from _other(f"rows.{name}", row.model, row.steps, student.settings)
    for name, student in params.students.items():
        if (v := student.validation) is not None:
            yield from _other(f"{key_of(name)}.validation", name, v.steps, student.settings)


def _other(where: str, model: str, steps: int, settings: Settings) -> Iterator[str]:
    _, own = settings.sampling
    if settings.needs_teacher and steps != own:
        yield (
            f"{where}.steps: {steps} steps of {model}, which is trained for {own}; write `own` to "
            "follow its settings"
        )


def _validated(block: dict[str, Any]) -> dict[str, Any]:
    validation = block.get("validation") or {}
    if validation.get("steps") != OWN:
        return block
    return {**block, "validation": {**validation, "steps": _own(block)}}


def _drawn(name: str, row: dict[str, Any], raw: Mapping[str, Any], report: Report) -> Any:  # noqa: ANN401
    """A row with a number of steps. A downloaded teacher has those of any teacher."""
    if row["steps"] != OWN:
        return row
    model, students = trained(row["model"]), raw.get("students") or {}
    if model == "teacher" and report.sound("teacher"):
        return {**row, "steps": _own(raw["teacher"].get("train"))}
    if model in students and report.sound("students", model):
        return {**row, "steps": _own(students[model])}
    if model in (raw.get("imports") or {}):
        message = "need a number of steps for an import, whose own stand in its file, got own"
        report.conflict(("rows", name, "steps"), message)
    return row


def _own(block: Mapping[str, Any] | None) -> int:
    """The steps that a training's settings are for; of none, those of a teacher."""
    if block is None:
        return Settings().sampling[1]
    of: Any = TypeAdapter(settings_of(block["method"])).validate_python(block["settings"])
    return of.sampling[1]
