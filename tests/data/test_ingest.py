"""Ingest: every kind of source gives the same images; builds resume, whatever the workers."""

import io
import itertools
import json
import os
import re
import shutil
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
from PIL import Image, ImageOps

from experiment import tiny_params
from fewstep.data import decode, tree
from fewstep.data.decode import Decoding, decode_image
from fewstep.data.ingest import ingest
from fewstep.data.lmdb import ImageDataset
from fewstep.data.sources import open_source
from fewstep.data.stream import FileStream
from fewstep.files import sha256_file
from fewstep.stages import build_lmdb as stage
from pickles import Call
from places import ROOT

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
    """Ten batches; with a mapping the data set's label k + 1 is the synset n(3 - k)."""
    folder.mkdir()
    for number in range(1, 11):  # 10 stands behind 2
        rows = slice(2 * number - 2, 2 * number if number < 10 else None)
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


# --- all of the images, and no others -------------------------------------------------------------


def linked(folder: Path, *links: tuple[str, str]) -> Path:
    """All images in `store`, and a source `x` of links to parts of it."""
    write_folder(folder / "store", pngs())
    for name, target in links:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(folder / target)
    return folder / "x"


PARTS = sorted({name.split("/")[0] for name in NAMES})
LINKED: dict[str, Callable[[Path], Path]] = {
    "source": lambda p: linked(p, ("x", "store")),
    "every class": lambda p: linked(p, *((f"x/{part}", f"store/{part}") for part in PARTS)),
    "train": lambda p: linked(p, ("x/train", "store")),
    "every image": lambda p: linked(p, *((f"x/{name}", f"store/{name}") for name in NAMES)),
    "a link to the top": lambda p: linked(p, ("x", "store"), ("store/n0000/up", "store")),
    "two that lead to each other": lambda p: linked(
        p, ("x", "store"), ("store/n0000/a", "store/n0001"), ("store/n0001/b", "store/n0000")
    ),
}


@pytest.mark.parametrize("kind", LINKED)
def test_links_are_followed_as_far_as_they_show_images(kind: str, tmp_path: Path) -> None:
    source = LINKED[kind](tmp_path)
    found = open_source(source, 8, 3, CLASSES)
    shown = 2 * sum(LABELS < 2) if kind.startswith("two") else 0  # each in the other's class too
    assert len(found) == COUNT + shown // 2
    manifest = build(source, tmp_path / "data.lmdb")
    assert manifest["images"] == len(found) and manifest["skipped"] == []
    assert ("DVC does not see" in manifest["note"]) is (kind not in ("source", "every image"))
    assert ("not followed" in manifest["note"]) is (" to " in kind)


def test_a_link_to_nowhere_is_an_unreadable_image(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "x", pngs())
    (source / "n0001/gone.png").symlink_to("nowhere.png")
    with pytest.raises(ValueError, match=r"n0001/gone\.png in x: cannot be read: No such file"):
        build(source, tmp_path / "data.lmdb")
    manifest = build(source, tmp_path / "data.lmdb", on_error="skip")
    assert manifest["images"] == COUNT
    assert [skip["file"] for skip in manifest["skipped"]] == ["n0001/gone.png"]


def test_a_class_folder_that_links_to_nowhere_is_refused(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "x", pngs())
    (source / "n0004").symlink_to("nowhere")
    with pytest.raises(
        ValueError, match="need links that lead somewhere, got 'n0004' -> 'nowhere'"
    ):
        open_source(source, 8, 3, CLASSES)


def test_links_that_unfold_without_end_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tree, "_LINKS", 100)
    source = write_folder(tmp_path / "x", {f"{i}/{i}.png": b"" for i in range(9)})
    for i, j in itertools.permutations(range(9), 2):
        (source / f"{i}/to{j}").symlink_to(f"../{j}")
    with pytest.raises(ValueError, match="need at most 100 folders behind links"):
        open_source(source, 8, 3, 9)


def test_a_named_pipe_is_an_unreadable_image(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "x", pngs())
    os.mkfifo(source / "n0001/pipe.png")
    with pytest.raises(ValueError, match=r"pipe\.png in x: is not a regular file"):
        build(source, tmp_path / "data.lmdb")


def test_a_link_in_a_zip_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(write_zip(tmp_path / "x.zip", pngs()), "a") as archive:
        link = zipfile.ZipInfo("n0004")
        link.create_system, link.external_attr = 3, 0o120777 << 16
        archive.writestr(link, "elsewhere")
    with pytest.raises(ValueError, match="need files in the zip .*got the link 'n0004'"):
        open_source(tmp_path / "x.zip", 8, 3, CLASSES)


