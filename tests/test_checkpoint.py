"""Training states: exact, atomic, rotated, refused when they belong to something else."""

from pathlib import Path

import pytest
import torch
from torch import nn

from fewstep import checkpoint
from fewstep.checkpoint import SCRATCH, Checkpoints


@pytest.fixture
def network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> nn.Linear:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def trained(network: nn.Linear, steps: int) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(network.parameters(), 0.1)
    for step in range(steps):
        network(torch.full((4, 3), float(step))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def test_a_state_comes_back_bit_by_bit(network: nn.Linear) -> None:
    optimizer = trained(network, 3)
    states = Checkpoints("x", "a" * 64, keep=2)
    states.save(32, {"net": network}, {"student": optimizer}, {"meter": {"loss": 1 / 3}})
    weights = {k: v.clone() for k, v in network.state_dict().items()}
    moments = {k: v.clone() for k, v in checkpoint.flatten_optimizer(optimizer).items()}
    again, fresh = nn.Linear(3, 2), None
    fresh = torch.optim.AdamW(again.parameters(), 0.1)
    states.wait()
    about = Checkpoints("x", "a" * 64, keep=2).restore({"net": again}, {"student": fresh})
    assert about is not None and (about["nimg"], about["meter"]) == (32, {"loss": 1 / 3})
    assert all(torch.equal(weights[k], v) for k, v in again.state_dict().items())
    for name, value in checkpoint.flatten_optimizer(fresh).items():
        assert torch.equal(value, moments[name]), name


def test_training_goes_on_while_a_state_is_written(network: nn.Linear) -> None:
    states = Checkpoints("x", "a" * 64, keep=2)
    before = network.weight.detach().clone()
    states.save(32, {"net": network}, {}, {})
    with torch.no_grad():
        network.weight.add_(1)
    states.wait()
    again = nn.Linear(3, 2)
    states.restore({"net": again}, {})
    assert torch.equal(again.weight, before), "the state is of the moment of saving"


def test_the_newest_and_the_best_are_kept(network: nn.Linear) -> None:
    states = Checkpoints("x", "a" * 64, keep=2)
    for nimg in (10, 20, 30, 40, 50):
        states.save(nimg, {"net": network}, {}, {"best": {"nimg": min(nimg, 20)}})
        states.wait()
    assert [int(file.stem[-3:]) for file in states.files()] == [20, 40, 50]


def test_a_failed_write_is_raised_and_leaves_the_state_before(
    network: nn.Linear, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = Checkpoints("x", "a" * 64, keep=2)
    states.save(10, {"net": network}, {}, {})
    states.wait()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    states.save(20, {"net": network}, {}, {})
    with pytest.raises(OSError, match=r"disk, quota .* while writing .*state-000000000020"):
        states.save(30, {"net": network}, {}, {})
    assert [file.name for file in states.folder.iterdir()] == ["state-000000000010.safetensors"]


def test_what_a_dying_process_left_half_written_goes(network: nn.Linear) -> None:
    states = Checkpoints("x", "a" * 64, keep=2)
    states.save(10, {"net": network}, {}, {})
    states.wait()
    (states.folder / ".state-000000000020.0123abcd.tmp.safetensors").write_bytes(b"half")
    assert states.restore({"net": network}, {}) is not None
    assert [file.name for file in states.folder.iterdir()] == ["state-000000000010.safetensors"]


def test_a_state_of_another_experiment_is_refused(network: nn.Linear) -> None:
    states = Checkpoints("x", "a" * 64, keep=2)
    states.save(32, {"net": network}, {}, {})
    states.wait()
    stranger = Checkpoints("x", "a" * 12 + "b" * 52, keep=2)
    with pytest.raises(ValueError, match="need a training state of fingerprint aaaaaaaaaaaa"):
        stranger.restore({"net": network}, {})
    assert stranger.folder.parent == SCRATCH
