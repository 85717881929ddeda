"""`fewstep <stage>`: reads params.yaml, runs one stage of the pipeline, writes its outputs."""

import argparse
import ctypes
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

STAGES = {
    "download-teacher": "fetch and verify the teacher's weights, or train them (teacher.train)",
    "download-model": "fetch and verify another network (imports)",
    "download-data": "fetch and verify data.source (data.url)",
    "download-all": "fetch and verify every file of params.yaml; says sha256 that are unknown",
    "build-lmdb": "turn data.source into artifacts/data.lmdb",
    "ref-stats": "feature statistics of real images, and the real-against-real floor",
    "preflight": "check a student's training before it runs, under torchrun",
    "train": "train a student, under torchrun",
    "generate": "sample the images of a row",
    "fid": "score the images of a row",
    "import": "turn another project's checkpoint into a model of ours",
    "results-table": "collect all rows into results/",
    "compare": "say whether two rows differ by more than their seeds",
    "sweep": "write the rows of params.yaml: sweeps into params.yaml",
    "phema": "rebuild a power-function average of a finished training (students.<name>.phema)",
    "sample": "draw images of a model or checkpoint: a grid, PNGs, NPZ",
    "plan": "what the experiment costs: FLOPs, memory, hours, disk; runs nothing",
    "check": "check params.yaml and stop",
}
NAMED = {
    "download-model": "network of imports",
    "preflight": "student",
    "train": "student",
    "generate": "row",
    "fid": "row",
    "phema": "student",
}
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
MODULES = {"import": "import_checkpoint"}  # where the name is a word of Python


def parser() -> argparse.ArgumentParser:
    """The command line: a stage, the student or row it is for, and the params file."""
    main = argparse.ArgumentParser("fewstep", description=__doc__)
    stages = main.add_subparsers(dest="stage", required=True, metavar="STAGE")
    for stage, text in STAGES.items():
        command = stages.add_parser(stage, help=text, description=text)
        if stage in NAMED:
            command.add_argument("name", help=f"a {NAMED[stage]} of params.yaml")
        if stage == "phema":
            command.add_argument("--std", type=float, required=True, help="relative width")
            command.add_argument("--kimg", type=float, help="time; the last snapshot's by default")
        if stage == "compare":
            for side in ("a", "b"):
                command.add_argument(side, help="a row, or REVISION:ROW of another git revision")
        if stage == "import":
            command.add_argument("file", help="a checkpoint: a file, or a folder of accelerate")
        if stage == "sample":
            command.add_argument("model", help="a name of params.yaml, or a checkpoint")
            command.add_argument("--classes", help="0-9,20: one after the other; all by default")
            command.add_argument("--seeds", default="0-63", help="0-63,100: an image each; 0-63")
            command.add_argument("--steps", type=int, help="by default what it was trained for")
            command.add_argument("--guidance", type=float, default=1.0, help="1, off")
            command.add_argument("--sampler", help="heun, euler, ddim or renoise; its method's own")
        if stage == "plan":
            command.add_argument("--gpu", default="h100", help="kind of GPU; h100 by default")
            command.add_argument("--gpus", type=int, default=8, help="GPUs of a node; 8")
            command.add_argument("--nodes", type=int, default=1, help="machines; 1")
            text = "share of the data sheet's FLOP/s that is reached; 0.2"
            command.add_argument("--utilisation", type=float, default=0.2, help=text)
            command.add_argument("--disk", type=float, help="free GB; by default what is free here")
            text = "images of the data; by default the fewest that will do"
            command.add_argument("--images", type=int, help=text)
        if stage in ("import", "phema", "sample"):
            command.add_argument(
                "--out", type=Path, help="folder; by default a new one in artifacts"
            )
        command.add_argument("--params", default="params.yaml", help="the params file")
    return main


def main(argv: Sequence[str] | None = None) -> None:
    """Run a stage. Errors of the user's input end as one message, without a traceback."""
    given = vars(parser().parse_args(argv))
    stage, path = given.pop("stage"), given.pop("params")
    from fewstep.params import load_params

    try:
        params = load_params(path, swept=stage != "sweep")
        if stage == "sweep":
            given["path"] = path
        if stage == "check":
            print(f"{path}: {len(params.students)} students, {len(params.rows)} rows")
            return
        keep_freed_memory()
        name = MODULES.get(stage, stage.replace("-", "_"))
        importlib.import_module(f"fewstep.stages.{name}").run(params, **given)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"fewstep {stage}: {error}")


def keep_freed_memory() -> None:
    """Let glibc keep what tensors leave: at each step it would be returned, and cleared anew."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None and mallopt(M_MMAP_THRESHOLD, 1 << 25):  # larger ones go back
        mallopt(M_TRIM_THRESHOLD, 1 << 30)
