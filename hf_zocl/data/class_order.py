"""The order in which classes arrive, and the size of each task."""

from __future__ import annotations

import logging
import numbers
from collections.abc import Sequence
from typing import Literal

import datasets
import numpy as np

from ..checks import check_type
from .splits import listed


logger = logging.getLogger(__name__)

MOST_LABELS = 10_000_000  # a table over all ids takes eight bytes per id


def draw_class_order(label_ids: list[int], given: Sequence[int] | None, seed: int | None) -> tuple[int, ...]:
    """The label ids in order of arrival: as given, drawn by a seed, or the dataset's own."""
    if given is None:
        count = len(label_ids)
        positions = range(count) if seed is None else np.random.RandomState(seed).permutation(count)
        return tuple(label_ids[position] for position in positions)
    order = tuple(int(label) for label in given)
    known = set(label_ids)
    unknown = [label for label in order if label not in known]
    repeated = sorted({label for label in order if order.count(label) > 1})
    if not order or unknown or repeated:
        what = f"unknown label ids {listed(unknown)}" if unknown else f"repeated label ids {listed(repeated)}"
        raise ValueError(
            f"class_order: {what if order else 'it is empty'}; expected label ids of the dataset's {len(label_ids)} "
            f"classes, each once ({label_ids[0]} to {label_ids[-1]})."
        )
    return order


def task_sizes(classes: int, initial_increment: int | None, increment: int | Literal["all"]) -> list[int]:
    """The number of classes of every task."""
    if increment == "all":
        return [classes]
    for argument, value in (("increment", increment), ("initial_increment", initial_increment or increment)):
        expected = f"a whole number from 1 to the stream's {classes} classes"
        check_type(argument, value, numbers.Integral, expected)
        if not 1 <= value <= classes:
            raise ValueError(f"{argument}={value!r}: expected {expected}.")
    sizes = [initial_increment or increment]
    while (left := classes - sum(sizes)) > 0:
        sizes.append(min(increment, left))
    if len(sizes) > 1 and sizes[-1] != increment:
        logger.warning(
            "increment=%d does not divide the classes (%d, the first task has %d): the last of %d tasks has %d.",
            *(increment, classes, sizes[0], len(sizes), sizes[-1]),
        )
    return sizes


def arrival_labels(images: datasets.Dataset, class_order: Sequence[int]) -> np.ndarray:
    """The position of every label id in the class order; -1 for ids that are left out.

    Raises:
        ValueError: If an id is too large to be a class number.
    """
    feature = images.features["label"]
    size = max(class_order) + 1
    if size > MOST_LABELS:
        raise ValueError(
            f"label id {size - 1}: expected class numbers, below {MOST_LABELS:,}; Dataset.class_encode_column numbers "
            "the values of a column."
        )
    if isinstance(feature, datasets.ClassLabel):
        size = max(size, feature.num_classes)
    arrival = np.full(size, -1, dtype=np.int64)
    arrival[list(class_order)] = np.arange(len(class_order))
    return arrival
