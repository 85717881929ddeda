"""`fewstep download-teacher`: the teacher's weights, verified -> artifacts/models/teacher."""

from fewstep.params import Params
from fewstep.stages import download_model, train


def run(params: Params) -> None:
    teacher = params.teacher
    if teacher.train is not None:
        train.run(params, "teacher")
        return
    download_model.install("teacher", str(teacher.url), str(teacher.sha256), params)
