"""CIFAR-10's own archive: its images and labels, refusals, and the download of a data set."""

import hashlib
import io
import tarfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

from experiment import tiny_params
from fewstep.data.lmdb import ImageDataset
from fewstep.data.sources import open_source
from fewstep.params import ParamsError
from fewstep.paths import DATA
from fewstep.stages import build_lmdb, download_data

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (12, 3, 32, 32), np.uint8)
LABELS = np.array([3, 0, 9, 9, 1, 2, 4, 5, 6, 7, 8, 0])


def records(part: slice) -> bytes:
    rows = zip(LABELS[part], IMAGES[part], strict=True)
    return b"".join(bytes([label]) + image.tobytes() for label, image in rows)


BATCHES = {
    "cifar-10-batches-bin/data_batch_2.bin": records(slice(2, 3)),
    "cifar-10-batches-bin/data_batch_10.bin": records(slice(10, 12)),
    "cifar-10-batches-bin/data_batch_1.bin": records(slice(2)),
    **{f"cifar-10-batches-bin/data_batch_{n}.bin": records(slice(n, n + 1)) for n in range(3, 10)},
    "cifar-10-batches-bin/test_batch.bin": records(slice(2)),
    "cifar-10-batches-bin/batches.meta.txt": b"airplane\n",
}


def archive(path: Path, files: dict[str, bytes] = BATCHES) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def test_batches_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    source = open_source(archive(tmp_path / "c.tar.gz"), 32, 3, 10)
    assert len(source) == 12, "the test batch is left out"
    for i in range(12):
        image, label = source[i]
        assert np.array_equal(image, IMAGES[i]) and label == LABELS[i]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a/test_batch.bin": b""}, r"need the data_batch_<n>\.bin .* got none"),
        ({"data_batch_1.bin": b"x" * 3074}, "records of 3073 bytes .* got 3074"),
        ({"data_batch_1.bin": bytes(3073), "data_batch_3.bin": b""}, r"no data_batch_2\.bin"),
        ({"data_batch_2.bin": bytes(3073)}, r"got no data_batch_1\.bin"),
        ({"data_batch_1.bin": b""}, "records of 3073 bytes .* got 0"),
        ({"data_batch_1.bin": b"\x0b" + bytes(3072)}, "11.*data.classes|label.*11"),
    ],
)
def test_other_archives_are_refused(files: dict[str, bytes], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        open_source(archive(tmp_path / "c.tar.gz", files), 32, 3, 10)


def test_a_damaged_archive_is_refused(tmp_path: Path) -> None:
    path = archive(tmp_path / "c.tar.gz")
    for content in (path.read_bytes()[:5000], b"not a tar", b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"c\.tar\.gz.*data\.source"):
            open_source(path, 32, 3, 10)


def test_links_in_an_archive_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(records(slice(1)))
    with tarfile.open(tmp_path / "c.tar.gz", "w:gz") as tar:
        link = tarfile.TarInfo("data_batch_1.bin")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "secret")
        tar.addfile(link)
    with pytest.raises(ValueError, match="got none"):
        open_source(tmp_path / "c.tar.gz", 32, 3, 10)


def test_another_shape_is_refused(tmp_path: Path) -> None:
    path = archive(tmp_path / "c.tar.gz")
    with pytest.raises(ValueError, match="data.resolution"):
        open_source(path, 16, 3, 10)


# --- data.url ----------------------------------------------------------------------------------


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:  # noqa: ANN401
    """Address and sha256 of the archive on a server; the current folder is another one."""
    monkeypatch.setenv("no_proxy", "*")
    (tmp_path / "server").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    file = archive(tmp_path / "server" / "c.tar.gz")
    handler = partial(Quiet, directory=str(tmp_path / "server"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        Thread(target=http.serve_forever, daemon=True).start()
        sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
        yield MappingProxyType({
            "source": "data/c.tar.gz", "resolution": 32, "channels": 3, "classes": 10,
            "url": f"http://127.0.0.1:{http.server_port}/c.tar.gz", "sha256": sha256,
        })  # fmt: skip
        http.shutdown()


def test_a_source_that_is_not_there_is_fetched(served: Any) -> None:  # noqa: ANN401
    params = tiny_params(Path(), data=dict(served), network__attn_resolutions=[16])
    build_lmdb.run(params)
    images, labels = ImageDataset(DATA, 10).read(range(12))
    assert np.array_equal(images, IMAGES) and np.array_equal(labels, LABELS)
    gone = {**served, "url": "http://127.0.0.1:9/never-asked"}
    download_data.run(tiny_params(Path(), data=gone, network__attn_resolutions=[16]))  # it is there


def test_another_file_is_refused_wherever_it_comes_from(served: Any) -> None:  # noqa: ANN401
    data = {**served, "sha256": "0" * 64}
    wrong = tiny_params(Path(), data=data, network__attn_resolutions=[16])
    with pytest.raises(ValueError, match="0{64}"):
        download_data.run(wrong)
    assert not Path("data/c.tar.gz").exists()
    Path("data").mkdir(exist_ok=True)
    Path("data/c.tar.gz").write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"of data/c\.tar\.gz; remove it.*data\.sha256"):
        build_lmdb.run(tiny_params(Path(), data=dict(served), network__attn_resolutions=[16]))


@pytest.mark.parametrize("missing", ["url", "sha256"])
def test_an_address_and_its_checksum_go_together(served: Any, missing: str) -> None:  # noqa: ANN401
    data = {key: value for key, value in served.items() if key != missing}
    with pytest.raises(ParamsError, match=rf"got no such key \(.*data\.{missing}\)"):
        tiny_params(Path(), data=data)


def test_without_an_address_the_source_is_the_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    params = tiny_params(Path(), data__source="mine.npz")
    with pytest.raises(ValueError, match=r"at mine\.npz, which you have to provide .*data\.source"):
        download_data.run(params)
    Path("mine.npz").touch()
    download_data.run(params)
    assert "mine.npz is there" in capsys.readouterr().out
