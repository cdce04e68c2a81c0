"""One setting's part of a report: its figures, accuracy matrix, gallery, confusion, curves and layers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .charts import Chart, Series, draw
from .compare import mean_and_deviation
from .comparison_charts import forgotten, variance_by_layer
from .confusion import Confusion, confusion
from .gallery import GALLERY_FILE, Shown, kinds, read_gallery
from .predictions import PREDICTIONS_FILE, PredictionHistory
from .runs import TRAINING_LOG, RunGroup, class_names


MOST_NUMBERED = 12  # up to this many tasks, the matrix cells have room for numbers
MOST_LISTED = 10  # classes in a task's title
MODES = {"zo": "ZO", "fo": "FO", "fo+zo": "mix"}


@dataclass(frozen=True)
class HeadFigure:
    """One of the four figures at the head.

    Args:
        name, value: The figure's name and its value, with the unit.
        zero_shot: The same figure before any training.
        meaning: What it says, in a few words.
    """

    name: str
    value: str
    zero_shot: str
    meaning: str


@dataclass(frozen=True)
class TaskGallery:
    """A task's images in the gallery.

    Args:
        title: The task.
        summary: How many of its test images were forgotten, learned and so on.
        images: The images.
    """

    title: str
    summary: str
    images: tuple[Shown, ...]


@dataclass(frozen=True)
class RunView:
    """One setting, as the report shows it; pictures and predictions are those of its first seed.

    Args:
        group: The setting.
        head: The four figures at the head.
        titles: The name of every task.
        matrix: The accuracy matrix as rows of (text, percent).
        top: The percentage of the darkest cell.
        classes: The name of every class number.
        gallery: Task → its images.
        history: The predictions, for the gallery's summaries.
        confusion: The confusion matrix; None if there are no predictions.
        charts: Curves of the training.
        layers: Tower → (name, mode) of every layer.
    """

    group: RunGroup
    head: tuple[HeadFigure, ...]
    titles: tuple[str, ...]
    matrix: tuple[tuple[tuple[str, float], ...], ...]
    top: float
    classes: tuple[str, ...]
    gallery: Mapping[int, list[Shown]]
    history: PredictionHistory | None
    confusion: Confusion | None
    charts: tuple[Chart, ...]
    layers: Mapping[str, Sequence[tuple[str, str]]]

    @property
    def is_numbered(self) -> bool:
        return len(self.matrix) <= MOST_NUMBERED

    def galleries(self, shown: Mapping[int, list[Shown]]) -> list[TaskGallery]:
        """The gallery task by task, with the images in `shown`, for which there is room."""
        return [
            TaskGallery(self._title(task), self._summary(task), tuple(images))
            for task, images in shown.items()
            if images
        ]

    def _title(self, task: int) -> str:
        numbers = np.unique(self.history.labels[self.history.of_task(task)])
        names = ", ".join(self.classes[number] for number in numbers[:MOST_LISTED]) + (
            f" and {len(numbers) - MOST_LISTED} more" if len(numbers) > MOST_LISTED else ""
        )
        own = self.titles[task - 1]
        return f"Task {task}" + ("" if own == f"task-{task:02d}" else f", {own}") + f": {names}"

    def _summary(self, task: int) -> str:
        found = {kind: len(places) for kind, places in kinds(self.history, task).items()}
        words = {"forgotten": "known and forgotten", "learned": "learned", "wrong": "never right", "kept": "kept"}
        total = int(self.history.images[task - 1])
        return f"Of {total} test images: " + ", ".join(f"{found[kind]} {words[kind]}" for kind in words) + "."


def view(group: RunGroup) -> RunView:
    """Collect what the report shows from the files of a setting's runs.

    Raises:
        ValueError: If one of these files is damaged.
    """
    matrix = 100 * group.matrix()
    run, folder = group.first, group.folders[0] if group.folders else None
    history = _history(folder, run, group)
    classes = class_names(run)
    shown: Mapping[int, list[Shown]] = {}
    if history is not None and (folder / GALLERY_FILE).is_file():
        shown = read_gallery(folder / GALLERY_FILE, history)
    top = 10 * max(1, math.ceil(np.nanmax(matrix) / 10))
    return RunView(
        group,
        tuple(_head(group)),
        tuple(run.get("tasks") or [f"task {number}" for number in range(1, group.planned_tasks + 1)]),
        tuple(tuple((f"{v:.0f}", v) for v in row if v == v) for row in matrix.tolist()),
        float(top),
        tuple(classes),
        shown,
        history,
        None if history is None else confusion(history, classes),
        tuple(_curves(group, folder)),
        _layers(run),
    )


def _history(folder: Path | None, run: dict[str, Any], group: RunGroup) -> PredictionHistory | None:
    if folder is None or not (folder / PREDICTIONS_FILE).is_file():
        return None
    history = PredictionHistory.read(folder / PREDICTIONS_FILE).up_to(len(run["accuracy_matrix"]))
    if not history.after:
        return None
    highest = max(
        int(said.max()) for said in (history.labels, history.zero_shot, *history.after.values()) if said.size
    )
    if len(history.images) != group.planned_tasks or highest >= len(class_names(run)):
        raise ValueError(f"{folder / PREDICTIONS_FILE}: not of the run whose results.json is next to it.")
    return history


def _head(group: RunGroup) -> list[HeadFigure]:
    zero_shot = group.zero_shot
    each = [run["zero_shot"].get("accuracy_matrix", ())[: group.tasks] for run in group.runs]
    is_matrix = all([*map(len, rows)] == [*range(1, group.tasks + 1)] for rows in each)
    loss = gain = None
    if is_matrix and group.tasks > 1:
        loss = np.mean([forgotten(rows) for rows in each])
        gain = np.mean([[rows[-1][i] - rows[i][i] for i in range(group.tasks - 1)] for rows in each])
    is_mean = group.first.get("scenario") == "cross-dataset"  # all datasets weigh the same
    of_last = "mean accuracy on the datasets" if is_mean else "accuracy on all classes"
    figures = [
        ("Last", "last", zero_shot["last"], f"{of_last}, after the last task"),
        ("Avg", "avg", zero_shot["avg"], "its mean over the tasks"),
        ("Forgetting", "forgetting", loss, "points lost since each task's best"),
        ("Backward transfer", "backward_transfer", gain, "points won or lost since each task was learned"),
    ]
    return [
        HeadFigure(
            name,
            mean_and_deviation(100 * group.values(key), 1, sign=key == "backward_transfer"),
            "–" if before is None else f"{100 * before:{'+' if key == 'backward_transfer' else ''}.1f}",
            meaning,
        )
        for name, key, before, meaning in figures
    ]


def _layers(run: dict[str, Any]) -> dict[str, list[tuple[str, str]]]:
    """Name and mode of every trained layer, by tower: the numbered layers, then `other`, all outside them."""
    towers = run.get("assignment", {}).get("towers", {})
    named = {
        tower: [(layer, MODES.get(layers[layer], layers[layer])) for layer in sorted(layers, key=_position)]
        for tower, layers in towers.items()
    }
    return {tower: layers for tower, layers in named.items() if layers}


def _position(layer: str) -> float:
    return int(layer) if layer.isdecimal() else math.inf


def _curves(group: RunGroup, folder: Path | None) -> list[Chart]:
    """The loss and the zeroth-order figures over the steps of the stream; without training logs, over the tasks."""
    logs = _logs(folder, group.tasks) if folder is not None else []
    if logs:
        steps, breaks, start = [], [], 0.0
        for log in logs:
            steps += [start + step for step in log["step"]]
            start = steps[-1]
            breaks.append(start)
        names = {name for log in logs for name in log}
        values = {
            name: [math.nan if v is None else v for log in logs for v in log.get(name, [None] * len(log["step"]))]
            for name in names
        }
        x_label, breaks = "step", breaks[:-1]
    elif group.tasks > 1:
        names = group.logged_names()
        values = {name: list(group.logged(name)[0]) for name in names}
        steps, breaks, x_label = list(range(1, group.tasks + 1)), [], "task"
    else:
        return []
    parted = " Lines mark where a task begins." if breaks else ""

    def series(*labels: tuple[str, str]) -> list[Series]:
        return [Series(label, steps, values[name], n) for n, (name, label) in enumerate(labels) if name in values]

    variances = [(f"zo_variance_{branch}", branch) for branch in ("vision", "language")] + [("zo_variance", "all")]
    differences = series(("zo_loss_difference", "difference of losses"), ("zo_noise", "rounding noise"))
    drawn = [
        draw("Loss", f"Of each task's own images.{parted}", series(("loss", "loss")), x_label, "loss", breaks=breaks),
        draw(
            "Difference against noise",
            f"A difference near the noise says nothing.{parted}",
            differences,
            x_label,
            "difference",
            is_log=True,
            breaks=breaks,
        ),
        draw(
            "Variance of the ZO gradient",
            f"By branch.{parted}",
            series(*variances),
            x_label,
            "variance",
            is_log=True,
            breaks=breaks,
        ),
    ]
    return [chart for chart in (*drawn, variance_by_layer([group])) if chart is not None]


def _logs(folder: Path, tasks: int) -> list[dict[str, list[float | None]]]:
    """The training logs of all tasks; empty if one is missing."""
    logs = []
    for task in range(1, tasks + 1):
        file = folder / f"task-{task:02d}" / TRAINING_LOG
        if not file.is_file():
            return []
        try:
            log = json.loads(file.read_text(encoding="utf-8"))
            sizes = {len(values) for values in log.values()}
            is_right = all(v is None or type(v) in (int, float) for values in log.values() for v in values)
            if "step" not in log or len(sizes) != 1 or not is_right or None in log["step"]:
                raise ValueError("expected lists of numbers of one length")
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{file}: not the training log of a task, or damaged: {error}.") from error
        if log["step"]:
            logs.append(log)
    return logs
