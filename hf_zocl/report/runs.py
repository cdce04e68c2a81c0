"""Finished runs, read from their `results.json`, and grouped into settings over several seeds."""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from .setting import base_name, other_setting


RESULTS_FILE = "results.json"
TRAINING_LOG = "training_log.json"  # in the folder of each task


@dataclass(frozen=True)
class RunGroup:
    """One setting, run with one seed or several.

    Args:
        name: Its name in tables and figures.
        runs: The content of every seed's `results.json`, in the order of the seeds.
        folders: The folder of every seed; empty if the runs are not from files.
    """

    name: str
    runs: tuple[dict[str, Any], ...]
    folders: tuple[Path, ...] = ()

    @property
    def first(self) -> dict[str, Any]:
        return self.runs[0]

    @property
    def tasks(self) -> int:
        """The tasks that every seed has finished."""
        return min(len(run["accuracy_matrix"]) for run in self.runs)

    @property
    def zero_shot(self) -> dict[str, float]:
        """Last and Avg of the untrained model: means over the seeds, which may differ in the class order.

        In an unfinished run, they are over its finished tasks.
        """
        each = [self._zero_shot_of(run) for run in self.runs]
        return {name: sum(one[name] for one in each) / len(each) for name in ("last", "avg")}

    def _zero_shot_of(self, run: dict[str, Any]) -> dict[str, Any]:
        zero_shot, done = run["zero_shot"], len(run["accuracy_matrix"])
        if self.is_joint or not 0 < done < self.planned_tasks:
            return zero_shot
        seen = zero_shot["seen_accuracy"][:done]
        return {"last": seen[-1], "avg": sum(seen) / done}

    @property
    def zero_shot_curve(self) -> np.ndarray:
        """The untrained model's accuracy on all classes seen, its mean over the seeds. Shape: (tasks,)."""
        return np.mean([run["zero_shot"]["seen_accuracy"][: self.tasks] for run in self.runs], axis=0)

    @property
    def unfinished(self) -> list[str]:
        """The seeds whose stream is not finished; their Last and Avg are the figures so far."""
        counts = [(run["seed"], len(run["accuracy_matrix"]), len(run.get("tasks") or ())) for run in self.runs]
        return [f"seed {seed} ({done} of {total} tasks)" for seed, done, total in counts if done < total]

    @property
    def planned_tasks(self) -> int:
        """The tasks of the stream, finished or not."""
        return len(self.first.get("tasks") or self.first["accuracy_matrix"])

    @property
    def classes_seen(self) -> tuple[int, ...]:
        """How many classes were seen after each finished task; empty if the results do not say."""
        details = self.first.get("details", [])[: self.tasks]
        return tuple(len(each.get("per_class_accuracy", ())) for each in details)

    @property
    def is_joint(self) -> bool:
        """True if all classes were learned at once: there is then one task, whatever the benchmark's tasks are."""
        return self.first.get("recipe", {}).get("learning") == "joint"

    @property
    def protocol(self) -> tuple[str, str, tuple[str, ...], Any, str]:
        """The evaluation protocol: benchmark, scenario, classes, cap on test images per class, base model."""
        run = self.first
        recipe = run.get("recipe", {})
        most = recipe.get("max_test_images_per_class")
        return (
            str(run.get("benchmark") or ""),
            str(run.get("scenario") or "class"),
            tuple(sorted(run.get("classes", ()))),
            most if isinstance(most, int) else None,
            _base_model(run),
        )

    def values(self, name: str) -> np.ndarray:
        """One figure of every seed (`mtil.transfer` for a nested one), NaN where it is missing. Shape: (seeds,)."""
        *outer, name = name.split(".")
        holders = [run.get(outer[0], {}) if outer else run for run in self.runs]
        return np.array([np.nan if one.get(name) is None else one[name] for one in holders], dtype=float)

    def percent(self, name: str) -> tuple[float, float]:
        """A figure's mean and standard deviation over the seeds, in percent; with one seed, the deviation is zero."""
        values = 100 * self.values(name)
        return values.mean(), values.std(ddof=1) if len(values) > 1 else 0.0

    def curves(self, name: str) -> np.ndarray:
        """A figure by task for every seed, up to the last task that all seeds have. Shape: (seeds, tasks)."""
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
        """The mean of a logged training figure, by task for every seed. Shape: (seeds, tasks)."""
        entries = [run.get("training", [])[: self.tasks] for run in self.runs]
        return np.array([[entry.get(name, np.nan) for entry in run] for run in entries], dtype=float)

    def logged_names(self) -> set[str]:
        return {name for run in self.runs for entry in run.get("training", []) for name in entry}


