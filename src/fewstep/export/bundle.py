"""Code of ours as one file that needs PyTorch and not `fewstep`.

The modules of networks and of the theory import only one another, so they can stand in one file,
each before those that need it, without the statements that import them.
"""

import ast
import importlib
import inspect
from collections.abc import Mapping
from pathlib import Path

import fewstep

WHOLE = ("fewstep.networks.", "fewstep.theory.")  # of other modules only the functions are taken
HEAD = "# Written by `fewstep export`, from the source code of fewstep (Apache License 2.0).\n"


def bundle(template: str, instead: Mapping[str, str]) -> str:
    """The code that a template imports from us, then the template.

    Args:
        template: Python code.
        instead: modules to take for others that it names.
    """
    parts: dict[str, str] = {}
    _add_imports(template, instead, parts)
    return "\n\n".join([HEAD, *parts.values(), _without_ours(template)])


def _add_imports(code: str, instead: Mapping[str, str], parts: dict[str, str]) -> None:
    """Add what the code imports from us, what that imports first."""
    for node in _ours(code):
        assert node.module is not None, "no relative imports in this package"
        module = instead.get(node.module, node.module)
        if not module.startswith(WHOLE):
            found = importlib.import_module(module)
            for name in [alias.name for alias in node.names]:
                parts[f"{module}.{name}"] = inspect.getsource(getattr(found, name))
        elif module not in parts:
            source = _source(module)
            _add_imports(source, instead, parts)
            parts[module] = f"# --- {module} ---\n\n{_without_ours(source)}"


def _source(module: str) -> str:
    root = Path(inspect.getfile(fewstep)).parent
    return root.joinpath(*module.split(".")[1:]).with_suffix(".py").read_text(encoding="utf-8")


def _ours(code: str) -> list[ast.ImportFrom]:
    """The statements at the top level that import from us."""
    nodes = (node for node in ast.parse(code).body if isinstance(node, ast.ImportFrom))
    return [node for node in nodes if (node.module or "").split(".")[0] == "fewstep"]


def _without_ours(code: str) -> str:
    lines = code.splitlines()
    for node in _ours(code):
        for number in range(node.lineno - 1, node.end_lineno or node.lineno):
            lines[number] = ""
    return "\n".join(lines).strip() + "\n"
