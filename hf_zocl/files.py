"""Files and folders that are whole or absent at any moment, and on the disk before their names are."""

import errno
import hashlib
import io
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


# What the system says where there is no room: on the disk, within a quota, or for a file of that size (ulimit).
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# A disk with less room than this is full: a write that fails has taken what there was.
_LEAST_ROOM = 1 << 20


def room_error(folder: Path, error: Exception, needed: int = 0) -> OSError | None:
    """What the system says of `error`, if it is for want of room that something could not be written into `folder`.

    torch and safetensors raise errors without the system's number. So the disk is asked: for its free space, for as
    much as a small file, and for a file that has grown as far as a file may.

    Args:
        folder: Where it was to be written; it need not be there.
        error: What was raised.
        needed: The bytes of the greatest file: what was written of it may be gone, and its room be free again.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return error if error.errno in NO_ROOM else None
    number = _want_of_room(existing_folder(folder), needed)
    return None if number is None else OSError(number, os.strerror(number))


def existing_folder(path: str | os.PathLike) -> Path:
    """The innermost folder of `path` that is there."""
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
    """The bytes that a file of this process may have (`ulimit -f`)."""
    try:
        import resource
    except ImportError:  # not on Windows
        return sys.maxsize
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    return sys.maxsize if limit == resource.RLIM_INFINITY else limit


@contextmanager
def written_whole(path: str | os.PathLike) -> Iterator[Path]:
    """A file to write beside `path`, which takes its place when the block ends, and is removed when it raises.

    Several processes of a machine may write the same file: the last wins.

    Raises:
        OSError: With the system's number where there is no room, whatever the block raised.
    """
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield unfinished
        _flush(unfinished)
        os.replace(unfinished, path)
    except Exception as error:
        no_room = room_error(path.parent, error)  # asked before what was written makes room again
        if no_room in (None, error):
            raise
        raise no_room from error
    finally:
        unfinished.unlink(missing_ok=True)


def replace_folder(unfinished: Path, folder: Path) -> None:
    """Let a folder that is complete take the place of `folder`."""
    for file in unfinished.rglob("*"):
        if file.is_file():
            _flush(file)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(unfinished, folder)


def remove_unfinished(folder: Path, names: Collection[str]) -> None:
    """Remove what a process which was killed was writing into `folder`, of files that have one of `names`."""
    for file in folder.glob(".*.tmp"):
        match = re.fullmatch(r"\.(.+)\.\d+\.tmp", file.name)
        if match and match[1] in names and file.is_file():
            file.unlink()


def fingerprint(content: Path | bytes) -> dict[str, Any]:
    """Size and SHA-256 of a file, or of what is to be one."""
    digest, size = hashlib.sha256(), 0
    with io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
            size += len(block)
    return {"bytes": size, "sha256": digest.hexdigest()}


def _flush(file: Path) -> None:
    """A power cut must not leave a name without its content."""
    with file.open("rb+") as opened:
        os.fsync(opened.fileno())
