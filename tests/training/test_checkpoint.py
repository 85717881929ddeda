"""Training states: exact, atomic, rotated, refused when they belong to something else."""

from pathlib import Path

import pytest
import torch
from torch import nn

from fewstep.distributed import Rank
from fewstep.paths import SCRATCH
from fewstep.training import checkpoint
from fewstep.training.checkpoint import Checkpoints
from fewstep.training.fingerprint import Fingerprint


@pytest.fixture
def network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> nn.Linear:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def fingerprint(digest: str, **facts: object) -> Fingerprint:
    made = Fingerprint(facts)
    made.digest = digest
    return made


def trained(network: nn.Linear, steps: int) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(network.parameters(), 0.1)
    for step in range(steps):
        network(torch.full((4, 3), float(step))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def test_a_state_comes_back_bit_by_bit(network: nn.Linear) -> None:
    optimizer = trained(network, 3)
    states = Checkpoints("x", fingerprint("a" * 64), keep=2)
    states.save(32, {"net": network}, {"student": optimizer}, {"meter": {"loss": 1 / 3}})
    weights = {k: v.clone() for k, v in network.state_dict().items()}
    moments = {k: v.clone() for k, v in checkpoint.flatten_optimizer(optimizer).items()}
    again, fresh = nn.Linear(3, 2), None
    fresh = torch.optim.AdamW(again.parameters(), 0.1)
    states.wait()
    about = Checkpoints("x", fingerprint("a" * 64), keep=2).restore(
        {"net": again}, {"student": fresh}
    )
    assert about is not None and (about["nimg"], about["meter"]) == (32, {"loss": 1 / 3})
    assert all(torch.equal(weights[k], v) for k, v in again.state_dict().items())
    for name, value in checkpoint.flatten_optimizer(fresh).items():
        assert torch.equal(value, moments[name]), name


def test_training_goes_on_while_a_state_is_written(network: nn.Linear) -> None:
    states = Checkpoints("x", fingerprint("a" * 64), keep=2)
    before = network.weight.detach().clone()
    states.save(32, {"net": network}, {}, {})
    with torch.no_grad():
        network.weight.add_(1)
    states.wait()
    again = nn.Linear(3, 2)
    states.restore({"net": again}, {})
    assert torch.equal(again.weight, before), "the state is of the moment of saving"


def test_the_newest_and_the_best_are_kept(network: nn.Linear) -> None:
    states = Checkpoints("x", fingerprint("a" * 64), keep=2)
    for nimg in (10, 20, 30, 40, 50):
        states.save(nimg, {"net": network}, {}, {"best": {"nimg": min(nimg, 20)}})
        states.wait()
    assert [int(file.stem[-3:]) for file in states.files()] == [20, 40, 50]


def test_a_failed_write_is_raised_and_leaves_the_state_before(
    network: nn.Linear, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = Checkpoints("x", fingerprint("a" * 64), keep=2)
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
    states = Checkpoints("x", fingerprint("a" * 64), keep=2)
    states.save(10, {"net": network}, {}, {})
    states.wait()
    half = states.folder / ".state-000000000020.0123abcd.tmp.safetensors"
    half.write_bytes(b"half")
    states.begin()
    assert not half.exists() and states.restore({"net": network}, {}) is not None
    assert {file.name for file in states.folder.iterdir()} == {
        "state-000000000010.safetensors",
        "fingerprint.json",
    }


def test_a_rank_that_restores_leaves_what_another_is_writing(network: nn.Linear) -> None:
    """The first rank may still write what the training depends on, or more."""
    states = stopped(network, "a", 4000, lr=0.1)
    writing = states.folder / ".fingerprint.0123abcd.tmp.json"
    writing.write_bytes(b"half")
    assert states.restore({"net": network}, {}) is not None
    assert writing.exists()


def test_one_process_of_a_node_hashes_a_state_and_the_others_take_its_word(
    network: nn.Linear, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = stopped(network, "a", 4000)
    (file,) = states.files()
    hashed: list[int] = []
    digest = checkpoint._sha256
    monkeypatch.setattr(checkpoint, "_sha256", lambda *a: hashed.append(1) or digest(*a))
    for index in (2, 3):  # of two nodes with two processes each
        rank, again = Rank(index, 4, torch.device("cpu"), index % 2), nn.Linear(3, 2)

        def told(found: Path | None, rank: Rank) -> list[Path | None]:
            assert found == (file if rank.local == 0 else None)
            return [None, None, file, None]  # the first node sees another disk

        monkeypatch.setattr(checkpoint, "gather", told)
        about = states.restore({"net": again}, {}, rank)
        assert about is not None and torch.equal(again.weight, network.weight)
    assert len(hashed) == 1


def test_a_state_of_another_experiment_is_refused(network: nn.Linear) -> None:
    states = Checkpoints("x", fingerprint("a" * 64), keep=2)
    states.save(32, {"net": network}, {}, {})
    states.wait()
    stranger = Checkpoints("x", fingerprint("a" * 12 + "b" * 52), keep=2)
    with pytest.raises(ValueError, match="need a training state of fingerprint aaaaaaaaaaaa"):
        stranger.restore({"net": network}, {})
    assert stranger.folder.parent == SCRATCH


# --- states of other trainings -----------------------------------------------------------------


def stopped(network: nn.Linear, digest: str, nimg: int, **facts: object) -> Checkpoints:
    """A training of those facts that left a state."""
    states = Checkpoints("x", fingerprint(digest * 64, **facts), keep=2)
    states.begin()
    states.save(nimg, {"net": network}, {}, {})
    states.wait()
    return states


def test_others_are_named_with_how_far_they_are_and_what_differs(network: nn.Linear) -> None:
    stopped(network, "a", 4000, lr=0.1, seed=0)
    stopped(network, "b", 1500, lr=0.2, seed=1)
    new = Checkpoints("x", fingerprint("c" * 64, lr=0.1, seed=1, drop=0.5), keep=2)
    assert list(new.others()) == [
        "train x: not resuming from 4 kimg in scratch/x-aaaaaaaaaaaa, which belongs to another "
        "training: seed: 0 there, 1 now; drop: none there, 0.5 now",
        "train x: not resuming from 1.5 kimg in scratch/x-bbbbbbbbbbbb, which belongs to another "
        "training: lr: 0.2 there, 0.1 now; drop: none there, 0.5 now",
    ]


def test_beginning_prints_them(network: nn.Linear, capsys: pytest.CaptureFixture[str]) -> None:
    stopped(network, "a", 4000, lr=0.1)
    capsys.readouterr()
    new = Checkpoints("x", fingerprint("c" * 64, lr=0.2), keep=2)
    said = "".join(f"{line}\n" for line in new.others())
    new.begin()
    assert capsys.readouterr().out == said != ""


def test_many_differences_are_counted(network: nn.Linear) -> None:
    stopped(network, "a", 4000, **dict.fromkeys("abcdef", 1))
    new = Checkpoints("x", fingerprint("c" * 64, **dict.fromkeys("abcdef", 2)), keep=2)
    (line,) = new.others()
    assert line.endswith("c: 1 there, 2 now; d: 1 there, 2 now; and 2 more")


def test_who_goes_on_from_a_state_of_its_own_hears_nothing_of_others(network: nn.Linear) -> None:
    stopped(network, "a", 4000, lr=0.1)
    own = stopped(network, "b", 1000, lr=0.2)
    assert list(own.others()) == []


def test_trainings_of_other_names_and_folders_without_states_are_not_named(
    network: nn.Linear,
) -> None:
    stopped(network, "a", 4000, lr=0.1)
    Checkpoints("x", fingerprint("b" * 64, lr=0.3), keep=2).begin()
    for name in ("y", "x-2"):
        assert list(Checkpoints(name, fingerprint("c" * 64, lr=0.2), keep=2).others()) == []
    assert len(list(Checkpoints("x", fingerprint("c" * 64, lr=0.2), keep=2).others())) == 1
