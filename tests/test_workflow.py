"""Two front ends, one DAG: what dvc.yaml and the Snakefile would run is compared, job by job."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from fronts import (
    ROOT,
    Job,
    copy_repository,
    dvc,
    dvc_jobs,
    planned,
    planned_jobs,
    ran,
    snakemake,
    snakemake_jobs,
)

SLOW = pytest.mark.slow
PRESETS = sorted(file.stem for file in (ROOT / "config").glob("*.yaml"))


def jobs_of_dvc(folder: Path) -> dict[str, Job]:
    """Those that Snakemake has too: it writes the files of `fewstep code` before it plans."""
    jobs = dvc_jobs(folder)
    del jobs["code"]
    return jobs


def different(left: dict[str, Job], right: dict[str, Job]) -> set[str]:
    """Names of the jobs on which the front ends disagree."""
    return {name for name in left.keys() | right.keys() if left.get(name) != right.get(name)}


@pytest.mark.parametrize(
    "preset", [p if p in ("fmnist16", "tiny") else pytest.param(p, marks=SLOW) for p in PRESETS]
)
def test_both_front_ends_run_the_same_jobs(preset: str, tmp_path: Path) -> None:
    copy = copy_repository(tmp_path, preset)
    params = yaml.safe_load((copy / "params.yaml").read_text())
    source = copy / params["data"]["source"]
    source.parent.mkdir(exist_ok=True)
    source.touch()  # what the user brings; nothing reads it here
    theirs, ours = jobs_of_dvc(copy), snakemake_jobs(copy)
    assert ours == theirs
    assert len(ours) == 4 + len(params["students"]) + 2 * len(params["rows"])


def test_imported_models_are_jobs_of_both(tmp_path: Path) -> None:
    copy = copy_repository(tmp_path, "tiny")
    params = yaml.safe_load((copy / "params.yaml").read_text())
    params["imports"] = {"theirs": {"url": "theirs.safetensors", "sha256": "0" * 64}}
    params["rows"]["theirs-1"] = {**params["rows"]["dmd2-1"], "model": "theirs"}
    params["students"]["cd"]["init_from"] = "theirs"
    (copy / "params.yaml").write_text(yaml.safe_dump(params))
    theirs, ours = jobs_of_dvc(copy), snakemake_jobs(copy)
    assert ours == theirs
    assert "artifacts/models/theirs/model.safetensors" in ours["train@cd"].inputs
    assert "download-model@theirs" in ours


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Job]]:
    """A copy of the repository and the jobs that both front ends agree on."""
    copy = copy_repository(tmp_path_factory.mktemp("tiny"), "tiny")
    return copy, jobs_of_dvc(copy)


@pytest.mark.parametrize(
    ("file", "old", "new", "stages"),
    [
        ("dvc.yaml", "train ${key}", "train ${key} --fast", "train@"),
        pytest.param(
            "dvc.yaml",
            "      - ${code}/download-teacher.json\n",
            "",
            "download-teacher",
            marks=SLOW,
        ),
        pytest.param(
            "dvc.yaml", "        - artifacts/settings/${key}.json\n", "", "train@", marks=SLOW
        ),
        pytest.param(
            "dvc.yaml",
            "artifacts/scores/${key}.json",
            "artifacts/values/${key}.json",
            "fid@",
            marks=SLOW,
        ),
        pytest.param(
            "dvc.yaml",
            "params: [metric, generate.images]",
            "params: [metric]",
            "ref-stats",
            marks=SLOW,
        ),
        pytest.param("rules/rows.smk", "fewstep fid {", "fewstep score {", "fid@", marks=SLOW),
        pytest.param(
            "rules/models.smk",
            '        "artifacts/settings/{student}.json",\n',
            "",
            "train@",
            marks=SLOW,
        ),
        pytest.param("rules/rows.smk", '        code("generate"),\n', "", "generate@", marks=SLOW),
        pytest.param(
            "rules/results.smk", '        "artifacts/data.lmdb",\n', "", "results-table", marks=SLOW
        ),
        ("rules/rows.smk", '"generate", "network"', '"network"', "generate@"),
    ],
)
def test_a_change_of_one_side_alone_is_seen(
    file: str, old: str, new: str, stages: str, tiny: tuple[Path, dict[str, Job]]
) -> None:
    copy, agreed = tiny
    changed = copy / (file if file == "dvc.yaml" else f"workflow/{file}")
    text = changed.read_text()
    assert old in text
    changed.write_text(text.replace(old, new, 1))
    try:
        jobs = jobs_of_dvc(copy) if file == "dvc.yaml" else snakemake_jobs(copy)
    finally:
        changed.write_text(text)
    wrong = different(agreed, jobs)
    assert wrong and any(name.startswith(stages) for name in wrong)


def test_every_rule_has_log_benchmark_and_resources() -> None:
    for file in (ROOT / "workflow" / "rules").glob("*.smk"):
        for rule in re.split(r"^rule ", file.read_text(), flags=re.M)[1:]:
            for word in ("log:", "benchmark:", "mem_mb=", "runtime=", "cpus_per_task=", "tracked="):
                assert word in rule, f"{file.name}, rule {rule.split(':')[0]} lacks {word}"


def test_wrong_params_stop_the_workflow_with_every_problem_named(tmp_path: Path) -> None:
    copy = copy_repository(tmp_path, "tiny")
    file = copy / "params.yaml"
    text = file.read_text()
    file.write_text(text.replace("sigma_min: 0.002", "sigma_min: 90.0").replace("1.0e-3", "1e-3"))
    out = snakemake("-n", cwd=copy, ok=False)
    assert "need sigma_min < sigma_max, got 90.0" in out
    assert "write 1.0e-3" in out and "Traceback" not in out


def test_params_that_no_stage_would_read_are_refused(tiny: tuple[Path, dict[str, Job]]) -> None:
    out = snakemake("-n", "--config", "seed=1", cwd=tiny[0], ok=False)
    assert "need all params in params.yaml, got others by --config" in out


def test_the_gpu_profile_is_found_by_name_and_says_that_there_is_no_gpu(
    tiny: tuple[Path, dict[str, Job]],
) -> None:
    assert (ROOT / "gpu").readlink() == Path("workflow/profiles/gpu")
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": ""}
    command = ["snakemake", "--cores", "all", "--profile", "gpu", "--dry-run", "--quiet"]
    run = subprocess.run(command, cwd=tiny[0], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "profile gpu: no GPU here, so everything runs on the CPU" in run.stderr


def test_the_slurm_profile_names_rules_and_executors_that_exist() -> None:
    profile = yaml.safe_load((ROOT / "workflow/profiles/slurm/config.yaml").read_text())
    text = "".join(file.read_text() for file in (ROOT / "workflow/rules").glob("*.smk"))
    rules = set(re.findall(r"^rule (\w+):", text, flags=re.M))
    assert {*profile["set-threads"], *profile["set-resources"]} <= rules
    known = subprocess.run(["snakemake", "--help"], capture_output=True, text=True).stdout
    assert all(f"--{key}" in known for key in profile)
    heavy = set(re.findall(r"^rule (\w+):(?:(?!^rule ).)*?threads: ALL_CORES", text, re.M | re.S))
    assert heavy == profile["set-threads"].keys(), "else Slurm is asked for ALL_CORES"


@pytest.fixture(scope="module")
def touched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository where all outputs are there, and empty."""
    copy = copy_repository(tmp_path_factory.mktemp("touched"), "tiny")
    for job in snakemake_jobs(copy).values():
        for output in sorted(job.outputs):
            path = copy / output
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir() if not path.suffix else path.touch()
    return copy


