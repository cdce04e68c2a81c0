"""The figures of a report, one question each: readable on a phone, on light and dark backgrounds."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .escape import mathtext
from .runs import RunGroup


WIDTH, HEIGHT = 5.4, 3.7  # inches
MAX_TASKS_WITH_TEXT = 12
MAX_TICKS = 12


@dataclass(frozen=True)
class Theme:
    """Colours on one background. Marker and line style tell the settings apart as well, for print in grey."""

    name: str
    background: str
    text: str
    grid: str
    colors: tuple[str, ...]


# Okabe and Ito's, the second row lighter.
LIGHT = Theme("light", "#ffffff", "#1a1a1a", "#d9d9d9", ("#0072B2", "#D55E00", "#007a59", "#a8487c", "#1a1a1a"))
DARK = Theme("dark", "#16181d", "#e8e8e8", "#43464d", ("#56B4E9", "#F0943A", "#3fcf9f", "#f0a6ca", "#f2f2f2"))
MARKERS = "os^DvPX*"
LINES = ("-", "--", "-.", ":")
BRANCHES = {"vision": ("o", "-"), "language": ("s", "--"), "": ("^", "-")}
VARIANCE = re.compile(r"zo_variance(?:_(?P<branch>vision|language))?(?:_(?:layers?_)?(?P<layer>\d+))?")


def draw_matrix(group: RunGroup, theme: Theme) -> Figure:
    """The accuracy matrix in percent, its mean over the seeds."""
    matrix = 100 * group.matrix()
    tasks = len(matrix)
    figure, axes = _figure(theme, height=4.4)
    top = 10 * max(1, math.ceil(np.nanmax(matrix) / 10))
    image = axes.imshow(matrix, cmap="cividis", vmin=0, vmax=top)
    bar = figure.colorbar(image, ax=axes, shrink=0.9)
    bar.outline.set_edgecolor(theme.grid)
    bar.ax.tick_params(colors=theme.text)
    axes.set(xlabel="test images of task", ylabel="after task")
    _number_tasks(axes.xaxis, tasks)
    _number_tasks(axes.yaxis, tasks)
    if tasks <= MAX_TASKS_WITH_TEXT:
        for row, column in np.transpose(np.tril_indices(tasks)):
            value = matrix[row, column]
            # cividis grows evenly in lightness; at 0.47 of it black and white text read equally well.
            color = "black" if value > 0.47 * top else "white"
            size = min(11.0, 100 / tasks)
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", color=color, fontsize=size)
    return figure


def draw_accuracy(groups: Sequence[RunGroup], theme: Theme) -> Figure:
    """The accuracy on all classes seen after every task, mean and standard deviation over the seeds."""
    figure, axes = _figure(theme, len(groups) + 1)
    for number, group in enumerate(groups):
        _line(axes, 100 * group.curves("seen_accuracy"), group.name, number, theme)
    zero_shot = 100 * np.array(groups[0].first["zero_shot"]["seen_accuracy"][: groups[0].tasks])
    x = np.arange(1, len(zero_shot) + 1)
    axes.plot(x, zero_shot, color=theme.text, linestyle=(0, (1, 2)), linewidth=2, label="zero-shot")
    axes.set(xlabel="after task", ylabel="accuracy on all classes seen (%)")
    axes.set_ylim(bottom=0)
    _finish(figure, axes, max(group.tasks for group in groups), theme)
    return figure


def draw_settings(groups: Sequence[RunGroup], theme: Theme) -> Figure | None:
    """Avg and Last of every setting, mean and standard deviation over the seeds, against the first one's."""
    if len(groups) == 1:
        return None
    figure, axes = _figure(theme, 4, height=1.0 + 0.3 * len(groups))
    for number, (name, title) in enumerate((("last", "Last"), ("avg", "Avg"))):
        means, spread = zip(*(group.percent(name) for group in groups), strict=True)
        rows = np.arange(len(groups)) + 0.2 * (0.5 - number)
        style = {"color": (color := _color(theme, number)), "marker": MARKERS[number], "linestyle": ""}
        axes.errorbar(means, rows, xerr=spread, capsize=3, label=title, **style)
        for value, line in ((means[0], "--"), (100 * groups[0].first["zero_shot"][name], ":")):
            axes.axvline(value, color=color, linestyle=line, linewidth=1.2, zorder=1)
    for label, line in ((groups[0].name, "--"), ("zero-shot", ":")):
        axes.plot([], [], color=theme.text, linestyle=line, linewidth=1.2, label=_short(label))
    axes.set_yticks(range(len(groups)), [_short(group.name, 24) for group in groups])
    axes.invert_yaxis()
    axes.set(xlabel="accuracy (%)")
    _finish(figure, axes, 0, theme)
    return figure


