"""A hash of a run's data, so that a run never goes on with other data unnoticed."""

from __future__ import annotations

import os
from collections.abc import Iterator

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from ..trainer.compat import rows_in_table
from .stream import TaskStream


# All images of a task's split are read up to this many bytes together; beyond that only every second, third …
READ_BYTES = 1_000_000_000
BATCH = 256


def stream_digest(stream: TaskStream) -> str:
    """A hash of a stream's labels, its images' stored sizes, and image bytes, up to 1 GB per task and split.

    It does not depend on where the dataset is, or on whether its images are files or in a table.
    """
    digest = xxhash.xxh3_128()
    for task in stream:
        for data in (task.train, task.test):
            _add(digest, data)
    return digest.hexdigest()


def _add(digest: xxhash.xxh3_128, data: datasets.Dataset) -> None:
    digest.update(np.asarray(data["label"][:], dtype=np.int64).tobytes())
    sizes = _sizes(data)
    digest.update(sizes.tobytes())
    step = -(-int(sizes.sum()) // READ_BYTES) or 1
    images = data.select_columns("image").cast_column("image", datasets.Image(decode=False))
    read = range(0, len(images), step)
    for start in range(0, len(read), BATCH):
        for image in images[list(read[start : start + BATCH])]["image"]:
            digest.update(_content(image))


def _sizes(data: datasets.Dataset) -> np.ndarray:
    """The stored size of every image in bytes, int64; images in a table are not read for it."""
    lengths = pc.binary_length(pc.struct_field(data.data.column("image"), "bytes"))
    sizes = pc.fill_null(pc.cast(lengths, pa.int64()), 0).to_numpy()[_rows(data)]
    for place, path in _files(data):
        sizes[place] = os.path.getsize(path)
    return sizes


def files_digest(data: datasets.Dataset) -> str:
    """A hash of the sizes and times of image files: the table of their paths does not show that one was replaced."""
    digest = xxhash.xxh3_128()
    for place, path in _files(data):
        status = os.stat(path)
        digest.update(f"{place} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _files(data: datasets.Dataset) -> Iterator[tuple[int, str]]:
    """The position and the path of every image that is a file outside the table."""
    column, rows = data.data.column("image"), _rows(data)
    is_file, paths = pc.is_null(pc.struct_field(column, "bytes")).to_numpy(), pc.struct_field(column, "path")
    for place in np.flatnonzero(is_file[rows]):
        path = paths[int(rows[place])].as_py()
        if path is not None and os.path.exists(path):
            yield int(place), path


def _rows(data: datasets.Dataset) -> np.ndarray:
    chosen = rows_in_table(data)
    return np.arange(len(data)) if chosen is None else chosen.to_numpy()


def _content(image: dict | None) -> bytes:
    if image is None:
        return b""
    if image["bytes"] is not None:
        return image["bytes"]
    if image["path"] is None or not os.path.exists(image["path"]):
        return b""
    with open(image["path"], "rb") as file:
        return file.read()


def file_digest(path: str | os.PathLike[str]) -> str:
    """A hash of a file's bytes, to detect damage."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