LEFT_BEHIND = (".thumbnails/1.png", "__MACOSX/n0/1.png", ".ipynb_checkpoints/1-checkpoint.png")
LEFT_BEHIND += ("n0001/@eaDir/1.png", "@eaDir/1.png", "n0002/.a/1.png", "$RECYCLE.BIN/1.png")


@pytest.mark.parametrize("write", [write_zip, write_folder])
@pytest.mark.parametrize("top", ["", "train/"])
def test_what_programs_leave_behind_is_no_class_and_no_image(
    tmp_path: Path, top: str, write: Callable[[Path, dict[str, bytes]], Path]
) -> None:
    left = {top + name: encoded(IMAGES[0]) for name in LEFT_BEHIND}
    files = {top + name: data for name, data in pngs().items()}
    source = write(tmp_path / "x.zip", {**files, **left})
    if source.is_dir():
        source = source.rename(tmp_path / "x")
    assert len(open_source(source, 8, 3, CLASSES)) == COUNT


def test_class_folders_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "x", {**pngs(), "thumbs\x1b[2J/1.png": b"", "z/1.png": b""})
    message = r"got 6 in .*: 'n0000' \(6\), .*'thumbs\\x1b\[2J' \(1\), 'z' \(1\) "
    with pytest.raises(ValueError, match=message):
        open_source(source, 8, 3, CLASSES)
    many = write_folder(tmp_path / "y", {f"{i:03}/1.png": b"" for i in range(40)})
    with pytest.raises(ValueError, match=r"'011' \(1\) and 28 more "):
        open_source(many, 8, 3, CLASSES)


@pytest.mark.parametrize("write", [write_zip, write_folder])
def test_pictures_of_other_formats_are_noted(
    tmp_path: Path, write: Callable[[Path, dict[str, bytes]], Path]
) -> None:
    extra = {"n0001/a.GIF": b"", "n0001/b.gif": b"", "n0002/c.tiff": b"", "n0002/notes.txt": b""}
    source = write(tmp_path / "x.zip", {**pngs(), **extra})
    if source.is_dir():
        source = source.rename(tmp_path / "x")
    manifest = build(source, tmp_path / "data.lmdb")
    assert manifest["note"] == "left out, as no PNG, JPEG or WebP: 2 .gif, 1 .tiff"


@pytest.mark.parametrize("gone", [1, 3, 9])
def test_a_batch_that_is_missing_between_others_is_named(tmp_path: Path, gone: int) -> None:
    source = write_batches(tmp_path / "x")
    (source / f"train_data_batch_{gone}.npz").unlink()
    with pytest.raises(ValueError, match=rf"got no train_data_batch_{gone}\.npz .*data\.source"):
        open_source(source, 8, 3, CLASSES)


def test_a_part_of_the_batches_is_noted(tmp_path: Path) -> None:
    source = write_batches(tmp_path / "x")
    (source / "train_data_batch_10.npz").unlink()
    assert "9 of the data set's 10 batches" in build(source, tmp_path / "data.lmdb")["note"]
    (source / "train_data_batch_02.npz").write_bytes(b"")
    with pytest.raises(ValueError, match="two of the same number"):
        open_source(source, 8, 3, CLASSES)


SHARDS = {
    "counted": ("train-0000{}-of-00004.parquet", range(4)),
    "counted, with a hash": ("train-0000{}-of-00004-0123456789abcdef.parquet", range(4)),
    "counted from 1": ("x_{}-of-4.parquet", range(1, 5)),
    "numbered": ("000{}.parquet", range(4)),
    "numbered from 1": ("part-{}.parquet", range(1, 5)),
}


@pytest.mark.parametrize("kind", SHARDS)
def test_a_missing_shard_is_named(tmp_path: Path, kind: str) -> None:
    template, numbers = SHARDS[kind]
    written = write_parquet(tmp_path / "x") / "data/train-00000-of-00002.parquet"
    for n in numbers:
        shutil.copy(written, tmp_path / template.format(n))
    assert len(open_source(tmp_path, 8, 3, CLASSES)) == 36
    for n in numbers[:-1] if kind == "counted from 1" else numbers[1:-1]:
        shard = tmp_path / template.format(n)
        shard.unlink()
        name = re.escape(template.format(n).replace("-0123456789abcdef", ""))
        with pytest.raises(ValueError, match=rf"got none named {name} .*data\.source"):
            open_source(tmp_path, 8, 3, CLASSES)
        shutil.copy(written, shard)


