"""States of finished trainings, kept until the model is used.

DVC can die after a training and before it records the model. It then deletes the model and runs the
stage again, which only has to write the model from the last state.
"""

import shutil

from fewstep.paths import SCRATCH

DIGITS = 12  # of the fingerprint, in the name of the folder with a training's states
FINISHED = "finished"  # a file in that folder, once the model is written


def forget_finished(name: str) -> None:
    """Remove the states of finished trainings of that name."""
    for mark in SCRATCH.glob(f"{name}-{'?' * DIGITS}/{FINISHED}"):
        for state in mark.parent.glob("state-*"):  # first, so nothing resumes in half a folder
            state.unlink(missing_ok=True)
        shutil.rmtree(mark.parent, ignore_errors=True)  # another row may be removing it too
