"""Every metric against an example worked out by hand."""

import pytest

from hf_zocl.continual.metrics import (
    AccuracyMatrix,
    Avg,
    BackwardTransfer,
    Forgetting,
    Last,
    accuracy_row,
    backward_transfer,
    forgetting,
    summarise,
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
