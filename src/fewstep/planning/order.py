"""Which files a command reads, and which command makes each: for commands that come too early.

DVC and Snakemake keep this order by themselves, from dvc.yaml and workflow/rules; a test compares.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

from fewstep.params import Params
from fewstep.paths import DATA, MODELS, SAMPLES, SCORES, SNAPSHOTS, STATS, STATS_ABOUT, trained

Needs = list[tuple[Path, str]]
"""Files and the commands that make them."""


def check_order(stage: str, params: Params, name: str | None = None) -> None:
    """Refuse a command before those that make what it reads.

    Args:
        stage: as in `fewstep <stage>`.
        name: what the command is for, such as a row; an unknown one is for the command to refuse.

    Raises:
        ValueError: files are missing, one line each with the command that makes it.
    """
    refuse_missing(needs(stage, params, name))


def refuse_missing(files: Needs) -> None:
    """Refuse files that are not there yet.

    Raises:
        ValueError: one line for each, with the command that makes it.
    """
    missing = [
        f"need {path}, got nothing there; make it with `{by}`"
        for path, by in files
        if not path.exists()
    ]
    if missing:
        raise ValueError("\n".join(missing))


def needs(stage: str, params: Params, name: str | None = None) -> Needs:
    """What a command reads of other commands' outputs, in the order in which they are made."""
    of_stage: dict[str, Callable[[], Needs]] = {
        "ref-stats": lambda: [_DATA],
        "train": lambda: list(_training(params, name)),
        "preflight": lambda: list(_training(params, name)),
        "phema": lambda: _phema(params, name),
        "generate": lambda: [model_file(params.rows[str(name)].model, params)],
        "fid": lambda: [*_REFERENCE, *_samples(str(name))],
        "results-table": lambda: list(_results(params)),
    }
    known = {"generate": params.rows, "fid": params.rows, "phema": params.students}
    if stage == "download-teacher" and params.teacher.train is not None:
        return [_DATA]
    if stage not in of_stage or (stage in known and name not in known[stage]):
        return []
    return of_stage[stage]()


_DATA = DATA, "fewstep build-lmdb"
_REFERENCE = [(STATS, "fewstep ref-stats"), (STATS_ABOUT, "fewstep ref-stats")]


def model_file(name: str, params: Params) -> tuple[Path, str]:
    """Where a model of the params lies, and the command that makes it."""
    if (training := trained(name)) == "teacher":
        by = "download-teacher"
    else:
        by = f"{'download-model' if training in params.imports else 'train'} {training}"
    return MODELS / name / "model.safetensors", f"fewstep {by}"


def _training(params: Params, name: str | None) -> Iterator[tuple[Path, str]]:
    if name == "teacher" and params.teacher.train is not None:
        yield _DATA
    if name is not None and name in params.students:
        yield _DATA
        origin = params.students[name].init_from or "teacher"
        yield from (model_file(model, params) for model in dict.fromkeys(("teacher", origin)))


def _phema(params: Params, name: str | None) -> Needs:
    has = params.students[str(name)].phema is not None  # without it, no command makes snapshots
    return [(SNAPSHOTS / str(name), f"fewstep train {name}")] if has else []


def _samples(row: str) -> Needs:
    files = (SAMPLES / f"{row}.{kind}" for kind in ("npz", "json"))
    return [(file, f"fewstep generate {row}") for file in files]


def _results(params: Params) -> Iterator[tuple[Path, str]]:
    yield _DATA
    yield _REFERENCE[1]
    for row in params.rows:
        yield from _samples(row)
        yield SCORES / f"{row}.json", f"fewstep fid {row}"
