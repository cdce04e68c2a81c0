"""Metrics of continual learning, as `evaluate.Metric` modules that need no network, and the functions behind them.

The accuracy matrix A has a row per task: A[t][i] is the accuracy on the test images of task i after learning task t,
predicting among all classes seen up to t. `seen_accuracy[t]` is the accuracy on the test images of all these classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import datasets
import evaluate
import numpy as np


Matrix = Sequence[Sequence[float]]


def last_accuracy(seen_accuracy: Sequence[float]) -> float:
    """Last: the accuracy on all classes after the last task (Rebuffi et al., iCaRL, CVPR 2017)."""
    return float(seen_accuracy[-1])


def average_accuracy(seen_accuracy: Sequence[float]) -> float:
    """Avg: the mean over tasks of the accuracy on all classes seen (average incremental accuracy, iCaRL)."""
    return float(np.mean(seen_accuracy))


def forgetting(matrix: Matrix) -> float | None:
    """F = mean over i < T of max over t < T of (A[t][i] − A[T][i]) (Chaudhry et al., ECCV 2018); None for one task."""
    last = len(matrix) - 1
    if last < 1:
        return None
    return float(np.mean([max(matrix[t][i] for t in range(i, last)) - matrix[last][i] for i in range(last)]))


def backward_transfer(matrix: Matrix) -> float | None:
    """BWT = mean over i < T of A[T][i] − A[i][i] (Lopez-Paz & Ranzato, GEM, NeurIPS 2017); None for one task."""
    last = len(matrix) - 1
    if last < 1:
        return None
    return float(np.mean([matrix[last][i] - matrix[i][i] for i in range(last)]))


def summarise(matrix: Matrix, seen_accuracy: Sequence[float]) -> dict[str, float | None]:
    """Last, Avg, forgetting and backward transfer of a run so far."""
    return {
        "last": last_accuracy(seen_accuracy),
        "avg": average_accuracy(seen_accuracy),
        "forgetting": forgetting(matrix),
        "backward_transfer": backward_transfer(matrix),
    }


def accuracy_row(predictions: np.ndarray, references: np.ndarray, tasks: np.ndarray) -> tuple[list[float], float]:
    """One row of the accuracy matrix and its accuracy on all classes seen.

    Args:
        predictions, references: Predicted and true labels, `(n,)`.
        tasks: The task of every example, counted from 1, `(n,)`; every task up to the greatest one occurs.
    """
    hits = np.asarray(predictions) == np.asarray(references)
    tasks = np.asarray(tasks)
    return [float(hits[tasks == task].mean()) for task in range(1, int(tasks.max()) + 1)], float(hits.mean())


_CITATION = "Lopez-Paz & Ranzato (NeurIPS 2017); Chaudhry et al. (ECCV 2018); Rebuffi et al. (CVPR 2017)"
_INPUTS = """
Args:
    predictions, references: predicted and true class, one per example and evaluation.
    task: the task, counted from 1, that the example belongs to.
    after_task: the task, counted from 1, after which this prediction was made.
"""


class _StreamMetric(evaluate.Metric):
    """A metric over the predictions that a model makes after every task of a stream."""

    def _info(self) -> evaluate.MetricInfo:
        columns = ("predictions", "references", "task", "after_task")
        return evaluate.MetricInfo(
            description=(type(self).__doc__ or "").strip(),
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({name: datasets.Value("int64") for name in columns}),
        )

    def _rows(self, predictions, references, task, after_task) -> tuple[list[list[float]], list[float]]:
        predictions, references = np.asarray(predictions), np.asarray(references)
        task, after_task = np.asarray(task), np.asarray(after_task)
        steps = [after_task == step for step in range(1, int(after_task.max()) + 1)]
        rows = [accuracy_row(predictions[step], references[step], task[step]) for step in steps]
        return [row for row, _ in rows], [seen for _, seen in rows]


class AccuracyMatrix(_StreamMetric):
    """The accuracy matrix, and the accuracy on all classes seen after every task."""

    def _compute(self, predictions, references, task, after_task):
        matrix, seen = self._rows(predictions, references, task, after_task)
        return {"accuracy_matrix": matrix, "seen_accuracy": seen}


class Last(_StreamMetric):
    """Accuracy on all classes after the last task."""

    def _compute(self, predictions, references, task, after_task):
        return {"last": last_accuracy(self._rows(predictions, references, task, after_task)[1])}


class Avg(_StreamMetric):
    """Mean over tasks of the accuracy on all classes seen."""

    def _compute(self, predictions, references, task, after_task):
        return {"avg": average_accuracy(self._rows(predictions, references, task, after_task)[1])}


class Forgetting(_StreamMetric):
    """Mean drop of a task's accuracy from its best to its last."""

    def _compute(self, predictions, references, task, after_task):
        return {"forgetting": forgetting(self._rows(predictions, references, task, after_task)[0])}


class BackwardTransfer(_StreamMetric):
    """Mean change of a task's accuracy from just after learning it to the end."""

    def _compute(self, predictions, references, task, after_task):
        return {"backward_transfer": backward_transfer(self._rows(predictions, references, task, after_task)[0])}
