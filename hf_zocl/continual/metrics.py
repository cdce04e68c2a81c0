"""Metrics of continual learning, as `evaluate.Metric` modules that need no network, and the functions behind them.

The accuracy matrix A has a row per task: A[t][i] is the accuracy on the test images of task i after learning task t,
predicting among all classes seen up to t (or the classes that the stream's scenario names). `seen_accuracy[t]` is the
accuracy on the test images of all these classes. The full matrix has future tasks in each row too; A[0] is the
untrained model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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


def forward_transfer(full_matrix: Matrix, untrained: Sequence[float]) -> float | None:
    """FWT = mean over i > 1 of A[i−1][i] − A[0][i] (Lopez-Paz & Ranzato, GEM, NeurIPS 2017); None for one task.

    GEM compares with a random initialisation. Here, as in avalanche, the initial accuracy is that of the model handed
    in: for a pretrained model, its zero-shot accuracy.

    Args:
        full_matrix: A row for every task learned, an entry for every task of the stream.
        untrained: A[0]: the untrained model's accuracy on every task.
    """
    tasks = range(1, min(len(full_matrix) + 1, len(untrained)))
    return float(np.mean([full_matrix[i - 1][i] - untrained[i] for i in tasks])) if tasks else None


def mtil_summary(full_matrix: Matrix) -> dict[str, float | None]:
    """Transfer, Avg and Last of multi-domain task-incremental learning (Zheng et al., ZSCL, ICCV 2023).

    For a full T × T matrix, as in ZSCL's mtil/results.ipynb:
    Transfer = mean over i > 1 of the mean over t < i of A[t][i]; Avg = mean of all entries; Last = mean of A[T].
    All datasets weigh the same. Transfer is None for one task.
    """
    matrix = np.asarray(full_matrix, dtype=float)
    transfer = [matrix[:i, i].mean() for i in range(1, matrix.shape[1]) if i <= len(matrix)]
    return {
        "transfer": float(np.mean(transfer)) if transfer else None,
        "avg": float(matrix.mean()),
        "last": float(matrix[-1].mean()),
    }


def zero_shot_retention(before: Sequence[float], after: Sequence[float]) -> float | None:
    """Zero-shot retention on held-out datasets: mean of `after` / mean of `before`.

    The share that is left of the zero-shot accuracy that ZSCL (Zheng et al., ICCV 2023) protects; above 1, it has
    grown. None if the mean before is zero.

    Args:
        before: The untrained model's accuracy on every held-out dataset.
        after: The trained model's accuracy on them.
    """
    return float(np.mean(after) / np.mean(before)) if np.mean(before) > 0 else None


def top_k_accuracy(ranked: np.ndarray, references: np.ndarray, k: int = 5) -> float:
    """Share of examples whose class is among the k that are ranked highest (Russakovsky et al., ImageNet, 2015).

    Args:
        ranked: Classes, highest score first, `(n, at least k or all classes)`.
        references: True classes, `(n,)`.
    """
    return float((np.asarray(ranked)[:, :k] == np.asarray(references)[:, None]).any(axis=1).mean())


def per_class_accuracy(predictions: np.ndarray, references: np.ndarray, classes: int) -> list[float | None]:
    """The accuracy on every class; None for a class without examples.

    Args:
        predictions, references: Predicted and true classes, `(n,)`.
        classes: How many classes there are.
    """
    references = np.asarray(references)
    hits = np.bincount(references, weights=np.asarray(predictions) == references, minlength=classes)
    counts = np.bincount(references, minlength=classes)
    return [float(hit / count) if count else None for hit, count in zip(hits, counts, strict=True)]


def calibration_error(confidences: np.ndarray, hits: np.ndarray, bins: int = 15) -> float:
    """ECE = Σ over bins b of |b|/n · |accuracy(b) − confidence(b)| (Guo et al., ICML 2017, equation 3).

    Args:
        confidences: The probability of the predicted class, `(n,)`.
        hits: Whether the prediction is right, `(n,)`.
        bins: Bins of equal width, closed on the right.
    """
    confidences, hits = np.asarray(confidences, dtype=float), np.asarray(hits, dtype=float)
    of_bin = np.clip(np.ceil(confidences * bins).astype(int) - 1, 0, bins - 1)
    gaps = np.bincount(of_bin, weights=hits - confidences, minlength=bins)
    return float(np.abs(gaps).sum() / len(confidences))


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
        tasks: The task of every example, counted from 1, `(n,)`; every task up to the last one occurs.
    """
    hits = np.asarray(predictions) == np.asarray(references)
    tasks = np.asarray(tasks)
    return [float(hits[tasks == task].mean()) for task in range(1, int(tasks.max()) + 1)], float(hits.mean())