def planned_after(file: str, addition: str, folder: Path) -> set[str]:
    """The jobs that are due when that is added to source files; all is undone."""
    sources = sorted((folder / "src/fewstep").glob(file))
    identities = sorted((folder / "artifacts/code").iterdir())
    before = {path: path.read_bytes() for path in (*sources, *identities)}
    now = time.time()
    for top in ("artifacts", "results"):
        for path in (folder / top).rglob("*"):
            os.utime(path, (now, now))  # of one moment, for Snakemake goes by times
    for path in sources:
        path.write_bytes(before[path] + addition.encode())
    try:
        return planned_jobs(snakemake("-n", cwd=folder))
    finally:
        for path, content in before.items():
            path.write_bytes(content)


def test_prose_in_the_code_reruns_nothing(touched: Path) -> None:
    assert planned_after("**/*.py", '\n"""In other words."""  # a comment\n', touched) == set()


TEACHERS = "teacher-heun-7 teacher-churn-7 teacher-euler-4".split()
ROWS = [*TEACHERS, "cd-4", "cd-4-best", "mm-2", "dmd2-1", "dmd2-4-guided"]


@pytest.mark.parametrize(
    ("file", "due"),
    [
        ("training/tracking.py", []),
        pytest.param("planning/*.py", [], marks=SLOW),
        pytest.param("report/*.py", ["results_table"], marks=SLOW),
        pytest.param(
            "metrics/score.py",
            ["ref_stats", *(f"fid {row}" for row in ROWS), "results_table"],
            marks=SLOW,
        ),
        (
            "methods/dmd2.py",
            [
                *(f"train {student}" for student in ("dmd2-1", "dmd2-4")),
                *(f"{rule} {row}" for rule in ("generate", "fid") for row in ROWS[-2:]),
                "results_table",
            ],
        ),
    ],
)
def test_an_edit_of_the_code_reruns_what_it_can_change(
    file: str, due: list[str], touched: Path
) -> None:
    assert planned_after(file, "\nEDITED = 1\n", touched) == set(due)


