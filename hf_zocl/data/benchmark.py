"""`Benchmark` and `BenchmarkSequence`: a dataset and the protocol by which it becomes a stream of tasks."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

import numpy as np

from .splits import CLASS_ORDER_SEED
from .stream import TaskStream


@dataclass(frozen=True)
class Benchmark:
    """A dataset and the protocol by which it becomes a stream of tasks.

    Args:
        name: Its name in recipes.
        dataset_id: Hub id, or the name of a dataset in `hf_zocl.sample`; None: only a local dataset.
        train_split, test_split, image_column, label_column: Their names in the dataset.
        initial_increment, increment: Classes of the first task, and of every other one; `all`: one task.
        class_order_seed: Seed that draws the class order if `class_order` is None.
        prompt_template: The class prompt, with a `{}` for the name; or several, to be averaged.
        source: Where each of these choices comes from.
        class_order: Label ids in order of arrival.
        partial_order: Whether the class order may leave classes out.
        class_names: The names by label id, as prompts need them; None: the dataset's, cleaned.
        name_column: A column of class names, where the labels are not readable.
        test_fraction: The share of each class to test on, if the dataset has only one split.
        excluded_train_rows: A function from the labels of all training images to the rows that the stream leaves out.
        config_name, revision: For `datasets.load_dataset`.
    """

    name: str
    dataset_id: str | None
    initial_increment: int | None
    increment: int | str
    prompt_template: str | tuple[str, ...]
    source: str
    train_split: str = "train"
    test_split: str = "test"
    image_column: str = "image"
    label_column: str = "label"
    class_order_seed: int | None = CLASS_ORDER_SEED
    class_order: tuple[int, ...] | None = None
    partial_order: bool = False
    class_names: tuple[str, ...] | None = None
    name_column: str | None = None
    test_fraction: float | None = None
    excluded_train_rows: Callable[[np.ndarray], np.ndarray] | None = None
    config_name: str | None = None
    revision: str | None = None

    def stream(self, dataset_path: str | os.PathLike[str] | None = None, **overrides: Any) -> TaskStream:
        """Build the benchmark's stream.

        Args:
            dataset_path: A local copy of the dataset; default: the Hub's, or the one in the package.
            overrides: Any argument of `TaskStream.from_dataset`, in place of the benchmark's; None changes nothing.
                An `increment` without `initial_increment` applies to the first task too, and a `class_order_seed`
                without `class_order` replaces the benchmark's own order.

        Raises:
            ValueError: If the dataset does not fit (see `TaskStream.from_dataset`), or none is given.
        """
        from ..sample import NAMES, resolve

        given = {argument: value for argument, value in overrides.items() if value is not None}
        options = self._options()
        if "increment" in given:
            options["initial_increment"] = None
        if "test_split" in given:
            options["test_fraction"] = None
        elif "test_fraction" in given or options["test_fraction"] is not None:
            options["test_split"] = None
        if "class_order_seed" in given:
            options["class_order"] = None
        if "class_order" in given:
            options["partial_order"] = False
        options["dataset_id"] = None if self.dataset_id in NAMES else self.dataset_id
        if dataset_path is None and self.dataset_id is None:
            raise ValueError(f"benchmark {self.name!r} is a local dataset: give its folder as dataset_path.")
        dataset = resolve(self.dataset_id) if self.dataset_id else None
        if dataset_path is not None:
            dataset = os.fspath(dataset_path)
            options["config_name"] = options["revision"] = None  # these are of the Hub's copy, not of a local one
            if not os.path.exists(dataset):
                raise ValueError(f"dataset_path={dataset!r}: there is no such folder for benchmark {self.name!r}.")
        return TaskStream.from_dataset(dataset, **{**options, "allow_shared_images": True, **given})

    def _options(self) -> dict[str, Any]:
        own = {"dataset_id", "prompt_template", "source"}
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name not in own}


@dataclass(frozen=True)
class BenchmarkSequence:
    """Whole datasets, each a task with its own classes and prompts (the `cross-dataset` scenario).

    Args:
        name: Its name in recipes.
        benchmarks: The datasets' benchmarks, in order of arrival.
        source: Where the datasets and their order come from.
        prompts: Prompts for some datasets, by benchmark name, in place of the benchmark's own.
    """

    name: str
    benchmarks: tuple[Benchmark, ...]
    source: str
    prompts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    prompt_template: str = "a photo of a {}."

    def stream(self, dataset_path: str | os.PathLike[str] | None = None, **overrides: Any) -> TaskStream:
        """Build the stream.

        Args:
            dataset_path: A folder with a local copy of every dataset, each in a folder named after its benchmark.
            overrides: As for `Benchmark.stream`: `max_train_images_per_class`, `max_test_images_per_class`, `seed`.

        Raises:
            ValueError: If an override does not apply to a stream of whole datasets, or a dataset does not fit.
        """
        given = {argument: value for argument, value in overrides.items() if value is not None}
        foreign = sorted(set(given) - {"max_train_images_per_class", "max_test_images_per_class", "seed", "scenario"})
        if foreign or given.pop("scenario", "cross-dataset") != "cross-dataset":
            what = f"{foreign[0]}={given[foreign[0]]!r}" if foreign else f"scenario={overrides['scenario']!r}"
            raise ValueError(f"benchmark {self.name!r} is a stream of whole datasets: {what} does not apply to it.")
        streams = []
        for benchmark in self.benchmarks:
            folder = None if dataset_path is None else os.path.join(dataset_path, benchmark.name)
            stream = benchmark.stream(folder, increment="all", **given)
            prompts = self.prompts.get(benchmark.name, benchmark.prompt_template)
            streams.append(stream.map_tasks(partial(replace, prompt_template=prompts)))
        titles = [benchmark.name for benchmark in self.benchmarks]
        return TaskStream.from_streams(streams, self.name, titles=titles)