_CITATION = "Lopez-Paz & Ranzato (NeurIPS 2017); Chaudhry et al. (ECCV 2018); Rebuffi et al. (CVPR 2017)"
_INPUTS = """
Args:
    predictions, references: predicted and true class, one per example and evaluation.
    task: the task, counted from 1, that the example belongs to.
    after_task: the task, counted from 1, after which this prediction was made; 0: before the first.
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
        steps = [(after_task == step) & (task <= step) for step in range(1, int(after_task.max()) + 1)]
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
    """Mean drop of a task's accuracy from its best to the final one."""

    def _compute(self, predictions, references, task, after_task):
        return {"forgetting": forgetting(self._rows(predictions, references, task, after_task)[0])}


class BackwardTransfer(_StreamMetric):
    """Mean change of a task's accuracy from just after learning it to the end."""

    def _compute(self, predictions, references, task, after_task):
        return {"backward_transfer": backward_transfer(self._rows(predictions, references, task, after_task)[0])}


class _FullMatrixMetric(_StreamMetric):
    """A metric over predictions on all tasks, future ones too, made before the first task and after every task."""

    def _full_rows(self, predictions, references, task, after_task) -> list[list[float]]:
        hits = np.asarray(predictions) == np.asarray(references)
        task, after_task = np.asarray(task), np.asarray(after_task)
        tasks = range(1, int(task.max()) + 1)
        steps = range(int(after_task.max()) + 1)
        return [[float(hits[(after_task == step) & (task == number)].mean()) for number in tasks] for step in steps]


class ForwardTransfer(_FullMatrixMetric):
    """FWT: mean change of a task's accuracy from the untrained model to just before the task is learned."""

    def _compute(self, predictions, references, task, after_task):
        untrained, *rows = self._full_rows(predictions, references, task, after_task)
        return {"forward_transfer": forward_transfer(rows, untrained)}


class MTIL(_FullMatrixMetric):
    """Transfer, Avg and Last of multi-domain task-incremental learning (ZSCL); `after_task` counts from 1."""

    def _compute(self, predictions, references, task, after_task):
        kept = np.asarray(after_task) > 0
        columns = [np.asarray(column)[kept] for column in (predictions, references, task)]
        steps = np.asarray(after_task)[kept] - 1
        return mtil_summary(self._full_rows(*columns, steps))


class ZeroShotRetention(_FullMatrixMetric):
    """Accuracy on held-out datasets after the last task, as a share of the accuracy before the first.

    `task` counts the held-out datasets here.
    """

    def _compute(self, predictions, references, task, after_task):
        rows = self._full_rows(predictions, references, task, after_task)
        return {"zero_shot_retention": zero_shot_retention(rows[0], rows[-1])}


class _ClassMetric(evaluate.Metric):
    """A metric over the predictions of one evaluation."""

    columns: dict[str, Any] = {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
    citation = ""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=(type(self).__doc__ or "").strip(),
            citation=self.citation,
            inputs_description=", ".join(self.columns),
            features=datasets.Features(self.columns),
        )


class TopKAccuracy(_ClassMetric):
    """Share of examples whose class is among the k ranked highest; `predictions` are classes, highest score first."""

    columns = {"predictions": datasets.List(datasets.Value("int64")), "references": datasets.Value("int64")}
    citation = "Russakovsky et al. (IJCV 2015)"

    def _compute(self, predictions, references, k: int = 5):
        return {f"top_{k}_accuracy": top_k_accuracy(np.asarray(predictions), references, k)}


class PerClassAccuracy(_ClassMetric):
    """The accuracy on every class; None for a class without examples."""

    def _compute(self, predictions, references, classes: int | None = None):
        count = int(max(references)) + 1 if classes is None else classes
        return {"per_class_accuracy": per_class_accuracy(predictions, references, count)}


class CalibrationError(_ClassMetric):
    """Expected calibration error: the gap between confidence and accuracy, over bins of equal width."""

    columns = {**_ClassMetric.columns, "confidences": datasets.Value("float64")}
    citation = "Guo et al. (ICML 2017)"

    def _compute(self, predictions, references, confidences, bins: int = 15):
        hits = np.asarray(predictions) == np.asarray(references)
        return {"calibration_error": calibration_error(confidences, hits, bins)}
