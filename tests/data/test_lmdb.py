"""Sources, the LMDB and the data order."""

import io
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
from pathlib import Path

import lmdb
import numpy as np
import pytest

import fewstep.data.lmdb
from fewstep.data.labelled import ArraySource
from fewstep.data.lmdb import ImageDataset, build_lmdb
from fewstep.data.order import batch_indices
from fewstep.data.sources import open_source
from fewstep.files import sha256_file
from fewstep.progress import progress
from places import ROOT

FMNIST16 = ROOT / "assets" / "fmnist16.npz"


def array_source(count: int = 37, resolution: int = 8, classes: int = 5) -> ArraySource:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, 3, resolution, resolution), np.uint8)
    return ArraySource("toy.npz", images, rng.integers(0, classes, count), classes)


def write_public(
    path: Path, source: ArraySource, *, subdir: bool = True, **changes: bytes | None
) -> Path:
    """An LMDB as the public tools write it; `changes` replace values, None drops a key."""
    n, c, h, w = source.images.shape
    entries: dict[str, bytes] = {"images_shape": f"{n} {c} {h} {w}".encode()}
    entries["labels_shape"] = f"{n} 1".encode()
    for i in range(n):
        entries[f"images_{i}_data"] = source.images[i].tobytes()
        entries[f"labels_{i}_data"] = source.labels[i : i + 1].astype(np.int64).tobytes()
    with lmdb.open(str(path), subdir=subdir, map_size=1 << 24, lock=False) as env:
        with env.begin(write=True) as txn:
            for key, value in {**entries, **changes}.items():
                if value is not None:
                    txn.put(key.encode(), value)
    return path


# Sources


def test_the_default_images_open_with_the_default_params() -> None:
    source = open_source(FMNIST16, resolution=16, channels=1, classes=10)
    assert (len(source), source.shape, source.name) == (50_000, (1, 16, 16), "fmnist16.npz")
    image, label = source[0]
    assert (image.dtype, image.shape, label) == (np.uint8, (1, 16, 16), 9)
    assert FMNIST16.stat().st_size <= 8_000_000


