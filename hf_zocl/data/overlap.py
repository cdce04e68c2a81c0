"""Images that are both trained and tested on: the same file, or the same content, in two splits."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..trainer.compat import rows_in_table
from .splits import Split


UNKNOWN = -1  # the size of a file that is not on this machine
CHUNK = 100_000
PROBE = 4096  # bytes at either end that are compared before two images are read whole


def shared_images(train: Split, test: Split) -> list[tuple[int, int]]:
    """The images of `test` that `train` holds too, as positions in `train` and `test`.

    Images are compared as files: by size, then by both ends, then whole, so that little of a large dataset is read;
    files that are not on this machine, by path. No image is decoded.
    """
    ours, theirs = _Files.of(train), _Files.of(test)
    by_probe: dict[bytes, list[int]] = {}
    for position in ours.candidates(theirs):
        by_probe.setdefault(ours.probe(position), []).append(int(position))
    found = []
    for position in theirs.candidates(ours):
        candidates = by_probe.get(theirs.probe(position), ())
        same = next((other for other in candidates if ours.is_same(other, theirs, position)), None)
        if same is not None:
            found.append((same, int(position)))
    return found


def describe_shared(found: list[tuple[int, int]], train: Split, test: Split) -> str:
    """Describe the images that two splits share, as text."""
    many = f"{len(found)} of {len(test.row_ids)} test images are also trained on"
    splits = tuple(zip((train, test), found[0], strict=True))
    paths = [_Files.of(split).paths[position].as_py() for split, position in splits]
    if paths[0] == paths[1] and paths[0] is not None and os.path.isfile(paths[0]):
        return (
            f"{paths[0]} is in both splits, because a folder named like a split is taken for one (only in a layout "
            f"like train/CLASS/1.png may a class have such a name); {many}"
        )
    ours, theirs = (
        f"row {split.row_ids[position]} of split {split.name!r}" + (f" ({path})" if path else "")
        for (split, position), path in zip(splits, paths, strict=True)
    )
    return f"{ours} and {theirs} are the same image; {many}"


def _size(path: str | None) -> int:
    try:
        return os.stat(path).st_size if path else UNKNOWN
    except (OSError, ValueError):
        return UNKNOWN


@dataclass(frozen=True)
class _Files:
    """The images of a split as files: on the disk, or within the dataset.

    Args:
        sizes: The size of every image in bytes, or `UNKNOWN`. Shape: (images,).
        paths: The path of every image.
        contents: The bytes of images within the dataset, as views: nothing is read yet.
    """

    sizes: np.ndarray
    paths: pa.ChunkedArray
    contents: _Rows

    @classmethod
    def of(cls, split: Split) -> _Files:
        data = split.data
        column = data.data.table["image"]
        rows = rows_in_table(data)
        contents, paths = pc.struct_field(column, "bytes"), pc.struct_field(column, "path")
        sizes = pc.binary_length(contents)
        if rows is not None:
            sizes, paths = sizes.take(rows), paths.take(rows)
        sizes = sizes.fill_null(UNKNOWN).to_numpy().astype(np.int64)
        for start in range(0, len(sizes), CHUNK):
            chunk = sizes[start : start + CHUNK]
            if (chunk == UNKNOWN).any():
                names = paths.slice(start, CHUNK).to_pylist()
                for position in np.flatnonzero(chunk == UNKNOWN):
                    chunk[position] = _size(names[position])
        return cls(sizes, paths, _Rows(contents, None if rows is None else rows.to_numpy()))

    def candidates(self, others: _Files) -> np.ndarray:
        """The positions of images that may be among the others: they share a size, or if that is unknown a path."""
        has_size = (self.sizes != UNKNOWN) & np.isin(self.sizes, others.sizes)
        has_path = pc.is_in(self.paths, value_set=others.paths, skip_nulls=True).to_numpy().astype(bool)
        return np.flatnonzero(has_size | ((self.sizes == UNKNOWN) & has_path))

    def probe(self, position: int) -> bytes:
        """A checksum of both ends of an image and its size; if the size is unknown, its path."""
        size, content = int(self.sizes[position]), self.contents[position]
        if size == UNKNOWN:
            return self.paths[position].as_py().encode()
        if content is not None:
            head, tail = content[:PROBE], content[-PROBE:]
        else:
            with open(self.paths[position].as_py(), "rb") as file:
                head = memoryview(file.read(PROBE))
                file.seek(max(0, size - PROBE))
                tail = memoryview(file.read())
        return hashlib.blake2b(bytes(head) + bytes(tail), digest_size=16).digest() + size.to_bytes(8, "little")

    def is_same(self, position: int, others: _Files, other: int) -> bool:
        if self.sizes[position] == UNKNOWN:
            return True  # the paths are the same, and nothing more can be compared
        return self.read(position) == others.read(other)

    def read(self, position: int) -> bytes:
        content = self.contents[position]
        if content is not None:
            return bytes(content)
        with open(self.paths[position].as_py(), "rb") as file:
            return file.read()


class _Rows:
    """The rows of a chunked column of bytes, each a view that costs nothing until read."""

    def __init__(self, column: pa.ChunkedArray, rows: np.ndarray | None):
        self.chunks, self.rows = column.chunks, rows
        self.starts = np.cumsum([0, *(len(chunk) for chunk in self.chunks)])

    def __getitem__(self, position: int) -> memoryview | None:
        row = position if self.rows is None else int(self.rows[position])
        chunk = int(np.searchsorted(self.starts, row, side="right")) - 1
        buffer = self.chunks[chunk][int(row - self.starts[chunk])].as_buffer()
        return None if buffer is None else memoryview(buffer)
