"""A lock on a folder, which the operating system releases when its holder ends or dies."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import IO

from transformers.utils import logging


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt


logger = logging.get_logger(__name__)

LOCK_FILE = ".lock"
_LOCKED_BYTE = 1 << 20  # Windows lets nobody read a locked byte, and the first bytes name the holder


class FolderInUseError(ValueError):
    """A folder is locked by another process."""


class FolderLock:
    """A lock on a folder, held by one process at a time: `with FolderLock(folder):`.

    The lock is the operating system's, on the file `.lock`, so a killed holder releases it. Processes that
    the holder forks do not hold it. On a file system without locks, a warning takes the lock's place.

    Args:
        folder: The folder. If it is missing, it is made, and removed again at the end if it is then empty.

    Raises:
        FolderInUseError: On entering, if another process holds the lock.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._file: IO[str] | None = None
        self._made: list[Path] = []

    def __enter__(self) -> FolderLock:
        self._made = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._file = self._acquire()
        except BaseException:
            self._remove_made()
            raise
        _held.add(self)
        return self

    def __exit__(self, *_: object) -> None:
        _held.discard(self)
        file, self._file = self._file, None
        if file is not None:
            if fcntl is not None:  # still locked, so that nobody locks a file that has lost its name
                self._path.unlink(missing_ok=True)
            file.close()
            if fcntl is None:
                with suppress(OSError):  # another process may hold it by now
                    self._path.unlink(missing_ok=True)
        self._remove_made()

    @property
    def _path(self) -> Path:
        return self.folder / LOCK_FILE

    def _acquire(self) -> IO[str] | None:
        while True:
            file = os.fdopen(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666), "r+", encoding="utf-8")
            try:
                _lock(file)
            except BlockingIOError:
                holder = file.readline().strip() if fcntl is not None else ""
                file.close()
                raise FolderInUseError(
                    f"{self.folder} is in use by another run{f' ({holder})' if holder else ''}: wait until it ends, "
                    "or choose another output_dir."
                ) from None
            except OSError as error:
                file.close()
                self._path.unlink(missing_ok=True)
                logger.warning(f"{self.folder} cannot be locked ({error.strerror}): do not start another run there.")
                return None
            if self._is_current(file):
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
                file.flush()
                return file
            file.close()  # the last holder has just removed this file

    def _is_current(self, file: IO[str]) -> bool:
        try:
            return fcntl is None or os.path.samestat(os.fstat(file.fileno()), os.stat(self._path))
        except FileNotFoundError:
            return False

    def _remove_made(self) -> None:
        for path in self._made:
            with suppress(OSError):
                path.rmdir()
        self._made = []


_held: set[FolderLock] = set()


def _lock(file: IO[str]) -> None:
    """Lock an open file, or raise BlockingIOError at once."""
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    try:
        os.lseek(file.fileno(), _LOCKED_BYTE, os.SEEK_SET)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except PermissionError as error:
        raise BlockingIOError(*error.args) from error
    finally:
        os.lseek(file.fileno(), 0, os.SEEK_SET)


def _let_go() -> None:
    """Release the lock in a forked process, such as a data loader worker, which must not hold it too."""
    for lock in _held:
        if lock._file is not None:
            lock._file.close()
            lock._file = None
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
