"""The confusions of a model after its last task, with the classes grouped by the task that brought them."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from .predictions import PredictionHistory


MOST_NAMED = 20  # classes whose names have room beside the matrix
MOST_NUMBERED = 10  # classes whose cells have room for a number
INK = (47, 127, 208)  # the page's --ink
PAIRS = 8


@dataclass(frozen=True)
class Confusion:
    """The confusion matrix of the classes seen.

    Args:
        names: The classes, in order of arrival.
        groups: (task, first class, classes) of every task that brought some.
        shares: Row: the true class; column: the share of its test images that is called so, and last that of other
            classes, `(classes, classes + 1)`.
        pairs: What is mistaken most, as (true class, called, images, of how many).
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
        """The classes with which a task begins."""
        return {first for _, first, _ in self.groups}

    @property
    def uri(self) -> str:
        """The matrix as a picture of one pixel a cell, darker for a greater share (its square root)."""
        pixels = np.zeros((*self.shares[:, : self.columns].shape, 4), dtype=np.uint8)
        pixels[..., :3] = INK
        pixels[..., 3] = np.round(255 * np.sqrt(self.shares[:, : self.columns]))
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, format="png", optimize=True)
        return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"


def confusion(history: PredictionHistory, names: Sequence[str]) -> Confusion:
    """Count what is taken for what after the last task.

    Args:
        history: What the model said.
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
