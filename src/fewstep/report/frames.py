"""The results as two pandas frames, from which tables, charts and the page are made.

In a notebook that was started in the repository:

    from fewstep.params import load_params
    from fewstep.report.frames import logs_frame, rows_frame

    params = load_params()
    rows = rows_frame(params.rows)
    rows.sort_values("value")[["student", "nfe", "value", "std", "metrics.recall.value"]]
    logs = logs_frame(params.students)
    logs[logs["name"] == "loss"].pivot(index="kimg", columns="model", values="value").plot()
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from fewstep.files import read_json
from fewstep.paths import MODELS, SCORES, TIMES, trained
from fewstep.report.text import COLUMNS
from fewstep.training.log import Log

HERE = Path()
CLOCK = ("nimg", "kimg")
LOG_TYPES = {"model": "str", "nimg": "int64", "kimg": "float64", "name": "str", "value": "float64"}


def rows_frame(names: Iterable[str], root: Path = HERE) -> pd.DataFrame:
    """Scored rows, one line each, indexed by name and in the order given.

    The columns are the keys of artifacts/scores/<row>.json, nested ones joined by dots
    (`metrics.recall.value`, `metrics.recall.std`, `classes.3`), and two more: `student`, the model
    that drew the images (`cd@best` is not the last of `cd`, and its `kimg` says which), and
    `train_seconds`, how long it was trained. What a row does not have is missing (a downloaded
    teacher has no training time).

    Args:
        names: rows of params.yaml; a folder's files would include rows deleted from it.
        root: of the repository.

    Raises:
        ValueError: no rows, or a score without one of the table's columns.
    """
    scores = [read_json(root / SCORES / f"{name}.json") for name in names]
    return frame_of(
        {**s, "student": s["model"], "train_seconds": train_seconds(s["model"], s["kimg"], root)}
        for s in scores
    )


def frame_of(scores: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """The frame of `rows_frame`, of scores that are in memory already."""
    scores = [dict(score) for score in scores]
    if not scores:
        raise ValueError("need at least 1 row, got 0 (params.yaml: rows)")
    for score in scores:
        if missing := [column for column in COLUMNS if column not in score]:
            raise ValueError(
                f"need every column in row {score.get('row', '?')}, got none for "
                f"{', '.join(missing)}"
            )
    frame = pd.json_normalize(scores).set_index("row")
    numbers = dict.fromkeys(("value", "std", "kimg", "train_seconds"), "float64")
    return frame.astype(numbers).copy()  # one block of memory where columns are many


def logs_frame(models: Iterable[str], root: Path = HERE) -> pd.DataFrame:
    """All that trainings logged, one line a number: model, nimg, kimg, name, value.

    Names with a slash break another one down (`sigma/loss_1_to_10`) or are scores
    (`validation/FD-EffLite0`). Within a model, names come in the order in which they were first
    logged.

    Raises:
        ValueError: a line of a log is no row.
    """
    found = [
        (model, row["nimg"], row["nimg"] / 1000, name, value)
        for model in models
        for row in Log(root / MODELS / model / "log.jsonl").rows()
        for name, value in row.items()
        if name not in CLOCK and isinstance(value, int | float)
    ]
    return pd.DataFrame(found, columns=list(LOG_TYPES)).astype(LOG_TYPES)


def train_seconds(model: str, kimg: float | None, root: Path = HERE) -> float | None:
    """How long it took to train a model up to its kimg, all sessions together; None if unknown."""
    end = round((kimg or 0) * 1000)
    times = Log(root / TIMES / f"{trained(model)}.jsonl").rows()
    return max((row["seconds"] for row in times if row["nimg"] <= end), default=None)


def main_loss(model: str, logs: pd.DataFrame, root: Path = HERE) -> str | None:
    """The loss that stands for a training: its method's choice, which model.json records.

    Models of older versions record none; theirs is the first loss that they logged.
    """
    about = root / MODELS / model / "model.json"
    recorded = read_json(about).get("main_loss") if about.exists() else None
    own = logs.loc[logs["model"] == model, "name"]
    return recorded or next(iter(own[own.str.startswith("loss")]), None)


def best_per_nfe(rows: pd.DataFrame) -> list[str]:
    """Names of the rows that beat another one with as many network calls."""
    contested = rows[rows["nfe"].duplicated(keep=False)]
    return contested.groupby("nfe")["value"].idxmin().tolist()


def reference_row(rows: pd.DataFrame) -> str | None:
    """The teacher's best row, against which students are judged; None where it has none."""
    teacher = rows.loc[rows["student"] == "teacher", "value"]
    return None if teacher.empty else str(teacher.idxmin())


def best_first(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows by their value, below the teacher's best."""
    best = rows.sort_values("value", kind="stable")
    first = best.index == reference_row(rows)
    return pd.concat([best[first], best[~first]])


def other_metrics(rows: pd.DataFrame) -> list[str]:
    """Names of the metrics beside the first, in order, of whichever rows have them."""
    names = rows.columns.str.extract(r"^metrics\.(.+)\.value$", expand=False).dropna()
    return [name for name in names if name != rows["metric"].iloc[0]]


def records(rows: pd.DataFrame) -> Sequence[dict[str, Any]]:
    """Rows as dictionaries, for code that shows one at a time."""
    return rows.reset_index().to_dict("records")  # pyright: ignore[reportReturnType]
