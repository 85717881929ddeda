"""The real dvc.yaml on config/tiny.yaml, in a copy of the repository."""

import csv
import json
import re
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from fronts import copy_repository, dvc, git, ran

# columns of `dvc exp show` that are about the experiment and not of it
KEPT = ("metrics.json", "samples.png", "table.csv", "table.md", "table.tex")
ADMINISTRATIVE = {"Experiment", "rev", "typ", "Created", "parent", "State", "Executor"}


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tracked files with the tiny preset and its own DVC cache."""
    return copy_repository(tmp_path_factory.mktemp("clone"), "tiny")


def test_stage_names_follow_the_params(clone: Path) -> None:
    params = yaml.safe_load((clone / "params.yaml").read_text())
    names = {line.split()[0] for line in dvc("stage", "list", cwd=clone).splitlines()}
    assert names == (
        {"code", "download-teacher", "build-lmdb", "ref-stats", "results-table"}
        | {f"train@{student}" for student in params["students"]}
        | {f"{stage}@{row}" for stage in ("generate", "fid") for row in params["rows"]}
    )


@pytest.mark.slow
def test_the_pipeline_runs_and_reruns_only_what_changed(clone: Path) -> None:
    everything = {line.split()[0] for line in dvc("stage", "list", cwd=clone).splitlines()}
    assert ran(dvc("repro", cwd=clone)) == everything
    assert (clone / "results" / "table.md").exists()
    assert ran(dvc("repro", cwd=clone)) == set(), "a second run has nothing to do"
    status = subprocess.run(
        ["git", "status", "--porcelain"], cwd=clone, capture_output=True, text=True, check=True
    )
    assert status.stdout.split() == ["??", "dvc.lock", "??", "results/"]
    git("add", "results", cwd=clone)
    kept = git("diff", "--cached", "--name-only", cwd=clone).splitlines()
    curves = {f"results/losses/{name}.csv" for name in ("cd", "dmd2-1", "dmd2-4", "mm-2")}
    tables = {f"results/{name}" for name in KEPT}
    assert set(kept) == {*tables, *curves, "results/validation/cd.csv"}
    git("reset", "-q", cwd=clone)

    out = dvc("exp", "run", "-S", "students.dmd2-1.lr=1.5e-4", cwd=clone)
    rows = {"generate@dmd2-1", "fid@dmd2-1"}
    assert ran(out) == {"code", "train@dmd2-1", "results-table"} | rows


@pytest.mark.slow
def test_an_edit_of_the_code_reruns_what_it_can_change(clone: Path) -> None:
    """Prose nothing but `code`, after which status is clean; a method its students and rows."""
    git("add", "-A", cwd=clone)
    git("commit", "-qm", "before edits", "--allow-empty", cwd=clone)
    dvc("repro", cwd=clone)
    source = clone / "src" / "fewstep"
    loop, dmd2 = source / "training" / "loop.py", source / "methods" / "dmd2.py"
    loop.write_text(f"# a comment\n{loop.read_text()}")
    assert ran(dvc("repro", cwd=clone)) == {"code"}
    assert "up to date" in dvc("status", cwd=clone)
    dmd2.write_text(f"{dmd2.read_text()}\nEDITED = 1\n")
    students = {"train@dmd2-1", "train@dmd2-4"}
    rows = {
        f"{stage}@{row}" for stage in ("generate", "fid") for row in ("dmd2-1", "dmd2-4-guided")
    }
    again = ran(dvc("repro", cwd=clone))
    assert {"code", *students} <= again <= {"code", "results-table", *students, *rows}
    git("checkout", "-q", "--", "src", cwd=clone)
    dvc("repro", cwd=clone)


@pytest.fixture(scope="module")
def made(clone: Path) -> Path:
    """The clone with everything made and committed."""
    dvc("repro", cwd=clone)
    git("add", "-A", cwd=clone)
    git("commit", "-qm", "made", "--allow-empty", cwd=clone)
    return clone


@pytest.mark.slow
def test_a_clone_that_pulls_has_nothing_to_do(made: Path, tmp_path: Path) -> None:
    store, pulled = str(tmp_path / "store"), tmp_path / "pulled"
    dvc("remote", "add", "--local", "--default", "--force", "store", store, cwd=made)
    dvc("push", cwd=made)
    subprocess.run(["git", "clone", "-q", str(made), str(pulled)], check=True)
    dvc("remote", "add", "--local", "--default", "store", store, cwd=pulled)
    dvc("pull", cwd=pulled)
    assert ran(dvc("repro", cwd=pulled)) == set()
    table = "results/table.md"
    assert (pulled / table).read_bytes() == (made / table).read_bytes()


@pytest.mark.slow
def test_a_sweep_of_three_shows_what_changed_and_nothing_else(made: Path, tmp_path: Path) -> None:
    key, names = "students.cd.lr", [f"lr-{lr}" for lr in ("1.0e-4", "5.0e-4", "1.0e-3")]
    for name in names:
        dvc("exp", "run", "--name", name, "-S", f"{key}={name[3:]}", cwd=made)
    (column,) = json.loads((made / "results/metrics.json").read_text())
    rows = ("cd-4", "cd-4-best", "dmd2-4-guided")  # dmd2-4 starts from cd
    moved = {f"{column}.{row}" for row in rows}

    show = ["exp", "show", "--only-changed", "--drop", "artifacts.*|src.*", "--csv"]
    table = list(csv.DictReader(dvc(*show, cwd=made).splitlines()))
    assert set(table[0]) - ADMINISTRATIVE == {*moved, key}
    assert set(names) <= {line["Experiment"] for line in table}
    ends = (names[0], names[2])
    params = json.loads(dvc("params", "diff", *ends, "--json", cwd=made))
    assert {file: set(found) for file, found in params.items()} == {"params.yaml": {key}}
    metrics = json.loads(dvc("metrics", "diff", *ends, "--json", cwd=made))
    assert {file: set(found) for file, found in metrics.items()} == {"results/metrics.json": moved}

    dvc("plots", "diff", *names, "-o", str(tmp_path), cwd=made)
    page = (tmp_path / "index.html").read_text()
    assert {file.name for file in (tmp_path / "static").iterdir()} == {
        f"{name}_results_samples.png" for name in names
    }
    for curve in ("losses/cd", "losses/dmd2-1", "losses/dmd2-4", "validation/cd"):
        drawn = page.split(f'<div id = "results_{curve.replace("/", "_")}_csv">')[1]
        spec = drawn.partition("</div>")[0]
        assert all(f'"rev": "{name}"' in spec for name in names), "all in one chart"
        assert f'"text": "results/{curve}.csv"' in spec, "each says which student it is of"


@pytest.mark.slow
def test_queued_experiments_run_side_by_side_on_their_own_code(made: Path, tmp_path: Path) -> None:
    imports, package = tmp_path / "imports", made / "src" / "fewstep" / "__init__.py"
    mark = f"\nwith open({str(imports)!r}, 'a') as file:\n    file.write(__path__[0] + '\\n')\n"
    package.write_text(package.read_text() + mark)
    git("commit", "-qam", "mark imports", cwd=made)
    row = "rows.teacher-euler-4"
    for steps in (2, 3):
        change = ["-S", f"{row}.steps={steps}"]
        dvc("exp", "run", "--queue", "--name", f"steps-{steps}", *change, cwd=made)
    dvc("queue", "start", "-j", "2", cwd=made)
    while any(word in dvc("queue", "status", cwd=made) for word in ("Queued", "Running")):
        time.sleep(2)

    lines = imports.read_text().splitlines()
    first, second = dict.fromkeys(lines)  # the code of two copies and of nothing else
    assert all(str(made / ".dvc" / "tmp" / "exps") in folder for folder in (first, second))
    assert lines.index(second) < len(lines) - 1 - lines[::-1].index(first), "side by side"

    show = ["exp", "show", "--only-changed", "--drop", "artifacts.*|src.*", "--csv"]
    table = list(csv.DictReader(dvc(*show, cwd=made).splitlines()))
    values = {line["Experiment"]: line for line in table}
    assert [values[f"steps-{n}"][f"{row}.steps"] for n in (2, 3)] == ["2", "3"]
    (score,) = (name for name in table[0] if re.match(r"FD-EffLite0.*\.teacher-euler-4$", name))
    assert len({line[score] for line in values.values()}) == 3
    assert set(table[0]) - ADMINISTRATIVE == {score, f"{row}.steps"}, "no other column"

    dvc("plots", "diff", "steps-2", "steps-3", "-o", "plots", cwd=made)
    pictures = {file.name for file in (made / "plots" / "static").iterdir()}
    assert {"steps-2_results_samples.png", "steps-3_results_samples.png"} <= pictures
    assert "vega" in (made / "plots" / "index.html").read_text(), "the losses"
