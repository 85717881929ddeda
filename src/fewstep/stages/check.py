"""`fewstep check`: all mistakes in params.yaml at once, and those of the data that is there."""

from pathlib import Path

from fewstep.params import ParamsError, load_params
from fewstep.planning.links import refused_by_dvc
from fewstep.planning.sight import absent_source, compiled_on_cpu, data_problems

HELP = "check params.yaml and whether the data fits it; run nothing"
TAKES_PATH = True


def run(path: str) -> None:
    """Print what the params hold, and warnings.

    A source that is not there is a warning only: params may be checked on another machine.

    Raises:
        ValueError: the params are wrong, or the data that is there is another or too little.
    """
    params = load_params(path)
    if Path(params.data.source).exists() and (problems := list(data_problems(params, path))):
        raise ParamsError("\n".join(problems))
    print(f"{path}: {len(params.students)} students, {len(params.rows)} rows")
    for line in (*absent_source(params, path), *compiled_on_cpu(params, path), *refused_by_dvc()):
        print(f"warning: {line}")
