"""Params files as DVC writes them, so that `dvc exp run -S key=value` changes one line.

DVC rewrites the whole file: lists become one item a line, lines longer than 80 are broken, braces
lose their spaces. `python -m fewstep.params.style FILE ...` does so once and for all; mappings too
long for a line become blocks. Values and comments stay.
"""

import io
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fewstep.files import atomic_path

WIDTH = 80  # of ruamel.yaml, and so of DVC
BRACES = 2  # columns by which a line grows at a level


def styled(text: str) -> str:
    """The text as DVC would write it."""
    from ruamel.yaml import YAML  # DVC brings it; the stages do without

    yaml = YAML()
    data = yaml.load(text)
    node: Any  # ruamel's own kinds of dict and list, which know how they were written
    for depth, key, node in _nodes(data, 0):
        line = f"{' ' * BRACES * depth}{key}: {_flow(node)}"
        if not (hasattr(node, "items") and len(node) and len(line) < WIDTH and _flat(node)):
            node.fa.set_block_style()
    stream = io.StringIO()
    yaml.dump(data, stream)
    return stream.getvalue()


def _nodes(node: Any, depth: int) -> Iterator[tuple[int, str, Any]]:  # noqa: ANN401
    """Mappings and lists below a node that were written in braces or brackets."""
    for key, value in node.items() if hasattr(node, "items") else ():
        if hasattr(value, "fa"):  # how ruamel.yaml remembers braces
            if value.fa.flow_style():
                yield depth, str(key), value
            yield from _nodes(value, depth + 1)


def _flat(node: Any) -> bool:  # noqa: ANN401
    """Whether nothing below has its own items, which DVC would write as a block."""
    return not any(isinstance(value, dict | list) for value in node.values())


def _flow(node: Any) -> str:  # noqa: ANN401
    if isinstance(node, dict):
        return f"{{{', '.join(f'{key}: {_flow(value)}' for key, value in node.items())}}}"
    return str(node)


def main(files: Sequence[str]) -> None:
    for file in files:
        with atomic_path(file) as temporary:
            temporary.write_text(styled(Path(file).read_text(encoding="utf-8")), encoding="utf-8")
        print(f"style: {file}")


if __name__ == "__main__":
    main(sys.argv[1:])
