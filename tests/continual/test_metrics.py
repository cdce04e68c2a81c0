"""Every metric against an example worked out by hand."""

import numpy as np
import pytest

from hf_zocl.continual.metrics import (
    MTIL,
    AccuracyMatrix,
    Avg,
    BackwardTransfer,
    CalibrationError,
    Forgetting,
    ForwardTransfer,
    Last,
    PerClassAccuracy,
    TopKAccuracy,
    ZeroShotRetention,
    accuracy_row,
    backward_transfer,
    calibration_error,
    forgetting,
    forward_transfer,
    mtil_summary,
    per_class_accuracy,
    summarise,
    top_k_accuracy,
    zero_shot_retention,
)


# Task 1 rises, then falls; task 2 falls.
MATRIX = [[0.8], [0.9, 0.6], [0.5, 0.4, 0.7]]


def test_forgetting_is_the_drop_from_the_best():
    # ((0.9 − 0.5) + (0.6 − 0.4)) / 2
    assert forgetting(MATRIX) == pytest.approx(0.3)


def test_backward_transfer_is_the_change_since_learning():
    # ((0.5 − 0.8) + (0.4 − 0.6)) / 2
    assert backward_transfer(MATRIX) == pytest.approx(-0.25)


def test_one_task_has_nothing_to_forget():
    assert summarise([[0.8]], [0.8]) == {"last": 0.8, "avg": 0.8, "forgetting": None, "backward_transfer": None}


def test_last_and_avg_are_of_the_accuracy_on_all_classes_seen():
    figures = summarise(MATRIX, [0.8, 0.75, 0.5])
    assert figures["last"] == 0.5
    assert figures["avg"] == pytest.approx((0.8 + 0.75 + 0.5) / 3)


def test_a_row_weighs_images_not_tasks():
    row, seen = accuracy_row([0, 0, 1, 2], [0, 0, 1, 3], [1, 1, 1, 2])
    assert (row, seen) == ([1.0, 0.0], 0.75)


@pytest.fixture
def records() -> dict[str, list[int]]:
    # After task 1: two images, one right. After task 2: the same two, both right, and two more, one right.
    return {
        "predictions": [0, 0, 0, 1, 2, 2],
        "references": [0, 1, 0, 1, 2, 3],
        "task": [1, 1, 1, 1, 2, 2],
        "after_task": [1, 1, 2, 2, 2, 2],
    }


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        (AccuracyMatrix, {"accuracy_matrix": [[0.5], [1.0, 0.5]], "seen_accuracy": [0.5, 0.75]}),
        (Last, {"last": 0.75}),
        (Avg, {"avg": 0.625}),
        (Forgetting, {"forgetting": -0.5}),
        (BackwardTransfer, {"backward_transfer": 0.5}),
    ],
)
def test_evaluate_metrics_compute_from_predictions(metric, expected, records, tmp_path):
    assert metric(cache_dir=str(tmp_path)).compute(**records) == expected


def test_evaluate_metrics_take_batches(records, tmp_path):
    metric = Last(cache_dir=str(tmp_path))
    for start in (0, 2, 4):
        metric.add_batch(**{name: column[start : start + 2] for name, column in records.items()})
    assert metric.compute() == {"last": 0.75}


# Tasks to come, and the untrained model

# After each of three tasks, on each of three tasks; and before the first.
FULL = [[0.8, 0.3, 0.2], [0.7, 0.6, 0.1], [0.5, 0.4, 0.9]]
UNTRAINED = [0.4, 0.2, 0.3]


def test_forward_transfer_is_the_change_before_a_task_is_learned():
    # ((0.3 − 0.2) + (0.1 − 0.3)) / 2
    assert forward_transfer(FULL, UNTRAINED) == pytest.approx(-0.05)


def test_forward_transfer_of_a_run_so_far_goes_as_far_as_its_rows():
    assert forward_transfer(FULL[:1], UNTRAINED) == pytest.approx(0.1)


def test_one_task_has_nothing_to_transfer_to():
    assert forward_transfer([[0.8]], [0.4]) is None
    assert mtil_summary([[0.8]]) == {"transfer": None, "avg": 0.8, "last": 0.8}


def test_mtils_transfer_avg_and_last():
    summary = mtil_summary(FULL)
    # Task 2: 0.3; task 3: (0.2 + 0.1) / 2.
    assert summary["transfer"] == pytest.approx((0.3 + 0.15) / 2)
    assert summary["avg"] == pytest.approx(sum(map(sum, FULL)) / 9)
    assert summary["last"] == pytest.approx(0.6)


def zscl_notebook(matrix: np.ndarray) -> dict[str, float]:
    """The three definitions of ZSCL's mtil/results.ipynb, restated; columns are datasets, rows are tasks learned."""
    columns = matrix.shape[1]
    before_learning = [np.mean([matrix[row, column] for row in range(column)]) for column in range(1, columns)]
    return {
        "transfer": np.mean(before_learning),
        "avg": np.mean([matrix[:, column].mean() for column in range(columns)]),
        "last": np.mean(matrix[-1]),
    }


def test_mtils_figures_are_those_of_zscls_notebook_on_eleven_datasets():
    matrix = np.random.default_rng(0).uniform(size=(11, 11))
    assert mtil_summary(matrix.tolist()) == pytest.approx(zscl_notebook(matrix))


