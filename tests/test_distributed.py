"""Who is alone, and who has others to meet."""

import pytest
import torch
import torch.distributed as dist

from fewstep.distributed import Rank, joined


def test_a_pod_whose_rank_numbers_nodes_is_alone_where_nothing_was_launched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As in `fewstep generate` on one GPU of a Kubernetes job; only torchrun sets LOCAL_RANK."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    with joined("cpu") as rank:
        assert rank == Rank(0, 1, torch.device("cpu"))


@pytest.mark.parametrize("ending", [SystemExit(143), ValueError("here alone")])
def test_the_group_is_taken_down_only_where_all_end(
    ending: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[str] = []
    monkeypatch.setattr(dist, "init_process_group", lambda backend: called.append(backend))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: called.append("down"))
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(type(ending)), joined("cpu"):
        raise ending
    assert called == ["gloo", *(["down"] if isinstance(ending, SystemExit) else [])]
