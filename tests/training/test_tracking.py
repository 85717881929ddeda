"""The log is the record and survives everything; what shows it may fail and never stops a run."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from fewstep.distributed import Rank
from fewstep.params import Tracking, Wandb, load_params
from fewstep.paths import TIMES
from fewstep.training import tracking
from fewstep.training.log import Log
from fewstep.training.tracking import DVCLIVE, PATIENCE, Tracker, WandbRun
from fewstep.training.watcher import Watched
from places import CONFIG

SILENT = Tracking(False, Wandb("disabled", "p"))
LIVE = Tracking(True, Wandb("disabled", "p"))
ALONE = Rank(0, 1, torch.device("cpu"))
TINY = load_params(CONFIG / "tiny.yaml")
IMAGES = np.zeros((4, 1, 4, 4), np.uint8)
ROWS = [{"nimg": 32 * i, "kimg": 0.032 * i, "loss": 1.0 / i} for i in range(1, 5)]


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Log:
    """A log of four rows, in the current folder."""
    monkeypatch.chdir(tmp_path)
    log = Log(tmp_path / "scratch" / "log.jsonl")
    for row in ROWS:
        log.write(row)
    return log


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that computes a thousand images a second of this training, if nothing is lost."""
    monkeypatch.setattr(tracking, "image_flops", lambda method, params: 1e6)
    monkeypatch.setattr(tracking, "matmul_rate", lambda device, precision: 1e9)


def begun(
    log: Log, config: Tracking = SILENT, nimg: int = 128, saved: dict[str, Any] | None = None
) -> Tracker:
    """The tracker of a training that goes on at nimg, from a state unless `saved` is None."""
    params, method, tracker = replace(TINY, tracking=config), cast(Any, None), Tracker()
    folder = log.path.parent
    kept = folder, folder / "snapshots", "f" * 64
    tracker.begin(Watched("cd", params, method, ALONE, *kept, nimg, 1000, saved))
    return tracker


def close(tracker: Tracker) -> None:
    tracker.__exit__(None, None, None)


# --- the log and the times ---------------------------------------------------------------------

CLOCKS = {"seconds": 1.5, "images_per_second": 250.0, "memory_gib": 0.5, "checkpoint_seconds": 0.1}


def test_what_depends_on_the_machine_is_in_a_file_of_its_own(log: Log) -> None:
    tracker = begun(log, saved={})
    tracker.write({"nimg": 160, "kimg": 0.16, "loss": 0.1}, CLOCKS)
    tracker.write({"nimg": 160, "kimg": 0.16, "validation/FD": 9.0})
    assert log.rows()[4:] == [
        {"nimg": 160, "kimg": 0.16, "loss": 0.1},
        {"nimg": 160, "kimg": 0.16, "validation/FD": 9.0},
    ]
    assert tracker.times.rows() == [{"nimg": 160, **CLOCKS, "utilisation": 0.25}]
    assert tracker.times.path == log.path.with_name("times.jsonl")


def test_both_files_are_rewound_to_where_the_training_goes_on(log: Log) -> None:
    times = Log(log.path.with_name("times.jsonl"))
    for row in ROWS:
        times.write({"nimg": row["nimg"], "seconds": 1.0})
    begun(log, nimg=64, saved={})
    assert [row["nimg"] for row in log.rows()] == [row["nimg"] for row in times.rows()] == [32, 64]


def test_a_training_without_a_state_begins_both_files_anew(log: Log) -> None:
    tracker = begun(log, nimg=0)
    assert log.path.read_bytes() == tracker.times.path.read_bytes() == b""


def test_in_the_end_the_log_lies_beside_the_model_and_the_times_do_not(log: Log) -> None:
    tracker, folder = begun(log, saved={}), Path("artifacts/models/cd")
    folder.mkdir(parents=True)
    tracker.write({"nimg": 160, "kimg": 0.16, "loss": 0.1}, CLOCKS)
    tracker.finish(folder)
    assert (folder / "log.jsonl").read_bytes() == log.path.read_bytes()
    assert [file.name for file in folder.iterdir()] == ["log.jsonl"]
    assert (TIMES / "cd.jsonl").read_bytes() == tracker.times.path.read_bytes() != b""


def test_a_tracker_that_never_began_ends_too() -> None:
    close(Tracker())


# --- DVCLive -----------------------------------------------------------------------------------


class FakeLive:
    """Keeps what it is told, as DVCLive would write it, and fails when asked to."""

    def __init__(self, failing: bool = False) -> None:
        self.step, self.failing = 0, failing
        self.metrics: list[tuple[int, str, float]] = []
        self.images: list[str] = []

    def log_metric(self, name: str, value: float) -> None:
        if self.failing:
            raise OSError("disk full")
        self.metrics.append((self.step, name, value))

    def log_image(self, name: str, pixels: np.ndarray) -> None:
        self.images.append(name)


