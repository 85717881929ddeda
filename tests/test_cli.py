"""The command line: answers at once, and ends in one message when the input is wrong."""

import ctypes
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from experiment import tiny_params
from fewstep.cli import keep_freed_memory, main, module_of, own_version, parser, stages
from fewstep.commands import GROUPS, overview
from places import ROOT


def test_help_imports_nothing_slow() -> None:
    code = (
        "import sys, contextlib, fewstep.cli as c\n"
        "with contextlib.suppress(SystemExit): c.main(['--help'])\n"
        "slow = ('torch', 'numpy', 'matplotlib', 'jsonschema', 'pydantic')\n"
        "print([m for m in slow if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.splitlines()[-1] == "[]"
    assert all(stage in out.stdout for stage in stages())


COMMANDS = """build-lmdb check code compare download-all download-data download-model
download-teacher export fid generate import new phema plan preflight ref-stats results-table sample
sweep train""".split()


def test_the_commands_are_those_of_the_folder() -> None:
    assert sorted(stages()) == COMMANDS


@pytest.mark.parametrize("stage", COMMANDS)
def test_every_stage_says_what_it_does_and_runs(stage: str) -> None:
    module = module_of(stage)
    assert stages()[stage] == module.HELP != ""
    assert callable(module.run)


@pytest.mark.parametrize("stage", COMMANDS)
def test_every_stage_has_its_help_and_a_params_file(
    stage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        parser(stage).parse_args([stage, "--help"])
    shown = capsys.readouterr().out
    assert "--params" in shown and " ".join(stages()[stage].split()[:3]) in shown


def test_wrong_params_end_in_one_message_that_names_all_problems(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_params(tmp_path)
    monkeypatch.chdir(tmp_path)
    file = Path("params.yaml")
    text = file.read_text().replace("sigma_min: 0.002", "sigma_min: 90.0")
    file.write_text(text.replace("first_seed:", "fist_seed:"))
    with pytest.raises(SystemExit) as stop:
        main(["build-lmdb"])
    message = str(stop.value)
    assert message.startswith("fewstep build-lmdb: ")
    assert (
        "unknown key 'fist_seed'; did you mean 'first_seed'?" in message
        and "need sigma_min < sigma_max, got 90.0" in message
    )


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (["train", "nobody"], "need a student of cd, dmd2-1, dmd2-4, mm-2, got 'nobody'"),
        (["generate", "nobody"], "need a row of teacher-heun-7, .*, got 'nobody'"),
        (["fid", "nobody"], "need a row of teacher-heun-7, .*, got 'nobody'"),
        (["build-lmdb"], r"need a file or folder, got nothing at absent.npz .*data\.source"),
        (["ref-stats"], r"artifacts/data.lmdb"),
        (["import", "absent.pkl"], r"fewstep import: .*absent.pkl"),
        (["import", "params.yaml"], r"need an EDM pickle, a file of torch.save, or safetensors"),
    ],
)
def test_wrong_names_and_missing_inputs_are_named(
    stage: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_params(tmp_path, data__source="absent.npz")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message):
        main(stage)


def test_check_says_what_the_params_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_params(tmp_path)
    monkeypatch.chdir(tmp_path)
    main(["check"])
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "params.yaml: 4 students, 8 rows",
        "warning: need a file or folder at assets/fmnist16.npz, got nothing there (params.yaml: "
        "data.source)",
    ]


@pytest.mark.parametrize(
    ("device", "precision", "kind", "attention", "warned"),
    [
        ("cpu", "bf16", "blocks", "plain", True),
        ("auto", "fp16", "blocks", "plain", True),
        ("cuda", "bf16", "blocks", "plain", False),
        ("cpu", "fp32", "blocks", "plain", False),
        ("cpu", "bf16", "network", "plain", False),
        ("cpu", "bf16", "blocks", "fused", False),
    ],
)
def test_check_warns_of_blocks_that_a_cpu_compiles_wrongly(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    device: str,
    precision: str,
    kind: str,
    attention: str,
    warned: bool,
) -> None:
    how = {"compile": kind, "attention": attention}
    tiny_params(tmp_path, device=device, precision=precision, performance=how)
    monkeypatch.chdir(tmp_path)
    main(["check"])
    assert ("whose gradients can be NaN" in capsys.readouterr().out) == warned


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"images": 319}, r"need 320 images, 256 of the reference and 64 others .*, got 319 in t"),
        ({"side": 8}, r"need images of 1x16x16 .*, got 1x8x8 .*\(params.yaml: data.resolution\)"),
        ({"classes": 11}, r"need labels in \[0, 10\), got 10 .*\(params.yaml: data.classes\)"),
    ],
)
def test_check_sees_data_that_is_too_little_or_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, edit: dict[str, int], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_params(tmp_path, data__source="t.npz")
    count, side = edit.get("images", 320), edit.get("side", 16)
    images = np.zeros((count, 1, side, side), np.uint8)
    np.savez("t.npz", images=images, labels=np.arange(count) % edit.get("classes", 10))
    with pytest.raises(SystemExit, match=message):
        main(["check"])


