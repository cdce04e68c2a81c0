"""Several settings side by side: mean ± standard deviation over seeds, and paired differences against a baseline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..files import written_whole
from .escape import latex, markdown, one_line
from .runs import RunGroup, by_benchmark, load_groups, zero_shot_beside


# name, heading, factor, decimals; accuracies are in percent
FIGURES = (
    ("last", "Last", 100, 1),
    ("avg", "Avg", 100, 1),
    ("forgetting", "forgetting", 100, 1),
    ("backward_transfer", "BWT", 100, 1),
    ("forward_transfer", "FWT", 100, 1),
    ("mtil.transfer", "Transfer", 100, 1),
    ("mtil.avg", "MTIL Avg", 100, 1),
    ("zero_shot_retention", "retention", 100, 1),
    ("seconds", "seconds", 1, 0),
    ("peak_memory_bytes", "GB", 1e-9, 2),
)
PAIRED = ("last", "avg")
ALWAYS = ("last", "avg", "forgetting", "seconds", "peak_memory_bytes")


@dataclass(frozen=True)
class Comparison:
    """A table of settings.

    Args:
        headings: The columns' headings.
        rows: Cells as text, a row for each setting, zero-shot first.
        note: What the columns mean.
    """

    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str

    def markdown(self) -> str:
        """A Markdown table and its note."""
        lines = [self.headings, ("---", *["---:"] * (len(self.headings) - 1)), *self.rows]
        cells = [line if number == 1 else tuple(map(markdown, line)) for number, line in enumerate(lines)]
        return "\n".join(f"| {' | '.join(line)} |" for line in cells) + f"\n\n{markdown(self.note)}"

    def latex(self) -> str:
        """A LaTeX table for the booktabs package, its note as a comment."""
        lines = [f"{' & '.join(map(latex, row))} \\\\" for row in (self.headings, *self.rows)]
        return "\n".join(
            [
                f"% {one_line(self.note)}",
                f"\\begin{{tabular}}{{l{'r' * (len(self.headings) - 1)}}}",
                "\\toprule",
                lines[0],
                "\\midrule",
                *lines[1:],
                "\\bottomrule",
                "\\end{tabular}",
            ]
        )

    def write(self, folder: Path, name: str = "comparison") -> list[Path]:
        """Write name.md and name.tex."""
        folder.mkdir(parents=True, exist_ok=True)
        texts = {folder / f"{name}.md": self.markdown(), folder / f"{name}.tex": self.latex()}
        for path, text in texts.items():
            with written_whole(path) as unfinished:
                unfinished.write_text(text + "\n", encoding="utf-8")
        return list(texts)


COMPARISON_FILES = ("comparison.md", "comparison.tex")


def compare_runs(folders: Sequence[str | Path], baseline: str | None = None) -> Comparison:
    """Compare the runs in some folders, see `load_groups` and `compare_groups`."""
    return compare_groups(load_groups(folders), baseline)


def compare_groups(groups: Sequence[RunGroup], baseline: str | None = None) -> Comparison:
    """A table of settings: mean ± sample standard deviation over the seeds, and paired differences to a baseline.

    A paired difference is taken between two runs with the same seed, so that what the seed does to both cancels out;
    its mean ± standard deviation is over the seeds that both settings have. Settings of different benchmarks are kept
    apart, each benchmark with its own zero-shot accuracy, see `by_benchmark`.

    Args:
        groups: The settings.
        baseline: The name of the setting to subtract; None: no differences.

    Raises:
        ValueError: If no setting has the baseline's name, or a setting has no seed in common with it.
    """
    names = [group.name for group in groups]
    if baseline is not None and baseline not in names:
        raise ValueError(f"baseline={baseline!r}: expected one of {', '.join(map(repr, names))}.")
    reference = next((group for group in groups if group.name == baseline), None)
    figures = [f for f in FIGURES if f[0] in ALWAYS or any(np.isfinite(g.values(f[0])).any() for g in groups)]
    headings = ["setting", "seeds", *(heading for _, heading, *_ in figures)]
    if reference is not None:
        headings += [f"Δ {heading}" for name, heading, *_ in figures if name in PAIRED]
    benchmarks, rows = by_benchmark(groups), []
    for benchmark, compared in benchmarks.items():
        beside = [""] * len(PAIRED) if reference is not None else []
        own = [[*_zero_shot_row(zero_shot_beside(compared), figures), *beside]]
        for group in compared:
            row = [group.name, str(len(group.runs))]
            row += [mean_and_deviation(group.values(name) * factor, d) for name, _, factor, d in figures]
            if reference is not None:
                row += _differences(group, reference, is_comparable=reference in compared)
            own.append(row)
        rows += own if len(benchmarks) == 1 else [[benchmark, *row] for row in own]
    note = (
        "Accuracies in percent, mean ± standard deviation over the seeds; zero-shot: the mean over the seeds of the "
        "first setting that learned all tasks one by one."
    )
    if len(benchmarks) > 1:
        headings = ["benchmark", *headings]
        note += " Settings of different benchmarks, or on different base models, cannot be compared with one another."
    if reference is not None:
        note += f" Δ: paired differences to {baseline}, seed by seed."
    if unfinished := [f"{group.name}: {', '.join(group.unfinished)}" for group in groups if group.unfinished]:
        note += f" Unfinished, with their figures so far: {'; '.join(unfinished)}."
    return Comparison(tuple(headings), tuple(map(tuple, rows)), note)


def _differences(group: RunGroup, reference: RunGroup, is_comparable: bool) -> list[str]:
    if group is reference:
        return ["baseline"] * len(PAIRED)
    if not is_comparable:
        return ["–"] * len(PAIRED)
    return [mean_and_deviation(100 * paired_differences(group, reference, name), 1, sign=True) for name in PAIRED]


def _zero_shot_row(zero_shot: dict[str, float], figures: Sequence[tuple]) -> list[str]:
    return ["zero-shot", "", *(f"{100 * zero_shot[name]:.1f}" if name in zero_shot else "" for name, *_ in figures)]


def paired_differences(group: RunGroup, reference: RunGroup, name: str) -> np.ndarray:
    """The differences of a figure between runs and the reference's runs with the same seeds.

    Args:
        group, reference: The two settings.
        name: The figure, for example `avg`.

    Returns:
        The differences, `(common seeds,)`.

    Raises:
        ValueError: If they have no seed in common.
    """
    theirs = {run["seed"]: run[name] for run in reference.runs}
    differences = [run[name] - theirs[run["seed"]] for run in group.runs if run["seed"] in theirs]
    if not differences:
        seeds = [sorted(run["seed"] for run in each.runs) for each in (group, reference)]
        raise ValueError(f"{group.name} (seeds {seeds[0]}) has no seed in common with {reference.name} ({seeds[1]}).")
    return np.array(differences)


def mean_and_deviation(values: np.ndarray, decimals: int, sign: bool = False) -> str:
    """A cell's text: mean ± sample standard deviation of the seeds' values; a single value stands alone."""
    values = values[np.isfinite(values)]
    if not len(values):
        return "–"
    mean = f"{values.mean():{'+' if sign else ''}.{decimals}f}"
    return mean if len(values) == 1 else f"{mean} ± {values.std(ddof=1):.{decimals}f}"