def live_tracker(log: Log, live: FakeLive, monkeypatch: pytest.MonkeyPatch) -> Tracker:
    monkeypatch.setattr(tracking, "_live", lambda name: live)
    return begun(log, LIVE, saved={})


def test_dvclive_is_shown_the_old_rows_then_the_new(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = FakeLive()
    tracker = live_tracker(log, live, monkeypatch)
    assert [(s, v) for s, name, v in live.metrics if name == "loss"] == [
        (row["nimg"], row["loss"]) for row in ROWS
    ]
    tracker.write({"nimg": 160, "kimg": 0.16, "loss": "nan", "fd": 3.0})
    assert live.metrics[-2:] == [(160, "kimg", 0.16), (160, "fd", 3.0)], "text is no number"
    assert log.rows()[-1] == {"nimg": 160, "kimg": 0.16, "loss": "nan", "fd": 3.0}


def test_events_are_in_the_log_but_not_plotted(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    live = FakeLive()
    tracker = live_tracker(log, live, monkeypatch)
    live.metrics.clear()
    event = {"nimg": 160, "nonfinite": "student", "norm": "nan", "loss": "0.5"}
    tracker.write(event)
    assert live.metrics == [] and log.rows()[-1] == event


def test_dvclive_that_fails_is_given_up_with_one_line(
    log: Log, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = live_tracker(log, FakeLive(failing=True), monkeypatch)
    tracker.write({"nimg": 160, "kimg": 0.16, "loss": 0.1})
    tracker.show(IMAGES, 160)
    close(tracker)
    assert capsys.readouterr().out == "DVCLive is off: OSError: disk full; training goes on\n"
    assert len(log.rows()) == 5


@pytest.mark.slow  # DVCLive takes seconds to import
def test_the_dvclive_folder_is_rebuilt_from_the_log(log: Log) -> None:
    plots = DVCLIVE / "cd" / "plots"
    for restart in range(2):
        tracker = begun(log, LIVE, saved={})
        tracker.write({"nimg": 160, "kimg": 0.16, "loss": 0.1, "segment/loss_0": 2.0})
        tracker.show(IMAGES, 160)
        close(tracker)
        rows = [line.split("\t") for line in (plots / "metrics/loss.tsv").read_text().splitlines()]
        steps = [int(step) for step, _ in rows[1:]]
        assert rows[0] == ["step", "loss"] and steps == [32, 64, 96, 128, 160], restart
        assert (plots / "images" / "samples.png").read_bytes().startswith(b"\x89PNG")
        log.rewind(128)
    assert (plots / "metrics/segment/loss_0.tsv").is_file()
    assert {p.name for p in Path().iterdir()} == {"scratch", "dvclive"}
    shutil.rmtree(plots)
    begun(log, LIVE, saved={})
    assert len((plots / "metrics/loss.tsv").read_text().splitlines()) == 5


# --- Weights & Biases, stood in for ------------------------------------------------------------


class FakeRun:
    def __init__(self, run_id: str | None = None, failing: str = "") -> None:
        self.id, self.failing = run_id or "new", failing
        self.rows: list[tuple[int, dict[str, Any]]] = []
        self.ended = threading.Event()

    def log(self, row: dict[str, Any], step: int) -> None:
        if self.failing == "log":
            raise ConnectionError("no\nroute\n  to host")
        self.rows.append((step, row))

    def finish(self) -> None:
        if self.failing == "finish":
            self.ended.wait(20)


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A stand-in for the package; a run fails as `failing` says, `asked` is how it was begun."""
    fake: Any = ModuleType("wandb")
    state = SimpleNamespace(failing="", asked={}, run=None)

    def init(**asked: Any) -> FakeRun:  # noqa: ANN401
        state.asked = asked
        if state.failing == "init":
            raise RuntimeError("no\nserver")
        state.run = FakeRun(asked["id"], state.failing)
        return state.run

    fake.init, fake.setup = init, lambda settings: None
    fake.Settings = lambda **values: values
    fake.Image = lambda pixels: pixels.shape
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return state


def tracker_of(log: Log, run_id: str | None = None) -> Tracker:
    saved = {"wandb": run_id} if run_id else {}
    return begun(log, Tracking(False, Wandb("online", "p", "me")), saved=saved)


def test_wandb_is_shown_numbers_and_pictures_at_their_nimg(
    log: Log, wandb: SimpleNamespace
) -> None:
    tracker = tracker_of(log)
    tracker.write({"nimg": 160, "kimg": 0.16, "loss": 0.1, "norm": "inf"})
    tracker.show(IMAGES, 160)
    assert wandb.run.rows == [(160, {"kimg": 0.16, "loss": 0.1}), (160, {"samples": (8, 98, 3)})]
    expected = {"project": "p", "entity": "me", "name": "cd", "mode": "online", "id": None}
    assert wandb.asked | expected == wandb.asked
    config = wandb.asked["config"]
    assert config["fingerprint"] == "f" * 64 and config["students"] == TINY.as_dict()["students"]
    assert wandb.asked["resume"] == "allow"
    assert tracker.saved() == {"wandb": "new"}


def test_a_restart_goes_on_with_its_run(log: Log, wandb: SimpleNamespace) -> None:
    assert tracker_of(log, "abc").wandb.id == "abc" == wandb.asked["id"]


@pytest.mark.parametrize("failing", ["init", "log"])
def test_a_run_that_fails_is_given_up_with_one_line(
    failing: str, log: Log, wandb: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    wandb.failing = failing
    tracker = tracker_of(log, "abc")
    for nimg in (160, 192):
        tracker.write({"nimg": nimg, "kimg": nimg / 1000, "loss": 0.1})
        tracker.show(IMAGES, nimg)
    close(tracker)
    what, why = {
        "init": ("W&B", "RuntimeError: no server"),
        "log": ("W&B log", "ConnectionError: no route to host"),
    }[failing]
    assert capsys.readouterr().out == f"{what} is off: {why}; training goes on\n"
    assert [row["nimg"] for row in log.rows()] == [32, 64, 96, 128, 160, 192]
    assert tracker.wandb.id == "abc", "the next start tries the same run again"


def test_a_run_that_does_not_end_is_left_after_a_while(
    log: Log,
    wandb: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(tracking, "PATIENCE", 0.1)
    wandb.failing = "finish"
    started = time.monotonic()
    close(tracker_of(log))
    assert time.monotonic() - started < 5
    assert "W&B is off: the upload did not finish within 0.1 s" in capsys.readouterr().out
    wandb.run.ended.set()


def test_a_missing_package_is_a_line(
    log: Log, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    tracker = tracker_of(log)
    tracker.write({"nimg": 160})
    close(tracker)
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "W&B is off: ModuleNotFoundError" in out
    assert tracker.wandb.id is None and len(log.rows()) == 5


# --- Weights & Biases itself -------------------------------------------------------------------

PROGRAM = """
import json, sys, time
from dataclasses import replace
from pathlib import Path
started = time.monotonic()
import numpy as np, torch
from fewstep.distributed import Rank
from fewstep.params import Tracking, Wandb, load_params
from fewstep.training import tracking
from fewstep.training.watcher import Watched
tracking.image_flops, tracking.matmul_rate = lambda *_: 1.0, lambda *_: 1.0
mode, run_id, file = sys.argv[1], sys.argv[2] or None, sys.argv[3]
config = Tracking(mode == "dvclive", Wandb("disabled" if mode == "dvclive" else mode, "p"))
params, rank = replace(load_params(file), tracking=config), Rank(0, 1, torch.device("cpu"))
saved = {"wandb": run_id} if run_id else None
with tracking.Tracker() as tracker:
    tracker.begin(Watched("cd", params, None, rank, Path(), Path(), "f" * 64, 0, 64, saved))
    for nimg in (32, 64):
        tracker.write({"nimg": nimg, "kimg": nimg / 1000, "loss": 0.5, "segment/loss_0": 1.0})
        sys.stdin.readline()
answer = {"id": tracker.wandb.id, "on": tracker.wandb.run is not None}
answer["seconds"] = time.monotonic() - started
answer["modules"] = [name for name in ("wandb", "dvclive", "dvc") if name in sys.modules]
Path("answer.json").write_text(json.dumps(answer))
"""


class Outcome(SimpleNamespace):
    out: str
    answer: dict[str, Any]
    seconds: float


def started(folder: Path, mode: str, run_id: str = "", **extra: str) -> subprocess.Popen[str]:
    """A process that tracks two rows with the real package, at home in `folder`."""
    homes = dict.fromkeys(("HOME", "TMPDIR", "WANDB_DIR"), str(folder))
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "XDG_"))}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, mode, run_id, str(CONFIG / "tiny.yaml")],
        cwd=folder,
        env={**kept, **homes, "PYTHONPATH": os.pathsep.join(sys.path), **extra},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(process: subprocess.Popen[str], folder: Path, since: float) -> Outcome:
    out, _ = process.communicate("\n\n", timeout=120)
    assert process.returncode == 0, out
    answer = json.loads((folder / "answer.json").read_text())
    assert [row["nimg"] for row in Log(folder / "log.jsonl").rows()][-2:] == [32, 64]
    return Outcome(out=out, answer=answer, seconds=time.monotonic() - since)


def tracked(folder: Path, mode: str, run_id: str = "", **extra: str) -> Outcome:
    since = time.monotonic()
    return ended(started(folder, mode, run_id, **extra), folder, since)


def test_disabled_trackers_are_not_even_imported(tmp_path: Path) -> None:
    outcome = tracked(tmp_path, "disabled")
    assert outcome.answer["modules"] == [] and outcome.out == ""
    assert {p.name for p in tmp_path.iterdir()} == {"log.jsonl", "times.jsonl", "answer.json"}


@pytest.mark.slow
def test_an_offline_run_is_written_and_resumed_under_its_id(tmp_path: Path) -> None:
    first = tracked(tmp_path, "offline")
    second = tracked(tmp_path, "offline", first.answer["id"])
    assert first.answer["on"] and second.answer["id"] == first.answer["id"]
    runs = list(tmp_path.glob("wandb/offline-run-*"))
    assert len(runs) == 2 and all(run.name.endswith(first.answer["id"]) for run in runs)
    assert all(list(run.glob("*.wandb"))[0].stat().st_size > 0 for run in runs)
    assert first.out == second.out == "", "silent"


class Server(BaseHTTPRequestHandler):
    """Just enough of W&B's server for a run to begin."""

    def do_POST(self) -> None:
        query = self.rfile.read(int(self.headers.get("content-length") or 0)).decode(
            errors="ignore"
        )
        project = {"id": "P", "name": "p", "entity": {"id": "e", "name": "e"}}
        run = {"id": "x", "name": "abc", "displayName": "cd", "config": "{}", "project": project}
        data = {"model": None}
        if "upsertBucket" in query:
            data = {"upsertBucket": {"bucket": run, "inserted": True}}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"data": data}).encode())

    do_GET = do_POST

    def log_message(self, format: str, *args: Any) -> None:  # noqa: ANN401
        pass


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def online(server: ThreadingHTTPServer) -> dict[str, str]:
    host, port = server.server_address[:2]
    return {"WANDB_BASE_URL": f"http://{host}:{port}", "WANDB_API_KEY": "0" * 40}


