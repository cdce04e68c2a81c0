"""Finished runs, read from their `results.json`, and what several seeds of one setting have in common."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


RESULTS_FILE = "results.json"


@dataclass(frozen=True)
class RunGroup:
    """One setting, run with one seed or several.

    Args:
        name: What tables and figures call it.
        runs: The content of every seed's `results.json`, by seed.
    """

    name: str
    runs: tuple[dict[str, Any], ...]

    @property
    def first(self) -> dict[str, Any]:
        return self.runs[0]

    @property
    def tasks(self) -> int:
        """The tasks that every seed has finished."""
        return min(len(run["accuracy_matrix"]) for run in self.runs)

    @property
    def unfinished(self) -> list[str]:
        """The seeds whose stream is not at its end: their Last and Avg are those so far."""
        counts = [(run["seed"], len(run["accuracy_matrix"]), len(run.get("tasks") or ())) for run in self.runs]
        return [f"seed {seed} ({done} of {total} tasks)" for seed, done, total in counts if done < total]

    def values(self, name: str) -> np.ndarray:
        """One figure of every seed, `mtil.transfer` for one within another; NaN where it is not. Shape: (seeds,)."""
        *outer, name = name.split(".")
        holders = [run.get(outer[0], {}) if outer else run for run in self.runs]
        return np.array([np.nan if one.get(name) is None else one[name] for one in holders], dtype=float)

    def percent(self, name: str) -> tuple[float, float]:
        """The mean of a figure over the seeds and its standard deviation, zero for one seed; percent."""
        values = 100 * self.values(name)
        return values.mean(), values.std(ddof=1) if len(values) > 1 else 0.0

    def curves(self, name: str) -> np.ndarray:
        """One list by task of every seed, up to the last task that all have. Shape: (seeds, tasks)."""
        return np.array([run[name][: self.tasks] for run in self.runs], dtype=float)

    def matrix(self) -> np.ndarray:
        """The mean accuracy matrix over the seeds, NaN above the diagonal. Shape: (tasks, tasks)."""
        matrices = np.full((len(self.runs), self.tasks, self.tasks), np.nan)
        for matrix, run in zip(matrices, self.runs, strict=True):
            for row, values in enumerate(run["accuracy_matrix"][: self.tasks]):
                if len(values) != row + 1:
                    raise ValueError(
                        f"{self.name}: accuracy_matrix, row {row + 1}: {len(values)} entries, not {row + 1}."
                    )
                matrix[row, : row + 1] = values
        return matrices.mean(axis=0)

    def logged(self, name: str) -> np.ndarray:
        """A figure of the training log, its mean by task of every seed. Shape: (seeds, tasks)."""
        entries = [run.get("training", [])[: self.tasks] for run in self.runs]
        return np.array([[entry.get(name, np.nan) for entry in run] for run in entries], dtype=float)

    def logged_names(self) -> set[str]:
        return {name for run in self.runs for entry in run.get("training", []) for name in entry}


def load_groups(folders: Iterable[str | Path]) -> list[RunGroup]:
    """Read runs: each folder holds a `results.json`, or a folder for each seed that does.

    Args:
        folders: Folders of runs; their names are the groups' names. Files among them are passed over, as a shell's
            `runs/*` finds them.

    Returns:
        The groups in the order given.

    Raises:
        ValueError: If a folder does not exist, none holds a finished task, a results.json cannot be read, or what is
            in a folder's folders are not the seeds of one setting.
    """
    groups = []
    for folder in map(Path, folders):
        if not folder.exists():
            raise ValueError(f"{folder}: there is no such folder.")
        if not folder.is_dir():
            continue
        own = folder / RESULTS_FILE
        seeds = [folder] if own.is_file() else sorted(file.parent for file in folder.glob(f"*/{RESULTS_FILE}"))
        group = load_seeds(seeds, folder.resolve().name)
        if group.runs:
            groups.append(group)
    if not groups:
        raise ValueError(f"no {RESULTS_FILE} with a finished task in {', '.join(map(str, folders)) or 'no folder'}.")
    return _with_own_names(groups, list(folders))


def load_seeds(folders: Sequence[Path], name: str | None = None) -> RunGroup:
    """Read the runs of one setting, one folder a seed; those without a finished task are left out.

    Args:
        folders: Each holds a `results.json`.
        name: Of the group; default: that of the folder they lie in.

    Raises:
        ValueError: If a results.json cannot be read, two are of one seed, or they are of several benchmarks.
    """
    runs = sorted((_read(folder / RESULTS_FILE) for folder in folders), key=lambda run: run["seed"])
    runs = [run for run in runs if run["accuracy_matrix"]]
    seeds, benchmarks = [run["seed"] for run in runs], sorted({str(run.get("benchmark")) for run in runs})
    if len(set(seeds)) < len(seeds) or len(benchmarks) > 1:
        raise ValueError(
            f"{', '.join(map(str, folders))}: expected one setting with seeds of its own, got seeds "
            f"{', '.join(map(str, seeds))} of {', '.join(benchmarks)}; name the folder of each setting."
        )
    return RunGroup(name or folders[0].resolve().parent.name, tuple(runs))


def _with_own_names(groups: list[RunGroup], folders: Sequence[str | Path]) -> list[RunGroup]:
    """Two folders of one name are told apart by their numbers."""
    names = [group.name for group in groups]
    return [
        group if names.count(group.name) == 1 else RunGroup(f"{group.name} ({number})", group.runs)
        for number, group in enumerate(groups, start=1)
    ]


def _read(file: Path) -> dict[str, Any]:
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: no JSON: {error}") from error
    missing = [name for name in ("accuracy_matrix", "seen_accuracy", "zero_shot", "seed") if name not in results]
    if missing:
        raise ValueError(f"{file}: no results of a run: {', '.join(missing)} is missing.")
    return results
