"""`fewstep <stage>`: reads params.yaml, runs one stage of the pipeline, writes its outputs."""

import argparse
import importlib
import sys
from collections.abc import Sequence

STAGES = {
    "download-teacher": "fetch and verify the teacher's weights, or train them (teacher.train)",
    "build-lmdb": "turn data.source into artifacts/data.lmdb",
    "ref-stats": "feature statistics of real images, and the real-against-real floor",
    "train": "train a student, under torchrun",
    "generate": "sample the images of a row",
    "fid": "score the images of a row",
    "import": "turn another project's checkpoint into a model of ours",
    "results-table": "collect all rows into results/",
    "check": "check params.yaml and stop",
}
NAMED = {"train": "student", "generate": "row", "fid": "row"}
MODULES = {"import": "import_checkpoint"}  # where the name is a word of Python


def parser() -> argparse.ArgumentParser:
    """The command line: a stage, the student or row it is for, and the params file."""
    main = argparse.ArgumentParser("fewstep", description=__doc__)
    stages = main.add_subparsers(dest="stage", required=True, metavar="STAGE")
    for stage, text in STAGES.items():
        command = stages.add_parser(stage, help=text, description=text)
        if stage in NAMED:
            command.add_argument("name", help=f"a {NAMED[stage]} of params.yaml")
        if stage == "import":
            command.add_argument("file", help="a checkpoint: a file, or a folder of accelerate")
            command.add_argument("--out", help="where to; default artifacts/models/<name of file>")
        command.add_argument("--params", default="params.yaml", help="the params file")
    return main


def main(argv: Sequence[str] | None = None) -> None:
    """Run a stage. Errors of the user's input end as one message, without a traceback."""
    arguments = parser().parse_args(argv)
    from fewstep.params import load_params

    try:
        params = load_params(arguments.params)
        if arguments.stage == "check":
            print(f"{arguments.params}: {len(params.students)} students, {len(params.rows)} rows")
            return
        name = MODULES.get(arguments.stage, arguments.stage.replace("-", "_"))
        given = [getattr(arguments, key) for key in ("name", "file", "out") if key in arguments]
        importlib.import_module(f"fewstep.stages.{name}").run(params, *given)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"fewstep {arguments.stage}: {error}")