@pytest.mark.parametrize("slash", ["", pytest.param("/", marks=SLOW)])
def test_an_edit_below_a_source_folder_is_seen(slash: str, tmp_path: Path) -> None:
    copy = copy_repository(tmp_path, "tiny")
    images = [copy / f"data/pics/{part}/deep/1.png" for part in "ab"]
    for image in images:
        image.parent.mkdir(parents=True)
        image.write_bytes(b"image")
    edit(copy, "source: assets/fmnist16.npz", f"source: data/pics{slash}")
    wanted = ("artifacts/data.lmdb", "artifacts/data.json")
    snakemake("-n", wanted[0], cwd=copy)  # which writes what they depend on
    for output in wanted:
        (copy / output).touch()
    assert planned(snakemake("-n", wanted[0], cwd=copy)) == set()
    images[0].write_bytes(b"another")
    assert planned(snakemake("-n", wanted[0], cwd=copy)) == {"build_lmdb"}


# --- the tiny preset, run by both -------------------------------------------------------------


def bytes_of(file: Path) -> bytes:
    """The bytes of an artefact, but of those that record a run."""
    if file.name in ("report.html", "provenance.json"):  # of a commit, a machine and a time
        return b""
    return file.read_bytes()


def artefacts(folder: Path) -> dict[str, bytes]:
    """Every file that the jobs declare as an output, without times of trainings."""
    paths = (folder / output for job in dvc_jobs(folder).values() for output in job.outputs)
    files = (f for path in paths for f in ([path] if path.is_file() else path.rglob("[!.]*")))
    return {str(file.relative_to(folder)): bytes_of(file) for file in files}


def edit(folder: Path, old: str, new: str) -> None:
    file = folder / "params.yaml"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))


CD = "cd-4: {model: cd, sampler: ddim, steps: "


@pytest.fixture(scope="module")
def by_dvc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = copy_repository(tmp_path_factory.mktemp("dvc"), "tiny")
    dvc("repro", cwd=copy)
    return copy


