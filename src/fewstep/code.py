"""Hashes of the code that decides the numbers of a stage, derived from imports.

The identity of a stage is the syntax trees, without docstrings and comments, of all modules that
its command imports, directly or not. DVC's stages, Snakemake's rules, the states of trainings and
half-drawn rows all depend on it. So an edit reruns what it can change, and prose reruns nothing.
"""

import ast
import hashlib
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from fewstep import methods
from fewstep.budgets import PARAMS, read_small
from fewstep.files import write_json
from fewstep.params import merged_students
from fewstep.paths import CODE, SETTINGS

ROOT = Path(__file__).parent
STAGES = ("build-lmdb", "download-model", "download-teacher", "fid", "generate", "ref-stats")
SHOWING = ("results-table",)  # its outputs are what reports show, so reports decide it

# Keys of a training that change neither its weights nor its log or snapshots.
UNWRITTEN = ("checkpoint_kimg", "keep_checkpoints", "max_nonfinite")

_NOT_DATA = (".py", ".pyc", ".pyi", ".typed")  # beside a package's code: code, or types of it

# Code that reports, checks beforehand or starts processes, and never feeds back into a number. A
# test ensures that no other module imports the reporting ones. Of params only the values count, and
# every stage tracks those.
ONLOOKERS = (
    "fewstep.cli",
    "fewstep.params",
    "fewstep.planning",
    "fewstep.progress",
    "fewstep.report",
    "fewstep.training.failures",
    "fewstep.training.launch",
    "fewstep.training.tracking",
)


def identity(
    stage: str, method: str | None = None, without: tuple[str, ...] = ()
) -> dict[str, str]:
    """The sha256 of each module that decides the numbers of a stage, by module name.

    Args:
        stage: as in `fewstep <stage>`.
        method: the method to train with, which is loaded by name: no import statement leads there.
        without: modules to leave out, together with what only they import.
    """
    roots = _with_parents(f"fewstep.stages.{stage.replace('-', '_')}")
    roots += _with_parents(f"fewstep.methods.{method}") if method else []
    shown = ("fewstep.report",) if stage in SHOWING else ()
    ignored = (*(o for o in ONLOOKERS if o not in shown), *without)
    found: dict[str, str] = {}
    while roots:
        module = roots.pop()
        if module not in found and not _is_in(module, ignored):
            found[module] = _digest(module)
            roots += _imports(module)
    return dict(sorted(found.items()))


def write_identities(path: str) -> list[Path]:
    """Write the files that stages depend on, as far as they changed; return all of them.

    artifacts/code has one for each stage and method. artifacts/settings has one for each training:
    its keys, merged with those of `training`, except those that change nothing in its outputs.

    Args:
        path: the path of params.yaml. It is not validated here, but by every stage that uses it.
    """
    try:
        raw = yaml.safe_load(read_small(path, PARAMS, "params"))
    except RecursionError:
        raise ValueError(f"need params, got {path}, which is nested too deeply") from None
    blocks = {"teacher": raw["teacher"], **merged_students(raw)}
    identities = {stage: identity(stage) for stage in (*STAGES, *SHOWING)}
    teacher = blocks["teacher"].get("method")  # None if it is downloaded
    identities["download-teacher"] = identity("download-teacher", teacher)
    identities |= {f"train-{method}": identity("train", method) for method in methods.names()}
    settings = {
        name: {key: value for key, value in block.items() if key not in UNWRITTEN}
        for name, block in blocks.items()
    }
    return [
        write_if_new(folder / f"{name}.json", obj)
        for folder, files in ((CODE, identities), (SETTINGS, settings))
        for name, obj in files.items()
    ]


def write_if_new(path: Path, obj: Any) -> Path:  # noqa: ANN401
    """Write JSON unless the file has it already, because Snakemake compares modification times."""
    if not path.exists() or json.loads(path.read_text()) != obj:
        write_json(path, json.loads(json.dumps(obj, sort_keys=True)))  # whatever order was given
    return path


def _is_in(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def _file(module: str) -> Path | None:
    """The file of a module of this package; None if the name is something else."""
    package, *parts = module.split(".")
    if package != ROOT.name:
        return None
    place = ROOT.joinpath(*parts)
    files = (place / "__init__.py", place.with_suffix(".py"))
    return next((file for file in files if file.is_file()), None)


@cache
def _tree(module: str) -> ast.Module:
    file = _file(module)
    assert file is not None, f"{module} is a module"
    return ast.parse(file.read_bytes())


@cache
def _digest(module: str) -> str:
    """sha256 of a module's syntax tree and, for a package, of the data files in its folder."""
    sha = hashlib.sha256(repr(_plain(_tree(module))).encode())
    file = _file(module)
    if file is not None and file.name == "__init__.py":
        for other in sorted(file.parent.iterdir()):
            if other.is_file() and other.suffix not in _NOT_DATA:
                sha.update(other.name.encode() + other.read_bytes())
    return sha.hexdigest()


def _plain(node: Any) -> Any:  # noqa: ANN401
    """A syntax tree as tuples, without free-standing strings (docstrings) and empty fields.

    Newer Pythons add fields, which are empty for code that older ones accept.
    """
    if isinstance(node, list):
        return tuple(_plain(item) for item in node if not _is_prose(item))
    if not isinstance(node, ast.AST):
        return node
    fields = ((name, _plain(value)) for name, value in ast.iter_fields(node))
    return type(node).__name__, *(
        (name, value) for name, value in fields if value not in ((), None)
    )


def _is_prose(node: Any) -> bool:  # noqa: ANN401
    value = node.value if isinstance(node, ast.Expr) else None
    return isinstance(value, ast.Constant) and isinstance(value.value, str)


@cache
def _imports(module: str) -> list[str]:
    """The modules of this package that a module imports anywhere, and their parent packages."""
    found = {other for name in _imported(_tree(module)) for other in _with_parents(name)}
    return sorted(other for other in found - {module} if _file(other) is not None)


def _with_parents(name: str) -> list[str]:
    """A module and the packages around it, which Python imports first."""
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts) + 1)]


def _imported(tree: ast.Module) -> Iterator[str]:
    """Names in import statements. Those imported from a module may be modules, too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from _importable(node.args[0])


def _importable(argument: ast.expr) -> Iterator[str]:
    """What `import_module(f"fewstep.networks.{name}")` may import: any module of that package.

    `fewstep.methods` leaves the package out of its call on purpose: `identity` names the one method
    that counts, and an edit of another must not retrain its students.
    """
    start = argument.values[0] if isinstance(argument, ast.JoinedStr) else argument
    text = str(start.value) if isinstance(start, ast.Constant) else ""
    file = _file(text.rstrip("."))
    if file is not None and file.name == "__init__.py":
        yield from (f"{text}{other.stem}" for other in file.parent.glob("[!_]*.py"))
