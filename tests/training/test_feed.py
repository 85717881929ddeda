"""Batches are read in order, once each and one ahead; what is in one depends on the clock alone."""

import threading
from typing import Any

import numpy as np
import pytest
import torch

from fewstep.data.order import batch_indices
from fewstep.distributed import Rank
from fewstep.training.feed import Feed

IMAGES, CLASSES, TOTAL = 60, 3, 24
CPU = torch.device("cpu")


class Images:
    """A data set whose image number i is i everywhere, of class i modulo 3; notes what is read.

    `before_reading` is called with the indices of each micro-batch.
    """

    classes = CLASSES

    def __init__(self) -> None:
        self.asked: list[list[int]] = []
        self.before_reading = lambda indices: None

    def __len__(self) -> int:
        return IMAGES

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        self.before_reading(indices.tolist())
        self.asked.append(indices.tolist())
        pixels = np.broadcast_to(
            indices.astype(np.uint8)[:, None, None, None], (len(indices), 1, 2, 2)
        )
        return pixels.copy(), indices % CLASSES


def feed(data: Images, rank: Rank = Rank(0, 1, CPU), **changes: Any) -> Feed:  # noqa: ANN401, B008
    settings = {"batch": 8, "batch_gpu": 8, "total": TOTAL, "seed": 0, **changes}
    return Feed(data, rank=rank, **settings)  # pyright: ignore[reportArgumentType]


def places(*starts: int, size: int = 8, seed: int = 0) -> list[list[int]]:
    """Which images stand at those places of the order."""
    return [batch_indices(nimg, size, IMAGES, seed).tolist() for nimg in starts]


def numbers(images: torch.Tensor) -> list[int]:
    """Which images these are."""
    return ((images[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()


# --- what comes --------------------------------------------------------------------------------


def test_images_and_labels_are_those_of_the_place_on_the_clock() -> None:
    (batch,) = feed(Images(), batch=8)(16)
    assert [numbers(batch.images)] == places(16)
    assert float(batch.images.min()) >= -1 and batch.images.dtype == torch.float32
    assert batch.labels.argmax(dim=1).tolist() == [i % CLASSES for i in places(16)[0]]
    assert batch.labels.sum(dim=1).tolist() == [1.0] * 8
    assert (batch.nimg, batch.step_nimg, batch.seed) == (16, 16, 0)


def test_pixels_fill_the_range_from_minus_one_to_one() -> None:
    data = Images()
    data.read = lambda indices: (  # pyright: ignore[reportAttributeAccessIssue]
        np.repeat(np.array([0, 255], np.uint8), 4 * 4).reshape(8, 1, 2, 2),
        indices % CLASSES,
    )
    (batch,) = feed(data)(0)
    assert (float(batch.images.min()), float(batch.images.max())) == (-1.0, 1.0)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_share_the_micro_batches_of_one_process(world: int) -> None:
    """Together they have the same ones, each with its own place and the batch's clock."""
    shared = [feed(Images(), Rank(i, world, CPU), batch_gpu=2)(8) for i in range(world)]
    assert [len(batches) for batches in shared] == [4 // world] * world
    found = sorted((b.nimg, b.step_nimg, *numbers(b.images)) for bs in shared for b in bs)
    alone = [(n, 8, *indices) for n in (8, 10, 12, 14) for indices in places(n, size=2)]
    assert found == alone


def test_another_order_is_read_for_methods_that_ask_for_it_only() -> None:
    data = Images()
    (own,), (both,) = feed(data)(0), feed(Images(), other_images=1)(0)
    assert not own.others
    with pytest.raises(AssertionError, match="need a method that asks for other_images"):
        own.other_images()
    images, labels = both.other_images()
    assert torch.equal(own.images, both.images), "its own images are as they were"
    assert numbers(images) != numbers(both.images)
    assert labels.argmax(dim=1).tolist() == [i % CLASSES for i in numbers(images)]


def test_the_other_order_goes_through_all_images_too() -> None:
    ahead = feed(Images(), batch=20, batch_gpu=20, total=60, other_images=1)
    seen = [i for nimg in (0, 20, 40) for i in numbers(ahead(nimg)[0].other_images()[0])]
    assert sorted(seen) == list(range(IMAGES))


# --- when it is read ---------------------------------------------------------------------------


def test_batches_are_read_in_order_and_once_each() -> None:
    data = Images()
    ahead = feed(data)
    given = [numbers(ahead(nimg)[0].images) for nimg in (0, 8, 16)]
    ahead.thread.shutdown()
    assert given == data.asked == places(0, 8, 16)


def test_nothing_is_read_past_the_end() -> None:
    data = Images()
    ahead = feed(data, total=16)
    ahead(0)
    ahead(8)
    ahead.thread.shutdown()
    assert data.asked == places(0, 8)


def test_what_follows_is_read_while_this_is_used() -> None:
    data, begun, go_on = Images(), threading.Event(), threading.Event()

    def wait(indices: list[int]) -> None:
        if indices == places(8)[0]:
            begun.set()
            assert go_on.wait(10)

    data.before_reading = wait
    ahead = feed(data)
    assert [numbers(ahead(0)[0].images)] == places(0)
    assert begun.wait(10), "the second is being read, though nobody asked for it"
    go_on.set()
    assert [numbers(ahead(8)[0].images)] == places(8)


def test_a_run_that_goes_on_elsewhere_reads_there() -> None:
    ahead = feed(Images(), total=400)
    assert [numbers(ahead(nimg)[0].images) for nimg in (0, 320, 328)] == places(0, 320, 328)


def test_what_reading_raised_comes_through_when_it_is_asked_for() -> None:
    data = Images()

    def refuse(indices: list[int]) -> None:
        if indices == places(16)[0]:
            raise ValueError("need a sound LMDB")

    data.before_reading = refuse
    ahead = feed(data)
    assert [numbers(ahead(nimg)[0].images) for nimg in (0, 8)] == places(0, 8)
    with pytest.raises(ValueError, match="need a sound LMDB"):
        ahead(16)
