"""idx files of MNIST and its kin: their images and labels, refusals."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from fewstep.data import idx
from fewstep.data.sources import open_source

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 28, 28), np.uint8)
LABELS = np.array([3, 0, 9, 9, 1, 2, 4, 5, 6, 7, 8, 0], np.uint8)


def packed(array: np.ndarray) -> bytes:
    sizes = struct.pack(f">{array.ndim}I", *array.shape)
    return gzip.compress(bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes())


def folder(where: Path, images: bytes = packed(PIXELS), labels: bytes = packed(LABELS)) -> Path:
    (where / idx.IMAGES).write_bytes(images)
    (where / idx.LABELS).write_bytes(labels)
    return where


def test_images_lie_in_the_middle_of_a_black_frame(tmp_path: Path) -> None:
    source = open_source(folder(tmp_path), 32, 1, 10)
    assert len(source) == 12 and source.shape == (1, 32, 32)
    for i in range(12):
        image, label = source[i]
        assert np.array_equal(image[0, 2:30, 2:30], PIXELS[i]) and label == LABELS[i]
        assert image.sum() == PIXELS[i].sum()
    assert open_source(tmp_path, 28, 1, 10).shape == (1, 28, 28)


@pytest.mark.parametrize(("resolution", "channels"), [(16, 1), (29, 1), (32, 3)])
def test_another_resolution_or_number_of_channels_is_refused(
    resolution: int, channels: int, tmp_path: Path
) -> None:
    key = "data.resolution" if channels == 1 else "data.channels"
    with pytest.raises(ValueError, match=key):
        open_source(folder(tmp_path), resolution, channels, 10)


HOSTILE = {
    "another type": gzip.compress(b"\0\0\x0d\x03" + bytes(12)),
    "labels instead of images": packed(LABELS),
    "no gzip": b"\0\0\x08\x03" + bytes(12),
    "cut short": packed(PIXELS)[:2000],
    "nothing": b"",
    "an empty gzip": gzip.compress(b""),
    "half a header": gzip.compress(b"\0\0\x08\x03\0\0"),
    "fewer bytes than it claims": gzip.compress(
        b"\0\0\x08\x03" + struct.pack(">3I", 60_000, 28, 28) + bytes(28 * 28)
    ),
    "sizes whose product passes 64 bits": gzip.compress(
        b"\0\0\x08\x03" + struct.pack(">3I", *[2**32 - 1] * 3)
    ),
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_other_files_are_refused(content: bytes, tmp_path: Path) -> None:
    message = "need an intact gzipped idx file of uint8 with 3 dimensions, got .*train-images"
    with pytest.raises(ValueError, match=message):
        open_source(folder(tmp_path, images=content), 32, 1, 10)


def test_what_unpacks_to_more_than_its_budget_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(idx, "UNPACKED", 1000)
    with pytest.raises(ValueError, match="need at most 1,000 bytes of an unpacked train-images"):
        open_source(folder(tmp_path), 32, 1, 10)


def test_a_label_for_each_image_is_needed_and_of_the_known_classes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got 12 images and 11 labels"):
        open_source(folder(tmp_path, labels=packed(LABELS[1:])), 32, 1, 10)
    with pytest.raises(ValueError, match="got 0 images and 0 labels"):
        nothing = packed(PIXELS[:0]), packed(LABELS[:0])
        open_source(folder(tmp_path, *nothing), 32, 1, 10)
    with pytest.raises(ValueError, match="data.classes"):
        open_source(folder(tmp_path), 32, 1, 9)
    (tmp_path / idx.LABELS).unlink()
    with pytest.raises(ValueError, match="train-labels-idx1-ubyte.gz"):
        open_source(tmp_path, 32, 1, 10)
