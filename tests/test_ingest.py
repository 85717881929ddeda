"""Ingest: every kind of source gives the same images; builds resume, whatever the workers."""

import io
import json
import os
import signal
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

from experiment import tiny_params
from fewstep.data import decode
from fewstep.data.decode import Decoding, decode_image
from fewstep.data.ingest import ingest
from fewstep.data.lmdb import ImageDataset
from fewstep.data.sources import open_source
from fewstep.data.stream import FileStream
from fewstep.files import sha256_file
from fewstep.stages import build_lmdb as stage
from pickles import Call

COUNT, CLASSES = 23, 4
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (COUNT, 3, 8, 8), np.uint8)
LABELS = np.sort(np.arange(COUNT) % CLASSES)  # as class folders sort
NAMES = [f"n{label:04}/{i:03}.png" for i, label in enumerate(LABELS)]


def encoded(image: np.ndarray, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    pixels = image.transpose(1, 2, 0)
    Image.fromarray(pixels[..., 0] if len(image) == 1 else pixels).save(buffer, form, **options)
    return buffer.getvalue()


def pngs() -> dict[str, bytes]:
    return {name: encoded(image) for name, image in zip(NAMES, IMAGES, strict=True)}


def listing(labels: object = None) -> bytes:
    pairs = [[n, int(label)] for n, label in zip(NAMES, LABELS, strict=True)]
    return json.dumps({"labels": pairs if labels is None else labels}).encode()


def write_folder(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def write_zip(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in reversed(files.items()):  # the order in the file does not matter
            archive.writestr(name, data)
    return path


def write_batches(folder: Path, *, mapping: bool = False, save: Callable = np.savez) -> Path:
    """Two batches; with a mapping the data set's label k + 1 is the synset n(3 - k)."""
    folder.mkdir()
    for number, rows in ((2, slice(10)), (10, slice(10, None))):  # 10 stands behind 2
        labels = (CLASSES - LABELS[rows] if mapping else LABELS[rows] + 1).tolist()
        flat = IMAGES[rows].reshape(-1, 192)
        save(folder / f"train_data_batch_{number}.npz", data=flat, labels=labels, mean=flat[:1])
    if mapping:
        lines = (f"n{CLASSES - 1 - k:04} {k + 1} thing_{k}\n" for k in range(CLASSES))
        (folder / "map_clsloc.txt").write_text("".join(lines))
    return folder


def write_parquet(folder: Path, *, groups: int = 4) -> Path:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    (folder / "data").mkdir(parents=True)
    rows = [{"bytes": encoded(image), "path": None} for image in IMAGES]
    shards = {"train-00000-of-00002": slice(0, 9), "train-00001-of-00002": slice(9, None)}
    for name, part in {**shards, "validation-00000-of-00001": slice(3)}.items():
        table = pa.table({"image": rows[part], "label": LABELS[part]})
        pq.write_table(table, folder / "data" / f"{name}.parquet", row_group_size=groups)
    return folder


SOURCES: dict[str, Callable[[Path], Path]] = {
    "EDM zip": lambda p: write_zip(p / "x.zip", {**pngs(), "dataset.json": listing()}),
    "EDM zip, deflated": lambda p: write_zip(
        p / "x.zip", {**pngs(), "dataset.json": listing()}, zipfile.ZIP_DEFLATED
    ),
    "EDM folder": lambda p: write_folder(p / "x", {**pngs(), "dataset.json": listing()}),
    "class folders": lambda p: write_folder(p / "x", pngs()),
    "class folders in train": lambda p: write_folder(
        p / "x",
        {f"train/{name}": data for name, data in pngs().items()}
        | {"val/n0000/1.png": encoded(IMAGES[0]), "train/.DS_Store": b"", "README.md": b""},
    ),
    "class zip": lambda p: write_zip(
        p / "x.zip", {**pngs(), "__MACOSX/n0000/._0.png": b"", "n0000/": b""}
    ),
    "class zip below train": lambda p: write_zip(
        p / "x.zip",
        {f"a/b/train/{name}": data for name, data in pngs().items()}
        | {"a/b/test/1.png": encoded(IMAGES[0])},
    ),
    "ImageNet npz": lambda p: write_batches(p / "x"),
    "ImageNet npz, compressed": lambda p: write_batches(p / "x", save=np.savez_compressed),
    "ImageNet npz, mapped": lambda p: write_batches(p / "x", mapping=True),
    "parquet": lambda p: write_parquet(p / "x"),
    "npz": lambda p: (np.savez(p / "x.npz", images=IMAGES, labels=LABELS), p / "x.npz")[1],
}


def build(source: Path, out: Path, **options: object) -> dict:
    opened = open_source(source, 8, 3, CLASSES)
    return ingest(opened, out, silent=True, **options)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("kind", SOURCES)
def test_every_source_gives_the_same_images_and_bytes(tmp_path: Path, kind: str) -> None:
    source = SOURCES[kind](tmp_path)
    manifest = build(source, tmp_path / "data.lmdb")
    dataset = ImageDataset(tmp_path / "data.lmdb")
    images, labels = dataset.read(range(COUNT))
    np.testing.assert_array_equal(images, IMAGES)
    np.testing.assert_array_equal(labels, LABELS)
    dataset.verify()
    assert json.loads((tmp_path / "data.json").read_text()) == manifest
    assert manifest["images_per_class"] == np.bincount(LABELS).tolist()
    assert (manifest["images"], manifest["skipped"], manifest["source"]) == (COUNT, [], source.name)
    assert str(tmp_path) not in json.dumps(manifest)
    assert not (tmp_path / ".data.partial").exists()
    opened = open_source(source, 8, 3, CLASSES)
    image, label = opened[11]
    np.testing.assert_array_equal(image, IMAGES[11])
    assert (label, len(opened), opened.shape, opened.classes) == (LABELS[11], COUNT, (3, 8, 8), 4)
    np.savez(tmp_path / "direct.npz", images=IMAGES, labels=LABELS)
    again = build(tmp_path / "direct.npz", tmp_path / "direct.lmdb")
    assert again["content_sha256"] == manifest["content_sha256"]


def test_an_existing_lmdb_is_a_source(tmp_path: Path) -> None:
    first = build(SOURCES["EDM zip"](tmp_path), tmp_path / "data.lmdb")
    again = build(tmp_path / "data.lmdb", tmp_path / "again.lmdb")
    assert again["content_sha256"] == first["content_sha256"]
    assert again["images_per_class"] == first["images_per_class"]


def test_imagenet_npz_says_what_its_labels_mean(tmp_path: Path) -> None:
    for mapping, says in ((False, "own order, as there is no map_clsloc.txt"), (True, "box")):
        source = write_batches(tmp_path / str(mapping), mapping=mapping)
        note = build(source, tmp_path / "data.lmdb")["note"]
        assert says in note and ("own order" in note) is not mapping
    (source / "map_clsloc.txt").write_text("n0001 1 a\n")
    with pytest.raises(ValueError, match=r"need 4 synsets .*map_clsloc.txt, got 1 .*data\.classes"):
        open_source(source, 8, 3, CLASSES)


# --- decoding ------------------------------------------------------------------------------------


def test_cropping_keeps_the_centre_of_the_short_side() -> None:
    for height, width in ((8, 13), (12, 8)):
        wide = RNG.integers(0, 256, (3, height, width), np.uint8)
        top, left = (height - 8) // 2, (width - 8) // 2
        centre = wide[:, top : top + 8, left : left + 8]
        ours = decode_image(encoded(wide), Decoding(3, 8, fit=True))
        np.testing.assert_array_equal(ours, centre)


@pytest.mark.parametrize("size", [(40, 64), (33, 20), (5, 3)])
def test_resizing_is_lanczos_of_the_centre(size: tuple[int, int]) -> None:
    large = RNG.integers(0, 256, (3, *size), np.uint8)
    height, width = size
    side = min(size)
    box = ((width - side) // 2, (height - side) // 2)
    square = Image.fromarray(large.transpose(1, 2, 0)).crop((*box, box[0] + side, box[1] + side))
    expected = np.asarray(square.resize((8, 8), Image.Resampling.LANCZOS)).transpose(2, 0, 1)
    ours = decode_image(encoded(large), Decoding(3, 8, fit=True))
    np.testing.assert_array_equal(ours, expected)


def test_jpeg_webp_grey_palette_and_alpha_become_what_the_params_ask_for() -> None:
    smooth = np.broadcast_to(np.arange(8, dtype=np.uint8) * 16, (3, 8, 8))
    for form, options in (("JPEG", {"quality": 100}), ("WEBP", {"lossless": True})):
        ours = decode_image(encoded(smooth, form, **options), Decoding(3, 8, fit=True))
        assert np.abs(ours.astype(int) - smooth).max() <= 4
    picture = Image.fromarray(smooth.transpose(1, 2, 0))
    for mode, form in (("L", "PNG"), ("RGBA", "PNG"), ("P", "PNG"), ("CMYK", "JPEG")):
        buffer = io.BytesIO()
        (picture.quantize(8) if mode == "P" else picture.convert(mode)).save(buffer, form)
        ours = decode_image(buffer.getvalue(), Decoding(3, 8, fit=True))
        assert ours.shape == (3, 8, 8) and np.abs(ours.astype(int) - smooth).max() <= 8, mode
    grey = decode_image(encoded(smooth), Decoding(1, 8, fit=True))
    assert grey.shape == (1, 8, 8) and np.abs(grey.astype(int) - smooth[:1]).max() <= 1


def bomb() -> bytes:
    """A PNG that claims 60,000 x 60,000 pixels."""
    data = bytearray(encoded(IMAGES[0]))
    data[16:24] = struct.pack(">II", 60_000, 60_000)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    return bytes(data)


def deep() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(buffer, "PNG")
    return buffer.getvalue()


DAMAGED = {
    "empty": (b"", "is no PNG, JPEG or WebP"),
    "text": (b"not an image at all", "is no PNG, JPEG or WebP"),
    "cut": (encoded(IMAGES[0])[:-40], "cannot be decoded: "),
    "cut JPEG": (encoded(IMAGES[0], "JPEG")[:-60], "cannot be decoded: .*truncated"),
    "BMP": (encoded(IMAGES[0], "BMP"), "is no PNG, JPEG or WebP"),
    "bomb": (bomb(), "decompression bomb"),
    "16 bits": (deep(), "need 8 bits a channel, got mode I"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_image_says_why(case: str) -> None:
    data, message = DAMAGED[case]
    with pytest.raises(ValueError, match=message):
        decode_image(data, Decoding(3, 8, fit=True))


def test_prepared_images_of_another_size_or_mode_are_refused() -> None:
    for image, got in ((IMAGES[0][:, :4, :4], "RGB 4x4"), (IMAGES[0][:1], "L 8x8")):
        with pytest.raises(ValueError, match=f"need RGB 8x8, got {got}"):
            decode_image(encoded(image), Decoding(3, 8, fit=False))


# --- damaged images in a build -------------------------------------------------------------------


def with_damage() -> dict[str, bytes]:
    files = pngs()
    files[NAMES[3]], files[NAMES[22]] = b"damaged", files[NAMES[22]][:-30]
    return files


@pytest.mark.parametrize("write", [write_zip, write_folder])
def test_a_damaged_image_stops_the_build_unless_it_is_skipped(
    tmp_path: Path, write: Callable[[Path, dict[str, bytes]], Path]
) -> None:
    source, out = write(tmp_path / "x.zip", with_damage()), tmp_path / "data.lmdb"
    if source.is_dir():
        source = source.rename(tmp_path / "x")
    message = rf"got {NAMES[3]} in x.*: is no PNG.*on_error: skip .*data\.on_error"
    for _ in range(2):  # and again, where it stopped
        with pytest.raises(ValueError, match=message):
            build(source, out)
        assert not out.exists() and not out.with_suffix(".json").exists()
    manifest = build(source, out, on_error="skip")
    assert [skip["file"] for skip in manifest["skipped"]] == [NAMES[3], NAMES[22]]
    assert "cannot be decoded" in manifest["skipped"][1]["reason"]
    kept = np.delete(np.arange(COUNT), [3, 22])
    images, labels = ImageDataset(out).read(range(COUNT - 2))
    np.testing.assert_array_equal(images, IMAGES[kept])
    np.testing.assert_array_equal(labels, LABELS[kept])
    assert sum(manifest["images_per_class"]) == manifest["images"] == COUNT - 2


def test_skipping_everything_is_refused(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "x", dict.fromkeys(NAMES, b"damaged"))
    with pytest.raises(ValueError, match="need at least 1 image, got 0 in x"):
        build(source, tmp_path / "data.lmdb", on_error="skip")


def test_a_changed_byte_in_a_zip_is_found(tmp_path: Path) -> None:
    source = write_zip(tmp_path / "x.zip", pngs())
    raw = bytearray(source.read_bytes())
    raw[raw.index(pngs()[NAMES[7]]) + 50] ^= 1
    source.write_bytes(raw)
    with pytest.raises(ValueError, match=rf"{NAMES[7]} in x.zip: its bytes are not those .*CRC"):
        build(source, tmp_path / "data.lmdb")


# --- sources that are refused --------------------------------------------------------------------


def lying_zip(path: Path, field: int, value: bytes) -> Path:
    """A zip whose first directory entry has another value at a byte."""
    raw = bytearray(write_zip(path, pngs()).read_bytes())
    at = raw.index(b"PK\x01\x02") + field
    raw[at : at + len(value)] = value
    path.write_bytes(raw)
    return path


def cut(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:900])
    return path


def one_batch(folder: Path, **arrays: object) -> Path:
    np.savez(folder / "train_data_batch_1.npz", **arrays)  # pyright: ignore[reportArgumentType]
    return folder / "train_data_batch_1.npz"


def extra(name: str, **changes: bytes) -> Callable[[Path], Path]:
    return lambda p: write_folder(p / name, {**pngs(), **changes})


REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "cut zip": (lambda p: cut(write_zip(p / "x.zip", pngs())), r"need a whole zip, got .*x\.zip"),
    "encrypted": (lambda p: lying_zip(p / "x.zip", 8, b"\x01"), r"got n0\d+/\d+\.png that is not"),
    "LZMA": (lambda p: write_zip(p / "x.zip", pngs(), zipfile.ZIP_LZMA), "stored or deflated"),
    "no images": (lambda p: write_zip(p / "x.zip", {"a.txt": b""}), "got no image"),
    "classes": (
        extra("x", **{"n9999/1.png": encoded(IMAGES[0])}),
        "need 4 class folders, got 5 in .*",
    ),
    "loose": (extra("x", **{"1.png": encoded(IMAGES[0])}), r"folder of its class .*got 1\.png"),
    "no label": (
        lambda p: write_zip(p / "x.zip", {**pngs(), "dataset.json": listing([[NAMES[0], 0]])}),
        rf"got 22 without a label, first {NAMES[1]}",
    ),
    "no file": (
        extra("x", **{"dataset.json": listing([[n, 0] for n in [*NAMES, "z.png"]])}),
        r"got 1 without a file, first z\.png",
    ),
    "no labels": (extra("x", **{"dataset.json": b'{"labels": null}'}), "got 23 without a label"),
    "big label": (
        extra("x", **{"dataset.json": listing([[n, 4] for n in NAMES])}),
        r"need labels in \[0, 4\), got 4 at index 0",
    ),
    "no JSON": (extra("x", **{"dataset.json": b"{"}), "in dataset.json of"),
    "other JSON": (extra("x", **{"dataset.json": b"[]"}), "in dataset.json of"),
    "nested JSON": (extra("x", **{"dataset.json": b"[" * 10**5}), "in dataset.json of"),
    "short batch": (
        lambda p: one_batch(p, data=IMAGES[:3], labels=[1, 2, 3]),
        r"need data \(3, 192\) in .*got \(3, 3, 8, 8\)",
    ),
    "float batch": (
        lambda p: one_batch(p, data=IMAGES / 1.0, labels=[1]),
        r"need data .* uint8 .*got data.npy of float64",
    ),
    "pickled batch": (
        lambda p: one_batch(p, labels=np.array([{}], object)),
        r"need data .*got Object arrays cannot be loaded",
    ),
    "label 0": (
        lambda p: one_batch(p, data=np.zeros((1, 192), np.uint8), labels=[0]),
        r"need labels in \[0, 4\), got -1",
    ),
    "no parquet": (
        lambda p: write_folder(p, {"x.parquet": b"PAR1" * 9}) / "x.parquet",
        r"need parquet with columns image .*got .*x\.parquet",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_source_that_does_not_fit_is_refused(tmp_path: Path, case: str) -> None:
    make, message = REFUSED[case]
    with pytest.raises(ValueError, match=message + r".*\(params\.yaml: data\."):
        open_source(make(tmp_path), 8, 3, CLASSES)


def test_parquet_of_other_columns_or_without_pyarrow_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    image = [{"bytes": b"", "path": ""}]
    for table in (
        {"image": image},
        {"image": [b""], "label": [1]},
        {"image": image, "label": ["a"]},
    ):
        pq.write_table(pa.table(table), tmp_path / "x.parquet")
        with pytest.raises(ValueError, match=r"need parquet with columns .*got .*columns {"):
            open_source(tmp_path / "x.parquet", 8, 3, CLASSES)
    pq.write_table(pa.table({"image": image, "label": [None]}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="need parquet with columns"):
        open_source(tmp_path / "x.parquet", 8, 3, CLASSES)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match=r"pip install 'fewstep\[parquet\]' .*data\.source"):
        open_source(tmp_path / "x.parquet", 8, 3, CLASSES)


def test_image_files_have_one_or_three_channels(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "x", pngs())
    with pytest.raises(ValueError, match=r"need 1 or 3 channels, got 2 .*data\.channels"):
        open_source(source, 8, 2, CLASSES)


def test_a_batch_cut_inside_is_refused_while_it_is_read(tmp_path: Path) -> None:
    source = write_batches(tmp_path / "x")
    with zipfile.ZipFile(source / "train_data_batch_10.npz") as archive:
        data, labels = archive.read("data.npy"), archive.read("labels.npy")
    write_zip(source / "train_data_batch_10.npz", {"data.npy": data[:-100], "labels.npy": labels})
    with pytest.raises(
        ValueError, match=r"need data .*train_data_batch_10.npz, got \d+ bytes where"
    ):
        build(source, tmp_path / "data.lmdb")


# --- workers and interruptions -------------------------------------------------------------------


def write_many(folder: Path, count: int = 700) -> Path:
    """Photographs of several sizes in class folders, two of them damaged."""
    rng = np.random.default_rng(1)
    files = {}
    for i in range(count):
        size = rng.integers(9, 40, 2)
        files[f"{i % CLASSES}/{i:04}.jpg"] = encoded(
            rng.integers(0, 256, (3, *size), np.uint8), "JPEG"
        )
    files["1/0301.jpg"] = files["1/0301.jpg"][:100]
    files["2/0302.jpg"] = b""
    return write_folder(folder, files)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, dict]:
    """A source, and the sha256 of the LMDB and the manifest that one process makes of it."""
    folder = tmp_path_factory.mktemp("many")
    source = write_many(folder / "photos")
    manifest = build(source, folder / "data.lmdb", on_error="skip")
    assert [skip["file"] for skip in manifest["skipped"]] == ["1/0301.jpg", "2/0302.jpg"]
    return source, sha256_file(folder / "data.lmdb"), manifest


def test_the_number_of_workers_changes_no_byte(
    tmp_path: Path, many: tuple[Path, str, dict]
) -> None:
    source, sha256, manifest = many
    assert build(source, tmp_path / "data.lmdb", workers=3, on_error="skip") == manifest
    assert sha256_file(tmp_path / "data.lmdb") == sha256


class Interrupted(Exception):
    pass


def broken_off(stream: FileStream, after: int) -> FileStream:
    """The stream, ending in an exception after so many images."""

    class Broken(FileStream):
        def read(self, start: int, workers: int) -> Iterator:
            for i, decoded in enumerate(FileStream.read(stream, start, workers)):
                if i == after:
                    raise Interrupted
                yield decoded

    return Broken(**vars(stream))


def read_from(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Where each build starts to read."""
    starts: list[int] = []
    original = FileStream.read

    def read(self: FileStream, start: int, workers: int) -> Iterator:
        starts.append(start)
        return original(self, start, workers)

    monkeypatch.setattr(FileStream, "read", read)
    return starts


def test_an_interrupted_build_goes_on_where_it_stopped(
    tmp_path: Path, many: tuple[Path, str, dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, sha256, manifest = many
    out, starts = tmp_path / "data.lmdb", read_from(monkeypatch)
    for after in (5, 300, 100):
        stream = open_source(source, 8, 3, CLASSES)
        assert isinstance(stream, FileStream)
        with pytest.raises(Interrupted):
            ingest(broken_off(stream, after), out, on_error="skip", silent=True)
        assert not out.exists()
        with (tmp_path / ".data.partial" / "images").open("ab") as file:
            file.write(b"a record cut short")
        with (tmp_path / ".data.partial" / "skipped").open("a") as file:
            file.write('{"index": 698, "file": "never reached", "reason": ""}\n{"ind')
    assert build(source, out, on_error="skip") == manifest
    assert sha256_file(out) == sha256
    assert starts == [0, 5, 305, 405]
    assert not (tmp_path / ".data.partial").exists()


def test_a_build_interrupted_at_the_lmdb_decodes_nothing_again(
    tmp_path: Path, many: tuple[Path, str, dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, sha256, manifest = many
    with monkeypatch.context() as patch:
        patch.setattr("fewstep.data.lmdb._map_size", lambda *_: 16384)
        with pytest.raises(ValueError, match="need images that fit"):
            build(source, tmp_path / "data.lmdb", on_error="skip")
    monkeypatch.setattr(decode, "decode_image", lambda *_: pytest.fail("decoded again"))
    assert build(source, tmp_path / "data.lmdb", on_error="skip") == manifest
    assert sha256_file(tmp_path / "data.lmdb") == sha256


def test_a_partial_build_of_another_source_is_not_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = write_folder(tmp_path / "x", pngs()), tmp_path / "data.lmdb"
    starts = read_from(monkeypatch)
    stream = open_source(source, 8, 3, CLASSES)
    assert isinstance(stream, FileStream)

    def interrupt() -> None:
        with pytest.raises(Interrupted):
            ingest(broken_off(stream, 5), out, silent=True)

    interrupt()
    os.utime(source / NAMES[20], (1, 1))  # edited
    build(source, out)
    interrupt()
    assert ingest(open_source(source, 4, 3, CLASSES), out, silent=True)["shape"] == [3, 4, 4]
    assert starts == [0] * 4


def test_two_builds_of_one_lmdb_are_refused(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "x", pngs())
    (tmp_path / ".data.partial").mkdir()
    with FileLock(tmp_path / ".data.partial" / "lock"):
        with pytest.raises(ValueError, match="need one build at a time"):
            build(source, tmp_path / "data.lmdb")


KILLED = """
import sys
from pathlib import Path
from fewstep.data import ingest, sources

if __name__ == "__main__":
    source = sources.open_source(sys.argv[1], 8, 3, 4)
    ingest.ingest(source, Path(sys.argv[2]), workers=2, on_error="skip", silent=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_build_goes_on_with_the_same_bytes(
    tmp_path: Path, many: tuple[Path, str, dict], kill: signal.Signals
) -> None:
    source, sha256, manifest = many
    out, images = tmp_path / "data.lmdb", tmp_path / ".data.partial" / "images"
    (tmp_path / "build.py").write_text(KILLED)
    command = [sys.executable, tmp_path / "build.py", source, out]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (images.exists() and images.stat().st_size > 20_000):
        time.sleep(0.002)
    process.send_signal(kill)
    assert process.wait(timeout=30) != 0 and not out.exists()
    held = images.stat().st_size
    assert 0 < held < manifest["images"] * 208
    assert build(source, out, on_error="skip") == manifest
    assert sha256_file(out) == sha256


WEIGHED = """
import re, sys
from pathlib import Path
from fewstep.data import ingest, sources

if __name__ == "__main__":
    source = sources.open_source(sys.argv[1], 64, 3, 4)
    ingest.ingest(source, Path(sys.argv[2]), workers=2, silent=True)
    # not ru_maxrss, which begins at what the process that started this one had
    print(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_hardly_grows_with_the_images(tmp_path: Path) -> None:
    (tmp_path / "build.py").write_text(WEIGHED)
    images = RNG.integers(0, 256, (16, 3, 64, 64), np.uint8)
    files, peaks = [encoded(image) for image in images], []
    for count in (5_000, 20_000):
        names = [f"{i % 4}/{i:05}.png" for i in range(count)]
        pairs = [[name, i % 4] for i, name in enumerate(names)]
        members = {name: files[i % 16] for i, name in enumerate(names)}
        members["dataset.json"] = json.dumps({"labels": pairs}).encode()
        source = write_zip(tmp_path / f"{count}.zip", members)
        command = [sys.executable, tmp_path / "build.py", source, tmp_path / f"{count}.lmdb"]
        peaks.append(1024 * int(subprocess.check_output(command)))
    assert peaks[1] - peaks[0] < 15_000 * 2048, "names, places and labels, not 12,288 bytes"


def test_a_worker_that_dies_ends_the_build_with_a_message() -> None:
    parts: list[Any] = [Call(os._exit, 1)]  # which whoever unpickles it does
    with pytest.raises(ValueError, match=r"need 2 processes .*died.*data\.workers"):
        list(decode.decode_chunks([parts] * 3, Decoding(3, 8, fit=True), 2))


def test_a_full_disk_keeps_what_was_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_folder(tmp_path / "x", pngs())
    write, calls = os.write, iter(range(100))

    def full(file: int, data: bytes) -> int:
        if len(data) == 208 and next(calls) == 5:
            raise OSError(28, "No space left on device")
        return write(file, data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(OSError, match="disk full at image 5; .*run again"):
            build(source, tmp_path / "data.lmdb")
    starts = read_from(monkeypatch)
    build(source, tmp_path / "data.lmdb")
    assert starts == [5]


# --- the stage -----------------------------------------------------------------------------------


def test_the_stage_takes_its_keys_from_the_params(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_folder(
        Path("photos"), {f"{i % 10}/{i}.jpg": encoded(IMAGES[i], "JPEG") for i in range(20)}
    )
    Path("photos/3/13.jpg").write_bytes(b"damaged")
    keys = {"data__source": "photos", "data__workers": 1}
    with pytest.raises(ValueError, match=r"3/13\.jpg in photos"):
        stage.run(tiny_params(tmp_path, **keys))
    stage.run(tiny_params(tmp_path, **keys, data__on_error="skip"))
    out = capsys.readouterr().out
    assert "19 images from photos in artifacts/data.lmdb, 1 skipped" in out
    assert json.loads(Path("artifacts/data.json").read_text())["images_per_class"][3] == 1
    assert ImageDataset("artifacts/data.lmdb").shape == (1, 16, 16)
