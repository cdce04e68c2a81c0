"""Choose learning rates and ε on the first task alone, as in the paper, and print every candidate.

    python -m hf_zocl tune --recipe cifar10 --dataset_path path/to/cifar10 --zo_branch none \\
        --grid learning_rate=5e-4,1e-3,2e-3,5e-3,1e-2 --retention path/to/another/dataset

A candidate is judged by two figures. A is the accuracy on held-out *training* images of the first task, after training
on it. R is zero-shot retention: the accuracy on the test images of another dataset, which the model knew before, after
the first task was trained as often as the stream has tasks. R shows what the steps of a whole stream make it forget.
A alone would choose a rate that forgets all that CLIP knows about the tasks to come, which no image of the first task
can show. The candidate with the greatest geometric mean √(A·R) wins: a relative gain in one weighs as much as the same
relative loss in the other. No test image of the stream, and no later task, is used.

Further arguments go to every candidate, as on the command line of `train`.
"""

import argparse
import dataclasses
import itertools
import json
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict
from tqdm.auto import tqdm

from ..continual import ContinualTaskScheduler
from ..continual.run_arguments import build_stream
from ..data import TaskStream
from ..files import write_json
from ..trainer import ZOCLTrainingArguments
from .door import Parser, command
from .recipe import Recipe, build_scheduler, given_names, parse_recipe


@command
def main() -> None:
    options, further = parse_arguments()
    judge = FirstTask(
        options.recipe,
        tuple(options.seeds),
        options.held_out,
        retention_stream(options.retention, options.retention_classes, options.retention_images),
        options.repetitions,
    )
    rows = [judge.zero_shot(further), *judge.measure_all(options.grid, further)]
    try:
        mark_best(rows, options.keep)
    finally:  # the rows took hours, so keep them even if none can be chosen
        if options.output is not None:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            write_json(options.output, rows)
        print(markdown_table(rows))


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--grid", action="append", required=True, metavar="ARGUMENT=VALUE,VALUE,…")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add_judge_arguments(parser)
    parser.add_argument("--output", type=Path, help="JSON file to write the rows to.")
    options, further = parser.parse_known_args()
    names = [item.partition("=")[0] for item in options.grid]
    if len(set(names)) < len(names):
        parser.error(f"--grid: {', '.join(names)}: expected each argument once, with all its values.")
    if own := sorted({"seed", "output_dir"} & {*names, *given_names(further)}):
        parser.error(f"--{own[0]}: every candidate gets its own (--seeds names the seeds); leave it out.")
    options.grid = {name: _values(text) for name, _, text in (item.partition("=") for item in options.grid)}
    return options, further


def _values(text: str) -> list[str]:
    """The values between commas; one for each tower is a single value: `vision=1,language=8,vision=2,language=16`."""
    values: list[str] = []
    for part in text.split(","):
        tower, equals, _ = part.partition("=")
        if equals and values and "=" in values[-1] and f"{tower}=" not in values[-1]:
            values[-1] += f",{part}"
        else:
            values.append(part)
    return values


def add_judge_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    parser.add_argument("--held_out", type=int, default=300, help="Held-out training images per class.")
    parser.add_argument("--retention", required=required, help="Dataset that the model knew: Hub id or folder.")
    parser.add_argument("--retention_classes", help="JSON file and key of its label ids, FILE:KEY; default: all.")
    parser.add_argument("--retention_images", type=int, default=20, help="Its test images per class.")
    parser.add_argument("--keep", type=float, help="Least R, as a fraction; the greatest A above it wins.")
    parser.add_argument("--repetitions", type=int, help="Trainings of the first task before R; default: one per task.")


@dataclasses.dataclass(frozen=True)
class FirstTask:
    """Measures candidates on the first task.

    Args:
        recipe: A recipe's name or file.
        seeds: The seeds over which a candidate's figures are averaged.
        held_out: Training images per class to test on.
        retention: The stream on which zero-shot retention is measured.
        repetitions: How often the first task is trained before R is measured; None: as often as there are tasks.
    """

    recipe: str
    seeds: tuple[int, ...]
    held_out: int
    retention: TaskStream
    repetitions: int | None = None

    def measure_all(self, grid: dict[str, list[str]], further: list[str]) -> list[dict[str, Any]]:
        """Measure every combination of the grid's values."""
        combinations = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
        return [self.measure(candidate, further) for candidate in tqdm(combinations, desc="candidates")]

    def measure(self, candidate: dict[str, str], further: list[str]) -> dict[str, Any]:
        """A, R and √(A·R) of one candidate, each the mean over the seeds."""
        arguments = [part for name, value in candidate.items() for part in (f"--{name}", value)]
        first_task, retained = [], []
        for seed in self.seeds:
            with self._scheduler([*further, *arguments, "--seed", str(seed)]) as (scheduler, tasks):
                first_task.append(scheduler.run()["last"])
                for repetition in range(1, self.repetitions or tasks):
                    # Other directions and another data order, as in a next task.
                    args = dataclasses.replace(scheduler.args, seed=seed + 1000 * repetition)
                    scheduler = self._over(scheduler.stream, args, scheduler)
                    scheduler.run(overwrite_output_dir=True)
                retained.append(accuracy(scheduler, self.retention))
        return as_row(candidate, first_task, retained)

    def zero_shot(self, further: list[str]) -> dict[str, Any]:
        """The table row of the untrained model."""
        with self._scheduler([*further, "--seed", str(self.seeds[0])]) as (scheduler, _):
            held_out = accuracy(scheduler, scheduler.stream)
            return as_row({}, [held_out], [accuracy(scheduler, self.retention)])

    @contextmanager
    def _scheduler(self, further: list[str]) -> Iterator[tuple[ContinualTaskScheduler, int]]:
        """A run over the first task alone, tested on held-out training images; and the number of tasks."""
        quiet = ["--disable_tqdm", "true", "--report_to", "none", "--push_to_hub", "false"]  # not a result
        with tempfile.TemporaryDirectory(prefix="hf-zocl-tune-") as folder:
            recipe = parse_recipe(["--recipe", self.recipe, *further, "--output_dir", folder, *quiet])
            whole = build_scheduler(recipe)
            stream = first_task_stream(whole.stream, recipe, self.held_out)
            yield self._over(stream, recipe.training, whole), len(whole.stream)

    @staticmethod
    def _over(stream: TaskStream, args: ZOCLTrainingArguments, like: ContinualTaskScheduler) -> ContinualTaskScheduler:
        """A run of the same model, with the same plug-ins, over `stream`."""
        return ContinualTaskScheduler(
            like.model,
            like.processor,
            stream,
            args,
            like.recipe,
            callbacks=like.callbacks,
            known_classes=like.known_classes,
            image_cache_gb=like.image_cache_gb,
            skip_corrupt=like.skip_corrupt,
        )