@pytest.fixture(scope="module")
def by_snakemake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = copy_repository(tmp_path_factory.mktemp("snakemake"), "tiny")
    snakemake(cwd=copy)
    return copy


@pytest.mark.slow
def test_both_front_ends_make_the_same_bytes(by_dvc: Path, by_snakemake: Path) -> None:
    theirs, ours = artefacts(by_dvc), artefacts(by_snakemake)
    assert ours.keys() == theirs.keys() and len(ours) > 40
    assert [name for name in ours if ours[name] != theirs[name]] == []


@pytest.mark.slow
def test_a_report_shows_table_grids_and_methods(by_snakemake: Path) -> None:
    snakemake("--report", "report.html", cwd=by_snakemake)
    html = (by_snakemake / "report.html").read_text()
    for shown in ("Method consistency", "Method dmd2", "Teacher", "All models", "table.csv"):
        assert shown in html
    assert all(f"grids/{row}.png" in html for row in ("cd-4", "dmd2-1", "teacher-heun-7"))


@pytest.mark.slow
def test_dvc_takes_over_what_snakemake_made(by_snakemake: Path) -> None:
    dvc("commit", "-f", "--no-relink", cwd=by_snakemake)
    assert ran(dvc("repro", cwd=by_snakemake)) == set()
    assert "Nothing to be done" in snakemake("-n", cwd=by_snakemake)
    edit(by_snakemake, f"{CD}4", f"{CD}3")
    assert planned(snakemake("-n", cwd=by_snakemake)) == {"generate", "fid", "results_table"}
    edit(by_snakemake, f"{CD}3", f"{CD}4")
    dvc("commit", "-f", cwd=by_snakemake)  # makes the outs anew, from DVC's cache
    assert ran(dvc("repro", cwd=by_snakemake)) == set()


@pytest.mark.slow
def test_snakemake_trusts_what_dvc_made_only_while_the_params_are_older(by_dvc: Path) -> None:
    assert planned(snakemake("-n", cwd=by_dvc)) == set()
    edit(by_dvc, f"{CD}4", f"{CD}3")
    assert "train" in planned(snakemake("-n", cwd=by_dvc)), "nobody told it what the edit concerns"
    edit(by_dvc, f"{CD}3", f"{CD}4")
    dvc("repro", cwd=by_dvc)
    snakemake("--touch", "--forceall", cwd=by_dvc)
    assert planned(snakemake("-n", cwd=by_dvc)) == set()
    assert ran(dvc("repro", cwd=by_dvc)) == set()
    edit(by_dvc, f"{CD}4", f"{CD}3")
    concerned = {"generate", "fid", "results_table"}
    assert planned(snakemake("-n", cwd=by_dvc)) == concerned
    assert "generate@cd-4" in ran(dvc("repro", cwd=by_dvc))
    edit(by_dvc, f"{CD}3", f"{CD}4")  # what Snakemake's record says, but not what is there
    assert planned(snakemake("-n", cwd=by_dvc)) == concerned


@pytest.mark.slow
def test_ctrl_c_of_snakemake_lets_a_training_save_its_state(by_snakemake: Path) -> None:
    params = yaml.safe_load((by_snakemake / "params.yaml").read_text())
    params["students"]["cd"]["kimg"] = 64.0
    (by_snakemake / "params.yaml").write_text(yaml.safe_dump(params))
    command = ["snakemake", "--cores", "1", "artifacts/models/cd/model.safetensors"]
    log, states = by_snakemake / "logs/train/cd.log", "scratch/cd-*/state-*"
    log.unlink()
    process = subprocess.Popen(command, cwd=by_snakemake, start_new_session=True, stderr=-1)
    while not (log.exists() and "train cd: " in log.read_text()):
        assert process.poll() is None
        time.sleep(0.2)
    for state in by_snakemake.glob(states):
        state.unlink()  # those of the clock
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=120)
    assert list(by_snakemake.glob(states)), log.read_text()
