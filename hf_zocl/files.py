"""Files that are whole or absent at any moment."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(path: str | os.PathLike) -> Iterator[Path]:
    """A file to write beside `path`, which takes its place when the block ends, and is removed when it raises.

    Processes that write the same file do not disturb each other: the last wins. What takes the place is on the disk by
    then, so that a power cut leaves the old file or the new one.
    """
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield unfinished
        with unfinished.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
