"""Charts of one setting or of several side by side; each is drawn only if it has something to show."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from .charts import Chart, Series, draw
from .runs import RunGroup, zero_shot_beside


ZERO_SHOT = 14  # grey and dotted, with diamonds, in every chart
VARIANCE = re.compile(r"zo_variance(?:_(?P<branch>vision|language))?(?:_(?:layers?_)?(?P<layer>\d+))?")
SEEDS = " Bars: one standard deviation over the seeds."


@dataclass(frozen=True)
class Standing:
    """Where a setting stands on the scale that all settings share, in percent of the scale's width.

    Args:
        name: The setting's name.
        marks: For Last and for Avg: the mean, the bar's beginning and the bar's length.
        text: The two means in words.
    """

    name: str
    marks: tuple[tuple[float, float, float], ...]
    text: str


def standings(groups: Sequence[RunGroup]) -> tuple[list[Standing], float]:
    """Last and Avg of several settings on one scale, and the scale's end in percent; empty for a single setting."""
    if len(groups) < 2:
        return [], 0.0
    figures = [(group.name, [group.percent(name) for name in ("last", "avg")]) for group in groups]
    untrained = zero_shot_beside(groups)
    zero_shot = [(100 * untrained[name], 0.0) for name in ("last", "avg")]
    figures = [("zero-shot", zero_shot), *figures]
    top = 10 * np.ceil(max(10.0, max(mean + spread for _, pairs in figures for mean, spread in pairs)) / 10)
    return [
        Standing(
            name,
            tuple(
                (100 * mean / top, 100 * max(0.0, mean - spread) / top, 200 * spread / top) for mean, spread in pairs
            ),
            f"Last {pairs[0][0]:.1f}, Avg {pairs[1][0]:.1f}",
        )
        for name, pairs in figures
    ], float(top)


def comparison_charts(groups: Sequence[RunGroup]) -> list[Chart]:
    """The charts that these comparable settings have the data for."""
    charts = [accuracy(groups)]
    if len(groups) > 1:  # the matrix and the curves of a single setting say it better
        charts += [forgetting(groups), memory(groups), variance(groups), variance_by_layer(groups)]
    return [chart for chart in charts if chart is not None]


def accuracy(groups: Sequence[RunGroup]) -> Chart | None:
    """The accuracy on all classes seen after every task, next to zero-shot."""
    if max(group.tasks for group in groups) < 2:
        return None
    series = [_over_tasks(group, 100 * group.curves("seen_accuracy"), number) for number, group in enumerate(groups)]
    longest = max(groups, key=lambda group: group.tasks)
    zero_shot = (100 * longest.zero_shot_curve).tolist()
    series.append(Series("zero-shot", range(1, len(zero_shot) + 1), zero_shot, ZERO_SHOT))
    caption = "On the test images of all classes seen by then." + _bars(groups)
    return draw("Accuracy over tasks", caption, series, "after task", "accuracy (%)", from_zero=True)


def forgetting(groups: Sequence[RunGroup]) -> Chart | None:
    """The forgetting of each task at the end: its best accuracy before the last task minus its last accuracy."""
    series = [
        _over_tasks(group, 100 * np.array([forgotten(run["accuracy_matrix"][: group.tasks]) for run in group.runs]), n)
        for n, group in enumerate(groups)
        if group.tasks > 1
    ]
    caption = "Best accuracy before the last task minus the last." + _bars(groups)
    return draw("Forgetting of each task", caption, series, "task", "forgetting (points)", from_zero=True)


def memory(groups: Sequence[RunGroup]) -> Chart | None:
    """The peak memory against the accuracy after the last task."""
    series = [
        Series(
            group.name, [group.values("peak_memory_bytes").mean() / 1e9], [group.percent("last")[0]], n, is_line=False
        )
        for n, group in enumerate(groups)
        if np.isfinite(group.values("peak_memory_bytes")).all()
    ]
    caption = "Up and to the left is better."
    return draw("Memory against accuracy", caption, series, "peak memory (GB)", "Last (%)", whole_x=False)


def variance(groups: Sequence[RunGroup]) -> Chart | None:
    """The variance of the zeroth-order gradient by branch, as its mean in each task."""
    if max(group.tasks for group in groups) < 2:
        return None
    series = []
    for number, (group, name, match) in enumerate(v for v in _variances(groups) if not v[2]["layer"]):
        label = f"{group.name}, {match['branch']}" if match["branch"] else group.name
        series.append(_over_tasks(group, group.logged(name), number, label))
    caption = "As logged in training, the mean of each task."
    return draw("Variance of the ZO gradient", caption, series, "task", "variance", is_log=True)


def variance_by_layer(groups: Sequence[RunGroup]) -> Chart | None:
    """The variance of the zeroth-order gradient by layer, as its mean over tasks; None if the log has no layers."""
    values: dict[str, dict[int, float]] = {}
    for group, name, match in _variances(groups):
        if match["layer"]:
            label = ", ".join(filter(None, [group.name if len(groups) > 1 else "", match["branch"] or "variance"]))
            values.setdefault(label, {})[int(match["layer"])] = float(np.nanmean(group.logged(name)))
    if max(map(len, values.values()), default=0) < 2:
        return None
    series = [
        Series(label, sorted(found), [found[layer] for layer in sorted(found)], n)
        for n, (label, found) in enumerate(values.items())
    ]
    caption = "The mean over tasks and seeds."
    return draw("Variance by layer", caption, series, "layer, counted from 1", "variance", is_log=True)


def forgotten(matrix: Sequence[Sequence[float]]) -> list[float]:
    """The accuracy that each task except the last has lost since its best."""
    last = len(matrix) - 1
    return [max(matrix[t][i] for t in range(i, last)) - matrix[last][i] for i in range(last)]


def _over_tasks(group: RunGroup, curves: np.ndarray, number: int, name: str | None = None) -> Series:
    """The mean of the seeds' curves, `(seeds, tasks)`, with bars of one standard deviation."""
    mean = curves.mean(axis=0)
    bars = {}
    if len(curves) > 1:
        spread = curves.std(axis=0, ddof=1)
        bars = {"low": mean - spread, "high": mean + spread}
    return Series(name or group.name, range(1, len(mean) + 1), mean, number, **bars)


def _bars(groups: Sequence[RunGroup]) -> str:
    return SEEDS if any(len(group.runs) > 1 for group in groups) else ""


def _variances(groups: Sequence[RunGroup]) -> Iterator[tuple[RunGroup, str, re.Match]]:
    """Every logged variance: its group, its name, and the name's parts."""
    for group in groups:
        for name in sorted(group.logged_names()):
            if match := VARIANCE.fullmatch(name):
                yield group, name, match
