"""Files that are either whole or absent: atomic writes, JSON, sha256."""

import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_PROBE = 1 << 20  # bytes


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Generator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` when the block succeeds.

    The temporary name keeps the suffix, because `np.savez` and others append a missing one.
    Parents are created. On any exception (Ctrl-C too) the temporary file is removed and what
    stood at `path` before stays as it was.

    Raises:
        OSError: the disk is full (errno ENOSPC), whatever class the writer in the block raised;
            the message names the file and the free bytes.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.tmp{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _fsync(temporary)
        os.replace(temporary, path)
        _fsync(path.parent)  # else a power cut can forget the rename
    except BaseException as error:
        full = isinstance(error, Exception) and (is_disk_full(error) or _is_full(temporary))
        temporary.unlink(missing_ok=True)
        if full:
            raise disk_full(path) from error
        raise


def replace_folder(source: Path, target: Path) -> None:
    """Put a copy of the folder `source`, or an empty folder, in the place of `target`."""
    half = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        half.mkdir(parents=True)
        if source.is_dir():
            shutil.copytree(source, half, dirs_exist_ok=True)
        shutil.rmtree(target, ignore_errors=True)
        half.rename(target)
    finally:
        shutil.rmtree(half, ignore_errors=True)


def is_disk_full(error: BaseException) -> bool:
    """Whether `error` says that the disk, the quota or the file size limit is reached.

    lmdb and safetensors raise their own classes without an errno, hence the look at the text.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _FULL
    return any(os.strerror(code) in str(error) for code in _FULL)


def disk_full(path: Path) -> OSError:
    """The error for a disk that was full while `path` was being written, after tidying up."""
    folder = next((p for p in path.absolute().parents if p.is_dir()), Path("/"))
    free = shutil.disk_usage(folder).free
    return OSError(
        errno.ENOSPC,
        f"disk, quota or file size limit reached while writing {path}; "
        f"nothing half-written was kept, which leaves {free} bytes free",
    )


def write_json(path: str | os.PathLike[str], obj: Any) -> None:  # noqa: ANN401
    """Write `obj` as JSON, atomically: keys in the order given, indent 2, no NaN.

    Raises:
        ValueError: `obj` holds NaN or infinity, which JSON cannot say.
    """
    try:
        text = json.dumps(obj, indent=2, allow_nan=False, ensure_ascii=False)
    except ValueError as error:
        raise ValueError(f"need finite numbers in {path}, got NaN or infinity") from error
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def read_json(path: str | os.PathLike[str]) -> Any:  # noqa: ANN401
    """Read a JSON file.

    Raises:
        ValueError: the file is not JSON; the message names it and the place.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # UnicodeDecodeError is one too
        raise ValueError(f"need JSON in {path}, got: {error}") from error


def sha256_file(path: str | os.PathLike[str]) -> str:
    """sha256 of the file's bytes, 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_full(temporary: Path) -> bool:
    """Whether a little more fits behind `temporary`, which is about to be removed.

    Asked because a full disk reaches us as "Input/output error" from lmdb and as "unexpected
    pos" from torch.save.
    """
    try:
        with open(temporary, "r+b") as file:
            file.seek(0, os.SEEK_END)
            file.write(bytes(_PROBE))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return is_disk_full(error)
    return False


def _fsync(path: Path) -> None:
    """Flush a file or folder to the disk, where delayed ENOSPC shows up."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
