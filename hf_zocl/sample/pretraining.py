"""The Tiny-ImageNet training images that the embedded mini CLIP was pretrained on; streams use the others."""

from collections.abc import Sequence

import numpy as np


def pretraining_rows(labels: Sequence[int]) -> np.ndarray:
    """Return the sorted rows of the training split that the embedded model has seen: four fifths of every class.

    Of each class, in the order of the labels, these are the first four fifths of its rows after
    `RandomState(0).permutation`.

    Args:
        labels: The label of every row of the training split.
    """
    array, rng = np.asarray(labels), np.random.RandomState(0)
    shuffled = [rng.permutation(np.flatnonzero(array == label)) for label in np.unique(array)]
    return np.sort(np.concatenate([rows[: len(rows) * 4 // 5] for rows in shuffled]))
