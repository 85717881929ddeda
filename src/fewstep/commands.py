"""The commands in groups, and an example of each: what `fewstep --help` and bare `fewstep` show.

A command is a file of `stages`. One that is missing here is listed too, under "more", so adding a
command takes no edit of this file.
"""

from collections.abc import Iterable, Mapping

GROUPS: Mapping[str, Mapping[str, str]] = {
    "before a run": {
        "new": "fewstep new --data ~/photos --budget 40m",
        "check": "fewstep check --params config/tiny.yaml",
        "plan": "fewstep plan --gpu h100 --gpus 8",
        "download-all": "fewstep download-all",
        "preflight": "fewstep preflight cd-8",
        "sweep": "fewstep sweep",
    },
    "the stages, which `dvc repro` and `snakemake` run in order": {
        "code": "fewstep code",
        "download-teacher": "fewstep download-teacher",
        "download-model": "fewstep download-model theirs",
        "build-lmdb": "fewstep build-lmdb",
        "ref-stats": "fewstep ref-stats",
        "train": "fewstep train cd-8",
        "generate": "fewstep generate cd-8",
        "fid": "fewstep fid cd-8",
        "results-table": "fewstep results-table",
    },
    "after a run": {
        "sample": "fewstep sample cd-8 --seeds 0-99",
        "export": "fewstep export cd-8 --to onnx",
        "compare": "fewstep compare cd-8 main:cd-8",
        "phema": "fewstep phema cd-8 --std 0.07 --kimg 50000",
    },
    "others' files": {
        "import": "fewstep import network-snapshot-157698.pkl",
        "download-data": "fewstep download-data",
    },
}
WAY = """\
fewstep: distil a diffusion model into a few-step sampler, and measure what that costs.

  make repro               run the experiment of params.yaml and print its table
  fewstep check            is params.yaml right? reports all mistakes at once
  fewstep plan --gpu cpu   what would it cost? hours, memory, disk; runs nothing
  fewstep sample cd-8      draw images from a trained student
  fewstep --help           all commands; `fewstep train --help` explains one
"""


def example(command: str) -> str | None:
    """How the command is typed; None where nobody has written it down."""
    return next((known[command] for known in GROUPS.values() if command in known), None)


def overview(helps: Mapping[str, str]) -> str:
    """All commands with their help, group by group."""
    grouped = {command for known in GROUPS.values() for command in known}
    groups = {
        **{head: [*known] for head, known in GROUPS.items()},
        "more": sorted(helps.keys() - grouped),
    }
    return "\n".join(_lines(groups, helps))


def _lines(groups: Mapping[str, Iterable[str]], helps: Mapping[str, str]) -> Iterable[str]:
    width = max(map(len, helps))
    for head, commands in groups.items():
        if known := [command for command in commands if command in helps]:
            yield f"\n{head}:"
            yield from (f"  {command:<{width}}  {helps[command]}" for command in known)
