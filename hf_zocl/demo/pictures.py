"""Some test images of a run; first those that the model knew and then forgot."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..continual.checkpoint_evaluation import run_arguments_of
from ..continual.run_arguments import build_stream
from ..data.stream import TaskStream
from ..data.tasks import Task
from ..hub.series import TaskSeries
from ..models.pixels import CORRUPT, read_image
from ..sample import NAMES


SHOWN = 24
TRIED = 4  # how many images are predicted for each one shown


@dataclass(frozen=True)
class Picture:
    """A test image.

    Args:
        image: The image.
        truth: The position of its class in `TaskSeries.classes`.
        task: The task that brought its class.
        probabilities: The probabilities of all classes at every stage, `(stages, classes)`.
    """

    image: Image.Image
    truth: int
    task: int
    probabilities: torch.Tensor

    @property
    def is_forgotten(self) -> bool:
        """True if the prediction was right after some task, but is wrong after the last."""
        right = self.probabilities.argmax(dim=-1)[self.task :] == self.truth
        return bool(right.any() and not right[-1])


def test_pictures(
    series: TaskSeries, is_own: bool, dataset_path: str | None = None, shown: int = SHOWN
) -> list[Picture]:
    """Equally many test images of every task; within a task, the forgotten ones first.

    Args:
        series: The run.
        is_own: Whether the run is a folder on this machine. The recipe of a repository is not trusted: no path in it
            is read, and no dataset that it names is downloaded.
        dataset_path: A local copy of the run's dataset; default: the recipe's.
        shown: How many images, over all tasks together.

    Raises:
        ValueError, OSError: If there are no test images to show; the message says why.
    """
    stream = _stream(series.info["recipe"], is_own, dataset_path)
    places = {name: place for place, name in enumerate(series.classes)}
    tasks = [task for task in stream if task.index <= series.stages[-1].task]
    share = max(1, shown // len(tasks))
    found: list[tuple[Image.Image, int, int]] = []
    for task in tasks:
        found += [(image, places[name], task.index) for image, name in _some(task, share * TRIED) if name in places]
    if not found:
        raise ValueError("the dataset has none of the run's classes")
    probabilities = series.probabilities([image for image, _, _ in found])
    pictures = [Picture(*each, own) for each, own in zip(found, probabilities, strict=True)]
    chosen: list[Picture] = []
    for task in tasks:
        own = [picture for picture in pictures if picture.task == task.index]
        chosen += sorted(own, key=lambda picture: not picture.is_forgotten)[:share]
    return chosen[:shown]


def _stream(recipe: dict[str, Any], is_own: bool, dataset_path: str | None) -> TaskStream:
    given: dict[str, Any] = {} if dataset_path is None else {"dataset_path": dataset_path}
    if not is_own:
        if dataset_path is None and recipe.get("benchmark") not in NAMES:
            raise ValueError("a repository does not hold its dataset: give --dataset_path")
        recipe = {name: value for name, value in recipe.items() if name not in ("dataset_path", "held_out")}
    elif recipe.get("dataset_path") and dataset_path is None and not Path(recipe["dataset_path"]).exists():
        raise ValueError(f"{recipe['dataset_path']} does not exist: give --dataset_path")
    stream, _ = build_stream(run_arguments_of(recipe, given, is_own=True), seed=recipe.get("data_seed") or 0)
    return stream


def _some(task: Task, count: int) -> list[tuple[Image.Image, str]]:
    """At most `count` images of one task with their class names, from its classes in turn."""
    labels = np.asarray(task.test["label"])
    rows = [np.flatnonzero(labels == label) for label in task.class_ids]
    names = dict(zip(task.class_ids, task.class_names, strict=True))
    turns = [own[turn] for turn in range(count) for own in rows if turn < len(own)][:count]
    some = []
    for row in turns:
        try:
            some.append((read_image(task.test[int(row)]["image"]), names[int(labels[row])]))
        except CORRUPT:
            continue  # `skip_corrupt` leaves such an image out, too
    return some
