"""Downloads from a real HTTP server on this machine that misbehaves on demand."""

import errno
import hashlib
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import fewstep.download
from fewstep.download import fetch

CONTENT = os.urandom(1_000_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
ZEROS = "0" * 64


@dataclass
class Server:
    """What to serve, how to fail (one entry of `faults` a request), and what was asked and sent."""

    url: str
    content: bytes = CONTENT
    ranges: bool = True
    etag: str = '"v1"'
    faults: list[str | int] = field(default_factory=list)
    requests: list[dict[str, str]] = field(default_factory=list)
    sent: list[int] = field(default_factory=list)

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        self.requests.append(dict(handler.headers))
        self.sent.append(0)
        fault = self.faults.pop(0) if self.faults else None
        if isinstance(fault, int):
            return handler.send_error(fault)
        start = 0
        asked = handler.headers.get("Range")
        unchanged = handler.headers.get("If-Range", self.etag) == self.etag
        if asked and self.ranges and unchanged:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if start >= len(self.content):
                handler.send_response(416)
                handler.send_header("Content-Range", f"bytes */{len(self.content)}")
                handler.send_header("Content-Length", "0")
                return handler.end_headers()
            handler.send_response(206)
            end, size = len(self.content) - 1, len(self.content)
            handler.send_header("Content-Range", f"bytes {start}-{end}/{size}")
        else:
            handler.send_response(200)
        body = self.content[start:]
        handler.send_header("Content-Length", str(len(body)))
        handler.send_header("ETag", self.etag)
        handler.end_headers()
        if fault == "cut":
            body = body[: len(body) // 2]
        if fault == "silence":
            body = b""
        handler.wfile.write(body)
        self.sent[-1] = len(body)
        handler.close_connection = True


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "*")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.answer(self)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        state = Server(f"http://127.0.0.1:{http.server_port}/teacher.bin")
        thread = threading.Thread(target=http.serve_forever, args=(0.01,))
        thread.start()
        yield state
        http.shutdown()
        thread.join()


def quick(url: str, sha256: str, cache: Path) -> Path:
    return fetch(url, sha256, cache, attempts=3, wait=0.001, timeout=5)


def files(cache: Path) -> list[str]:
    return sorted(p.name for p in cache.iterdir() if p.suffix != ".lock")


def test_a_download_is_whole_and_made_once(server: Server, tmp_path: Path) -> None:
    cache = tmp_path / "new" / "cache"
    path = quick(server.url, SHA256, cache)
    assert path == cache / SHA256 and path.read_bytes() == CONTENT
    assert quick(server.url, SHA256.upper(), cache) == path
    assert len(server.requests) == 1 and "Range" not in server.requests[0]
    assert files(cache) == [SHA256]


def test_a_cached_file_that_rotted_is_fetched_again(server: Server, tmp_path: Path) -> None:
    (tmp_path / SHA256).write_bytes(b"rot")
    assert quick(server.url, SHA256, tmp_path).read_bytes() == CONTENT


def test_a_cut_connection_resumes_and_gets_only_the_rest(server: Server, tmp_path: Path) -> None:
    server.faults = ["cut"]
    assert quick(server.url, SHA256, tmp_path).read_bytes() == CONTENT
    assert server.requests[1]["Range"] == "bytes=500000-"
    assert server.requests[1]["If-Range"] == '"v1"'
    assert server.sent == [500_000, 500_000]


def test_a_later_run_resumes_what_an_earlier_one_left(server: Server, tmp_path: Path) -> None:
    (tmp_path / f"{SHA256}.part").write_bytes(CONTENT[:900_000])
    assert quick(server.url, SHA256, tmp_path).read_bytes() == CONTENT
    assert server.sent == [100_000]


def test_a_part_that_was_whole_already_is_only_verified(server: Server, tmp_path: Path) -> None:
    (tmp_path / f"{SHA256}.part").write_bytes(CONTENT)
    assert quick(server.url, SHA256, tmp_path).read_bytes() == CONTENT
    assert server.sent == [0]  # 416: nothing behind the last byte


@pytest.mark.parametrize("stale", [b"x" * 1000, b"x" * 2_000_000], ids=["shorter", "longer"])
def test_a_part_of_another_file_is_replaced(server: Server, tmp_path: Path, stale: bytes) -> None:
    (tmp_path / f"{SHA256}.part").write_bytes(stale)
    assert quick(server.url, SHA256, tmp_path).read_bytes() == CONTENT


def test_a_file_replaced_between_two_tries_is_not_glued(server: Server, tmp_path: Path) -> None:
    real_answer = server.answer
    server.content, server.faults = b"old" * 300_000, ["cut"]

    def answer(handler: BaseHTTPRequestHandler) -> None:
        real_answer(handler)
        server.content, server.etag = CONTENT, '"v2"'

    server.answer = answer  # type: ignore[method-assign]
    assert quick(server.url, SHA256, tmp_path).read_bytes() == CONTENT
    assert len(server.requests) == 2


def test_a_server_without_ranges_starts_over(server: Server, tmp_path: Path) -> None:
    server.ranges, server.faults = False, ["cut", "cut"]
    assert quick(server.url, SHA256, tmp_path).read_bytes() == CONTENT
    assert server.sent == [500_000, 500_000, 1_000_000]


def test_a_wrong_sha256_names_all_and_leaves_nothing(server: Server, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"{ZEROS}, got {SHA256} from http.*teacher\.sha256"):
        quick(server.url, ZEROS, tmp_path)
    assert files(tmp_path) == [] and len(server.requests) == 1


def test_404_is_final(server: Server, tmp_path: Path) -> None:
    server.faults = [404]
    with pytest.raises(ValueError, match=r"need a file at http.*got HTTP 404 .*teacher\.url"):
        quick(server.url, SHA256, tmp_path)
    assert len(server.requests) == 1


def test_server_errors_are_retried(server: Server, tmp_path: Path) -> None:
    server.faults = [500, 503, "silence"]
    path = fetch(server.url, SHA256, tmp_path, attempts=4, wait=0.001)
    assert path.read_bytes() == CONTENT and len(server.requests) == 4


def test_giving_up_says_what_is_kept(server: Server, tmp_path: Path) -> None:
    server.faults = ["cut", 500, 500, 500]
    with pytest.raises(ConnectionError, match=r"HTTP.*500.* 3 times.*500000 bytes are kept in"):
        quick(server.url, SHA256, tmp_path)
    assert files(tmp_path) == [f"{SHA256}.part"] and len(server.requests) == 3


def test_bytes_gained_earn_new_attempts(server: Server, tmp_path: Path) -> None:
    server.faults = ["cut"] * 8
    assert quick(server.url, SHA256, tmp_path).read_bytes() == CONTENT
    assert sum(server.sent) == len(CONTENT)


def test_nobody_listening_is_a_connection_error(tmp_path: Path) -> None:
    with pytest.raises(ConnectionError, match=r"need http://127\.0\.0\.1:9/x.*3 times"):
        quick("http://127.0.0.1:9/x", SHA256, tmp_path)


def test_a_full_disk_keeps_nothing(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(fewstep.download.os, "fsync", full)
    with pytest.raises(OSError, match="limit reached while writing .*nothing half-written"):
        quick(server.url, SHA256, tmp_path)
    assert files(tmp_path) == [] and len(server.requests) == 1


def test_local_files_are_verified_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a b.bin"
    path.write_bytes(CONTENT)
    assert quick(path.as_uri(), SHA256, tmp_path / "cache") == path
    assert quick(str(path), SHA256, tmp_path / "cache") == path
    assert quick("a b.bin", SHA256, tmp_path / "cache") == Path("a b.bin")
    with pytest.raises(ValueError, match=rf"need sha256 {ZEROS}, got {SHA256} from a b\.bin"):
        quick("a b.bin", ZEROS, tmp_path / "cache")
    assert path.exists() and not (tmp_path / "cache").exists()


def test_bad_arguments_name_the_key(tmp_path: Path) -> None:
    for url, sha256, message in [
        ("missing.bin", SHA256, r"need a file at missing\.bin, got nothing .*teacher\.url"),
        ("file:///missing.bin", SHA256, r"need a file at file:///missing\.bin.*teacher\.url"),
        ("s3://bucket/x", SHA256, r"need an https, http or file URL.*got s3.*teacher\.url"),
        ("x", "abc", r"need 64 hex digits, got 'abc' .*teacher\.sha256"),
    ]:
        with pytest.raises(ValueError, match=message):
            quick(url, sha256, tmp_path)


# --- an unknown sha256 -------------------------------------------------------------------------


def unknown(url: str, cache: Path) -> str:
    with pytest.raises(ValueError) as error:
        fetch(url, "unknown", cache, key="metric.reference", attempts=3, wait=0.001)
    return str(error.value)


def test_an_unknown_sha256_is_told_and_the_file_fetched_once(
    server: Server, tmp_path: Path
) -> None:
    message = unknown(server.url, tmp_path)
    assert f"need the sha256 of {server.url}, got unknown" in message
    assert f"is {SHA256}: " in message and "metric.reference.sha256" in message
    assert unknown(server.url, tmp_path) == message
    assert quick(server.url, SHA256, tmp_path).read_bytes() == CONTENT  # as if written down
    assert len(server.requests) == 1


def test_an_unknown_file_that_rotted_is_fetched_again(server: Server, tmp_path: Path) -> None:
    message = unknown(server.url, tmp_path)
    (tmp_path / SHA256).write_bytes(b"rot")
    assert unknown(server.url, tmp_path) == message and len(server.requests) == 2


def test_what_an_earlier_run_left_of_an_unknown_file_is_not_glued_on(
    server: Server, tmp_path: Path
) -> None:
    server.faults = ["cut", 500, 500, 500]
    with pytest.raises(ConnectionError):
        fetch(server.url, "unknown", tmp_path, attempts=3, wait=0.001)
    assert [path.stat().st_size for path in tmp_path.glob("*.part")] == [500_000]
    server.content = CONTENT[::-1]
    digest = hashlib.sha256(server.content).hexdigest()
    assert f"is {digest}: " in unknown(server.url, tmp_path)
    assert "Range" not in server.requests[-1]


def test_an_unknown_local_file_is_measured_where_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(CONTENT)
    assert f"is {SHA256}: " in unknown(str(path), tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_messages_name_the_key_that_the_file_stands_at(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"params\.yaml: metric\.weights\.url"):
        fetch("absent.pth", SHA256, tmp_path, key="metric.weights")
