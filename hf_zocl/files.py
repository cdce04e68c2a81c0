"""Files and folders that are whole or absent at any moment, and on the disk before their names are."""

import hashlib
import io
import os
import re
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


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