def draw_forgetting(groups: Sequence[RunGroup], theme: Theme) -> Figure | None:
    """The forgetting of each task at the end: its best accuracy before the last task minus its last accuracy."""
    groups = [group for group in groups if group.tasks > 1]
    if not groups:
        return None
    figure, axes = _figure(theme, len(groups))
    for number, group in enumerate(groups):
        per_seed = np.array([_forgotten(run["accuracy_matrix"][: group.tasks]) for run in group.runs])
        # Side by side rather than on top of one another.
        shift = 0.5 * ((number + 0.5) / len(groups) - 0.5)
        _line(axes, 100 * per_seed, group.name, number, theme, shift)
    axes.axhline(0, color=theme.text, linewidth=1)
    axes.set(xlabel="task", ylabel="forgetting (points)")
    _finish(figure, axes, max(group.tasks for group in groups) - 1, theme)
    return figure


def draw_memory(groups: Sequence[RunGroup], theme: Theme) -> Figure:
    """The peak memory against the accuracy after the last task."""
    figure, axes = _figure(theme, len(groups))
    for number, group in enumerate(groups):
        memory, last = group.values("peak_memory_bytes") / 1e9, 100 * group.values("last")
        spread = {"xerr": memory.std(ddof=1), "yerr": last.std(ddof=1)} if len(group.runs) > 1 else {}
        style = {"color": _color(theme, number), "marker": MARKERS[number % len(MARKERS)], "linestyle": ""}
        axes.errorbar(memory.mean(), last.mean(), markersize=9, capsize=4, label=_short(group.name), **spread, **style)
    axes.set(xlabel="peak memory (GB)", ylabel="Last (%)")
    axes.margins(0.2)
    axes.locator_params(axis="x", nbins=5)
    _finish(figure, axes, 0, theme)
    return figure


def draw_variance(groups: Sequence[RunGroup], theme: Theme) -> Figure | None:
    """The variance of the zeroth-order gradient in every branch, its mean in each task."""
    series = [(group, name, match["branch"] or "") for group, name, match in _variances(groups) if not match["layer"]]
    if not series:
        return None
    figure, axes = _figure(theme, len(series))
    names = [group.name for group in groups]
    for group, name, branch in series:
        number = names.index(group.name)
        label = f"{group.name}, {branch}" if branch else group.name
        _line(axes, group.logged(name), label, number, theme, style=BRANCHES[branch])
    axes.set(xlabel="task", ylabel="variance of the ZO gradient", yscale="log")
    _finish(figure, axes, max(group.tasks for group, *_ in series), theme)
    return figure


def draw_variance_by_layer(groups: Sequence[RunGroup], theme: Theme) -> Figure | None:
    """The variance of the zeroth-order gradient in every layer, its mean over tasks; where the log has layers."""
    values: dict[tuple[str, str], dict[int, np.ndarray]] = {}
    for group, name, match in _variances(groups):
        if match["layer"]:
            by_layer = values.setdefault((group.name, match["branch"] or ""), {})
            by_layer[int(match["layer"])] = np.nanmean(group.logged(name), axis=1)
    if not values:
        return None
    figure, axes = _figure(theme, len(values))
    names = [group.name for group in groups]
    for (name, branch), by_layer in values.items():
        layers = sorted(by_layer)
        curves = np.array([by_layer[layer] for layer in layers]).T
        label = f"{name}, {branch}" if branch else name
        _line(axes, curves, label, names.index(name), theme, x=np.array(layers), style=BRANCHES[branch])
    axes.set(xlabel="layer, counted from 1", ylabel="variance of the ZO gradient", yscale="log")
    _finish(figure, axes, 0, theme)
    axes.xaxis.get_major_locator().set_params(integer=True)
    return figure


