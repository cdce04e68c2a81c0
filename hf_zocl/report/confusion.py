"""The confusion matrix of a model after its last task, with the classes grouped by the task that brought them."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from .predictions import PredictionHistory


MOST_NAMED = 20  # up to this many classes, the names have room next to the matrix
MOST_NUMBERED = 10  # up to this many classes, the cells have room for numbers
INK = (47, 127, 208)  # the page's --ink
PAIRS = 8


@dataclass(frozen=True)
class Confusion:
    """The confusion matrix of the classes seen.

    Args:
        names: The classes, in order of arrival.
        groups: (task, first class, number of classes) of every task that brought classes.
        shares: Row: the true class; column: the predicted class, the last column for all other classes; value: the
            share of the row's test images, `(classes, classes + 1)`.
        pairs: The most frequent mistakes, as (true class, predicted class, images, of how many).
    """

    names: tuple[str, ...]
    groups: tuple[tuple[int, int, int], ...]
    shares: np.ndarray
    pairs: tuple[tuple[str, str, int, int], ...]

    @property
    def is_named(self) -> bool:
        return len(self.names) <= MOST_NAMED

    @property
    def is_numbered(self) -> bool:
        return len(self.names) <= MOST_NUMBERED

    @property
    def has_others(self) -> bool:
        return bool(self.shares[:, -1].any())

    @property
    def columns(self) -> int:
        return len(self.names) + self.has_others

    @property
    def firsts(self) -> set[int]:
        """The first class of every task."""
        return {first for _, first, _ in self.groups}

    @property
    def uri(self) -> str:
        """The matrix as a picture with one pixel per cell, as dark as the square root of its share."""
        pixels = np.zeros((*self.shares[:, : self.columns].shape, 4), dtype=np.uint8)
        pixels[..., :3] = INK
        pixels[..., 3] = np.round(255 * np.sqrt(self.shares[:, : self.columns]))
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, format="png", optimize=True)
        return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"


def confusion(history: PredictionHistory, names: Sequence[str]) -> Confusion:
    """The confusion matrix after the last task.

    Args:
        history: The model's predictions.
        names: The name of every class number.
    """
    last = max(history.after)
    said = history.after[last].astype(np.int64)
    labels = history.labels[: len(said)].astype(np.int64)
    groups, count = [], 0
    for task in range(1, last + 1):
        end = max(count, int(history.labels[history.of_task(task)].max(initial=-1)) + 1)
        if end > count:
            groups.append((task, count, end - count))
        count = end
    counts = np.zeros((count, count + 1), dtype=np.int64)
    np.add.at(counts, (labels, np.minimum(said, count)), 1)
    totals = counts.sum(axis=1)
    wrong = [
        (int(counts[row, column]), row, column)
        for row, column in np.argwhere(counts).tolist()
        if row != column and column < count
    ]
    wrong.sort(key=lambda each: (-each[0] / totals[each[1]], -each[0], each[1:]))
    pairs = [(names[row], names[column], number, int(totals[row])) for number, row, column in wrong[:PAIRS]]
    shares = counts / np.maximum(totals, 1)[:, None]
    return Confusion(tuple(names[:count]), tuple(groups), shares, tuple(pairs))