GOOD = array_source(4)
BAD_ARRAYS = {
    "resolution": (GOOD.images[..., :4, :4], GOOD.labels, r"3x8x8 .*got 3x4x4.*data\.resolution"),
    "channels": (GOOD.images[:, :1], GOOD.labels, r"need .* 3x8x8 .*got 1x8x8.*data\.channels"),
    "oblong": (GOOD.images[..., :4], GOOD.labels, r"got 3x8x4.*data\.resolution"),
    "float": (
        GOOD.images / 255.0,
        GOOD.labels,
        r"need images of uint8 .*got float64.*data\.source",
    ),
    "flat": (GOOD.images.reshape(4, -1), GOOD.labels, r"\(N, C, H, W\).*got uint8 \(4, 192\)"),
    "one-hot": (
        GOOD.images,
        np.eye(5, dtype=int)[GOOD.labels],
        r"labels of shape \(4,\).*\(4, 5\)",
    ),
    "few labels": (GOOD.images, GOOD.labels[:3], r"one per image, .*got int64 \(3,\)"),
    "float labels": (GOOD.images, GOOD.labels / 1.0, r"need integer labels .*got float64"),
    "big label": (
        GOOD.images,
        np.array([0, 4, 5, 7]),
        r"\[0, 5\), got 5 at index 2.*data\.classes",
    ),
    "negative": (GOOD.images, np.array([0, -1, 2, 3]), r"\[0, 5\), got -1 at index 1"),
    "unsigned": (GOOD.images, np.array([0, 1, 2, 255], np.uint8), r"got 255 at index 3"),
    "no images": (GOOD.images[:0], GOOD.labels[:0], r"at least 1 image, got 0 in .*data\.source"),
    "pickle": (np.array([{}], object), GOOD.labels, r"need an intact \.npz without pickles"),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_npz_that_the_params_do_not_describe_is_refused(tmp_path: Path, case: str) -> None:
    images, labels, message = BAD_ARRAYS[case]
    np.savez(tmp_path / "bad.npz", images=images, labels=labels)
    with pytest.raises(ValueError, match=message) as caught:
        open_source(tmp_path / "bad.npz", 8, 3, 5)
    assert "bad.npz" in str(caught.value)


def test_source_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    def refused(name: str, message: str) -> None:
        with pytest.raises(ValueError, match=message + r".*data\.source"):
            open_source(tmp_path / name, 8, 3, 5)

    refused("missing.npz", r"got nothing at .*missing\.npz")
    np.savez(tmp_path / "other.npz", x=GOOD.images)
    refused("other.npz", r"need the array images, and labels .*got x")
    whole = io.BytesIO()
    np.savez_compressed(whole, images=GOOD.images, labels=GOOD.labels)
    (tmp_path / "cut.npz").write_bytes(whole.getvalue()[:300])
    refused("cut.npz", r"need an intact \.npz .*got .*cut\.npz")
    np.save(tmp_path / "array.npy", GOOD.images)
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    refused("array.npz", r"need an intact \.npz")
    (tmp_path / "x.tar").touch()
    refused("x.tar", r"need an LMDB, a \.npz, .* or a folder of images, got .*x\.tar")
    (tmp_path / "folder").mkdir()
    refused("folder", r"need PNG, JPEG or WebP images below .*folder, got none")


# LMDB


def test_lmdb_returns_what_went_in_and_knows_what_it_holds(tmp_path: Path) -> None:
    source = array_source()
    metadata = build_lmdb(source, tmp_path / "x.lmdb")
    dataset = ImageDataset(tmp_path / "x.lmdb")
    assert (len(dataset), dataset.shape, dataset.classes) == (37, (3, 8, 8), 5)
    assert dataset.metadata == metadata and metadata["source"] == "toy.npz"
    assert str(tmp_path) not in json.dumps(metadata)
    order = [36, 0, 5, 5, 12]
    images, labels = dataset.read(order)
    assert images.dtype == np.uint8 and labels.dtype == np.int64
    np.testing.assert_array_equal(images, source.images[order])
    np.testing.assert_array_equal(labels, source.labels[order])
    np.testing.assert_array_equal(dataset.labels(), source.labels)
    images[:] = 0  # a copy: training may write into it
    dataset.check(8, 3, 5)
    dataset.verify()
    assert [p.name for p in tmp_path.iterdir()] == ["x.lmdb"]  # no lock file


def test_every_build_has_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fewstep.data.lmdb, "_COMMIT", 50_000)  # several transactions
    source = array_source(1200)
    for name in ("a.lmdb", "b.lmdb"):
        build_lmdb(source, tmp_path / name)
    build_lmdb(array_source(3), tmp_path / "c.lmdb")
    build_lmdb(source, tmp_path / "c.lmdb")  # over another
    hashes = {sha256_file(tmp_path / name) for name in ("a.lmdb", "b.lmdb", "c.lmdb")}
    assert len(hashes) == 1
    assert (tmp_path / "a.lmdb").stat().st_size < 2 * source.images.nbytes  # sparse map, full pages


def test_content_sha256_sees_every_pixel_label_and_shape(tmp_path: Path) -> None:
    def sha(source: ArraySource) -> str:
        return build_lmdb(source, tmp_path / "x.lmdb")["content_sha256"]

    a, pixel, label, shape = (array_source() for _ in range(4))
    pixel.images[11, 2, 3, 4] ^= 1
    label.labels[20] = (label.labels[20] + 1) % 5
    tall = ArraySource("toy.npz", shape.images.reshape(37, 3, 4, 16), shape.labels, 5)
    assert len({sha(a), sha(pixel), sha(label), sha(tall)}) == 4


@pytest.mark.parametrize("subdir", [True, False])
@pytest.mark.parametrize("labels_shape", [b"37", b"37 1"])
def test_public_lmdbs_work_unchanged(tmp_path: Path, subdir: bool, labels_shape: bytes) -> None:
    source = array_source()
    path = write_public(tmp_path / "x.lmdb", source, subdir=subdir, labels_shape=labels_shape)
    dataset = ImageDataset(path)
    assert (len(dataset), dataset.shape, dataset.metadata) == (37, (3, 8, 8), None)
    assert dataset.classes == source.labels.max() + 1
    assert ImageDataset(path, classes=1000).classes == 1000
    np.testing.assert_array_equal(dataset.read(range(37))[0], source.images)
    np.testing.assert_array_equal(dataset.read(range(37))[1], source.labels)
    metadata = build_lmdb(open_source(path, 8, 3, 5), tmp_path / "ours.lmdb")
    assert dataset.content_sha256() == metadata["content_sha256"]
    with pytest.raises(ValueError, match=r"\[0, 3\), got \d at index \d+ in .*data\.classes"):
        open_source(path, 8, 3, 3)