def _variances(groups: Sequence[RunGroup]):
    """Every logged variance: its group, its name, and the name's parts."""
    for group in groups:
        for name in sorted(group.logged_names()):
            if match := VARIANCE.fullmatch(name):
                yield group, name, match


def _forgotten(matrix: list[list[float]]) -> list[float]:
    last = len(matrix) - 1
    return [max(matrix[t][i] for t in range(i, last)) - matrix[last][i] for i in range(last)]


def _figure(theme: Theme, entries: int = 0, height: float = HEIGHT) -> tuple[Figure, Axes]:
    """A figure with room for this number of legend lines below its axes."""
    with matplotlib.rc_context({"font.size": 11, "axes.titlesize": 11}):
        figure = Figure(figsize=(WIDTH, height + 0.24 * entries), layout="constrained", facecolor=theme.background)
        axes = figure.add_subplot(facecolor=theme.background)
    axes.tick_params(colors=theme.text, labelsize=11)
    axes.xaxis.label.set(color=theme.text, size=11)
    axes.yaxis.label.set(color=theme.text, size=11)
    for side, spine in axes.spines.items():
        spine.set(edgecolor=theme.text, visible=side in ("left", "bottom"))
    return figure, axes


def _finish(figure: Figure, axes: Axes, tasks: int, theme: Theme) -> None:
    axes.grid(axis="y", color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    if tasks:
        step = math.ceil(tasks / MAX_TICKS)
        axes.set_xlim(0.5, tasks + 0.5)
        axes.set_xticks(range(1, tasks + 1, step))
    figure.legend(
        loc="outside lower center", ncols=1, frameon=False, labelcolor=theme.text, fontsize=10, handlelength=3
    )


def _line(
    axes: Axes,
    curves: np.ndarray,
    name: str,
    number: int,
    theme: Theme,
    shift: float = 0.0,
    x: np.ndarray | None = None,
    style: tuple[str, str] | None = None,
) -> None:
    """The mean of the seeds' curves, `(seeds, points)`, with bars of one standard deviation; of variances, which are
    on a logarithmic scale, with bars from the least to the greatest seed.
    """
    marker, line = style or (MARKERS[number % len(MARKERS)], LINES[number % len(LINES)])
    x = np.arange(1, curves.shape[1] + 1) + shift if x is None else x
    mean, spread = curves.mean(axis=0), None
    if len(curves) > 1:
        is_variance = style is not None
        spread = (mean - curves.min(axis=0), curves.max(axis=0) - mean) if is_variance else curves.std(axis=0, ddof=1)
    axes.errorbar(
        x,
        mean,
        spread,
        label=_short(name),
        color=_color(theme, number),
        marker=marker,
        linestyle=line if shift == 0 else "",
        linewidth=2,
        markersize=7,
        markerfacecolor=theme.background if number % 2 else None,
        capsize=3,
    )


def _color(theme: Theme, number: int) -> str:
    return theme.colors[number % len(theme.colors)]


def _short(name: str, limit: int = 44) -> str:
    """A name that fits under a figure: its middle is left out where it is too long."""
    return mathtext(name if len(name) <= limit else f"{name[: limit // 2]}…{name[-limit // 2 + 1 :]}")


def _number_tasks(axis, tasks: int) -> None:
    ticks = range(0, tasks, math.ceil(tasks / MAX_TICKS))
    axis.set_ticks(ticks, [str(tick + 1) for tick in ticks])
