"""Download a file and prove that it is the right one: resume, retry, sha256."""

import hashlib
import http.client
import os
import re
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, url2pathname, urlopen

from filelock import FileLock

from fewstep.files import atomic_path, disk_full, is_disk_full, sha256_file
from fewstep.params import Download, Import, Params
from fewstep.paths import SCRATCH
from fewstep.progress import progress

CACHE = SCRATCH / "downloads"
_CHUNK = 1 << 17  # bytes per read: small enough for a steady progress bar on a slow line
_TRANSIENT = {408, 425, 429, 500, 502, 503, 504}  # HTTP statuses worth another attempt
_NETWORK_ERRORS = (URLError, ConnectionError, TimeoutError, ssl.SSLError, http.client.HTTPException)


def fetch(
    url: str,
    sha256: str,
    cache: Path,
    *,
    key: str = "teacher",
    attempts: int = 6,
    wait: float = 1.0,
    timeout: float = 30.0,
) -> Path:
    """A local file with this sha256, downloaded unless it is in the cache.

    Args:
        url: https, http or file URL, or a path; a relative path starts at the current folder,
            which for every stage is the repository.
        sha256: 64 hex digits. "unknown" downloads and keeps the file, then raises with its digest;
            once that is in params.yaml, the kept file is used.
        cache: folder for downloads: `<sha256>` when complete, `<sha256>.part` before. An
            interrupted download resumes where it stopped, in this run or the next.
        key: the block of params.yaml with url and sha256, for messages.
        attempts: consecutive tries without a new byte before giving up.
        wait: seconds before the second try; doubled each time.
        timeout: seconds without a byte before a try fails.

    Returns:
        The verified file: in `cache`, or the local file itself.

    Raises:
        ValueError: another or an unknown sha256, no such file, an HTTP error, or an unsupported
            kind of URL.
        ConnectionError: the network failed `attempts` times.
        OSError: the disk is full.
    """
    sha256 = sha256.lower()
    if sha256 != "unknown" and not re.fullmatch("[0-9a-f]{64}", sha256):
        raise ValueError(f"need 64 hex digits, got {sha256!r} (params.yaml: {key}.sha256)")
    parts = urlsplit(url)
    if parts.scheme in ("", "file"):
        path = Path(url2pathname(parts.path) if parts.scheme else url)
        if not path.is_file():
            raise ValueError(f"need a file at {url}, got nothing (params.yaml: {key}.url)")
        if (got := sha256_file(path)) == sha256:
            return path
        raise (_unknown if sha256 == "unknown" else _mismatch)(url, sha256, got, path, key)
    if parts.scheme not in ("http", "https"):
        raise ValueError(
            f"need an https, http or file URL or a path, got {url} (params.yaml: {key}.url)"
        )
    cache.mkdir(parents=True, exist_ok=True)
    if sha256 == "unknown":
        part = cache / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}.part"
        whole = _measured(_Download(url, part, key, attempts, wait, timeout))
        raise _unknown(url, sha256, whole.name, whole, key)
    whole = cache / sha256
    with FileLock(cache / f"{sha256}.lock"):
        if not (whole.is_file() and sha256_file(whole) == sha256):
            download = _Download(url, cache / f"{sha256}.part", key, attempts, wait, timeout)
            resumed = download.size() > 0
            download.run()
            if resumed and sha256_file(download.part) != sha256:
                # The first bytes may come from an older file at this URL: start over, once.
                download.part.unlink()
                download.run()
            if (got := sha256_file(download.part)) != sha256:
                download.part.unlink()
                raise _mismatch(url, sha256, got, download.part, key)
            os.replace(download.part, whole)
    return whole


def measured(url: str, cache: Path, *, key: str = "teacher") -> Path:
    """The file at an http(s) URL, in the cache under the sha256 that it turns out to have.

    For looking at it: no stage uses a file whose sha256 the params do not name.

    Raises:
        ValueError, ConnectionError, OSError: as `fetch`.
    """
    cache.mkdir(parents=True, exist_ok=True)
    part = cache / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}.part"
    return _measured(_Download(url, part, key, 6, 1.0, 30.0))


def obtain(file: Download | Import, cache: Path, key: str) -> Path:
    """As `fetch`; a local folder, or a local file without a sha256, as it is.

    Raises:
        ValueError, ConnectionError, OSError: as `fetch`.
    """
    here = urlsplit(file.url).scheme == ""
    if here and (file.sha256 is None or Path(file.url).is_dir()):
        if not Path(file.url).exists():
            raise ValueError(
                f"need a file or folder at {file.url}, got nothing (params.yaml: {key}.url)"
            )
        return Path(file.url)
    return fetch(file.url, file.sha256 or "unknown", cache, key=key)