def zero_shot_beside(groups: Sequence[RunGroup]) -> dict[str, float]:
    """Last and Avg of the untrained model to set beside several settings that can be compared.

    Those of a run that learned all classes at once, which has one task, or of an unfinished one are over other tasks.
    """
    return max(groups, key=lambda group: (not group.is_joint, not group.unfinished)).zero_shot


def class_names(results: Mapping[str, Any]) -> list[str]:
    """The name of every class number of a run's predictions, see `PredictionHistory`."""
    classes = list(results.get("classes", ()))
    return [*classes, *(name for name in results.get("known_classes", ()) if name not in classes)]


def load_groups(folders: Iterable[str | Path]) -> list[RunGroup]:
    """Read runs: each folder holds a `results.json`, or folders for several seeds that do.

    Args:
        folders: Folders of runs; their names are the groups' names. Files among them are skipped, because a shell's
            `runs/*` includes them.

    Returns:
        The groups in the order given.

    Raises:
        ValueError: If a folder does not exist, none holds a finished task, a results.json cannot be read, or a
            folder's subfolders are not the seeds of one setting.
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
    """Read the runs of one setting, one folder per seed; runs without a finished task are left out.

    Args:
        folders: Each holds a `results.json`.
        name: The group's name; default: the name of their parent folder.

    Raises:
        ValueError: If a results.json cannot be read, two have the same seed, or they are of different settings.
    """
    read = sorted(((_read(folder / RESULTS_FILE), folder) for folder in folders), key=lambda each: each[0]["seed"])
    read = [(run, folder) for run, folder in read if run["accuracy_matrix"]]
    runs = [run for run, _ in read]
    seeds, benchmarks = [run["seed"] for run in runs], sorted({str(run.get("benchmark")) for run in runs})
    if len(set(seeds)) < len(seeds) or len(benchmarks) > 1:
        raise ValueError(
            f"{', '.join(map(str, folders))}: expected one setting, each run with its own seed, got seeds "
            f"{', '.join(map(str, seeds))} of {', '.join(benchmarks)}; name the folder of each setting."
        )
    for run, folder in read[1:]:
        mine, theirs = (_setting(each) for each in (runs[0], run))
        if (name := other_setting(mine, theirs)) is not None:
            raise ValueError(
                f"{read[0][1]} and {folder}: expected one setting, each run with its own seed, got {name} "
                f"{mine[name]!r} and {theirs[name]!r}; name the folder of each setting."
            )
    own = tuple(folder for _, folder in read)
    return RunGroup(name or folders[0].resolve().parent.name, tuple(runs), own)


def _base_model(run: Mapping[str, Any]) -> str:
    """The base model's name or, if the recipe has none (a run in Python), the beginning of its checksum."""
    named = base_name(run.get("recipe", {}).get("model_name_or_path"))
    digest = run.get("fingerprints", {}).get("base_model")
    return named or (f"base {digest[:8]}" if digest else "")


def _setting(run: Mapping[str, Any]) -> dict[str, Any]:
    """The run's arguments, with its base model if that is known."""
    base_model = _base_model(run)
    return run.get("recipe", {}) | ({"model_name_or_path": base_model} if base_model else {})


def _with_own_names(groups: list[RunGroup], folders: Sequence[str | Path]) -> list[RunGroup]:
    """The groups, with numbers added to names that occur twice."""
    names = [group.name for group in groups]
    return [
        group if names.count(group.name) == 1 else replace(group, name=f"{group.name} ({number})")
        for number, group in enumerate(groups, start=1)
    ]


def by_benchmark(groups: Sequence[RunGroup]) -> dict[str, list[RunGroup]]:
    """Group the settings whose figures can be compared: the same benchmark, tasks and base model.

    A run that learned all classes at once is grouped with those that learned them task by task.

    Args:
        groups: The settings.

    Returns:
        The benchmark's name → its settings, both in the order given.
    """
    found: list[list[RunGroup]] = []
    for group in groups:
        for members in found:
            if all(_has_same_tasks(group, member) for member in members):
                members.append(group)
                break
        else:
            found.append([group])
    names: dict[str, list[RunGroup]] = {}
    for members in found:
        tasks = next((member.planned_tasks for member in members if not member.is_joint), None)
        name = _benchmark_name(members[0].protocol, tasks)
        if name in names:
            name += f" ({len(names) + 1})"
        names[name] = members
    return names


def _has_same_tasks(one: RunGroup, other: RunGroup) -> bool:
    """True if two settings have one protocol and, unless one learned all classes at once, tasks of the same sizes."""
    if one.protocol != other.protocol:
        return False
    if one.is_joint or other.is_joint:
        return True
    # As far as both have come.
    return one.planned_tasks == other.planned_tasks and all(map(operator.eq, one.classes_seen, other.classes_seen))


