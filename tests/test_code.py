"""An edit reruns what it can change: no less, and as little else as can be."""

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from fewstep import code, methods, networks
from places import CONFIG, ROOT

SRC = ROOT / "src" / "fewstep"
STAGES = (*code.STAGES, *code.SHOWING)
TRAININGS = {f"train-{method}" for method in methods.names()}
WATCHING = [o for o in code.ONLOOKERS if o not in ("fewstep.cli", "fewstep.params")]
Modules = dict[str, str]


def forget() -> None:
    """What was read of files that have been edited since."""
    for remembered in (code._tree, code._digest, code._imports):
        remembered.cache_clear()


def identities() -> dict[str, Modules]:
    """Of every stage and method."""
    forget()
    found = {stage: code.identity(stage) for stage in STAGES}
    return found | {f"train-{name}": code.identity("train", name) for name in methods.names()}


def changed(before: dict[str, Modules]) -> set[str]:
    """Stages and methods whose identity is another one now."""
    now = identities()
    assert now.keys() == before.keys()
    return {name for name in now if now[name] != before[name]}


@pytest.fixture(scope="module")
def before() -> dict[str, Modules]:
    return identities()


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of src/fewstep that may be edited, and whose identities are asked for."""
    copy = tmp_path / "fewstep"
    shutil.copytree(SRC, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(code, "ROOT", copy)
    yield copy
    forget()


def edit(file: Path, edited: Callable[[str], str]) -> None:
    text = file.read_text()
    assert (new := edited(text)) != text
    file.write_text(new)


def append(file: Path) -> None:
    edit(file, lambda text: f"{text}\nEDITED = 1\n")


# --- prose ---------------------------------------------------------------------------------------


class Reworded(ast.NodeTransformer):
    """Another docstring for whatever can have one, and none elsewhere."""

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        alone = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if alone else node

    def reworded(self, node: ast.Module | ast.ClassDef | ast.FunctionDef) -> ast.AST:
        self.generic_visit(node)
        node.body.insert(0, ast.Expr(ast.Constant("In other words.")))
        return node

    visit_Module = visit_ClassDef = visit_FunctionDef = reworded


def test_comments_docstrings_and_formatting_change_nothing(
    source: Path, before: dict[str, Modules]
) -> None:
    """In every file at once: comments go, lines are broken elsewhere, docstrings are other ones."""
    for file in source.rglob("*.py"):
        tree = Reworded().visit(ast.parse(file.read_text()))
        file.write_text(f"# a comment\n{ast.unparse(ast.fix_missing_locations(tree))}\n# another\n")
    assert changed(before) == set()


def test_words_below_a_field_change_nothing(source: Path, before: dict[str, Modules]) -> None:
    """The meaning of a key of params.yaml is prose, though no docstring."""
    file = source / "methods" / "dmd2.py"
    edit(file, lambda text: text.replace("denoising steps of the student", "steps it takes"))
    assert changed(before) == set()


# --- all else ------------------------------------------------------------------------------------


def test_any_other_edit_of_any_module_of_a_stage_changes_it(
    source: Path, before: dict[str, Modules]
) -> None:
    for file in source.rglob("*.py"):
        append(file)
    now = identities()
    for name, modules in before.items():
        assert modules.keys() == now[name].keys()
        assert [module for module in modules if modules[module] == now[name][module]] == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("f(x + 1)", "f(x + 2)"),
        ("f(x + 1)", "f(x - 1)"),
        ("f(x + 1)", "f(y + 1)"),
        ("f(x + 1)", "g(x + 1)"),
        ("f(x + 1)", "f(x + 1.0)"),
        ("f(x + 1)", "f(x + True)"),
        ("y=None", "y=0"),
        ("y=None", "y=()"),
        ('"kind"', '"other"'),
        ('"kind"', 'b"kind"'),
        ("@cached\n", ""),
        ("n: int", "n: float"),
        ("    a()\n    b()\n", "    b()\n    a()\n"),
        ("    if x:\n        a()\n", "    if x:\n        a()\n    else:\n        b()\n"),
        ("import one", "import two"),
        ("return [1, 2]", "return [1, 2, 2]"),
        ("return [1, 2]", "return (1, 2)"),
        ("return [1, 2]", "return {1, 2}"),
        ("return [1, 2]", "yield [1, 2]"),
    ],
)
def test_the_smallest_edits_are_seen(
    old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (
        "import one\n\nn: int\n\n@cached\ndef h(x, y=None):\n    f(x + 1)\n    a()\n    b()\n"
        '    if x:\n        a()\n    g("kind")\n    return [1, 2]\n'
    )
    assert old in text
    digests = []
    for version in (text, text.replace(old, new, 1)):
        package(tmp_path, monkeypatch, {"stages/s.py": version})
        digests.append(code.identity("s")["fewstep.stages.s"])
    assert digests[0] != digests[1]


# --- what an edit reruns -------------------------------------------------------------------------


@pytest.mark.parametrize("method", methods.names())
def test_an_edit_of_a_method_retrains_its_students_alone(
    method: str, source: Path, before: dict[str, Modules]
) -> None:
    append(source / "methods" / f"{method}.py")
    assert changed(before) == {f"train-{method}"}


def test_losses_retrain_all_students(source: Path, before: dict[str, Modules]) -> None:
    append(source / "theory" / "losses.py")
    assert changed(before) == TRAININGS


@pytest.mark.parametrize("file", ["training/loop.py", "training/optimizer.py", "method.py"])
def test_what_all_trainings_use_retrains_all_of_them(
    file: str, source: Path, before: dict[str, Modules]
) -> None:
    append(source / file)
    assert changed(before) == {*TRAININGS, "download-teacher"}, "that trains a teacher, too"


@pytest.mark.parametrize("file", ["theory/sample.py", "theory/guidance.py", "networks/layers.py"])
def test_samplers_and_networks_decide_trainings_and_rows(
    file: str, source: Path, before: dict[str, Modules]
) -> None:
    append(source / file)
    assert {*TRAININGS, "generate"} <= changed(before)


def test_what_only_looks_on_retrains_and_redraws_nothing(
    source: Path, before: dict[str, Modules]
) -> None:
    files = ["cli.py", "output.py", "progress.py", "training/tracking.py", "training/launch.py"]
    for file in (
        *files,
        "training/failures.py",
        "stages/plan.py",
        "stages/sample.py",
        "stages/preflight.py",
    ):
        append(source / file)
    for file in (source / "planning").glob("*.py"):
        append(file)
    assert changed(before) == set()


def test_the_report_is_code_of_the_table_alone(source: Path, before: dict[str, Modules]) -> None:
    for file in (source / "report").glob("*.py"):
        append(file)
    assert changed(before) == {"results-table"}


def test_a_new_module_that_nobody_imports_changes_nothing(
    source: Path, before: dict[str, Modules]
) -> None:
    (source / "theory" / "unused.py").write_text("import torch\n")
    assert changed(before) == set()


def test_a_new_network_is_code_of_whoever_may_build_it(
    source: Path, before: dict[str, Modules]
) -> None:
    (source / "networks" / "edm3.py").write_text("NETWORK = 1\n")
    assert {*TRAININGS, "generate"} <= changed(before)


@pytest.mark.parametrize("file", ["page.html", "published.csv"])
def test_files_beside_the_code_count_where_they_are_shown(
    file: str, source: Path, before: dict[str, Modules]
) -> None:
    edit(source / "report" / file, lambda text: f"{text} ")
    assert changed(before) == {"results-table"}


def test_scoring_while_training_is_left_out_where_asked(source: Path) -> None:
    without = ("fewstep.training.validation",)
    whole, part = (code.identity("train", "dmd2", w) for w in ((), without))
    assert part.items() < whole.items()
    assert "fewstep.metrics.features" in whole.keys() - part.keys()
    assert {"fewstep.training.loop", "fewstep.theory.losses", "fewstep.methods.dmd2"} <= part.keys()


# --- which modules are found ---------------------------------------------------------------------


def package(folder: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str]) -> None:
    """A package fewstep of those files, each folder with an __init__.py."""
    root = folder / "fewstep"
    shutil.rmtree(root, ignore_errors=True)
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    for place in (root, *(path for path in root.rglob("*") if path.is_dir())):
        (place / "__init__.py").touch()
    monkeypatch.setattr(code, "ROOT", root)
    forget()


@pytest.mark.parametrize(
    "text",
    [
        "import fewstep.deep.b",
        "from fewstep.deep import b",
        "from fewstep.deep.b import anything",
        "def f():\n    from fewstep.deep import b",
        "class C:\n    def f(self):\n        import fewstep.deep.b as x",
        "if TYPE_CHECKING:\n    from fewstep.deep.b import C",
        "try:\n    from fewstep.deep import b\nexcept ImportError:\n    b = None",
        'def f(name):\n    return import_module(f"fewstep.deep.{name}")',
    ],
)
def test_an_import_is_found_in_whatever_form_and_place(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"deep/b.py": "from fewstep import c", "c.py": "", "stages/s.py": text}
    package(tmp_path, monkeypatch, files)
    packages = {"fewstep", "fewstep.deep", "fewstep.stages"}
    found = {"fewstep.deep.b", "fewstep.c", "fewstep.stages.s"}
    assert code.identity("s").keys() == packages | found


def test_modules_that_import_each_other_are_found_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = "def f(): from fewstep import b", "from fewstep import a"
    package(tmp_path, monkeypatch, {"a.py": a, "b.py": b, "stages/s.py": "import fewstep.a"})
    assert {"fewstep.a", "fewstep.b"} < code.identity("s").keys()


def test_modules_of_others_and_onlookers_with_what_they_alone_import_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {
        "stages/s.py": "import torch, json\nfrom fewstep.report import tile\nfrom fewstep import a",
        "report/tile.py": "import fewstep.drawing",
        "drawing.py": "",
        "a.py": "import fewstep.progress",
        "progress.py": "",
    }
    package(tmp_path, monkeypatch, files)
    assert code.identity("s").keys() == {
        "fewstep",
        "fewstep.stages",
        "fewstep.stages.s",
        "fewstep.a",
    }


def test_files_beside_a_packages_code_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"stages/s.py": "import fewstep.a.b", "a/b.py": "", "a/table.csv": "1,2"}
    package(tmp_path, monkeypatch, files)
    before = code.identity("s")
    counts, not_code = ("a/table.csv", "a/other.csv"), ("a/b.pyc", "a/__init__.pyi", "a/py.typed")
    for name, text in dict.fromkeys((*counts, *not_code), "1,3").items():
        package(tmp_path, monkeypatch, files | {name: text})
        differ = {m for m in before if code.identity("s")[m] != before[m]}
        assert differ == ({"fewstep.a"} if name in counts else set()), name


IMPORTED = """
import os, sys
import torch, numpy  # once, before the processes part
for stage in sys.argv[1:]:
    if not os.fork():
        __import__(f"fewstep.stages.{stage.replace('-', '_')}")
        print(stage, *sorted(m for m in sys.modules if m.startswith("fewstep")), flush=True)
        os._exit(0)
    assert os.wait()[1] == 0
