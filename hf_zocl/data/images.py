"""A stream's images: decoded and resized once, kept as bytes in a memory-mapped Arrow file, and made into batches."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from datasets.fingerprint import Hasher
from torch.utils.data import Dataset
from transformers import BaseImageProcessor, ProcessorMixin
from transformers.utils import logging

from ..files import written_whole
from ..models.pixels import CORRUPT, eight_bits, why_corrupt
from ..trainer.compat import dataset_fingerprint
from .fingerprint import file_digest, files_digest
from .stream import TaskStream
from .tasks import Task


logger = logging.get_logger(__name__)

DEFAULT_CACHE_GB = 4.0
PIXELS = 2  # version of the conversion to pixels: caches of another version are not found
_AS_THEY_ARE = {"do_resize": False, "do_center_crop": False, "do_convert_rgb": False}


class PixelCodec:
    """An image processor in two steps: an image to pixels (8 bits per value), and pixels to the model's values.

    The second step looks each value up in a table that the processor itself filled, so the two steps give exactly the
    processor's values.

    Args:
        image_processor: A processor that converts, resizes, crops, rescales and normalises, as CLIP's does.

    Raises:
        ValueError: If its images would differ in size.
    """

    def __init__(self, image_processor: BaseImageProcessor):
        self.image_processor = image_processor
        size = dict(image_processor.crop_size if image_processor.do_center_crop else image_processor.size)
        is_fixed = image_processor.do_resize or image_processor.do_center_crop
        if not is_fixed or size.get("height") is None or size.get("width") is None:
            raise ValueError(
                f"the image processor makes images of several sizes (do_resize={image_processor.do_resize}, "
                f"do_center_crop={image_processor.do_center_crop}, size={dict(image_processor.size)}), which cannot "
                "form a batch; expected do_center_crop=True, or a size of height and width."
            )
        self.shape = (3, int(size["height"]), int(size["width"]))
        ramp = np.tile(np.arange(256, dtype=np.uint8), (3, 1, 1))
        values = image_processor(
            images=[ramp], input_data_format="channels_first", return_tensors="pt", **_AS_THEY_ARE
        )
        self._table = values["pixel_values"][0, :, 0].numpy().ravel()
        self._channel = (256 * np.arange(3, dtype=np.int32)).reshape(3, 1, 1)

    @property
    def image_bytes(self) -> int:
        """The size of one image in bytes."""
        return int(np.prod(self.shape))

    def pixels(self, image: Any) -> bytes:
        """The pixels of one PIL image: scaled to 8 bits, converted, resized and cropped; bytes of `shape`.

        Raises:
            ValueError: If the scale of the image's values is unknown, see `eight_bits`.
        """
        pixels = self.image_processor(
            images=[eight_bits(image)], do_rescale=False, do_normalize=False, return_tensors="np"
        )
        return np.asarray(pixels["pixel_values"][0], dtype=np.uint8).tobytes()

    def values(self, pixels: Iterable[bytes]) -> torch.Tensor:
        """The model's values for some pixels: rescaled, normalised, float32; `(images, channels, height, width)`."""
        array = np.frombuffer(b"".join(pixels), dtype=np.uint8).reshape(-1, *self.shape)
        return torch.from_numpy(np.take(self._table, array + self._channel))


class ImageCollator:
    """Makes a batch of a task's images: the processor's pixel values, and labels in order of arrival.

    Args:
        processor: The CLIP model's processor.
        arrival_labels: The position in the class order of every label id of the dataset.
        first_label: Subtracted from the arrival labels, because training sees only the task's own classes.
        codec: Reads images that are bytes (see `prepare_images`); PIL images go through the processor.
    """

    def __init__(
        self,
        processor: ProcessorMixin,
        arrival_labels: np.ndarray,
        first_label: int = 0,
        codec: PixelCodec | None = None,
    ):
        self.image_processor = processor.image_processor
        self.arrival_labels, self.first_label, self.codec = arrival_labels, first_label, codec

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        images = [example["image"] for example in examples]
        labels = self.arrival_labels[[example["label"] for example in examples]] - self.first_label
        if isinstance(images[0], bytes):
            pixel_values = self.codec.values(images)
        else:
            images = [eight_bits(image) for image in images]
            pixel_values = self.image_processor(images=images, return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixel_values, "labels": torch.as_tensor(labels, dtype=torch.long)}


