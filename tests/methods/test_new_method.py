"""A stranger's method: one file and a block of params, and all of the pipeline knows it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fronts import copy_repository, dvc, git

METHOD = '''"""Copying: the student answers at one noise level as the teacher does."""

import torch
from torch import Tensor

from fewstep.data.batch import Batch
from fewstep.logs import Logged, mean_of
from fewstep.method import Method, Networks
from fewstep.networks.denoiser import Denoiser
from fewstep.params import Settings as MethodSettings
from fewstep.params.fields import Sigma, block
from fewstep.theory.noise import Schedule


@block()
class Settings(MethodSettings):
    sigma: Sigma
    """noise level at which the student copies. A low one makes it copy images"""

    @property
    def sampling(self) -> tuple[str, int]:
        return "euler", 2


class Copying(Method):
    main_loss = "copy"

    def __init__(self, student: Denoiser, teacher: Denoiser, settings: Settings) -> None:
        super().__init__(student, teacher)
        self.teacher, self.settings = teacher, settings

    def loss(
        self, phase: str, batch: Batch, prepared: None = None
    ) -> tuple[Tensor, dict[str, Logged]]:
        sigma = torch.full((len(batch.images),), self.settings.sigma)
        x = batch.images + self.settings.sigma * batch.normal_like(batch.images)
        with torch.no_grad():
            target = self.teacher(x, sigma, batch.labels)
        loss = (self.student(x, sigma, batch.labels) - target).square().mean()
        return loss, {"copy": mean_of(loss)}

    def forwards(self, encoder: float) -> float:
        return 4.0


def build(networks: Networks, settings: Settings, schedule: Schedule) -> Copying:
    return Copying(networks.student(), networks.teacher(), settings)
'''


def fewstep(*arguments: str, cwd: Path) -> str:
    command = [sys.executable, "-m", "fewstep", *arguments]
    own = {**os.environ, "PYTHONPATH": "src"}
    return subprocess.run(command, cwd=cwd, env=own, capture_output=True, text=True).stdout


@pytest.mark.slow
def test_a_method_is_one_file_and_a_block_of_params(tmp_path: Path) -> None:
    folder = copy_repository(tmp_path, "tiny")
    (folder / "src/fewstep/methods/copying.py").write_text(METHOD)
    params = yaml.safe_load((folder / "params.yaml").read_text())
    student = params["students"]["cd"] | {"method": "copying", "settings": {"sigma": 1.0}}
    validation = {"sampler": "euler", "steps": 2, "images": 16, "reference_images": 64}
    student["validation"] = student.get("validation", {}) | validation
    params["students"] = {"mine": student}
    params["rows"] = {
        "mine-2": {"model": "mine", "sampler": "euler", "steps": 2, "guidance_scale": 1.0}
    }
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))

    dvc("repro", cwd=folder)

    table = (folder / "results/table.csv").read_text().splitlines()
    assert len(table) == 2 and table[1].startswith("mine-2,mine,copying,euler,2,2,")
    assert (folder / "results/losses/mine.csv").read_text().startswith("kimg,loss\n")
    assert "copy" in (folder / "artifacts/models/mine/log.jsonl").read_text()
    assert "train mine: " in fewstep("plan", cwd=folder)
    assert "euler, 2 NFE" in fewstep("sample", "mine", "--seeds", "0-3", cwd=folder)
    edited = git("status", "--porcelain", "--untracked-files=all", cwd=folder).split("\n")
    written = {"?? src/fewstep/methods/copying.py", " M params.yaml", "?? dvc.lock"}
    edited = {line for line in edited if line and " results/" not in line}
    assert edited <= written, "these two files, and what DVC records"
