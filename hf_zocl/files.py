"""Files, also JSON, and folders that are whole or absent at any moment, and flushed before they are named."""

import errno
import hashlib
import io
import json
import math
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


# The system's error numbers for lack of space: on the disk, within a quota, or by the limit on file size (ulimit).
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# A disk with less free space than this counts as full: the failed write has used the rest.
_LEAST_ROOM = 1 << 20


def room_error(folder: Path, error: Exception, needed: int = 0) -> OSError | None:
    """The system's error behind `error`, if a write into `folder` failed for lack of space; otherwise None.

    torch and safetensors raise errors without the system's number, so the disk is checked: its free space, whether a
    small file can be written, and whether a file has reached the size limit.

    Args:
        folder: The folder to write into; it need not exist.
        error: The error that was raised.
        needed: The size in bytes of the largest file to write; its unfinished part may already be removed, and the
            space free again.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return error if error.errno in NO_ROOM else None
    number = _want_of_room(existing_folder(folder), needed)
    return None if number is None else OSError(number, os.strerror(number))


def existing_folder(path: str | os.PathLike) -> Path:
    """The innermost folder of `path` that exists."""
    path = Path(path).absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def _want_of_room(folder: Path, needed: int) -> int | None:
    if shutil.disk_usage(folder).free < max(needed, _LEAST_ROOM):
        return errno.ENOSPC
    limit = _greatest_file()
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(min(_LEAST_ROOM, limit)))
    except OSError as error:
        return error.errno if error.errno in NO_ROOM else None
    if limit == sys.maxsize:
        return None
    is_reached = limit < needed or any(file.stat().st_size == limit for file in folder.rglob("*"))
    return errno.EFBIG if is_reached else None


def _greatest_file() -> int:
    """The largest size in bytes that this process may give a file (`ulimit -f`)."""
    try:
        import resource
    except ImportError:  # not on Windows
        return sys.maxsize
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    return sys.maxsize if limit == resource.RLIM_INFINITY else limit


@contextmanager
def written_whole(path: str | os.PathLike) -> Iterator[Path]:
    """Give a file next to `path` to write to. It replaces `path` when the block ends, and is removed if that raises.

    Several processes on a machine may write the same file: the last one wins.

    Raises:
        OSError: With the system's number, if there is no space, whatever error the block raised.
    """
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield unfinished
        _flush(unfinished)
        os.replace(unfinished, path)
    except Exception as error:
        no_room = room_error(path.parent, error)  # before removing the unfinished file frees its space
        if no_room in (None, error):
            raise
        raise no_room from error
    finally:
        unfinished.unlink(missing_ok=True)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file, which is whole or absent at any moment.

    Raises:
        ValueError: If a number is not finite, because JSON has no such numbers; the message names it.
    """
    try:
        text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        found = next(not_finite(content), None)
        if found is None:
            raise
        raise ValueError(f"{path}: {found[0]} is {found[1]}: expected a finite number.") from error
    with written_whole(path) as unfinished:
        unfinished.write_text(text + "\n", encoding="utf-8")


def not_finite(content: Any, where: str = "") -> Iterator[tuple[str, float]]:
    """The numbers in a JSON-like object that are not finite, each after its place."""
    if isinstance(content, float) and not math.isfinite(content):
        yield where, content
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield from not_finite(value, f"{where}.{key}" if where else str(key))


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: If the file holds no JSON object, or cannot be read.
    """
    if not file.is_file():
        raise ValueError(f"{file} is missing.")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged: it cannot be read as JSON ({error}).") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} is damaged: expected a JSON object, got {type(content).__name__}.")
    return content


def replace_folder(unfinished: Path, folder: Path) -> None:
    """Replace `folder` by a complete folder."""
    for file in unfinished.rglob("*"):
        if file.is_file():
            _flush(file)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(unfinished, folder)


def remove_unfinished(folder: Path, names: Collection[str]) -> None:
    """Remove the unfinished files with one of `names` that a killed process left in `folder`."""
    for file in folder.glob(".*.tmp"):
        match = re.fullmatch(r"\.(.+)\.\d+\.tmp", file.name)
        if match and match[1] in names and file.is_file():
            file.unlink()


def fingerprint(content: Path | bytes) -> dict[str, Any]:
    """The size and SHA-256 of a file, or of the content of one."""
    digest, size = hashlib.sha256(), 0
    with io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
            size += len(block)
    return {"bytes": size, "sha256": digest.hexdigest()}


def _flush(file: Path) -> None:
    """Flush a file to the disk, so that a power cut never leaves a name without its content."""
    with file.open("rb+") as opened:
        os.fsync(opened.fileno())