def prepare_images(
    stream: TaskStream,
    codec: PixelCodec,
    cache_gb: float = DEFAULT_CACHE_GB,
    skip_corrupt: bool = False,
    workers: int = 0,
) -> tuple[TaskStream, int]:
    """Decode and resize a stream's images ahead of training, if their pixels fit into the cache.

    The cache is a memory-mapped Arrow file for each task and split, in the cache folder of `datasets`. Its name is a
    hash of the images and the processor, so that a later run finds it. If all pixels together exceed `cache_gb`, each
    image is decoded whenever it is needed.

    Args:
        stream: The tasks.
        codec: The image processor's two steps.
        cache_gb: The greatest size of the pixels, in GB (1e9 bytes); 0: no cache.
        skip_corrupt: Leave out images that cannot be decoded, instead of stopping.
        workers: How many processes decode; 0: this one.

    Returns:
        The same tasks with images as bytes, and how many images were left out.

    Raises:
        ValueError: If an image cannot be decoded (the message names its row; without a cache, it is raised when the
            image is needed), or if `skip_corrupt` leaves a class without images.
    """
    images = sum(len(task.train) + len(task.test) for task in stream)
    size = images * codec.image_bytes / 1e9
    if size > cache_gb:
        logger.info(
            f"{images} images take {size:.1f} GB: above image_cache_gb={cache_gb}, so each is decoded on demand."
        )

    def prepare(task: Task) -> Task:
        parts = {}
        for split, data, rows in (("train", task.train, task.train_rows), ("test", task.test, task.test_rows)):
            source = _Source(data, rows, f"{stream.name}, task {task.index}, {split} images", codec)
            parts[split] = source.cached(skip_corrupt, workers) if size <= cache_gb else source.lazy(skip_corrupt)
            if skip_corrupt and len(data):  # a stream for testing only has no training images
                _check_classes(task, parts[split], source.where)
        return replace(task, train_rows=None, test_rows=None, **parts)

    prepared = stream.map_tasks(prepare)
    skipped = images - sum(len(task.train) + len(task.test) for task in prepared)
    if skipped:
        logger.warning(f"skip_corrupt: {skipped} of {images} images cannot be decoded and are left out.")
    return prepared, skipped