def test_bare_fewstep_shows_the_way(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    shown = capsys.readouterr().out
    assert "make repro" in shown and "fewstep --help" in shown


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"fewstep {own_version()}\n"


def test_a_mistyped_command_is_answered_with_the_one_meant(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for typed, meant in (("trian", "; did you mean 'train'?"), ("xyzzy", ";")):
        with pytest.raises(SystemExit, match="2"):
            main([typed, "cd"])
        expected = f"need a command, got '{typed}'{meant} `fewstep --help` lists all"
        assert capsys.readouterr().err == f"fewstep: {expected}\n"


def test_help_has_groups_whose_commands_exist_and_fit_a_terminal() -> None:
    assert {name for known in GROUPS.values() for name in known} <= stages().keys()
    shown = overview(stages()).splitlines()
    assert max(map(len, shown)) <= 100
    assert overview({"other": "x"}).split() == ["more:", "other", "x"], "also what no group names"
    for typed in (typed for known in GROUPS.values() for typed in known.values()):
        words = typed.split()[1:]
        parser(words[0]).parse_args(words)


def test_a_warning_is_told_once_and_last_without_its_line_of_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(path: str) -> None:
        for _ in range(2):
            warnings.warn("few images", stacklevel=1)
        print("done", file=sys.stderr)

    monkeypatch.setattr(module_of("check"), "run", run)
    main(["check"])
    assert capsys.readouterr().err == "done\nwarning: few images\n"
    monkeypatch.setenv("RANK", "1")
    main(["check"])
    assert capsys.readouterr().err == "done\n", "the first of several processes tells it"


def test_ctrl_c_while_starting_is_one_line(tmp_path: Path) -> None:
    """With torch replaced by an import that waits, and that hides the exception as some do."""
    (tmp_path / "torch.py").write_text(
        "import sys, time\nprint('importing', flush=True)\n"
        "try: time.sleep(60)\nexcept BaseException: raise ImportError('C extension')\n"
    )
    tiny_params(tmp_path)
    environ = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT / 'src'}"}
    process = subprocess.Popen(
        [sys.executable, "-m", "fewstep", "train", "cd"],
        cwd=tmp_path,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout is not None and process.stdout.readline() == "importing\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == ("", "fewstep: interrupted\n")
    assert process.returncode == 130


def test_ctrl_c_later_is_one_line_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(path: str) -> None:
        raise KeyboardInterrupt

    tiny_params(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module_of("check"), "run", interrupted)
    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit, match="130"):
            main(["check"])
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == "fewstep: interrupted\n"


@pytest.mark.parametrize("taken", [0, 1])
def test_memory_is_kept_for_good_only_where_large_tensors_go_back(
    taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first option that is set ends glibc's own choice of both."""
    asked: list[tuple[int, int]] = []
    libc = SimpleNamespace(mallopt=lambda *option: asked.append(option) or taken)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: libc)
    monkeypatch.setattr(sys, "platform", "linux")
    keep_freed_memory()
    assert asked == [(-3, 2**25), (-1, 2**30)][: 1 + taken]
    monkeypatch.setattr(sys, "platform", "darwin")
    keep_freed_memory()
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace())  # as musl's
    keep_freed_memory()
    assert len(asked) == 1 + taken


def test_threads_that_wait_spin_for_a_moment_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    monkeypatch.setenv("GOMP_SPINCOUNT", "")  # so that its absence is restored
    monkeypatch.delenv("GOMP_SPINCOUNT")
    with pytest.raises(SystemExit):
        main(["--version"])
    assert os.environ["OMP_WAIT_POLICY"] == "active"
    assert os.environ["GOMP_SPINCOUNT"] == "20000"