class AvalancheForgetting:
    """Avalanche's `Forgetting`, restated: the first value recorded for a task minus the last one."""

    def __init__(self):
        self.initial, self.last = {}, {}

    def update(self, task: int, accuracy: float) -> None:
        (self.last if task in self.initial else self.initial)[task] = accuracy

    def result(self) -> float:
        return float(np.mean([self.initial[task] - self.last[task] for task in self.initial if task in self.last]))


def test_backward_transfer_is_avalanches_forgetting_with_the_sign_turned():
    matrix = [row[: index + 1] for index, row in enumerate(np.random.default_rng(1).uniform(size=(6, 6)).tolist())]
    metric = AvalancheForgetting()
    for row in matrix:
        for task, accuracy in enumerate(row):
            metric.update(task, accuracy)
    assert backward_transfer(matrix) == pytest.approx(-metric.result())


def test_forgetting_is_chaudhrys_which_takes_the_best_and_so_is_never_below_avalanches():
    assert forgetting(MATRIX) == pytest.approx(0.3)
    assert -backward_transfer(MATRIX) == pytest.approx(0.25)


def test_forward_transfer_is_avalanches():
    """The accuracy after the experience before, minus the initial one, averaged over experiences."""
    full, initial = np.random.default_rng(2).uniform(size=(5, 5)), np.random.default_rng(3).uniform(size=5)
    previous = {task: full[task - 1][task] for task in range(1, 5)}
    expected = np.mean([previous[task] - initial[task] for task in previous])
    assert forward_transfer(full.tolist(), initial.tolist()) == pytest.approx(expected)


def test_retention_is_what_is_left_of_the_zero_shot_accuracy():
    assert zero_shot_retention([0.6, 0.2], [0.3, 0.3]) == pytest.approx(0.75)
    assert zero_shot_retention([0.0], [0.3]) is None


@pytest.fixture
def full_records() -> dict[str, list[int]]:
    """Two tasks of two images, before the first task and after each: hits 1, 0 | 2, 1 | 1, 2."""
    hits = [(0, 1, 1), (0, 2, 0), (1, 1, 2), (1, 2, 1), (2, 1, 1), (2, 2, 2)]
    rows = [(step, task, image < right) for step, task, right in hits for image in range(2)]
    return {
        "predictions": [int(hit) for *_, hit in rows],
        "references": [1] * len(rows),
        "task": [task for _, task, _ in rows],
        "after_task": [step for step, *_ in rows],
    }


def test_metrics_over_the_full_matrix_compute_from_predictions(full_records, tmp_path):
    computed = {}
    for metric in (ForwardTransfer, MTIL, ZeroShotRetention, AccuracyMatrix):
        computed |= metric(cache_dir=str(tmp_path)).compute(**full_records)
    assert computed == {
        "forward_transfer": 0.5,  # task 2: from 0 to 0.5
        "transfer": 0.5,
        "avg": (1.0 + 0.5 + 0.5 + 1.0) / 4,
        "last": 0.75,
        "zero_shot_retention": 3.0,  # from (0.5 + 0) / 2 to (0.5 + 1) / 2
        "accuracy_matrix": [[1.0], [0.5, 1.0]],  # tasks to come take no part
        "seen_accuracy": [1.0, 0.75],
    }


# One evaluation


def test_top_k_looks_at_the_k_classes_ranked_highest(tmp_path):
    ranked, references = [[3, 1, 0], [2, 0, 1], [0, 1, 2]], [1, 1, 2]
    assert top_k_accuracy(ranked, references, k=1) == 0.0
    assert top_k_accuracy(ranked, references, k=2) == pytest.approx(1 / 3)
    assert top_k_accuracy(ranked, references) == 1.0
    computed = TopKAccuracy(cache_dir=str(tmp_path)).compute(predictions=ranked, references=references, k=2)
    assert computed == {"top_2_accuracy": pytest.approx(1 / 3)}


def test_per_class_accuracy_has_an_entry_for_every_class(tmp_path):
    predictions, references = [0, 1, 1, 1], [0, 0, 1, 3]
    assert per_class_accuracy(predictions, references, 4) == [0.5, 1.0, None, 0.0]
    metric = PerClassAccuracy(cache_dir=str(tmp_path))
    assert metric.compute(predictions=predictions, references=references) == {
        "per_class_accuracy": [0.5, 1.0, None, 0.0]
    }


def test_calibration_error_is_the_gap_of_every_bin_weighed_by_its_examples(tmp_path):
    # Two bins: (0.3, right), (0.5, wrong) | (0.9, right), (0.7, right): |0.5 − 0.4| · 2/4 + |1 − 0.8| · 2/4
    confidences, hits = [0.3, 0.5, 0.9, 0.7], [1, 0, 1, 1]
    assert calibration_error(confidences, hits, bins=2) == pytest.approx(0.15)
    metric = CalibrationError(cache_dir=str(tmp_path))
    computed = metric.compute(predictions=[1, 0, 1, 1], references=[1] * 4, confidences=confidences, bins=2)
    assert computed == {"calibration_error": pytest.approx(0.15)}


def test_a_sure_and_right_model_is_calibrated():
    assert calibration_error([1.0, 1.0], [1, 1]) == 0.0
    assert calibration_error([0.0, 1.0], [0, 0]) == pytest.approx(0.5)
