"""Files that are either complete or absent: atomic writes, JSON, sha256."""

import errno
import hashlib
import json
import os
import secrets
import shutil
import stat
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
    Parent folders are created. The file gets the permissions of any new file there, by the umask:
    safetensors alone would write 0600, which others of the group could not read, and lmdb 0755.
    On any exception (Ctrl-C too) the temporary file is removed and
    `path` stays as it was.

    Raises:
        OSError: the disk is full (errno ENOSPC), whatever the block raised; the message names the
            file and the free bytes.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.tmp{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        mode = _mode_of_new(temporary)
        yield temporary
        temporary.chmod(mode)
        _fsync(temporary)
        os.replace(temporary, path)
        _fsync(path.parent)  # otherwise a power cut can undo the rename
    except BaseException as error:
        full = isinstance(error, Exception) and (is_disk_full(error) or _is_full(temporary))
        temporary.unlink(missing_ok=True)
        if full:
            raise disk_full(path) from error
        raise


def _mode_of_new(path: Path) -> int:
    """The permissions of a file created at `path`, which is removed again.

    Reading the umask itself would mean to change it for a moment, for all threads.
    """
    path.touch(exist_ok=False)
    mode = stat.S_IMODE(path.stat().st_mode)
    path.unlink()
    return mode


def replace_folder(source: Path, target: Path) -> None:
    """Replace `target` by a copy of the folder `source`, or by an empty folder if there is none."""
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
    """Whether `error` means that the disk, the quota or the file size limit is exhausted.

    lmdb and safetensors raise their own classes without an errno, so their text has to do.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _FULL
    return any(os.strerror(code) in str(error) for code in _FULL)


def disk_full(path: Path) -> OSError:
    """The error for a disk that filled up while `path` was written; call it after cleaning up."""
    folder = next((p for p in path.absolute().parents if p.is_dir()), Path("/"))
    free = shutil.disk_usage(folder).free
    return OSError(
        errno.ENOSPC,
        f"disk, quota or file size limit reached while writing {path}; "
        f"nothing half-written was kept; {free} bytes are free now",
    )


def write_json(path: str | os.PathLike[str], obj: Any) -> None:  # noqa: ANN401
    """Write `obj` as JSON, atomically: keys in the given order, indent 2, no NaN.

    Characters that a terminal would obey, in names from others' files, are written as escapes.

    Raises:
        ValueError: `obj` contains NaN or infinity, which JSON does not have.
    """
    try:
        text = json.dumps(obj, indent=2, allow_nan=False, ensure_ascii=False)
    except ValueError as error:
        raise ValueError(f"need finite numbers in {path}, got NaN or infinity") from error
    with atomic_path(path) as temporary:
        temporary.write_text(_visible(text) + "\n", encoding="utf-8")


def _visible(text: str) -> str:
    """JSON whose unprintable characters, which only its strings have, are escapes."""
    if text.isascii():  # of ASCII, json escapes them itself
        return text
    return "".join(c if c == "\n" or c.isprintable() else json.dumps(c)[1:-1] for c in text)


def read_json(path: str | os.PathLike[str]) -> Any:  # noqa: ANN401
    """Read a JSON file; a ValueError names the file and the position of what is wrong."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # JSONDecodeError or UnicodeDecodeError
        raise ValueError(f"need JSON in {path}, got: {error}") from error


def sha256_file(path: str | os.PathLike[str]) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_full(temporary: Path) -> bool:
    """Whether `temporary`, which is about to be removed, cannot grow by a little more.

    The exception may not tell: on a full disk, lmdb raises "Input/output error" and torch.save
    "unexpected pos".
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
    """Flush a file or folder to the disk; a delayed ENOSPC is raised here."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