def own_lines(out: str) -> list[str]:
    """What is left of the output without the library's line about where its key came from."""
    return [line for line in out.splitlines() if "Loaded credentials" not in line]


@pytest.mark.slow
def test_an_unreachable_server_costs_a_line_and_some_patience(
    server: ThreadingHTTPServer, tmp_path: Path
) -> None:
    address = online(server)
    server.server_close()  # nobody listens there now
    outcome = tracked(tmp_path, "online", "abc", **address)
    assert not outcome.answer["on"] and outcome.answer["id"] == "abc"
    (line,) = own_lines(outcome.out)
    assert line.startswith("W&B is off: CommError") and line.endswith("training goes on")
    assert outcome.seconds < PATIENCE + 20


@pytest.mark.slow
def test_a_server_that_dies_does_not_keep_the_training_from_ending(
    server: ThreadingHTTPServer, tmp_path: Path
) -> None:
    since = time.monotonic()
    process = started(tmp_path, "online", "abc", **online(server))
    while not Log(tmp_path / "log.jsonl").rows():  # W&B has begun by then
        assert process.poll() is None and time.monotonic() - since < 60
        time.sleep(0.1)
    server.shutdown()
    server.server_close()
    outcome = ended(process, tmp_path, since)
    assert outcome.answer["id"] == "abc"
    first, *rest = own_lines(outcome.out)
    assert first == f"W&B is off: the upload did not finish within {PATIENCE} s"
    assert len(rest) <= 2 and "Traceback" not in outcome.out, "what the library says at its exit"
    assert outcome.seconds < PATIENCE + 30


@pytest.mark.slow
def test_online_without_a_key_is_a_line(tmp_path: Path) -> None:
    outcome = tracked(tmp_path, "online", WANDB_BASE_URL="http://127.0.0.1:9")
    (line,) = outcome.out.splitlines()
    assert "W&B is off: UsageError: No API key" in line and outcome.seconds < PATIENCE


def test_a_disabled_run_does_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    run = WandbRun("cd", Wandb("disabled", "p"), {}, "abc")
    run.do("log", lambda _: pytest.fail("there is no run"))
    run.finish()
    assert run.run is None and run.id == "abc" and capsys.readouterr().out == ""