def test_shards_of_two_versions_are_refused(tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "x")
    one = source / "data/train-00000-of-00002.parquet"
    for name in ("train-00000-of-00001.parquet", "train-00001-of-00002-0abc.parquet"):
        shutil.copy(one, source / "data" / name)
        with pytest.raises(ValueError, match="need the shards of one data set .*got two sets"):
            open_source(source, 8, 3, CLASSES)
        (source / "data" / name).unlink()


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


UP = np.zeros((3, 8, 8), np.uint8)  # red above, blue below, and a green corner
UP[0, :4], UP[2, 4:], UP[1, 0, 0] = 255, 255, 255
RGB8 = Decoding(3, 8, fit=True)


def saved(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:  # noqa: ANN401
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def picture(pixels: np.ndarray = UP) -> Image.Image:
    return Image.fromarray(pixels.transpose(1, 2, 0))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", range(10))
def test_the_orientation_in_exif_is_applied(form: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation  # 0 and 9 mean nothing
    options: dict[str, Any] = {"JPEG": {"quality": 95, "subsampling": 0}, "PNG": {}}.get(
        form, {"lossless": True}
    )
    data = saved(picture(), form, exif=exif, **options)
    with Image.open(io.BytesIO(data)) as image:
        shown = np.asarray(ImageOps.exif_transpose(image)).transpose(2, 0, 1)
    ours, changes = decode.decode_and_tell(data, RGB8)
    np.testing.assert_array_equal(ours, shown)
    assert changes == ((decode.UPRIGHT,) if 2 <= orientation <= 8 else ())


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_an_image_with_damaged_exif_is_shown_as_it_lies() -> None:
    for exif in (b"Exif\0\0rubbish", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"Exif\0\0"):
        np.testing.assert_array_equal(decode_image(saved(picture(), exif=exif), RGB8), UP)


def test_a_prepared_image_is_turned_before_its_size_is_compared() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    wide = picture(np.zeros((3, 4, 8), np.uint8))
    with pytest.raises(ValueError, match="need RGB 8x8, got RGB 4x8"):
        decode_image(saved(wide, exif=exif), Decoding(3, 8, fit=False))


def png16(kind: int, channels: int) -> bytes:
    """A 16-bit PNG; kind is PNG's colour type."""
    rows = b"".join(b"\0" + bytes(16 * channels) for _ in range(8))
    head = struct.pack(">2I5B", 8, 8, 16, kind, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    packed = (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


@pytest.mark.parametrize("fit", [True, False])
@pytest.mark.parametrize(("kind", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_more_than_8_bits_a_channel_are_refused_in_every_mode(
    kind: int, channels: int, fit: bool
) -> None:
    for wanted in (1, 3):
        with pytest.raises(ValueError, match="has more than 8 bits a channel"):
            decode_image(png16(kind, channels), Decoding(wanted, 8, fit))


def test_a_jpeg_of_12_bits_says_what_it_may_be() -> None:
    data = bytearray(saved(picture(), "JPEG"))
    data[data.index(b"\xff\xc0") + 4] = 12
    with pytest.raises(ValueError, match="JPEG, or one that has more than 8 bits a channel"):
        decode_image(bytes(data), RGB8)


def half_clear() -> np.ndarray:
    """RGBA: the right half is red and invisible."""
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[:, :4], pixels[:, 4:] = (10, 20, 30, 255), (255, 0, 0, 0)
    return pixels


def transparent(kind: str) -> bytes:
    rgba = Image.fromarray(half_clear())
    if kind == "RGBA":
        return saved(rgba)
    if kind == "WebP":
        return saved(rgba, "WEBP", lossless=True, exact=True)
    if kind == "grey with alpha":
        return saved(Image.fromarray(half_clear()[..., [0, 3]]))
    if kind == "a colour of RGB":
        return saved(rgba.convert("RGB"), transparency=(255, 0, 0))
    if kind == "a level of grey":
        return saved(Image.fromarray(half_clear()[..., 0]), transparency=255)
    palette = Image.fromarray(half_clear()[..., :3]).quantize(2)
    red = int(np.asarray(palette)[0, 7])
    return saved(palette, transparency=red)


KINDS = ["RGBA", "WebP", "grey with alpha", "a colour of RGB", "a level of grey", "palette"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [1, 3])
def test_transparent_pixels_are_white_and_hide_no_colour(kind: str, channels: int) -> None:
    ours, changes = decode.decode_and_tell(transparent(kind), Decoding(channels, 8, fit=True))
    assert decode.OVER_WHITE in changes
    assert (ours[:, :, 4:] == 255).all() and (ours[:, :, :4] <= 30).all()
    small = decode_image(transparent(kind), Decoding(channels, 4, fit=True))
    assert small[:, :, 3].min() > 200, "nor in the edges that resizing mixes"


def test_half_transparent_pixels_are_mixed_with_white() -> None:
    pixels = np.full((8, 8, 4), (100, 0, 0, 128), np.uint8)
    ours = decode_image(saved(Image.fromarray(pixels)), RGB8)
    expected = 255 - (255 - np.array([100, 0, 0])) * 128 / 255
    assert np.abs(ours[:, 0, 0] - expected).max() <= 1


def test_an_alpha_channel_that_hides_nothing_changes_nothing() -> None:
    opaque = np.concatenate([UP.transpose(1, 2, 0), np.full((8, 8, 1), 255, np.uint8)], -1)
    ours, changes = decode.decode_and_tell(saved(Image.fromarray(opaque)), RGB8)
    np.testing.assert_array_equal(ours, UP)
    assert changes == ()


@pytest.mark.parametrize("form", ["PNG", "WEBP", "MPO"])
def test_the_first_of_several_frames_is_taken_and_told(form: str) -> None:
    options = {"WEBP": {"lossless": True}}.get(form, {})
    frames = [picture(), picture(255 - UP)]
    data = saved(frames[0], form, save_all=True, append_images=frames[1:], **options)
    ours, changes = decode.decode_and_tell(data, RGB8)
    assert changes == (decode.FIRST_FRAME,)
    assert np.abs(ours.astype(int) - UP).mean() <= (30 if form == "MPO" else 0)  # JPEG's colours


@pytest.mark.parametrize(
    ("mode", "channels", "changes"),
    [
        ("RGB", 3, ()),
        ("L", 1, ()),
        ("1", 1, ()),
        ("L", 3, (decode.TO_RGB,)),
        ("1", 3, (decode.TO_RGB,)),
        ("RGB", 1, (decode.TO_GREY,)),
        ("P", 3, (decode.FROM_PALETTE,)),
        ("CMYK", 3, (decode.FROM_CMYK,)),
        ("CMYK", 1, (decode.FROM_CMYK, decode.TO_GREY)),
    ],
)
def test_conversions_are_told(mode: str, channels: int, changes: tuple[str, ...]) -> None:
    image = picture().convert(mode)
    data = saved(image, "JPEG" if mode == "CMYK" else "PNG")
    ours, told = decode.decode_and_tell(data, Decoding(channels, 8, fit=True))
    with Image.open(io.BytesIO(data)) as stored:
        expected = np.asarray(stored.convert({1: "L", 3: "RGB"}[channels]))
    np.testing.assert_array_equal(ours, np.atleast_3d(expected).transpose(2, 0, 1))
    assert told == changes


def with_changes() -> dict[str, bytes]:
    """Ten images of each class, of which some have to be changed."""
    exif = Image.Exif()
    exif[0x0112] = 3
    files = {f"{c}/{i}.png": encoded(IMAGES[i]) for c in "ab" for i in range(10)}
    files |= {"a/3.png": saved(picture(), exif=exif), "b/4.png": transparent("palette")}
    return files | {"b/5.png": saved(picture().convert("L")), "b/9.png": transparent("RGBA")}


CHANGED = {
    decode.UPRIGHT: 1,
    decode.OVER_WHITE: 2,
    decode.FROM_PALETTE: 1,
    decode.TO_RGB: 1,
}


@pytest.mark.parametrize("form", ["folder", "zip", "parquet"])
def test_the_manifest_counts_what_decoding_changed(tmp_path: Path, form: str) -> None:
    files, source = with_changes(), tmp_path / "x"
    if form == "folder":
        write_folder(source, files)
    elif form == "zip":
        source = write_zip(tmp_path / "x.zip", files)
    else:
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet as pq

        rows = [{"bytes": data, "path": None} for data in files.values()]
        source = tmp_path / "x.parquet"
        pq.write_table(
            pa.table({"image": rows, "label": [int(n[0] == "b") for n in files]}), source
        )
    stream = open_source(source, 8, 3, 2)
    assert isinstance(stream, FileStream)
    for after in (4, 9):
        with pytest.raises(Interrupted):
            ingest(broken_off(stream, after), tmp_path / "data.lmdb", silent=True)
    manifest = ingest(stream, tmp_path / "data.lmdb", silent=True)
    assert manifest["changed"] == CHANGED


FMNIST = "9ccde1f8ad8ca6e9788c42c0eda891e20e5dd5c5301b966512bb48778da7fed0"
PHOTOS = "fc0c0dcdee4d1c3786269cbf7227aa4e74ec421dfab3fa65d84dadeeb7d99142"


def test_images_that_need_no_change_give_the_bytes_that_they_always_gave(tmp_path: Path) -> None:
    """Recorded before images were turned or laid over white."""
    shipped = ingest(
        open_source(ROOT / "assets/fmnist16.npz", 16, 1, 10), tmp_path / "a.lmdb", silent=True
    )
    assert shipped["content_sha256"] == FMNIST and shipped["changed"] == {}
    rng = np.random.default_rng(7)
    for name in ("a/0", "a/1", "b/0", "b/1"):
        pixels = Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8))
        write_folder(tmp_path / "x", {f"{name}.png": saved(pixels)})
    small = ingest(open_source(tmp_path / "x", 16, 3, 2), tmp_path / "b.lmdb", silent=True)
    assert small["content_sha256"] == PHOTOS and small["changed"] == {}


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
    "empty": (b"", "is not a PNG, JPEG or WebP image"),
    "text": (b"not an image at all", "is not a PNG, JPEG or WebP image"),
    "cut": (encoded(IMAGES[0])[:-40], "cannot be decoded: "),
    "cut JPEG": (encoded(IMAGES[0], "JPEG")[:-60], "cannot be decoded: .*truncated"),
    "BMP": (encoded(IMAGES[0], "BMP"), "is not a PNG, JPEG or WebP image"),
    "bomb": (bomb(), "decompression bomb"),
    "16 bits": (deep(), "more than 8 bits a channel"),
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
    message = rf"got {NAMES[3]} in x.*: is not a PNG.*on_error: skip .*data\.on_error"
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
    with pytest.raises(
        ValueError, match=rf"{NAMES[7]} in x.zip: its bytes do not match the zip.*CRC"
    ):
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
    "cut zip": (lambda p: cut(write_zip(p / "x.zip", pngs())), r"need an intact zip, got .*x\.zip"),
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
        r"need labels in \[0, 4\), got 4 at n0000",
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
        r"need data .* uint8 .*got data of float64",
    ),
    "pickled batch": (
        lambda p: one_batch(p, labels=np.array([{}], object)),
        r"need data .*got 'labels' has Python objects",
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


@pytest.mark.parametrize("classes", [None, 1])
def test_parquet_without_integers_has_one_class(tmp_path: Path, classes: int | None) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    rows = [{"bytes": encoded(image), "path": None} for image in IMAGES]
    pq.write_table(pa.table({"image": rows, "text": ["a"] * len(rows)}), tmp_path / "x.parquet")
    stream = open_source(tmp_path / "x.parquet", 8, 3, classes)
    assert stream.classes == 1 and len(stream) == len(IMAGES)
    for place, image in enumerate(IMAGES):
        found, label = stream[place]
        assert np.array_equal(found, image) and label == 0


def test_parquet_of_other_columns_or_without_pyarrow_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    image = [{"bytes": b"", "path": ""}]
    for table in (
        {"image": image, "fine_label": [1]},
        {"image": [b""], "label": [1]},
        {"image": image, "label": ["a"]},
    ):
        pq.write_table(pa.table(table), tmp_path / "x.parquet")
        with pytest.raises(ValueError, match=r"need parquet with columns .*got .*columns "):
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


def test_a_batch_cut_inside_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    source = write_batches(tmp_path / "x")
    with zipfile.ZipFile(source / "train_data_batch_10.npz") as archive:
        data, labels = archive.read("data.npy"), archive.read("labels.npy")
    write_zip(source / "train_data_batch_10.npz", {"data.npy": data[:-100], "labels.npy": labels})
    with pytest.raises(
        ValueError,
        match=r"need data .*train_data_batch_10.npz, got 'data' claims \d+ bytes, \d+ are",
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
    monkeypatch.setattr(decode, "decode_and_tell", lambda *_: pytest.fail("decoded again"))
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
    assert 0 < held < manifest["images"] * (24 + 192)
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
        if len(data) == 24 + 192 and next(calls) == 5:
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
