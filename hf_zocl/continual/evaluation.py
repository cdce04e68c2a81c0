"""Evaluation of a model on a stream's test images, in a run and in the same way for a checkpoint later."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import ProcessorMixin, Trainer

from ..data.images import ImageCollator, PixelCodec
from ..data.stream import TaskStream
from ..data.tasks import Evaluation
from ..models import CLIPClassifier
from .metrics import (
    accuracy_row,
    average_accuracy,
    calibration_error,
    last_accuracy,
    per_class_accuracy,
    top_k_accuracy,
)


TOP_K = 5


@dataclass(frozen=True)
class Predictions:
    """Predictions on test images.

    Args:
        labels: True arrival labels, `(n,)`.
        ranked: Arrival labels, highest score first, `(n, at most 5)`.
        confidences: The probability of the first of them, `(n,)`.
        tasks: The task of every image, counted from 1, `(n,)`.
    """

    labels: np.ndarray
    ranked: np.ndarray
    confidences: np.ndarray
    tasks: np.ndarray

    @property
    def hits(self) -> np.ndarray:
        return self.ranked[:, 0] == self.labels

    def by_task(self) -> dict[int, float]:
        """The accuracy on the images of every task."""
        return {int(task): float(self.hits[self.tasks == task].mean()) for task in np.unique(self.tasks)}


class StreamEvaluator:
    """Measures a model on a stream's test images, predicting among the classes that the stream's scenario names.

    Args:
        model: The classifier; every evaluation sets its classes anew.
        processor: The CLIP model's processor.
        trainer: Its `predict` is used, with its arguments; its collator is replaced.
        codec: Reads images that are bytes.
        known_classes: Further classes that the model knows: every image is predicted among them too.
    """

    def __init__(
        self,
        model: CLIPClassifier,
        processor: ProcessorMixin,
        trainer: Trainer,
        codec: PixelCodec | None = None,
        known_classes: Sequence[str] = (),
    ):
        self.model, self.processor, self.trainer, self.codec = model, processor, trainer, codec
        self.known_classes = tuple(known_classes)

    def after(self, stream: TaskStream, index: int) -> dict[str, Any]:
        """Measure the model on everything seen after task `index`.

        Returns:
            `row` (the accuracy on each task from 1 to `index`), `seen` (the accuracy on all their test images; where
            datasets are tasks, the mean over the datasets), `details` (`top_5_accuracy`, `calibration_error` and
            `per_class_accuracy`, by arrival label) and `predicted`, the class of every image as `PredictionHistory`
            counts classes, `(images,)`.
        """
        evaluations = stream.evaluations(index)
        found = [self.predict(evaluation) for evaluation in evaluations]
        labels, ranked = np.concatenate([f.labels for f in found]), _stack([f.ranked for f in found])
        hits, tasks = ranked[:, 0] == labels, np.concatenate([f.tasks for f in found])
        row, seen = accuracy_row(ranked[:, 0], labels, tasks)
        classes = len(stream.seen_class_names(index))
        details = {
            "top_5_accuracy": top_k_accuracy(ranked, labels, TOP_K),
            "calibration_error": calibration_error(np.concatenate([f.confidences for f in found]), hits),
            "per_class_accuracy": per_class_accuracy(ranked[:, 0], labels, classes),
        }
        predicted = np.concatenate(
            [self._numbers(stream, each, f.ranked[:, 0]) for each, f in zip(evaluations, found, strict=True)]
        )
        return {"row": row, "seen": _seen(stream, row, seen), "details": details, "predicted": predicted}

    def future(self, stream: TaskStream, index: int) -> list[float]:
        """The accuracy on each task after `index`, predicted among the classes it will have when it arrives."""
        return [float(self.predict(evaluation).hits.mean()) for evaluation in stream.future_evaluations(index)]

    def zero_shot(self, stream: TaskStream) -> dict[str, Any]:
        """Measure the untrained model by the protocol of the whole stream, in one pass over all test images.

        Returns:
            The `zero_shot` of `results.json`, and two more keys: `labels`, the true class of every test image, and
            `predicted`, for each task the `predicted` of `after`.
        """
        last = len(stream)
        if stream.scenario == "class":
            matrix, seen, labels, predicted = self._zero_shot_by_class(stream)
        else:  # the classes that an image is predicted among do not change over the stream
            found = [self.predict(evaluation) for evaluation in stream.evaluations(last)]
            hits, tasks = np.concatenate([f.hits for f in found]), np.concatenate([f.tasks for f in found])
            labels, said = np.concatenate([f.labels for f in found]), np.concatenate([f.ranked[:, 0] for f in found])
            predicted = [said[tasks <= index] for index in range(1, last + 1)]
            row = [float(hits[tasks == task.index].mean()) for task in stream]
            matrix = [row[:index] for index in range(1, last + 1)]
            seen = [_seen(stream, row, float(hits[tasks <= i + 1].mean())) for i, row in enumerate(matrix)]
        return {
            "per_task": matrix[-1],
            "accuracy_matrix": matrix,
            "seen_accuracy": seen,
            "avg": average_accuracy(seen),
            "last": last_accuracy(seen),
            "labels": labels,
            "predicted": predicted,
        }

    def _zero_shot_by_class(
        self, stream: TaskStream
    ) -> tuple[list[list[float]], list[float], np.ndarray, list[np.ndarray]]:
        counts = [len(stream.seen_class_names(task.index)) for task in stream]
        (everything,) = stream.evaluations(len(stream))
        # Known classes stand among the stream's own, or after them.
        names = self._names(everything)
        known = [column for column, name in enumerate(names) if name in self.known_classes]
        columns = [[*range(count), *(column for column in known if column >= count)] for count in counts]
        predictions, labels = self._run(
            everything,
            lambda logits: torch.stack([logits[:, chosen].argmax(dim=-1) for chosen in columns], dim=-1),
        )
        matrix, seen, said = [], [], []
        for index, count in enumerate(counts):
            rows = labels < count
            said.append(np.array(columns[index])[predictions[rows, index]])
            row, accuracy = accuracy_row(predictions[rows, index], labels[rows], everything.task_indices[rows])
            matrix.append(row)
            seen.append(accuracy)
        return matrix, seen, labels, said

    def predict(self, evaluation: Evaluation) -> Predictions:
        """Predict the images of one evaluation among its classes."""
        (ranked, confidences), labels = self._run(evaluation, _rank)
        first = evaluation.first_label
        return Predictions(labels + first, ranked + first, confidences, evaluation.task_indices)

    def _run(self, evaluation: Evaluation, keep) -> tuple[Any, np.ndarray]:
        """What `keep` makes of the logits, and the labels counted from the evaluation's first class."""
        self.model.set_classes(self._names(evaluation), evaluation.prompt_template)
        self.trainer.data_collator = ImageCollator(
            self.processor, evaluation.tasks[0].arrival_labels, evaluation.first_label, self.codec
        )
        self.trainer.preprocess_logits_for_metrics = lambda logits, labels: keep(
            logits[0] if isinstance(logits, tuple) else logits
        )
        output = self.trainer.predict(evaluation.test, metric_key_prefix="test")
        return output.predictions, output.label_ids

    def _names(self, evaluation: Evaluation) -> list[str]:
        """The classes to predict among: the evaluation's own, then the other known ones."""
        others = [name for name in self.known_classes if name not in evaluation.class_names]
        return [*evaluation.class_names, *others]

    def _numbers(self, stream: TaskStream, evaluation: Evaluation, labels: np.ndarray) -> np.ndarray:
        """Predicted labels as positions in the stream's classes followed by the other known classes."""
        own = len(evaluation.class_names)
        further = self._names(evaluation)[own:]
        if not further:
            return labels
        known = [name for name in self.known_classes if name not in stream.class_names]
        numbers = {name: number for number, name in enumerate([*stream.class_names, *known])}
        return np.array([*range(evaluation.first_label + own), *(numbers[name] for name in further)])[labels]


def _rank(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    # A stable sort ranks the first of equal scores first, as argmax does.
    ranked = logits.sort(dim=-1, descending=True, stable=True).indices[:, :TOP_K]
    return ranked, logits.softmax(dim=-1).amax(dim=-1)


def _stack(ranked: Sequence[np.ndarray]) -> np.ndarray:
    """The rankings, stacked; shorter ones (fewer classes) are padded with -1, which is no label."""
    width = max(array.shape[1] for array in ranked)
    return np.concatenate([np.pad(a, ((0, 0), (0, width - a.shape[1])), constant_values=-1) for a in ranked])


def _seen(stream: TaskStream, row: Sequence[float], by_image: float) -> float:
    """The accuracy on all images seen; where datasets are tasks, each counts equally, as in MTIL."""
    return float(np.mean(row)) if stream.scenario == "cross-dataset" else by_image
