"""`fewstep <command>`: reads params.yaml, runs one stage of the pipeline, writes its outputs."""

import argparse
import ast
import ctypes
import difflib
import importlib
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from fewstep.commands import WAY, example, overview
from fewstep.output import survive_readers
from fewstep.quoting import printable
from fewstep.warned import at_the_end

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def stages() -> dict[str, str]:
    """Each command with its HELP, which is parsed rather than imported: torch would take 2 s."""
    files = sorted((Path(__file__).parent / "stages").glob("[!_]*.py"))
    return {file.stem.rstrip("_").replace("_", "-"): _help(file) for file in files}


def _help(file: Path) -> str:
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "HELP":
            return ast.literal_eval(node.value)
    raise AssertionError(f"need HELP in {file}")


def module_of(stage: str) -> ModuleType:
    name = stage.replace("-", "_")
    return importlib.import_module(f"fewstep.stages.{name}{'_' * (stage == 'import')}")


def parser(chosen: str | None = None) -> argparse.ArgumentParser:
    """The command line. Only the chosen stage is imported, and so has its own arguments."""
    plain, known = argparse.RawDescriptionHelpFormatter, stages()
    more = "`fewstep COMMAND --help` explains a command."
    text = f"{WAY}\ncommands, in groups:\n{overview(known)}\n\n{more}"
    main = argparse.ArgumentParser(
        "fewstep", usage="fewstep COMMAND ...", description=text, formatter_class=plain
    )
    main.add_argument("--version", action="version", version=f"fewstep {own_version()}")
    commands = main.add_subparsers(
        prog="fewstep", dest="stage", required=True, metavar="COMMAND", help=argparse.SUPPRESS
    )
    for stage, text in known.items():
        shown = f"example:\n  {typed}" if (typed := example(stage)) else None
        command = commands.add_parser(stage, description=text, epilog=shown, formatter_class=plain)
        if stage == chosen:
            module = module_of(stage)
            if hasattr(module, "NAME"):
                command.add_argument("name", help=module.NAME)
            if hasattr(module, "arguments"):
                module.arguments(command)
        command.add_argument("--params", default="params.yaml", help="the params file")
    return main


def own_version() -> str:
    try:
        return version("fewstep")
    except PackageNotFoundError:  # run from a checkout, by PYTHONPATH
        return "of this checkout, not installed"


def _refuse_unknown(command: str) -> NoReturn:
    """Exit code 2, as argparse has it for wrong usage; its own message lists all commands."""
    like = difflib.get_close_matches(command, stages(), n=1, cutoff=0.5)
    meant = f"; did you mean '{like[0]}'?" if like else ";"
    text = f"fewstep: need a command, got {command!r}{meant} `fewstep --help` lists all"
    print(printable(text), file=sys.stderr)
    sys.exit(2)


def main(argv: Sequence[str] | None = None) -> None:
    """Run a stage. Errors in the user's input end in a message, without a traceback."""
    survive_readers()
    # By default OpenMP's threads spin while they wait and take cores from other processes: with two
    # of those busy, a training ran at a fifth of its speed. Those that sleep at once wake up late:
    # small networks were slower on two cores than on one. So they spin for about 50 µs, which
    # costs other processes nothing that can be measured. torch reads this when imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    words = list(sys.argv[1:] if argv is None else argv)
    chosen = next((word for word in words if not word.startswith("-")), None)
    if not words:
        print(WAY, end="")
        return
    if chosen is not None and words[0] == chosen and chosen not in stages():
        _refuse_unknown(chosen)
    try:
        with _interruptible() if argv is None else nullcontext():  # imports take seconds
            given: dict[str, Any] = vars(parser(chosen).parse_args(words))
            stage, path = given.pop("stage"), given.pop("params")
            module = module_of(stage)
        if "DVC_STAGE" in os.environ:  # as DVC's commands have it
            _refuse_links()
        with at_the_end():
            if getattr(module, "TAKES_PATH", False):
                read: Any = path
            else:
                _check_order(chosen, read := _load(path), given.get("name"))
            if getattr(module, "WRITES_PARAMS", False):
                given["path"] = path
            keep_freed_memory()
            module.run(read, **given)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"fewstep {chosen}: {printable(str(error))}")
    except KeyboardInterrupt:
        _say_interrupted()
        sys.exit(128 + signal.SIGINT)


@contextmanager
def _interruptible() -> Iterator[None]:
    """End at once on Ctrl-C: from within an import, its exception can come out as another one."""

    def end(*_: object) -> None:
        _say_interrupted()
        os._exit(128 + signal.SIGINT)

    heeded = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if heeded:
        signal.signal(signal.SIGINT, end)
    yield
    if heeded:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _say_interrupted() -> None:
    """In one line, of one of the processes that Ctrl-C reaches."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print("fewstep: interrupted", file=sys.stderr, flush=True)


def _refuse_links() -> None:
    from fewstep.planning.links import refused_by_dvc

    if refused := refused_by_dvc():
        raise ValueError("\n".join(refused))


def _check_order(stage: str | None, params: Any, name: str | None) -> None:  # noqa: ANN401
    from fewstep.planning.order import check_order

    check_order(str(stage), params, name)


def _load(path: str) -> Any:  # noqa: ANN401
    from fewstep.params import load_params

    return load_params(path)


def keep_freed_memory() -> None:
    """Make glibc keep freed memory; else each step returns it, and the kernel clears it anew."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None and mallopt(M_MMAP_THRESHOLD, 1 << 25):  # larger blocks are returned
        mallopt(M_TRIM_THRESHOLD, 1 << 30)