def mark_best(rows: list[dict[str, Any]], keep: float | None = None) -> dict[str, Any]:
    """Mark the chosen candidate and return its row; the first row, zero-shot, is not a candidate.

    Raises:
        ValueError: If no candidate's R is at least `keep`.
    """
    candidates, name = rows[1:], "score"
    if keep is not None:
        candidates, name = [row for row in candidates if row["retained"] >= keep], "first_task"
        if not candidates:
            most = max(row["retained"] for row in rows[1:])
            raise ValueError(f"--keep {keep}: no candidate retains that much; the most is {most:.4f}.")
    best = max(candidates, key=lambda row: row[name])
    for row in rows:
        row["chosen"] = row is best
    return best


def as_row(candidate: dict[str, str], first_task: list[float], retained: list[float]) -> dict[str, Any]:
    scores = [(a * r) ** 0.5 for a, r in zip(first_task, retained, strict=True)]
    means = {"first_task": first_task, "retained": retained, "score": scores}
    return {"candidate": candidate, **{name: statistics.mean(values) for name, values in means.items()}}


def first_task_stream(stream: TaskStream, recipe: Recipe, held_out: int) -> TaskStream:
    """The first task's training images, of which `held_out` of each class become the test images."""
    images = recipe.run.max_train_images_per_class
    data = stream[0].train if images is None else whole_first_task(recipe)
    train, test = split_by_class(data, held_out, images, seed=recipe.training.data_seed or 0)
    names = dict(zip(stream[0].class_ids, stream[0].class_names, strict=True))
    first = TaskStream.from_dataset(
        DatasetDict(train=train, test=test),
        increment=len(names),
        name=f"{stream.name}, first task",
        # The benchmark's names for the first task; those of later tasks do not matter.
        class_names=[names.get(label, f"class {label}") for label in range(len(stream.arrival_labels))],
        class_order=stream[0].class_ids,
        partial_order=True,
        allow_shared_images=True,  # both splits are published training images
    )
    return first.map_tasks(lambda task: dataclasses.replace(task, prompt_template=stream[0].prompt_template))


def whole_first_task(recipe: Recipe) -> Dataset:
    """All training images of the first task, because the recipe's cap leaves none to hold out."""
    run = dataclasses.replace(recipe.run, max_train_images_per_class=None)
    return build_stream(run, seed=recipe.training.data_seed or 0)[0][0].train


def split_by_class(data: Dataset, held_out: int, images: int | None, seed: int) -> tuple[Dataset, Dataset]:
    labels = np.asarray(data["label"])
    train: list = []
    test: list = []
    for label in np.unique(labels):
        rows = np.random.default_rng((seed, int(label))).permutation(np.flatnonzero(labels == label))
        if len(rows) <= held_out:
            raise ValueError(f"--held_out {held_out}: class {label} has only {len(rows)} training images.")
        test.extend(rows[:held_out])
        train.extend(rows[held_out:][:images])
    return data.select(train), data.select(test)


def retention_stream(dataset: str, classes: str | None, images: int) -> TaskStream:
    order = None
    if classes is not None:
        file, _, key = classes.rpartition(":")
        order = json.loads(Path(file).read_text(encoding="utf-8"))[key]
    return TaskStream.from_dataset(
        dataset,
        increment=1,
        class_order=order,
        partial_order=order is not None,
        class_order_seed=None,
        max_train_images_per_class=1,
        max_test_images_per_class=images,
        allow_shared_images=True,  # this dataset is never trained on
    )


def accuracy(scheduler: ContinualTaskScheduler, stream: TaskStream) -> float:
    """The model's accuracy on all test images of `stream`, among its classes; on its own, also among those known."""
    return scheduler.evaluator(is_own=stream is scheduler.stream).after(stream, len(stream))["seen"]


def markdown_table(rows: list[dict]) -> str:
    lines = ["| candidate | A: first task, held out | R: retained | √(A·R) | |", "|---|---|---|---|---|"]
    for row in rows:
        name = ", ".join(f"{key}={value}" for key, value in row["candidate"].items()) or "zero-shot"
        figures = " | ".join(f"{100 * row[key]:.1f}" for key in ("first_task", "retained", "score"))
        lines.append(f"| {name} | {figures} | {'chosen' if row.get('chosen') else ''} |")
    return "\n".join(lines)