def _benchmark_name(key: tuple, tasks: int | None) -> str:
    benchmark, scenario, classes, most, model = key
    parts = [f"{len(classes)} classes" if classes else "", f"{tasks} tasks" if tasks else "", scenario]
    parts += [f"at most {most} test images a class" if most else "", Path(model).name if model else ""]
    return f"{Path(benchmark).name or 'local dataset'} ({', '.join(part for part in parts if part)})"


def _read(file: Path) -> dict[str, Any]:
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not JSON: {error}") from error
    if not isinstance(results, dict):
        raise ValueError(f"{file}: not the results of a run: expected a JSON object, got {type(results).__name__}.")
    missing = [name for name in ("accuracy_matrix", "seen_accuracy", "zero_shot", "seed") if name not in results]
    if missing:
        raise ValueError(f"{file}: not the results of a run: {', '.join(missing)} is missing.")
    for name, (is_right, expected) in _KINDS.items():
        if name in results and not is_right(results[name]):
            raise ValueError(
                f"{file}: not the results of a run: expected {name} to be {expected}, got {results[name]!r:.60}."
            )
    if problem := _contradiction(results):
        raise ValueError(f"{file}: not the results of a run: {problem}.")
    return results


def _contradiction(results: dict[str, Any]) -> str | None:
    """A contradiction in one run's results, as text; None if there is none."""
    matrix, zero_shot = results["accuracy_matrix"], results["zero_shot"]
    wrong = next((number for number, row in enumerate(matrix, start=1) if len(row) != number), None)
    if wrong is not None:
        return f"accuracy_matrix, row {wrong}: {len(matrix[wrong - 1])} entries, not {wrong}"
    for name, values in (("seen_accuracy", results), ("seen_accuracy of zero_shot", zero_shot)):
        if len(values["seen_accuracy"]) < len(matrix):
            return f"{name} has {len(values['seen_accuracy'])} entries after {len(matrix)} tasks"
    lacking = [name for name in ("last", "avg") if matrix and name not in results]
    return f"{lacking[0]} is missing" if lacking else None


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number too large for a float
        return False


def _is_figure(value: Any) -> bool:
    """Tell whether a value of a log is a number; a failed training may leave it infinite or NaN."""
    return isinstance(value, float) or _is_number(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_list(is_right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(is_right, value))


def _or_none(is_right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or is_right(value)


def _is_zero_shot(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and _is_list(_is_number)(value.get("seen_accuracy"))
        and all(_is_number(value.get(name)) for name in ("last", "avg"))
    )


def _is_assignment(value: Any) -> bool:
    towers = value.get("towers") if isinstance(value, dict) else None
    return isinstance(towers, dict) and all(
        isinstance(layers, dict) and all(map(_is_text, layers.values())) for layers in towers.values()
    )


_FIGURE = (_or_none(_is_number), "a number or null")
_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "accuracy_matrix": (_is_list(_is_list(_is_number)), "rows of numbers"),
    "seen_accuracy": (_is_list(_is_number), "numbers"),
    "zero_shot": (_is_zero_shot, "seen_accuracy, last and avg"),
    "seed": (lambda value: isinstance(value, int) and not isinstance(value, bool), "a whole number"),
    **dict.fromkeys(("last", "avg"), (_is_number, "a number")),
    **dict.fromkeys(
        ("forgetting", "backward_transfer", "forward_transfer", "zero_shot_retention", "seconds", "peak_memory_bytes"),
        _FIGURE,
    ),
    "mtil": (lambda value: isinstance(value, dict) and all(map(_is_number, value.values())), "numbers by name"),
    "training": (
        _is_list(lambda entry: isinstance(entry, dict) and all(map(_is_figure, entry.values()))),
        "a log of numbers",
    ),
    "details": (
        _is_list(lambda each: isinstance(each, dict) and isinstance(each.get("per_class_accuracy", []), list)),
        "figures by name, for each task",
    ),
    "tasks": (_or_none(_is_list(_is_text)), "the names of the tasks"),
    **dict.fromkeys(("classes", "known_classes"), (_is_list(_is_text), "the names of the classes")),
    "assignment": (_is_assignment, "branch, layers, and the modes of each tower's layers"),
    **dict.fromkeys(("benchmark", "scenario"), (_or_none(_is_text), "text")),
    **dict.fromkeys(("recipe", "versions"), (lambda value: isinstance(value, dict), "values by name")),
    "skipped_images": (_is_number, "a number"),
}
