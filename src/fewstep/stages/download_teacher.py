"""`fewstep download-teacher`: the teacher's weights, verified -> artifacts/models/teacher."""

from fewstep.interop.install import install
from fewstep.params import Import, Params
from fewstep.paths import BEST, MODELS
from fewstep.stages import train

HELP = "fetch and verify the teacher's weights, or train them (teacher.train)"


def run(params: Params) -> None:
    teacher = params.teacher
    if teacher.train is not None:
        train.run(params, "teacher")
    else:
        # an output of the stage, which only a training with validation fills
        (MODELS / f"teacher{BEST}").mkdir(parents=True, exist_ok=True)
        install("teacher", Import(str(teacher.url), teacher.sha256), params)
