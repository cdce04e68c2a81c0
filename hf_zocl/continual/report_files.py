"""The files of a run for its report: predictions, a few small test images, and the curves of every task's training."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers.utils import logging

from ..data.images import PixelCodec
from ..data.stream import TaskStream
from ..files import written_whole
from ..hub.task_info import task_folder
from ..report.gallery import (
    GALLERY_FILE,
    GALLERY_PICTURE,
    best_row,
    choose,
    gallery_bytes,
    read_gallery,
    row_png,
    small_image,
)
from ..report.predictions import PREDICTIONS_FILE, PredictionHistory
from ..report.runs import TRAINING_LOG, class_names


logger = logging.get_logger(__name__)


class ReportFiles:
    """The files of a run that its report needs besides `results.json`, in the process that writes them.

    Every task's folder gets a copy of `predictions.safetensors`, as of `results.json`, but none of `gallery.json`,
    because it holds images.

    Args:
        folder: The run's folder.
        codec: Knows the shape of the stream's images.
    """

    def __init__(self, folder: Path, codec: PixelCodec):
        self.folder, self.codec = folder, codec
        self._history: PredictionHistory | None = None
        self._untrained: Sequence[np.ndarray] = ()
        self._small: dict[tuple[int, int], bytes] = {}

    def start(self, stream: TaskStream, labels: np.ndarray, predicted: Sequence[np.ndarray]) -> None:
        """Begin with the untrained model's predictions, see `StreamEvaluator.zero_shot`."""
        images = np.array([len(task.test) for task in stream])
        on_arrival = [said[-count:] for said, count in zip(predicted, images, strict=True)]
        self._history, self._untrained = PredictionHistory(images, labels, np.concatenate(on_arrival)), predicted

    def go_on(self, stream: TaskStream, done: int) -> None:
        """Go on after task `done` of a run, with the predictions that the run has kept."""
        places = [self.folder / PREDICTIONS_FILE]
        if done:
            places.append(self.folder / task_folder(done) / PREDICTIONS_FILE)
        for path in filter(Path.is_file, places):
            try:
                history = PredictionHistory.read(path).up_to(done)
            except ValueError as error:
                logger.warning(f"{error} The file is ignored.")
                continue
            if history.is_of([len(task.test) for task in stream]) and len(history.after) == done:
                self._history = history
                return
        logger.warning(f"resume: {self.folder} has no predictions of its tasks, so its report will lack them.")

    def add(self, task: int, predicted: np.ndarray) -> None:
        """Keep the model's predictions after a task."""
        if self._history is not None:
            self._history = self._history.with_task(task, predicted)

    def finish_untrained(self) -> None:
        """Keep the untrained model's predictions as those after each task, in a run without training."""
        for task, predicted in enumerate(self._untrained, start=1):
            self.add(task, predicted)

    @property
    def predictions(self) -> dict[str, bytes]:
        """The predictions as a file, by its name; empty if there are none."""
        return {} if self._history is None else {PREDICTIONS_FILE: self._history.to_bytes()}

    def of_task(self, curves: Mapping[str, Sequence[float | None]]) -> dict[str, bytes]:
        """The files of a task's checkpoint, by name.

        Args:
            curves: The figures of the task's training log, by name.
        """
        return {**self.predictions, TRAINING_LOG: (json.dumps(curves, allow_nan=False) + "\n").encode()}

    def row(self, results: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, bytes]]:
        """The card's gallery row, as `task.json` describes it, and its picture; none where images may be private.

        A card may be pushed, so it shows images of registered benchmarks only.
        """
        is_public = results["recipe"].get("benchmark") not in (None, "none")
        file = self.folder / GALLERY_FILE
        if self._history is None or not is_public or not file.is_file():
            return {}, {}
        shown = best_row(read_gallery(file, self._history))
        if not shown:
            return {}, {}
        forgotten = sum(one.kind == "forgotten" for one in shown)
        row = {"task": shown[0].task, "images": len(shown), "forgotten": forgotten}
        return {"gallery": row}, {GALLERY_PICTURE: row_png(shown, class_names(results))}

    def write(self, stream: TaskStream) -> None:
        """Write `predictions.safetensors`, and `gallery.json` with the images that now tell the most."""
        if self._history is None:
            return
        self._history.write(self.folder / PREDICTIONS_FILE)
        chosen = choose(self._history, max(self._history.after, default=0))
        images = {
            task: {place: self._image(stream, task, place) for place in places} for task, places in chosen.items()
        }
        with written_whole(self.folder / GALLERY_FILE) as unfinished:
            unfinished.write_bytes(gallery_bytes(images))

    def _image(self, stream: TaskStream, task: int, place: int) -> bytes:
        if (task, place) not in self._small:
            pixels = np.frombuffer(stream[task - 1].test[place]["image"], dtype=np.uint8)
            self._small[task, place] = small_image(pixels.reshape(self.codec.shape).transpose(1, 2, 0))
        return self._small[task, place]
