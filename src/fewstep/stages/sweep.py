"""`fewstep sweep`: write the rows of params.yaml: sweeps into params.yaml: rows.

DVC and Snakemake make one job per key of `rows`, so every measured row must be listed there. Users
edit `sweeps`, and this command updates `rows`; all other commands refuse params in which the two
disagree.
"""

import re
from pathlib import Path
from typing import Any

from fewstep.files import atomic_path
from fewstep.params import ParamsError, load_params, plain, swept_rows

HELP = "write the rows of params.yaml: sweeps into params.yaml"
TAKES_PATH = True


def run(path: str) -> None:
    """Add, change and remove the rows of sweeps; every other byte of the file stays.

    Raises:
        ValueError: `rows` is not written as a block of lines, or a sweep's rows are invalid.
    """
    sweeps = plain(load_params(path, swept=False).sweeps or {})
    wanted, text = swept_rows(sweeps), Path(path).read_text()
    with atomic_path(path) as temporary:
        temporary.write_text(follow(text, list(sweeps), wanted))
        try:
            load_params(temporary)
        except ParamsError as error:
            raise ParamsError(str(error).replace(str(temporary), path)) from None
    print(f"sweep: {len(wanted)} rows of {len(sweeps)} sweeps in {path}")


def follow(text: str, sweeps: list[str], wanted: dict[str, dict[str, Any]]) -> str:
    """params.yaml with the wanted rows, one line each, in place of the sweeps' earlier rows."""
    lines = text.splitlines()
    if "rows:" not in (bare := [line.partition("#")[0].rstrip() for line in lines]):
        raise ValueError("need rows as a block, one per line, got none (params.yaml: rows)")
    start = bare.index("rows:") + 1
    after = (i for i in range(start, len(lines)) if re.match(r"[^\s#]", lines[i]))
    end = next(after, len(lines))
    while not re.match(r"\s+[^\s#]", lines[end - 1]) and end > start:
        end -= 1  # comments and blanks before the next key are that key's
    swept = re.compile(rf"  ({'|'.join(map(re.escape, sweeps)) or '(?!)'})-[^\s:]*: \{{.*\}}$")
    kept = [line for line in lines[start:end] if not swept.match(line)]
    rows = [f"  {name}: {_flow(row)}" for name, row in wanted.items()]
    return "\n".join([*lines[:start], *kept, *rows, *lines[end:]]) + "\n"


def _flow(value: object) -> str:
    """A mapping of names and numbers on one line of YAML."""
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{key}: {_flow(v)}' for key, v in value.items())} }}"
    return str(value)
