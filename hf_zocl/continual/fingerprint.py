"""What a run's data are, in one number: so that a run does not go on with others unseen."""

from __future__ import annotations

import os

import datasets
import numpy as np
import xxhash

from .tasks import TaskStream


# Images are read whole up to so many bytes in all; of more, every second, third … alone.
READ_BYTES = 1_000_000_000
BATCH = 256


def stream_digest(stream: TaskStream) -> str:
    """A hash of a stream's labels and images, as they are stored: their sizes, and of up to 1 GB their bytes.

    It does not depend on where the dataset lies, nor on whether its images are files or stand in a table.
    """
    digest = xxhash.xxh3_128()
    for task in stream:
        for data in (task.train, task.test):
            _add(digest, data)
    return digest.hexdigest()


def _add(digest: xxhash.xxh3_128, data: datasets.Dataset) -> None:
    digest.update(np.asarray(data["label"][:], dtype=np.int64).tobytes())
    images = data.select_columns("image").cast_column("image", datasets.Image(decode=False))
    sizes: list[int] = []
    for start in range(0, len(images), BATCH):
        sizes += [_size(image) for image in images[start : start + BATCH]["image"]]
    digest.update(np.asarray(sizes, dtype=np.int64).tobytes())
    step = -(-sum(sizes) // READ_BYTES) or 1
    read = range(0, len(images), step)
    for start in range(0, len(read), BATCH):
        for image in images[list(read[start : start + BATCH])]["image"]:
            digest.update(_content(image))


def _size(image: dict | None) -> int:
    if image is None:
        return 0
    if image["bytes"] is not None:
        return len(image["bytes"])
    return os.path.getsize(image["path"]) if os.path.exists(image["path"]) else 0


def _content(image: dict | None) -> bytes:
    if image is None or (image["bytes"] is None and not os.path.exists(image["path"])):
        return b""
    if image["bytes"] is not None:
        return image["bytes"]
    with open(image["path"], "rb") as file:
        return file.read()


def file_digest(path: str | os.PathLike[str]) -> str:
    """A hash of a file's bytes, by which damage is seen."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