def downloads(params: Params) -> Iterator[tuple[str, Download | Import]]:
    """Each key of the params with a url, except data, and its block."""
    if params.teacher.url is not None:
        yield "teacher", Import(params.teacher.url, params.teacher.sha256)
    yield from ((f"imports.{name}", file) for name, file in params.imports.items())
    if params.metric.weights is not None:
        yield "metric.weights", params.metric.weights
    if params.metric.reference is not None:
        yield "metric.reference", params.metric.reference


@dataclass
class _Download:
    """The transfer of one URL into one file, over as many connections as it takes."""

    url: str
    part: Path
    key: str
    attempts: int
    wait: float
    timeout: float
    etag: str | None = None

    def size(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def run(self) -> None:
        """Transfer until the file is complete."""
        failures, furthest = 0, self.size()
        while True:
            try:
                return self._transfer()
            except HTTPError as error:
                if error.code not in _TRANSIENT:
                    raise ValueError(
                        f"need a file at {self.url}, got HTTP {error.code} {error.reason} "
                        f"(params.yaml: {self.key}.url)"
                    ) from error
                reason: Exception = error
            except _NETWORK_ERRORS as error:
                reason = error
            except OSError as error:
                if not is_disk_full(error):
                    raise
                self.part.unlink(missing_ok=True)
                raise disk_full(self.part) from error
            # Progress resets the count: a server may cut a long download many times.
            failures = 1 if self.size() > furthest else failures + 1
            furthest = max(furthest, self.size())
            if failures >= self.attempts:
                raise ConnectionError(
                    f"need {self.url}, got {reason!r} {failures} times "
                    f"(params.yaml: {self.key}.url); {self.size()} bytes are kept in "
                    f"{self.part}, run again to resume"
                ) from reason
            time.sleep(self.wait * 2 ** (failures - 1))

    def _transfer(self) -> None:
        """One connection: append what is missing, or start over if the server insists."""
        offset = self.size()
        headers = {"User-Agent": "fewstep"}
        if offset:
            headers["Range"] = f"bytes={offset}-"
            if self.etag:
                headers["If-Range"] = self.etag  # if the file was replaced, the server sends all
        try:
            response = urlopen(Request(self.url, headers=headers), timeout=self.timeout)
        except HTTPError as error:
            if error.code != 416 or not offset:
                raise
            # There is nothing after our last byte: we have everything, or the file was replaced.
            if error.headers.get("Content-Range") == f"bytes */{offset}":
                return
            self.part.unlink()
            raise ConnectionError(f"{self.url} is not longer than {offset} bytes") from error
        with response:
            resumed = response.status == 206
            content_range = response.headers.get("Content-Range", "")
            if resumed and not content_range.startswith(f"bytes {offset}-"):
                self.part.unlink()
                raise ConnectionError(f"asked for bytes {offset}-, got {content_range!r}")
            etag = response.headers.get("ETag", "")
            self.etag = etag if etag.startswith('"') else None  # If-Range forbids weak ones (W/...)
            start = offset if resumed else 0
            length = response.headers.get("Content-Length")
            total = start + int(length) if length else None
            name = Path(urlsplit(self.url).path).name
            with (
                self.part.open("ab" if resumed else "wb") as file,
                progress(total, f"download {name}", "B", initial=start) as bar,
            ):
                while chunk := response.read(_CHUNK):
                    file.write(chunk)
                    bar.update(len(chunk))
                file.flush()
                os.fsync(file.fileno())
        if total is not None and self.size() < total:
            raise ConnectionError(f"connection closed after {self.size()} of {total} bytes")


def _measured(download: _Download) -> Path:
    """The file at a URL with an unknown sha256, in the cache under the one it turns out to have.

    A note beside it records the digest of this URL, so that nothing is downloaded twice. A part
    left by an interrupted run is discarded: without a checksum, nothing would reveal a file glued
    together from two.
    """
    cache, note = download.part.parent, download.part.with_suffix(".sha256")
    with FileLock(download.part.with_suffix(".lock")):
        if note.is_file():
            whole = cache / note.read_text().split()[0]
            if whole.is_file() and sha256_file(whole) == whole.name:
                return whole
        download.part.unlink(missing_ok=True)
        download.run()
        whole = cache / sha256_file(download.part)
        os.replace(download.part, whole)
        with atomic_path(note) as path:
            path.write_text(f"{whole.name}  {download.url}\n")
    return whole


def _unknown(url: str, sha256: str, got: str, path: Path, key: str) -> ValueError:
    return ValueError(
        f"need the sha256 of {url}, got {sha256}; the file is kept in {path}, its sha256 is {got}: "
        f"compare it with a source you trust, then write it in place of {sha256} "
        f"(params.yaml: {key}.sha256)"
    )


def _mismatch(url: str, sha256: str, got: str, path: Path, key: str) -> ValueError:
    return ValueError(f"need sha256 {sha256}, got {got} from {url} (params.yaml: {key}.sha256)")
