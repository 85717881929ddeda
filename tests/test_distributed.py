"""Who is alone, and who has others to meet."""

import pytest
import torch
import torch.distributed as dist

from fewstep import distributed
from fewstep.distributed import Rank, joined, one_of_node_first, to_host


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


def test_one_process_of_a_node_works_before_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(distributed, "barrier", lambda rank: order.append("barrier"))
    for index, local in ((8, 0), (9, 1)):
        rank = Rank(index, 16, torch.device("cpu"), local)
        assert rank.node == 8
        with one_of_node_first(rank):
            order.append(f"work {local}")
    assert order == ["work 0", "barrier", "barrier", "work 1"]


def test_what_is_in_main_memory_need_not_be_copied_there() -> None:
    values = torch.ones(3)
    assert to_host(values)() is values
