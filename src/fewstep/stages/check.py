"""`fewstep check`: reports all mistakes in params.yaml at once."""

from fewstep.params import load_params

HELP = "check params.yaml; run nothing"
TAKES_PATH = True


def run(path: str) -> None:
    params = load_params(path)
    print(f"{path}: {len(params.students)} students, {len(params.rows)} rows")
