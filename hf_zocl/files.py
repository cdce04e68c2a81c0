"""Files and folders that are whole or absent at any moment, and on the disk before their names are."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(path: str | os.PathLike) -> Iterator[Path]:
    """A file to write beside `path`, which takes its place when the block ends, and is removed when it raises.

    Several processes of a machine may write the same file: the last wins.
    """
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield unfinished
        _flush(unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def replace_folder(unfinished: Path, folder: Path) -> None:
    """Let a folder that is complete take the place of `folder`."""
    for file in unfinished.rglob("*"):
        if file.is_file():
            _flush(file)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(unfinished, folder)


def remove_unfinished(folder: Path) -> None:
    """Remove the files that a process which was killed was writing into `folder`."""
    for file in folder.glob(".*.tmp"):
        if file.is_file():
            file.unlink()


def _flush(file: Path) -> None:
    """A power cut must not leave a name without its content."""
    with file.open("rb+") as opened:
        os.fsync(opened.fileno())
