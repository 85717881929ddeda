"""`fewstep check`: reports all mistakes in params.yaml at once, and what DVC will refuse."""

from fewstep.params import load_params
from fewstep.planning.links import refused_by_dvc

HELP = "check params.yaml; run nothing"
TAKES_PATH = True


def run(path: str) -> None:
    params = load_params(path)
    print(f"{path}: {len(params.students)} students, {len(params.rows)} rows")
    for line in refused_by_dvc():
        print(f"warning: {line}")
