"""The picture of a run: its accuracy matrix, and its accuracy on all classes seen against zero-shot."""

import math
import os
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..files import written_whole
from .escape import mathtext


# Okabe and Ito's blue and vermilion; line style and marker differ too, for print in grey.
TRAINED = {"color": "#0072B2", "linestyle": "-", "marker": "o"}
ZERO_SHOT = {"color": "#D55E00", "linestyle": "--", "marker": "s", "markerfacecolor": "white"}
MAX_TASKS_WITH_DECIMALS = 10
MAX_TASKS_WITH_TEXT = 20


def plot_accuracy_matrix(results: dict[str, Any], path: str | os.PathLike) -> Path:
    """Draw a run's accuracy matrix into a PNG file, which is complete or absent at any moment.

    Args:
        results: the content of `results.json`, see `draw_accuracy_matrix`.
        path: the PNG file; its folder is made if it is missing.

    Returns:
        The path written.

    Raises:
        ValueError: `accuracy_matrix` is empty, or row t does not hold t entries.
    """
    return save_figure(draw_accuracy_matrix(results), Path(path))


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a PNG file of 150 dots per inch, which is complete or absent at any moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as unfinished:
        figure.savefig(unfinished, format="png", dpi=150, metadata={"Software": None})
    return path


def draw_accuracy_matrix(results: dict[str, Any]) -> Figure:
    """Draw the accuracy matrix as a heatmap and, next to it, the accuracy on all classes seen against zero-shot.

    Args:
        results: the content of `results.json`, of which it reads `benchmark`, `recipe`, `accuracy_matrix` (row t of
            length t, fractions in [0, 1]), `seen_accuracy`, `last`, `avg` and `zero_shot["seen_accuracy"]`.

    Returns:
        A separate figure, outside pyplot, so that no global state is touched.

    Raises:
        ValueError: `accuracy_matrix` is empty, or row t does not hold t entries.
    """
    matrix = _percent_matrix(results["accuracy_matrix"])
    trained = 100 * np.asarray(results["seen_accuracy"][: len(matrix)], dtype=float)
    zero_shot = 100 * np.asarray(results["zero_shot"]["seen_accuracy"][: len(matrix)], dtype=float)
    # One scale for both panels, up to the next ten: from 0 to 100, a weak model's panels would be all dark.
    top = 10 * max(1, math.ceil(max(np.nanmax(matrix), trained.max(), zero_shot.max()) / 10))
    figure = Figure(figsize=(12, 5.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.1, 1))
    figure.suptitle(_title(results), fontsize=12)
    _draw_heatmap(left, matrix, top)
    _draw_curves(right, trained, zero_shot, top)
    return figure


def _percent_matrix(rows: list[list[float]]) -> np.ndarray:
    """The ragged rows as a square [tasks, tasks] matrix in percent, NaN above the diagonal."""
    if not rows:
        raise ValueError("accuracy_matrix is empty: there is no task to draw")
    matrix = np.full((len(rows), len(rows)), np.nan)
    for index, row in enumerate(rows):
        if len(row) != index + 1:
            raise ValueError(f"accuracy_matrix: row {index + 1} has {len(row)} entries, expected {index + 1}")
        matrix[index, : index + 1] = 100 * np.asarray(row, dtype=float)
    return matrix


def _draw_heatmap(axes: Axes, matrix: np.ndarray, top: float) -> None:
    tasks = len(matrix)
    image = axes.imshow(matrix, cmap="cividis", vmin=0, vmax=top)
    axes.figure.colorbar(image, ax=axes, shrink=0.9)
    axes.set(title="Accuracy on the test images of each task (%)", xlabel="test images of task", ylabel="after task")
    _number_tasks(axes.xaxis, tasks)
    _number_tasks(axes.yaxis, tasks)
    axes.spines[["top", "right"]].set_visible(False)
    if tasks > MAX_TASKS_WITH_TEXT:
        return
    digits = 1 if tasks <= MAX_TASKS_WITH_DECIMALS else 0
    size = min(12.0, 150 / tasks)
    for row, column in np.transpose(np.tril_indices(tasks)):
        value = matrix[row, column]
        # The lightness of cividis grows evenly; at 0.47, black and white text read equally well.
        color = "black" if value > 0.47 * top else "white"
        axes.text(column, row, f"{value:.{digits}f}", ha="center", va="center", color=color, fontsize=size)


def _draw_curves(axes: Axes, trained: np.ndarray, zero_shot: np.ndarray, top: float) -> None:
    for name, values, style in (("trained", trained, TRAINED), ("zero-shot", zero_shot, ZERO_SHOT)):
        label = f"{name}: Avg {values.mean():.1f}, Last {values[-1]:.1f}"
        axes.plot(range(len(values)), values, label=label, linewidth=2, markersize=7, clip_on=False, **style)
    axes.set(title="Accuracy on all classes seen (%)", xlabel="after task", ylabel="accuracy (%)")
    axes.set(xlim=(-0.5, len(trained) - 0.5), ylim=(0, top))
    _number_tasks(axes.xaxis, len(trained))
    axes.grid(axis="y", color="0.85")
    axes.spines[["top", "right"]].set_visible(False)
    # Below the axes, because no place inside is free of curves in every run.
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, frameon=False)


def _number_tasks(axis: Any, tasks: int) -> None:
    """Set ticks that count tasks from 1, thinned out if there are too many to read."""
    step = math.ceil(tasks / MAX_TASKS_WITH_TEXT)
    ticks = range(0, tasks, step)
    axis.set_ticks(ticks, [str(tick + 1) for tick in ticks], fontsize=10 if tasks <= 10 else 8)


def _title(results: dict[str, Any]) -> str:
    recipe = results["recipe"]
    names = (results["benchmark"], recipe.get("dataset_name"), recipe.get("dataset_path"))
    # Only the last component of a path: the figure is pushed to the Hub.
    name = next((Path(str(name)).name for name in names if name and name != "none"), "local dataset")
    setting = [recipe.get("adapter"), recipe.get("zo_branch"), recipe.get("zo_layers")]
    if recipe.get("zo_branch") == "none":
        setting = [recipe.get("adapter"), "first-order only"]
    return fill(mathtext(" · ".join([name, *(str(part) for part in setting if part)])), width=110)
