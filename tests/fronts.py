"""Both front ends on a copy of the repository; and what each would run, in a form that compares."""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from places import CONFIG, ROOT


@dataclass(frozen=True)
class Job:
    """A command with all that it reads and writes: files, and dotted keys of params.yaml."""

    command: str
    inputs: frozenset[str]
    outputs: frozenset[str]
    params: frozenset[str]


def copy_repository(folder: Path, preset: str) -> Path:
    """The tracked files as they are now, with a preset in place and a git history of its own."""
    tracked = _run("git", "ls-files", cwd=ROOT).split()
    for name in tracked:
        if name != "dvc.lock" and not name.startswith("results/"):  # of the default
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            _copy(ROOT / name, folder / name)
    _copy(CONFIG / f"{preset}.yaml", folder / "params.yaml")
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "copy"]):
        git(*command, cwd=folder)
    return folder


def _copy(source: Path, target: Path) -> None:
    if source.is_symlink():
        target.symlink_to(source.readlink())
    else:
        target.write_bytes(source.read_bytes())
        target.chmod(source.stat().st_mode)


def _run(*command: str, cwd: Path) -> str:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True).stdout


def dvc(*arguments: str, cwd: Path) -> str:
    """Output of a dvc command; fails the test with that output."""
    return _front_end("dvc", *arguments, cwd=cwd).stdout


def snakemake(*arguments: str, cwd: Path, ok: bool = True) -> str:
    """Output of a snakemake command; fails the test with that output, unless it is to fail."""
    run = _front_end("snakemake", "--cores", "1", "--nocolor", *arguments, cwd=cwd, ok=ok)
    return run.stdout + run.stderr


def _front_end(*command: str, cwd: Path, ok: bool = True) -> subprocess.CompletedProcess[str]:
    own = {"PYTHONPATH": "", "OMP_NUM_THREADS": "1", "DVC_NO_ANALYTICS": "1"}
    run = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, env={**os.environ, **own}
    )
    assert (run.returncode == 0) == ok, run.stdout + run.stderr
    return run


def ran(output: str) -> set[str]:
    """Names of the stages that a `dvc repro` ran."""
    lines = (line for line in output.splitlines() if line.startswith("Running stage"))
    return {line.split("'")[1] for line in lines}


def planned(output: str) -> set[str]:
    """Names of the rules that a `snakemake -n` would run."""
    return set(re.findall(r"^rule (\w+):", output, flags=re.M)) - {"all"}


def planned_jobs(output: str) -> set[str]:
    """The jobs that a `snakemake -n` would run, as `rule wildcard`."""
    blocks = re.split(r"^rule (\w+):", output, flags=re.M)[1:]
    found = set[str]()
    for rule, block in zip(blocks[::2], blocks[1::2], strict=True):
        wildcards = re.search(r"^    wildcards: \w+=(\S+)$", block, flags=re.M)
        found.add(f"{rule} {wildcards[1]}" if wildcards else rule)
    return found - {"all"}


def git(*arguments: str, cwd: Path) -> str:
    return _run("git", "-c", "user.name=t", "-c", "user.email=t@t", *arguments, cwd=cwd)


def dvc_jobs(folder: Path) -> dict[str, Job]:
    """Stages by name. A folder among the dependencies stands for the files and outs below it.

    A file in a folder that is an out stands for that folder, as Snakemake knows no part of one.
    """
    from dvc.dependency.param import ParamsDependency
    from dvc.repo import Repo

    with Repo(str(folder)) as repo:
        stages: list[Any] = list(repo.index.stages)
        outs = {out.def_path for stage in stages if stage.name != "code" for out in stage.outs}
        jobs = {}
        for stage in stages:
            params = [dep for dep in stage.deps if isinstance(dep, ParamsDependency)]
            files = [dep.def_path for dep in stage.deps if not isinstance(dep, ParamsDependency)]
            jobs[stage.name] = Job(
                " ".join(stage.cmd.split()),
                frozenset(path for file in files for path in _below(file, outs, folder)),
                frozenset(out.def_path for out in stage.outs),
                frozenset(key for dep in params for key in dep.params),
            )
    return jobs


def _below(path: str, outs: set[str], folder: Path) -> set[str]:
    if whole := {out for out in outs if f"{path}/".startswith(f"{out}/")}:
        return whole
    if (folder / path).is_file():
        return {path}
    made = {out for out in outs if out.startswith(f"{path}/")}
    code = {str(file.relative_to(folder)) for file in (folder / path).rglob("*.*")}
    return made | code or {path}


def snakemake_jobs(folder: Path) -> dict[str, Job]:
    """Jobs by the name of DVC's stage, without the log and without params.yaml as a file."""
    printed = _front_end(sys.executable, __file__, ".", cwd=folder).stdout
    jobs = {}
    for job in json.loads(printed.splitlines()[-1]):
        (name,) = [*job["wildcards"].values(), ""][:1]
        stage = job["rule"].replace("_", "-") + (f"@{name}" if name else "")
        command, _, log = job["command"].partition(" > ")
        assert log == f"{job['log']} 2>&1", f"need the output in the log, got {job['command']}"
        inputs = frozenset(job["inputs"]) - {"params.yaml"}
        outputs, params = frozenset(job["outputs"]), frozenset(job["params"])
        jobs[stage] = Job(command, inputs, outputs, params)
    return jobs


def _print_jobs(folder: Path) -> None:
    """Resolve the real Snakefile and print its jobs as JSON."""
    from snakemake.api import SnakemakeApi
    from snakemake.settings.types import DAGSettings, OutputSettings, Quietness, ResourceSettings

    os.chdir(folder)
    with SnakemakeApi(OutputSettings(quiet={Quietness.ALL})) as api:
        workflow: Any = api.workflow(
            ResourceSettings(cores=1), snakefile=Path("workflow/Snakefile")
        )
        workflow.dag(DAGSettings(forceall=True)).execute_workflow(executor="dryrun")
        jobs = workflow._workflow.dag.jobs
        print(json.dumps([_describe(job) for job in jobs if job.rule.name != "all"]))


def _describe(job: Any) -> dict[str, Any]:  # noqa: ANN401
    return {
        "rule": job.rule.name,
        "wildcards": dict(job.wildcards.items()),
        "command": job.shellcmd,
        "inputs": [str(file) for file in job.input],
        "outputs": [str(file) for file in job.output],
        "params": job.params.tracked,
        "log": str(job.log),
    }


if __name__ == "__main__":
    _print_jobs(Path(sys.argv[1]))
