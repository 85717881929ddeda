"""The examples of docs/extending.md work as they stand there."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from experiment import set_up
from fewstep.params import Params
from places import CONFIG, ROOT

PAGE = (ROOT / "docs" / "extending.md").read_text()
BLOCKS = re.findall(r"`(src/\S+\.py)`:\n\n```python\n(.*?)```", PAGE, re.DOTALL)
RUN = """
from fewstep.cli import main
from fewstep.params import load_params
from fewstep.training.loop import train
from fewstep.distributed import Rank
import torch

for stage in ("check", "code"):
    main([stage])
params, alone = load_params("params.yaml"), Rank(0, 1, torch.device("cpu"))
for name in ("teacher", "regression"):
    train(name, params, alone)
main(["generate", "regression-1"])
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Params:
    return set_up(tmp_path, monkeypatch, images=400)


@pytest.mark.slow
def test_a_method_and_a_network_are_added_by_a_file_each(toy: Params, tmp_path: Path) -> None:
    assert len(BLOCKS) == 2
    shutil.copytree(ROOT / "src", "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name, code in BLOCKS:
        Path(name).write_text(code)
    raw = yaml.safe_load((CONFIG / "tiny.yaml").read_text())
    shown = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)[0])
    shown["students"]["regression"] |= {"kimg": 0.064, "ema": {"kind": "none"}}
    raw["students"], raw["rows"] = shown["students"], shown["rows"]
    raw["teacher"]["train"]["kimg"], raw["network"]["type"] = 0.032, "plain"
    Path("params.yaml").write_text(yaml.safe_dump(raw))
    command = [sys.executable, "-c", RUN]
    env = {"PYTHONPATH": str(tmp_path / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with np.load("artifacts/samples/regression-1.npz") as samples:
        assert samples["images"].shape == (128, 1, 16, 16)
    assert Path("artifacts/code/train-regression.json").exists()
