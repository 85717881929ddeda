"""From the file to checked, frozen params."""

import warnings
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from fewstep.params.blocks import Params
from fewstep.params.checks import check_conflicts, check_sweeps, ungrounded_guidance
from fewstep.params.merging import home, merged
from fewstep.params.problems import Report
from fewstep.params.reading import read
from fewstep.params.schema import check_values
from fewstep.params.steps import other_steps, with_own_steps


def load_params(path: str | Path = "params.yaml", swept: bool = True) -> Params:
    """Read, merge, check and freeze a params file.

    Args:
        swept: whether the rows have to be those of the sweeps, as `fewstep sweep` writes them.

    Raises:
        ParamsError: the file cannot be read or some of its values are wrong; names them all.

    Warns:
        UserWarning: a row guides a model that never trained without labels, or draws a student in
            other steps than it is trained for.
    """
    report = Report(str(path))
    file = read(Path(path), report)
    report.home = partial(home, file)
    raw = merged(file)
    check_values(file | raw, report)
    raw = with_own_steps(raw, report)
    check_conflicts(raw, report)
    if swept:
        check_sweeps(raw, report)
    report.stop()
    params = _build(raw, report)
    for message in (*ungrounded_guidance(params), *other_steps(params)):
        warnings.warn(f"{path}: {message}", stacklevel=2)
    return params


def _build(raw: dict[str, Any], report: Report) -> Params:
    try:
        return TypeAdapter(Params).validate_python(raw)
    except ValidationError as error:  # a number that the schema takes and Python cannot hold
        for problem in error.errors():
            report.refuse(problem["loc"], f"{problem['msg']}, got {problem['input']}")
        report.stop()
        raise
