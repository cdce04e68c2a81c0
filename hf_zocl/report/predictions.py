"""The predictions for every test image of a run, task after task: one small file, `predictions.safetensors`."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ..files import written_whole


PREDICTIONS_FILE = "predictions.safetensors"
_AFTER = "after_task_"


@dataclass(frozen=True)
class PredictionHistory:
    """Class numbers of test images, task by task in the stream's order.

    A class number is a position in the run's `classes` followed by the `known_classes` that are not among them.

    Args:
        images: How many test images each task has, `(tasks,)`.
        labels: The true class of every test image, `(images,)`.
        zero_shot: The untrained model's predictions, among the classes known when each image's task arrived,
            `(images,)`.
        after: Task → the predictions after it, for the images of tasks 1 to that one, `(their images,)`.
    """

    images: np.ndarray
    labels: np.ndarray
    zero_shot: np.ndarray
    after: Mapping[int, np.ndarray] = field(default_factory=dict)

    def __post_init__(self):
        total, ends = int(self.images.sum()), self.ends
        for name, values in (("label", self.labels), ("zero_shot", self.zero_shot)):
            if values.shape != (total,):
                raise ValueError(f"{name} has shape {list(values.shape)}, expected [{total}]")
        for task, values in self.after.items():
            if not 1 <= task <= len(self.images) or values.shape != (ends[task - 1],):
                raise ValueError(f"{_AFTER}{task:02d} has shape {list(values.shape)}: not that of its test images")

    @property
    def ends(self) -> np.ndarray:
        """Where each task's images end, `(tasks,)`."""
        return np.cumsum(self.images)

    def of_task(self, task: int) -> slice:
        """The positions of a task's images; tasks count from 1."""
        end = int(self.ends[task - 1])
        return slice(end - int(self.images[task - 1]), end)

    def with_task(self, task: int, predicted: np.ndarray) -> PredictionHistory:
        """The same history with the predictions after `task`."""
        return replace(self, after={**self.after, task: predicted})

    def up_to(self, task: int) -> PredictionHistory:
        """The same history without the predictions after later tasks."""
        return replace(self, after={number: said for number, said in self.after.items() if number <= task})

    def is_of(self, images: Sequence[int]) -> bool:
        """Tell whether the history is of a stream whose tasks have these numbers of test images."""
        return list(self.images) == list(images)

    def path(self, task: int) -> dict[int, np.ndarray]:
        """The predictions for a task's own images: moment (0 for zero-shot, else a task) → class numbers."""
        own = self.of_task(task)
        return {0: self.zero_shot[own], **{t: self.after[t][own] for t in sorted(self.after) if t >= task}}

    def to_bytes(self) -> bytes:
        """The content of the file; the same history always gives the same bytes."""
        highest = max((int(values.max()) for values in self._numbers().values() if values.size), default=0)
        kind = np.uint16 if highest < 2**16 else np.uint32
        tensors = {name: values.astype(kind) for name, values in self._numbers().items()}
        tensors["images"] = self.images.astype(np.uint32)
        return save(tensors, metadata={"sha256": _digest(tensors)})

    def write(self, path: Path) -> None:
        """Write the file, which is complete or absent at any moment."""
        with written_whole(path) as unfinished:
            unfinished.write_bytes(self.to_bytes())

    def _numbers(self) -> dict[str, np.ndarray]:
        after = {f"{_AFTER}{task:02d}": self.after[task] for task in sorted(self.after)}
        return {"label": self.labels, "zero_shot": self.zero_shot, **after}

    @classmethod
    def read(cls, path: Path) -> PredictionHistory:
        """Read the file.

        Raises:
            ValueError: If it is missing, damaged, or another kind of file.
        """
        try:
            with safe_open(path, framework="numpy") as file:
                tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(f"{path}: not the predictions of a run: {error}") from error
        try:
            for name, values in tensors.items():
                if values.ndim != 1 or values.dtype.kind != "u":
                    raise ValueError(f"{name} is {values.dtype} of shape {list(values.shape)}, expected whole numbers")
            if (metadata or {}).get("sha256") != _digest(tensors):
                raise ValueError("its content does not match its checksum")
            tensors = {name: values.astype(np.int64) for name, values in tensors.items()}
            after = {
                int(match[1]): tensors[name] for name in tensors if (match := re.fullmatch(_AFTER + r"(\d+)", name))
            }
            missing = [name for name in ("images", "label", "zero_shot") if name not in tensors]
            if missing:
                raise ValueError(f"{missing[0]} is missing")
            return cls(tensors["images"], tensors["label"], tensors["zero_shot"], after)
        except ValueError as error:
            raise ValueError(f"{path}: not the predictions of a run, or damaged: {error}.") from error


def _digest(tensors: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(json.dumps([name, str(tensors[name].dtype), list(tensors[name].shape)]).encode())
        digest.update(np.ascontiguousarray(tensors[name]).tobytes())
    return digest.hexdigest()