class _Source:
    """The images of one task and split, with the rows they come from."""

    def __init__(self, data: datasets.Dataset, rows: np.ndarray | None, where: str, codec: PixelCodec):
        self.feature = data.features["image"]
        self.table = dataset_fingerprint(data)
        self.data = data.cast_column("image", datasets.Image(decode=False))
        self.rows = np.arange(len(data)) if rows is None else rows
        self.where, self.codec = where, codec

    def fingerprint(self) -> str:
        """A hash of all that the pixels in the cache depend on."""
        processor = self.codec.image_processor.to_json_string()
        return Hasher.hash((self.table, files_digest(self.data), processor, datasets.__version__, PIXELS))

    def decode(self, image: dict[str, Any] | None, index: int) -> bytes:
        """One image's pixels.

        Raises:
            ValueError: If it cannot be decoded; the message names its row in the split.
        """
        try:
            if image is None:
                raise ValueError("it is missing")
            return self.codec.pixels(self.feature.decode_example(image))
        except CORRUPT as error:
            raise ValueError(
                f"{self.where}: the image in row {self.rows[index]} cannot be decoded ({why_corrupt(error)}); "
                "skip_corrupt leaves such images out."
            ) from error

    def readable(self, image: dict[str, Any] | None, index: int) -> bytes | None:
        try:
            return self.decode(image, index)
        except ValueError:
            logger.warning(f"{self.where}: the image in row {self.rows[index]} cannot be decoded and is left out.")
            return None

    def cached(self, skip_corrupt: bool, workers: int) -> datasets.Dataset:
        """Decode all images into a memory-mapped file, or open the file of an earlier run."""
        if not len(self.data):  # `map` would return the source's own file
            return self.data
        read = self.readable if skip_corrupt else self.decode
        fingerprint = f"{self.fingerprint()}{'-skip' if skip_corrupt else ''}"

        def decode(batch: dict[str, list], indices: list[int]) -> dict[str, list]:
            pixels = [read(image, index) for image, index in zip(batch["image"], indices, strict=True)]
            kept = [index for index, value in enumerate(pixels) if value is not None]
            return {"image": [pixels[i] for i in kept], "label": [batch["label"][i] for i in kept]}

        def made(**options: Any) -> datasets.Dataset:
            return self.data.map(
                decode,
                batched=True,
                batch_size=256,
                with_indices=True,
                features=datasets.Features({"image": datasets.Value("binary"), "label": self.data.features["label"]}),
                new_fingerprint=fingerprint,
                num_proc=workers or None,
                desc="Decoding images",
                **options,
            )

        started = time.time()
        try:
            images = made()
            if _is_intact(images, started):
                return images
        except (OSError, pa.ArrowException):  # the cache file cannot be read as a table
            pass
        logger.warning(f"{self.where}: the cache of decoded images is damaged, or has no checksum; it is made again.")
        images = made(load_from_cache_file=False)
        _is_intact(images, started)
        return images

    def lazy(self, skip_corrupt: bool) -> LazyImages:
        """All images, decoded when needed; `skip_corrupt` decodes each once beforehand, to find broken ones."""
        kept = np.arange(len(self.data))
        if skip_corrupt:
            kept = np.array([i for i in kept if self.readable(self.data[int(i)]["image"], i) is not None], dtype=int)
        return LazyImages(self, kept)


def _is_intact(images: datasets.Dataset, started: float) -> bool:
    """Tell by the checksums next to them whether the files behind `images` are as they were written.

    Files written after `started` (Unix time in seconds) get their checksums here.
    """
    for file in (Path(each["filename"]) for each in images.cache_files):
        known = file.with_name(f"{file.name}.xxh3")
        digest = file_digest(file)
        if file.stat().st_mtime >= started:
            with written_whole(known) as unfinished:
                unfinished.write_text(digest, encoding="ascii")
        elif not known.is_file() or known.read_text(encoding="ascii", errors="replace") != digest:
            return False
    return True


class LazyImages(Dataset):
    """Images that are decoded when they are needed: examples of `image` (bytes) and `label`."""

    def __init__(self, source: _Source, kept: np.ndarray):
        self.source, self.kept = source, kept

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        rows = self.kept[list(indices)]
        batch = self.source.data[rows.tolist()]
        pixels = [self.source.decode(image, row) for image, row in zip(batch["image"], rows, strict=True)]
        return [{"image": image, "label": label} for image, label in zip(pixels, batch["label"], strict=True)]

    @property
    def labels(self) -> list[int]:
        return self.source.data.select(self.kept)["label"][:]


def _check_classes(task: Task, images: datasets.Dataset | LazyImages, where: str) -> None:
    """Check that every class of the task has an image left."""
    labels = images.labels if isinstance(images, LazyImages) else images["label"][:]
    lost = [name for label, name in zip(task.class_ids, task.class_names, strict=True) if label not in set(labels)]
    if lost:
        raise ValueError(f"skip_corrupt: {where}: no image of {', '.join(map(repr, lost))} can be decoded.")