"""


def test_every_module_that_a_stage_imports_is_in_its_closure() -> None:
    """Python itself says which: all that are loaded but for onlookers and what they load."""
    stages = (*STAGES, "train")
    command = [sys.executable, "-c", IMPORTED, *stages]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    loaded = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines()}
    assert loaded.keys() == set(stages)
    for stage, modules in loaded.items():
        found = code.identity(stage)
        looking_on = reached_by_onlookers()
        missing = {m for m in modules if m not in found and m not in looking_on}
        assert not missing, f"{stage}: {missing}"
        assert found.keys() & set(modules), stage


def reached_by_onlookers() -> set[str]:
    """Onlookers and all that they import."""
    waiting = [m for m in all_modules() if code._is_in(m, code.ONLOOKERS)]
    found = set[str]()
    while waiting:
        if (module := waiting.pop()) not in found:
            found.add(module)
            waiting += code._imports(module)
    return found


def all_modules() -> dict[str, Path]:
    found = {}
    for file in SRC.rglob("*.py"):
        parts = file.relative_to(SRC.parent).with_suffix("").parts
        found[".".join(parts[: -1 if parts[-1] == "__init__" else None])] = file
    return found


def test_networks_found_by_name_and_what_they_need_are_in_the_closures() -> None:
    named = {f"fewstep.networks.{name}" for name in networks.names()}
    needed = named | {
        f"fewstep.networks.{m}" for m in ("layers", "cpu_norm", "compute", "denoiser")
    }
    theory = {f"fewstep.theory.{m}" for m in ("noise", "sample", "solve", "guidance")}
    assert len(named) >= 2
    assert needed | theory <= code.identity("generate").keys()
    for method in methods.names():
        assert needed | {f"fewstep.methods.{method}"} <= code.identity("train", method).keys()


def test_nothing_is_imported_in_a_way_that_cannot_be_followed() -> None:
    """Relative imports, and names of modules that are put together elsewhere."""
    # a stage is asked for by name, a method is a root, what others are offered decides no stage
    known = {"fewstep", "fewstep.cli", "fewstep.methods"}
    for module, file in all_modules().items():
        if module.startswith("fewstep.export"):
            continue
        tree = ast.parse(file.read_text())
        calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call)]
        by_name = [n for n in calls if ast.unparse(n.func).split(".")[-1] in ("import_module",)]
        assert module in known or all(list(code._importable(n.args[0])) for n in by_name), module
        assert not [n for n in calls if ast.unparse(n.func) == "__import__"], module
        froms = (n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom))
        assert all(node.level == 0 for node in froms), f"{module}: from . import"


def test_nothing_that_decides_numbers_imports_an_onlooker() -> None:
    """But for progress, whose lines are printed beside the work and give nothing back."""
    watching = tuple(o for o in WATCHING if o != "fewstep.progress")
    outside = ("fewstep.stages", "fewstep.export", *code.ONLOOKERS)  # which write what was made
    found = {
        f"{module} imports {other}"
        for module in all_modules()
        if not code._is_in(module, outside)
        for other in code._imports(module)
        if code._is_in(other, watching)
    }
    assert found == set()


# --- the files -----------------------------------------------------------------------------------


@pytest.fixture
def params(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copy(CONFIG / "tiny.yaml", "params.yaml"))


def test_there_is_a_file_for_each_stage_and_method_and_training(params: Path) -> None:
    written = code.write_identities(str(params))
    stages = {f"artifacts/code/{name}.json" for name in {*STAGES, *TRAININGS}}
    trained = ("teacher", "cd", "dmd2-1", "dmd2-4", "mm-2")
    settings = {f"artifacts/settings/{name}.json" for name in trained}
    assert {str(path) for path in written} == stages | settings
    found = json.loads(Path("artifacts/code/train-dmd2.json").read_text())
    assert found == code.identity("train", "dmd2")
    teacher = json.loads(Path("artifacts/code/download-teacher.json").read_text())
    assert "fewstep.methods.denoising" in teacher, "it is trained here"


def test_a_file_that_says_the_same_is_not_touched(params: Path) -> None:
    """Snakemake goes by times."""
    written = code.write_identities(str(params))
    for path in written:
        os.utime(path, (1, 1))
    edit(params, lambda text: text.replace("lr: 3.0e-4", "lr: 4.0e-4"))
    code.write_identities(str(params))
    touched = [str(path) for path in written if path.stat().st_mtime != 1]
    assert touched == ["artifacts/settings/cd.json"]


def test_settings_are_those_after_the_shared_ones_were_put_in(params: Path) -> None:
    code.write_identities(str(params))
    raw, cd = yaml.safe_load(params.read_text()), Path("artifacts/settings/cd.json")
    found = json.loads(cd.read_text())
    assert found["settings"] == raw["students"]["cd"]["settings"]
    assert found["grad_clip"] == raw["training"]["grad_clip"]
    before = cd.read_bytes()
    edit(params, lambda text: text.replace("grad_clip: 10.0", "grad_clip: 5.0"))
    code.write_identities(str(params))
    assert cd.read_bytes() != before


@pytest.mark.parametrize("key", code.UNWRITTEN)
def test_keys_that_change_nothing_that_is_written_rerun_nothing(key: str, params: Path) -> None:
    files = code.write_identities(str(params))
    before = [path.read_bytes() for path in files]
    raw = yaml.safe_load(params.read_text())
    raw["training"][key] = 7
    raw["students"]["cd"][key] = 9
    params.write_text(yaml.safe_dump(raw))
    code.write_identities(str(params))
    assert [path.read_bytes() for path in files] == before


def test_a_missing_file_that_said_the_same_is_written_again(params: Path) -> None:
    (first, *_) = code.write_identities(str(params))
    before = first.read_bytes()
    first.unlink()
    code.write_identities(str(params))
    assert first.read_bytes() == before