FOREIGN = {
    "no images_shape": ({"images_shape": None}, r"images_shape, .*got no key images_shape"),
    "no labels_shape": ({"labels_shape": None}, r"got no key labels_shape"),
    "text": ({"images_shape": b"many"}, r"got images_shape b'many'"),
    "NHW": ({"images_shape": b"37 8 8"}, r"images_shape \(37, 8, 8\), not N C H W"),
    "other shape": ({"images_shape": b"37 3 16 16"}, r"need 768 bytes at images_0_data, got 192"),
    "too many": ({"images_shape": b"40 3 8 8", "labels_shape": b"40"}, r"need 82 entries.*got 76"),
    "labels": ({"labels_shape": b"30"}, r"need labels_shape 37, one label per image, got 30"),
    "one-hot": ({"labels_shape": b"37 5"}, r"need labels_shape 37, .*got 37 5"),
    "empty": ({"images_shape": b"0 3 8 8", "labels_shape": b"0"}, r"need at least 1 image, got 0"),
    "int32": ({"labels_0_data": b"\0\0\0\0"}, r"need 8 bytes at labels_0_data, got 4 bytes"),
    "metadata": ({"fewstep_metadata": b"{}"}, r"got fewstep_metadata b'\{\}'"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_a_foreign_or_mislabelled_lmdb_says_what_is_wrong(tmp_path: Path, case: str) -> None:
    changes, message = FOREIGN[case]
    path = write_public(tmp_path / "x.lmdb", array_source(), subdir=False, **changes)
    with pytest.raises(ValueError, match=message + r".*data\.source"):
        ImageDataset(path)


def test_a_missing_image_is_named(tmp_path: Path) -> None:
    path = write_public(tmp_path / "x.lmdb", array_source(), images_17_data=None, spare=b"")
    with pytest.raises(ValueError, match="need 192 bytes at images_17_data, got no such key"):
        ImageDataset(path).read([16, 17])


def test_what_is_no_lmdb_says_so(tmp_path: Path) -> None:
    path = tmp_path / "x.lmdb"
    for content in (b"", b"hello", os.urandom(100_000), bytes(100_000)):
        path.write_bytes(content)
        message = rf"need an LMDB, got .*x\.lmdb of {len(content)} bytes.*data\.source"
        with pytest.raises(ValueError, match=message):
            ImageDataset(path)
    with pytest.raises(ValueError, match=r"got nothing at .*y\.lmdb"):
        ImageDataset(tmp_path / "y.lmdb")


OPEN_ALL = """
import sys
from fewstep.data.lmdb import ImageDataset
for path in sys.argv[1:]:
    try:
        ImageDataset(path)
        print("opened", path)
    except ValueError as error:
        print("truncated" if "truncated" in str(error) else error)
"""


def test_an_lmdb_cut_anywhere_is_called_truncated_and_kills_nobody(tmp_path: Path) -> None:
    """In a process of its own: reading behind the end of a mapped file is a SIGBUS."""
    build_lmdb(array_source(200), tmp_path / "x.lmdb")
    whole = (tmp_path / "x.lmdb").read_bytes()
    cuts = [1, 100, 4096, 5000, 8191, 8192, 12288, len(whole) // 2, len(whole) - 4096]
    cuts += [len(whole) - 1]
    paths = [tmp_path / f"{cut}.lmdb" for cut in cuts]
    for cut, path in zip(cuts, paths, strict=True):
        path.write_bytes(whole[:cut])
    result = subprocess.run(
        [sys.executable, "-c", OPEN_ALL, *paths], capture_output=True, text=True, check=True
    )
    assert result.stdout.splitlines() == ["truncated"] * len(cuts)


DAMAGE = """
import random, sys
from pathlib import Path
from fewstep.data.lmdb import ImageDataset
path, count, out = Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
whole, draw, refused = path.read_bytes(), random.Random(0), 0
pages = range(0, len(whole), 4096)
tree = [p for p in pages if int.from_bytes(whole[p : p + 8], "little") == p // 4096]
places = [p + i for p in tree for i in range(200 if p < 8192 else 16)]
places += [draw.choice(tree) + draw.randrange(4096) for _ in range(count)]
for place in places:
    for value in {0, 0xFF, whole[place] ^ 1, whole[place] ^ 0x80, draw.randrange(256)}:
        out.unlink(missing_ok=True)
        out.write_bytes(whole[:place] + bytes([value]) + whole[place + 1 :])
        print(place, value, flush=True)
        try:
            dataset = ImageDataset(out)
            dataset.read(range(len(dataset)))
            dataset.labels()
        except ValueError as error:
            assert "x.lmdb" in str(error), error
            refused += 1
print("refused", refused)
"""


@pytest.mark.parametrize(("side", "count"), [(8, 40), (48, 30)])
def test_no_damaged_byte_kills_the_process(side: int, count: int, tmp_path: Path) -> None:
    """Images within the leaves, and in pages of their own; LMDB alone dies of dozens of these."""
    build_lmdb(array_source(count, side), tmp_path / "whole.lmdb")
    command = [tmp_path / "whole.lmdb", "300", tmp_path / "x.lmdb"]
    run = subprocess.run(
        [sys.executable, "-c", DAMAGE, *command], capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, f"{run.returncode}: {run.stdout[-100:]} {run.stderr[-2000:]}"
    assert int(run.stdout.split()[-1]) > 100


def test_a_damaged_page_is_named(tmp_path: Path) -> None:
    build_lmdb(array_source(60, 48), tmp_path / "x.lmdb")
    raw = bytearray((tmp_path / "x.lmdb").read_bytes())
    at = raw.index(b"images_0_data") + len("images_0_data")  # where its pixels are
    raw[at : at + 8] = (len(raw) // 4096 - 1).to_bytes(8, "little")
    (tmp_path / "x.lmdb").write_bytes(raw)
    message = rf"got a value behind the end of the file in page {at // 4096} of .*x\.lmdb; copy or"
    with pytest.raises(ValueError, match=message):
        ImageDataset(tmp_path / "x.lmdb")


def test_check_compares_with_the_params(tmp_path: Path) -> None:
    build_lmdb(array_source(), tmp_path / "x.lmdb")
    dataset = ImageDataset(tmp_path / "x.lmdb")
    with pytest.raises(ValueError, match=r"need .*3x16x16 .*got 3x8x8 .*data\.resolution"):
        dataset.check(16, 3, 5)
    with pytest.raises(ValueError, match=r"need .*1x8x8 .*got 3x8x8 .*data\.channels"):
        dataset.check(8, 1, 5)
    with pytest.raises(ValueError, match=r"need 10 classes, got 5 .*data\.classes"):
        dataset.check(8, 3, 10)


def test_verify_finds_a_changed_pixel(tmp_path: Path) -> None:
    source, path = array_source(), tmp_path / "x.lmdb"
    build_lmdb(source, path)
    raw = bytearray(path.read_bytes())
    raw[raw.index(source.images[7].tobytes())] ^= 1
    path.write_bytes(raw)
    with pytest.raises(ValueError, match="need content with sha256"):
        ImageDataset(path).verify()


@pytest.mark.parametrize("fault", ["label", "shape", "empty", "map", "crash"])
def test_a_failed_build_keeps_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    path = tmp_path / "x.lmdb"
    build_lmdb(array_source(5), path)
    before = sha256_file(path)
    source, message = array_source(), "out of bounds"
    if fault == "label":
        source.labels[9] = 5
        message = r"\[0, 5\), got 5 at index 9"
    elif fault == "shape":
        monkeypatch.setattr(ArraySource, "shape", (3, 4, 4))
        message = r"need uint8 images of \(3, 4, 4\), got uint8 \(3, 8, 8\) at index 0"
    elif fault == "empty":
        source = array_source(0)
        message = "need at least 1 image, got 0 in toy.npz"
    elif fault == "map":
        monkeypatch.setattr(fewstep.data.lmdb, "_map_size", lambda *_: 16384)
        message = "need images that fit into 16384 bytes, got more"
    else:
        source = ArraySource("toy.npz", source.images, source.labels[:20], 5)
    with pytest.raises(IndexError if fault == "crash" else ValueError, match=message):
        build_lmdb(source, path)
    assert list(tmp_path.iterdir()) == [path] and sha256_file(path) == before


def _sum(dataset: ImageDataset) -> int:
    return int(dataset.read(range(len(dataset)))[0].sum())


def test_a_dataset_survives_fork_spawn_and_pickle(tmp_path: Path) -> None:
    source = array_source()
    build_lmdb(source, tmp_path / "x.lmdb")
    dataset, expected = ImageDataset(tmp_path / "x.lmdb"), int(source.images.sum())
    assert _sum(pickle.loads(pickle.dumps(dataset))) == expected
    for method in ("fork", "spawn"):
        with multiprocessing.get_context(method).Pool(2) as pool:
            assert pool.map(_sum, [dataset] * 4) == [expected] * 4
    assert _sum(dataset) == expected


def test_a_dataset_opens_twice_and_after_a_rebuild(tmp_path: Path) -> None:
    path = tmp_path / "x.lmdb"
    build_lmdb(array_source(5), path)
    first, second = ImageDataset(path), ImageDataset(path)
    build_lmdb(array_source(6), path)
    assert (len(first), len(second), len(ImageDataset(path))) == (5, 5, 6)
    assert _sum(first) == _sum(second)


# Batches


def test_an_epoch_shows_every_image_once_and_each_epoch_another_order() -> None:
    epochs = [batch_indices(100 * e, 100, 100, seed=3) for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(100)) and epoch.dtype == np.int64
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert list(batch_indices(0, 100, 100, seed=4)) != list(epochs[0])


@pytest.mark.parametrize("batch", [1, 7, 64, 250])
def test_the_order_does_not_depend_on_how_it_is_cut(batch: int) -> None:
    whole = batch_indices(0, 1000, 90, seed=0)
    parts = [batch_indices(p, min(batch, 1000 - p), 90, seed=0) for p in range(0, 1000, batch)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_the_order_is_the_recorded_one() -> None:
    """A change here would silently alter every training run."""
    assert batch_indices(6, 6, 8, seed=0).tolist() == [4, 5, 7, 4, 5, 1]


def test_impossible_batches_are_refused() -> None:
    for arguments in [(-1, 1, 1, 0), (0, 0, 1, 0), (0, 1, 0, 0), (0, 1, 1, -1)]:
        with pytest.raises(ValueError, match="need (nimg|batch|size|seed) >="):
            batch_indices(*arguments)


# Progress


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_progress_prints_few_plain_lines_with_rate_and_time_left() -> None:
    clock, stream = Clock(), io.StringIO()
    for _ in progress(range(600), "build-lmdb", "images", stream=stream, clock=clock):
        clock.now += 0.05
    lines = stream.getvalue().splitlines()
    assert lines[0] == "build-lmdb: 40/600 images, 20/s, 28 s left"
    assert lines[-1] == "build-lmdb: 600/600 images, 20/s, 30 s in all"
    assert len(lines) == 4  # at 2, 12, 22 and 30 s


def test_progress_is_quiet_below_two_seconds_and_when_silent() -> None:
    for seconds, silent in [(1.9, False), (1000.0, True)]:
        clock, stream = Clock(), io.StringIO()
        with progress(10, "x", stream=stream, clock=clock, silent=silent) as bar:
            clock.now += seconds
            bar.update(10)
        assert stream.getvalue() == ""


def test_progress_counts_a_resumed_run_at_its_own_rate() -> None:
    clock, stream = Clock(), io.StringIO()
    with progress(10_000, "train", initial=5000, stream=stream, clock=clock) as bar:
        clock.now = 10
        bar.update(1000, "loss 0.25")
    assert stream.getvalue().splitlines()[0] == (
        "train: 6000/10000 images, 100/s, 40 s left, loss 0.25"
    )


def test_progress_shows_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("fewstep.progress.QUIET", 0)
    stream = Terminal()
    with progress(10, "train", stream=stream) as bar:
        bar.update(10, "loss 0.25")
    assert "train: 100%" in stream.getvalue() and "loss 0.25" in stream.getvalue()
