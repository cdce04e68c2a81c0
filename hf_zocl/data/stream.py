"""`TaskStream`: an image-classification dataset's splits, cut into tasks by class."""

from __future__ import annotations

import itertools
import logging
import numbers
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import datasets
import numpy as np

from ..checks import check_count, check_texts, check_type
from .class_order import arrival_labels, draw_class_order, task_sizes
from .overlap import describe_shared, shared_images
from .splits import (
    CLASS_ORDER_SEED,
    LISTS_SYNONYMS,
    TEST_SPLITS,
    TRAIN_SPLITS,
    Split,
    check_cap,
    check_names,
    encode_strings,
    find_image_column,
    find_label_column,
    in_order,
    listed,
    load_splits,
    names_from_column,
    open_split,
    read_class_names,
    rows_by_class,
    split_off,
)
from .tasks import Evaluation, Task, concatenate


logger = logging.getLogger(__name__)

SCENARIOS = ("class", "task", "domain", "cross-dataset")


class TaskStream(Sequence[Task]):
    """A sequence of tasks in order of arrival; `TaskStream.from_dataset` makes one from a dataset.

    Args:
        tasks: The tasks, in order.
        name: The stream's name in results and model cards.
        dataset_id: Hub id of the dataset, if it has one.
        scenario: The classes that an image is predicted among (van de Ven & Tolias 2019; MTIL: Zheng et al., ZSCL,
            ICCV 2023): `class`: all classes seen; `task`: those of its own task; `domain`: those that all tasks share;
            `cross-dataset`: those of its own dataset, which is one task, with that dataset's prompts.

    Attributes:
        class_order: Label ids of the dataset in order of arrival; for several datasets, one after the other.
        class_names: The names of the classes in order of arrival.
        arrival_labels: `arrival_labels[label id]` is the id's position in `class_order`, the label that a model is
            trained and tested on; -1 for ids that are not in the stream. Shape: (label ids of the dataset,). With
            several datasets, these are the first one's; every task has its own.

    Raises:
        ValueError: If there is no task, their indices do not count up from 1, the scenario is unknown, or tasks of the
            `domain` scenario differ in classes.
    """

    def __init__(self, tasks: Iterable[Task], name: str, dataset_id: str | None = None, scenario: str = "class"):
        self._tasks = tuple(tasks)
        self.name, self.dataset_id, self.scenario = name, dataset_id, scenario
        if not self._tasks:
            raise ValueError(f"stream {name!r} has no task.")
        if scenario not in SCENARIOS:
            raise ValueError(f"scenario={scenario!r} is unknown: expected one of {', '.join(SCENARIOS)}.")
        if any(task.index != index for index, task in enumerate(self._tasks, start=1)):
            given = [task.index for task in self._tasks]
            raise ValueError(
                f"stream {name!r}: tasks {given} in this order; expected 1 to {len(given)}: each task's labels "
                "continue those of the task before it."
            )
        if scenario == "domain":
            _check_same_classes(self._tasks)
        own = self._tasks[:1] if scenario == "domain" else self._tasks
        self.class_order = tuple(label for task in own for label in task.class_ids)
        self.class_names = self.seen_class_names(len(self._tasks))
        if self._tasks[0].arrival_labels is None:
            shared = arrival_labels(self._tasks[0].train, self.class_order)
            self._tasks = tuple(replace(task, arrival_labels=shared) for task in self._tasks)
        self.arrival_labels = self._tasks[0].arrival_labels

    def __len__(self) -> int:
        return len(self._tasks)

    def __getitem__(self, index):
        return self._tasks[index]

    def __repr__(self) -> str:
        sizes = [len(task.class_ids) for task in self._tasks]
        return f"TaskStream({self.name!r}, {len(sizes)} tasks of {sizes} classes, scenario {self.scenario!r})"

    def seen_class_names(self, index: int) -> tuple[str, ...]:
        """The names of the classes of tasks 1 to `index`, in order of arrival."""
        tasks = self._seen(index)
        return tuple(name for task in (tasks[:1] if self.scenario == "domain" else tasks) for name in task.class_names)

    def seen_test(self, index: int) -> datasets.Dataset:
        """The test images of tasks 1 to `index`, task by task; columns `image` and `label`."""
        return concatenate([task.test for task in self._seen(index)])

    def evaluations(self, index: int) -> tuple[Evaluation, ...]:
        """The evaluations after task `index`: the test images seen so far, grouped by the classes to predict among.

        Raises:
            ValueError: If there is no such task.
        """
        tasks = self._seen(index)
        if self.scenario == "class":
            return (Evaluation(tasks, self.seen_class_names(index), prompt_template=tasks[0].prompt_template),)
        return tuple(self._alone(task) for task in tasks)

    def training_classes(self, index: int) -> tuple[tuple[str, ...], int]:
        """The classes that task `index` is trained among, and the arrival label of the first of them.

        They are the task's own. A loss over a single class is zero for every model, so a task with one class is
        trained among all classes seen.

        Raises:
            ValueError: If the task has one class, and there is no other to train it among.
        """
        task = self._seen(index)[-1]
        if len(task.class_ids) > 1:
            return task.class_names, task.first_label
        if self.scenario == "class" and index > 1:
            return self.seen_class_names(index), 0
        why = "it is the first" if self.scenario == "class" else f"scenario={self.scenario!r} adds no others"
        raise ValueError(
            f"task {index} of {self.name!r} has the single class {task.class_names[0]!r}, and {why}: a loss over one "
            "class is zero, so nothing would be learned. Give it at least two classes "
            f"({'initial_increment' if index == 1 and self.scenario == 'class' else 'increment'})."
        )

    def future_evaluations(self, index: int) -> tuple[Evaluation, ...]:
        """The test images of each task after `index`, predicted among the classes it will have when it arrives."""
        return tuple(self._alone(task) for task in self._tasks[index:])

    def _alone(self, task: Task) -> Evaluation:
        if self.scenario in ("class", "domain"):
            return Evaluation((task,), self.seen_class_names(task.index), prompt_template=task.prompt_template)
        return Evaluation((task,), task.class_names, task.first_label, task.prompt_template)

    def map_tasks(self, function: Callable[[Task], Task]) -> TaskStream:
        """The same stream with `function` applied to every task."""
        return TaskStream(map(function, self._tasks), self.name, self.dataset_id, self.scenario)

    def _seen(self, index: int) -> tuple[Task, ...]:
        if not 1 <= index <= len(self._tasks):
            raise ValueError(f"task index {index}: tasks of {self.name!r} are counted from 1 to {len(self._tasks)}.")
        return self._tasks[:index]

    @classmethod
    def from_streams(
        cls, streams: Sequence[TaskStream], name: str, scenario: str = "cross-dataset", titles: Sequence[str] = ()
    ) -> TaskStream:
        """Build a stream of whole datasets, each a stream of one task.

        Args:
            streams: Streams of one task (`increment="all"`).
            name: The new stream's name.
            scenario: `cross-dataset`, or `domain` if all datasets have the same classes, by name.
            titles: The titles of the tasks; default: the streams' names.

        Raises:
            ValueError: If a stream has several tasks, or the domains differ in classes.
        """
        if any(len(stream) != 1 for stream in streams):
            raise ValueError(f"{name}: every dataset must be one task (increment='all'); got {list(streams)}.")
        tasks, first = [], 0
        for index, stream in enumerate(streams, start=1):
            task = stream[0]
            arrival = task.arrival_labels
            if scenario == "domain":
                arrival = _by_name(task, streams[0][0])
                ids = dict(zip(task.class_names, task.class_ids, strict=True))
                names = streams[0][0].class_names
                task = replace(task, class_names=names, class_ids=tuple(ids[name] for name in names))
            title = titles[index - 1] if titles else stream.name
            shifted = np.where(arrival < 0, -1, arrival + first)
            tasks.append(replace(task, index=index, first_label=first, arrival_labels=shifted, title=title))
            first += 0 if scenario == "domain" else len(task.class_ids)
        return cls(tasks, name, scenario=scenario)

    @classmethod
    def from_dataset(
        cls,
        dataset: str | os.PathLike[str] | Mapping[str, datasets.Dataset],
        *,
        increment: int | str,
        initial_increment: int | None = None,
        scenario: str = "class",
        domain_column: str | None = None,
        name: str | None = None,
        dataset_id: str | None = None,
        config_name: str | None = None,
        revision: str | None = None,
        train_split: str | None = None,
        test_split: str | None = None,
        image_column: str | None = None,
        label_column: str | None = None,
        name_column: str | None = None,
        test_fraction: float | None = None,
        class_names: Sequence[str] | None = None,
        class_order: Sequence[int] | None = None,
        partial_order: bool = False,
        class_order_seed: int | None = CLASS_ORDER_SEED,
        excluded_train_rows: Callable[[np.ndarray], np.ndarray] | None = None,
        max_train_images_per_class: int | None = None,
        max_test_images_per_class: int | None = None,
        seed: int = 0,
        allow_shared_images: bool = False,
    ) -> TaskStream:
        """Cut a dataset into tasks. No image is decoded, and none is copied.

        Args:
            dataset: Hub id or local folder, for `datasets.load_dataset`, or a loaded `DatasetDict`, whose formats and
                transforms are dropped.
            increment: Classes of every task. If the classes do not divide evenly, the last task is smaller, and a
                warning says so. `all`: one task. The `domain` scenario ignores it.
            initial_increment: Classes of the first task; None or 0: `increment`.
            scenario: `class`, `task` or `domain`, see `TaskStream`.
            domain_column: A column of strings, class labels or integers whose values are the tasks of the `domain`
                scenario: in numeric order if all are whole numbers, otherwise in alphabetical order.
            name: The stream's name; default: the Hub id, or the folder's name.
            dataset_id: Hub id of the dataset; default: `dataset`, if that is a Hub id.
            config_name, revision: Configuration and Hub revision, for `datasets.load_dataset`.
            train_split: Default: `train`.
            test_split: Default: the first that exists of `test`, `validation`, `valid`, `val`.
            image_column: Default: the column of type `Image`.
            label_column: Default: the column of type `ClassLabel`, else one named `label` or `labels`. Strings are
                encoded in numeric order if all are whole numbers, otherwise in alphabetical order; integers are the
                ids, and their own names. A dataset in memory keeps the ids of its `ClassLabel`; one that is loaded by
                name or from a folder has label names in alphabetical order put in numeric order, if all are numbers.
            name_column: A column of strings that names every image's class, if the labels themselves do not.
            test_fraction: Share of each class's training images that become the test images, for datasets with one
                split only; drawn at random with seed 1993, the same for every run.
            class_names: One name for each label id from 0, used unchanged; default: the dataset's, through
                `clean_class_name`.
            class_order: Label ids in order of arrival.
            partial_order: Whether `class_order` may leave classes out; they are then left out of the stream.
            class_order_seed: Seed that draws the order when `class_order` is None:
                `numpy.random.RandomState(seed).permutation(classes)`. Source: PyCIL and LAMDA-PILOT, whose seed is
                1993. None: the dataset's own order.
            excluded_train_rows: A function from the labels of all training images to the rows that the stream leaves
                out, such as those that the model was pretrained on.
            max_train_images_per_class, max_test_images_per_class: Keep at most this many of a class, drawn at random.
            seed: Seed of that draw; each class has its own draw, whatever the order and the increments.
            allow_shared_images: Only warn of images that are both trained and tested on, instead of refusing them: for
                published splits, because their published figures include such images.

        Raises:
            TypeError: If an argument has the wrong type.
            ValueError: If the dataset cannot be loaded; if a split or a column is missing, ambiguous or of the wrong
                type; if a label is missing or has no name, or two classes have the same one; if a class of the stream
                has no training or no test image; if an image is both trained and tested on; or if an argument does not
                fit the dataset.
        """
        _check_arguments(class_names, class_order, class_order_seed, seed)
        if test_split is not None and test_fraction is not None:
            raise ValueError(f"test_split={test_split!r} and test_fraction={test_fraction} were both given: pass one.")
        caps = {
            "max_train_images_per_class": max_train_images_per_class,
            "max_test_images_per_class": max_test_images_per_class,
        }
        for argument, cap in caps.items():
            check_cap(argument, cap)
        is_hub_id = isinstance(dataset, str) and not os.path.exists(dataset)
        dataset_id = dataset_id or (dataset if is_hub_id else None)
        is_path = isinstance(dataset, str | os.PathLike)
        name = name or dataset_id or (os.path.basename(os.path.abspath(dataset)) if is_path else "dataset")

        splits = load_splits(dataset, config_name, revision)
        train = open_split(splits, train_split, "train_split", TRAIN_SPLITS)
        test = train if test_fraction is not None else open_split(splits, test_split, "test_split", TEST_SPLITS)
        image_column = find_image_column(train, image_column)
        label_column = find_label_column(train, label_column)
        named = train
        if (scenario == "domain") != (domain_column is not None):
            raise ValueError(
                f"scenario={scenario!r}, domain_column={domain_column!r}: expected both 'domain' and a "
                "column, or neither."
            )
        train = train.with_columns(image_column, label_column, domain_column)
        test = test.with_columns(
            find_image_column(test, image_column), find_label_column(test, label_column), domain_column
        )

        train, test = encode_strings(train, test, renumbers=is_path)
        lists_synonyms = bool(dataset_id and LISTS_SYNONYMS.fullmatch(dataset_id.rpartition("/")[2]))
        if class_names is None and name_column is not None:
            class_names = names_from_column(named, name_column, train.labels, lists_synonyms)
        if excluded_train_rows is not None:
            train = train.rows(np.setdiff1d(np.arange(len(train.labels)), excluded_train_rows(train.labels)))
        if test_fraction is not None:
            train, test = split_off(train, test_fraction)
        names = read_class_names(train, test, class_names, lists_synonyms)
        order = draw_class_order(sorted(names), class_order, class_order_seed)
        if len(order) < len(names) and not partial_order:
            left_out = [names[label] for label in names if label not in set(order)]
            raise ValueError(
                f"class_order leaves out {len(left_out)} of {len(names)} classes ({listed(left_out)}); expected every "
                "class once, or partial_order=True to learn only the others."
            )
        check_names({label: names[label] for label in order}, train.data.features["label"], class_names is not None)
        if scenario == "domain":
            found = {*train.domains.tolist(), *test.domains.tolist()}
            domains = in_order(found) if all(isinstance(domain, str) for domain in found) else sorted(found)
            parts = {str(domain): (train.in_domain(domain), test.in_domain(domain)) for domain in domains}
            cuts = [(0, len(order))]
        else:
            parts = {None: (train, test)}
            cuts = itertools.pairwise(np.cumsum([0, *task_sizes(len(order), initial_increment, increment)]).tolist())
        stream = cls(_cut(parts, list(cuts), order, names, tuple(caps.values()), seed), name, dataset_id, scenario)
        _check_apart(stream, train, test, allow_shared_images)
        return stream


