"""`Task`: images that are learned together. `Evaluation`: images that are predicted among the same classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import datasets
import numpy as np

from ..hub.task_info import task_folder


@dataclass(frozen=True)
class Task:
    """One task: the classes that arrive together, and their images.

    Args:
        index: The task's place in the stream, counted from 1.
        class_ids: The dataset's own label ids, in order of arrival.
        class_names: The class names as prompts need them, in the same order.
        first_label: How many classes arrived before, which is the arrival label of `class_ids[0]`.
        train: The training images: columns `image` and `label` (the dataset's own label ids).
        test: The test images of this task's classes, in the same form.
        arrival_labels: The arrival label of every label id of the task's dataset, -1 for those not in the stream.
            Shape: (label ids of the dataset,).
        title: The name of the task's dataset or domain, if its classes do not distinguish it.
        prompt_template: The prompt or prompts of this task's dataset; None: the stream's.
        train_rows, test_rows: The images' rows in their splits. Shape: (images,).
    """

    index: int
    class_ids: tuple[int, ...]
    class_names: tuple[str, ...]
    first_label: int
    train: datasets.Dataset
    test: datasets.Dataset
    arrival_labels: np.ndarray | None = field(default=None, repr=False, compare=False)
    title: str | None = None
    prompt_template: str | tuple[str, ...] | None = None
    train_rows: np.ndarray | None = field(default=None, repr=False, compare=False)
    test_rows: np.ndarray | None = field(default=None, repr=False, compare=False)

    @property
    def name(self) -> str:
        """The name of the task and of its folder: `task-01`."""
        return task_folder(self.index)


@dataclass(frozen=True)
class Evaluation:
    """Test images that are predicted among the same classes.

    Args:
        tasks: The tasks whose test images these are.
        class_names: The classes to predict among, in order of arrival.
        first_label: The arrival label of the first of these classes.
        prompt_template: The prompt or prompts; None: the model's.
    """

    tasks: tuple[Task, ...]
    class_names: tuple[str, ...]
    first_label: int = 0
    prompt_template: str | tuple[str, ...] | None = None

    @property
    def test(self) -> datasets.Dataset:
        """The test images, task by task; columns `image` and `label`."""
        return concatenate([task.test for task in self.tasks])

    @property
    def task_indices(self) -> np.ndarray:
        """The task of every test image, counted from 1. Shape: (images,)."""
        return np.repeat([task.index for task in self.tasks], [len(task.test) for task in self.tasks])


def concatenate(images: Sequence[datasets.Dataset]) -> datasets.Dataset:
    """Several sets of images, one after the other."""
    return (
        datasets.concatenate_datasets(images)
        if isinstance(images[0], datasets.Dataset)
        else sum(images[1:], images[0])
    )
