"""`fewstep sweep`: write the rows of params.yaml: sweeps into params.yaml: rows.

DVC and Snakemake make a job of each key of `rows`, so what is measured has to stand there. The
block is what one edits; this command makes the rows follow, and every other command refuses
params in which they do not.
"""

import io
from pathlib import Path

from fewstep.files import atomic_path
from fewstep.params import Params, load_params, swept_rows


def run(params: Params, path: str = "params.yaml") -> None:
    """Add, change and remove the rows that belong to a sweep; comments and the rest stay."""
    from ruamel.yaml import YAML

    yaml = YAML()
    yaml.width, yaml.preserve_quotes = 1000, True
    document = yaml.load(Path(path).read_text())
    rows, wanted = document["rows"], swept_rows(document.get("sweeps") or {})
    prefixes = tuple(f"{name}-" for name in document.get("sweeps") or {})
    for name in [n for n in rows if prefixes and n.startswith(prefixes) and n not in wanted]:
        del rows[name]
    for name, row in wanted.items():
        entry = yaml.map(**row)
        entry.fa.set_flow_style()
        rows[name] = entry
    text = io.StringIO()
    yaml.dump(document, text)
    with atomic_path(path) as temporary:
        temporary.write_text(text.getvalue())
    load_params(path)
    print(f"sweep: {len(wanted)} rows of {len(prefixes)} sweeps in {path}")