def _check_arguments(class_names, class_order, class_order_seed, seed) -> None:
    """Check the types of `from_dataset`'s arguments, and the ranges that do not depend on the dataset."""
    if class_names is not None:
        check_texts("class_names", class_names)
    if class_order is not None:
        for position, label in enumerate(class_order):
            check_type(f"class_order[{position}]", label, numbers.Integral, "a label id")
    if class_order_seed is not None:
        check_count("class_order_seed", class_order_seed, 0, 2**32 - 1)
    check_count("seed", seed, 0)


def _check_apart(stream: TaskStream, train: Split, test: Split, is_allowed: bool) -> None:
    """Check that no image of the stream is both trained and tested on."""
    used = [
        split.rows(np.flatnonzero(np.isin(split.row_ids, np.concatenate([getattr(task, rows) for task in stream]))))
        for split, rows in ((train, "train_rows"), (test, "test_rows"))
    ]
    found = shared_images(*used)
    if not found:
        return
    what = f"{stream.name}: {describe_shared(found, *used)}"
    if not is_allowed:
        raise ValueError(f"{what}, so their accuracy says nothing. Take them out of one of the splits.")
    logger.warning("%s. They stay, because the dataset was published this way.", what)


def _cut(
    parts: Mapping[str | None, tuple[Split, Split]],
    cuts: Sequence[tuple[int, int]],
    order: tuple[int, ...],
    names: Mapping[int, str],
    caps: tuple[int | None, int | None],
    seed: int,
) -> Iterator[Task]:
    """Make a task for every part (a domain, or the whole dataset) and every cut of the class order."""
    index = 0
    for title, (train, test) in parts.items():
        train_rows, test_rows = (
            rows_by_class(split, order, names, cap, seed) for split, cap in zip((train, test), caps, strict=True)
        )
        for first, stop in cuts:
            index, ids = index + 1, order[first:stop]
            train_images, test_images = train.select(train_rows, ids), test.select(test_rows, ids)
            yield Task(
                index=index,
                class_ids=ids,
                class_names=tuple(names[label] for label in ids),
                first_label=first,
                train=train_images.data,
                test=test_images.data,
                title=title,
                train_rows=train_images.row_ids,
                test_rows=test_images.row_ids,
            )


def _check_same_classes(tasks: tuple[Task, ...]) -> None:
    for task in tasks[1:]:
        other = set(task.class_names) ^ set(tasks[0].class_names)
        if other:
            raise ValueError(
                f"scenario='domain': task {task.index} ({task.title}) and task 1 ({tasks[0].title}) must have the "
                f"same classes; only one of them has {listed(sorted(other))}."
            )


def _by_name(task: Task, first: Task) -> np.ndarray:
    """The arrival labels of a domain's label ids: the positions of the same names in the first domain."""
    _check_same_classes((first, task))
    positions = {name: position for position, name in enumerate(first.class_names)}
    arrival = task.arrival_labels.copy()
    arrival[list(task.class_ids)] = [positions[name] for name in task.class_names]
    return arrival
