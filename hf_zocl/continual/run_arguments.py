"""The arguments of a run's model and its stream of tasks, and the stream built from them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from ..checks import check_fields
from ..data.benchmarks import Benchmark, BenchmarkSequence, get_benchmark
from ..data.images import DEFAULT_CACHE_GB
from ..data.stream import SCENARIOS, TaskStream
from ..models.clip_classifier import check_templates


LEARNING = ("sequential", "joint", "none")
DTYPES = ("auto", "float64", "float32", "bfloat16", "float16")
_STREAM_ARGUMENTS = (
    *("train_split", "test_split", "image_column", "label_column", "name_column", "class_names"),
    *("test_fraction", "scenario", "domain_column", "initial_increment", "increment"),
    *("class_order", "partial_order", "class_order_seed"),
    *("max_train_images_per_class", "max_test_images_per_class"),
)


@dataclass
class RunArguments:
    """The model and the stream of tasks of a run.

    Args:
        preset: The name of the preset that the run's arguments began with (`hf_zocl/commands/presets`).
        model_name_or_path: A CLIP model: Hub id, local folder, or the embedded `mini-clip`. Or a task's checkpoint
            (its folder, or a repository) or another PEFT adapter, which is then trained further; images are
            predicted among the classes that the checkpoint knows as well.
        merge_into: Do not train that adapter further: merge it into its base model, keep the result in this folder,
            and train a fresh adapter on it.
        dtype: The model's dtype once loaded: `auto` (that of its checkpoint, but float32 instead of half precision),
            `float64`, `float32`, `bfloat16` or `float16`; the adapter's weights are float32 at least.
        benchmark: A registered benchmark, or `none` for any image-classification dataset.
        dataset_name: Hub id of the dataset under `benchmark=none`.
        dataset_path: A local copy of the benchmark's dataset, or the dataset itself under `benchmark=none`.
        dataset_config: The dataset's configuration, where it has several.
        dataset_revision: The dataset's revision on the Hub, a commit or a tag; default: the newest. A local copy has
            no revision.
        datasets: Several datasets (Hub ids or folders), each a task, under `benchmark=none` and `scenario=domain` or
            `cross-dataset`.
        train_split, test_split, image_column, label_column: Chosen by name and feature type unless given.
        name_column: A column of class names, where the labels are not readable.
        class_names: A name for every label id from 0, instead of the dataset's.
        test_fraction: Share of every class to test on, for a dataset with only one split.
        scenario: `class`, `task`, `domain` or `cross-dataset`: the classes that an image is predicted among.
        domain_column: The column whose values are the tasks of `scenario=domain`.
        learning: `sequential`: task by task; `joint`: all classes at once, the upper bound; `none`: zero-shot, the
            lower bound.
        initial_increment, increment: Classes of the first task, and of every other one.
        class_order: Label ids in order of arrival; default: drawn by `class_order_seed`.
        partial_order: Whether `class_order` may leave classes out.
        class_order_seed: Seed of numpy's permutation; 1993 is the usual one in the field.
        max_train_images_per_class, max_test_images_per_class: Caps, drawn at random by `data_seed` or 0.
        prompt_template: The class prompt, with a `{}` for the name, or several (the first trains, their average
            predicts); default: the benchmark's.
        held_out: Benchmarks that are measured before and after every task and never trained on, each a registered
            name, or `name=folder` for a local copy.
        evaluate_future: Also measure future tasks, for forward transfer; default: only under `cross-dataset`.
        image_cache_gb: Images are decoded once into a cache if their pixels fit into this many GB; 0: no cache.
        skip_corrupt: Leave out and count images that cannot be decoded, instead of stopping.
        classifier_alignment: Steps after every task in which the text tower learns to tell all classes seen apart,
            from the statistics of their image features (`ClassifierAlignment`); 0: none.
        classifier_alignment_learning_rate: The learning rate of these steps in first-order text layers; default: 5e-3.
        seeds: Run once with each of these as `seed` (`1993,1996,1997`), into `output_dir/seed-1993` and so on.
        num_seeds: In place of `seeds`, how many seeds, counted up from `seed`.
        vary_class_order: Each seed also draws the class order, as in PyCIL and SLCA.
        resume: Go on where the run in `output_dir` stopped, within a task too. `resume_from_checkpoint=true` does the
            same; it also takes the folder of a checkpoint or of a complete task.
        overwrite_output_dir: Replace the run in `output_dir`: its files, and nothing else there, are removed once the
            first step of this run is done. Without it, and without `resume`, a folder that holds a run is refused.
    """

    preset: str | None = field(default=None, metadata={"help": "A method by name: see `python -m hf_zocl recipes`."})
    model_name_or_path: str = field(default="mini-clip", metadata={"help": "Hub id, folder, or mini-clip."})
    merge_into: str | None = field(default=None, metadata={"help": "Folder for model and adapter merged into one."})
    dtype: str = field(default="auto", metadata={"help": f"The model's dtype: {', '.join(DTYPES)}."})
    benchmark: str = field(default="cifar10-sample", metadata={"help": "A registered benchmark, or none."})
    dataset_name: str | None = field(default=None, metadata={"help": "Hub id of a dataset (benchmark=none)."})
    dataset_path: str | None = field(default=None, metadata={"help": "Local folder of the dataset."})
    datasets: list[str] | None = field(default=None, metadata={"help": "Several datasets, each a task."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Commit or tag of the dataset on the Hub."})
    train_split: str | None = field(default=None, metadata={"help": "Split to train on."})
    test_split: str | None = field(default=None, metadata={"help": "Split to test on."})
    image_column: str | None = field(default=None, metadata={"help": "Column of images."})
    label_column: str | None = field(default=None, metadata={"help": "Column of labels."})
    name_column: str | None = field(default=None, metadata={"help": "Column of class names."})
    class_names: list[str] | None = field(default=None, metadata={"help": "One name per label id, from 0."})
    test_fraction: float | None = field(default=None, metadata={"help": "Share of a single split to test on."})
    scenario: str | None = field(default=None, metadata={"help": f"What is predicted among: {', '.join(SCENARIOS)}."})
    domain_column: str | None = field(default=None, metadata={"help": "Column of domains (scenario=domain)."})
    learning: str = field(default="sequential", metadata={"help": f"Task by task, or a bound: {', '.join(LEARNING)}."})
    initial_increment: int | None = field(default=None, metadata={"help": "Classes of the first task."})
    increment: int | None = field(default=None, metadata={"help": "Classes of every other task."})
    class_order: list[int] | None = field(default=None, metadata={"help": "Label ids in order of arrival."})
    partial_order: bool | None = field(default=None, metadata={"help": "class_order may leave classes out."})
    class_order_seed: int | None = field(default=None, metadata={"help": "Seed of the class order (1993)."})
    max_train_images_per_class: int | None = field(default=None, metadata={"help": "Cap on training images."})
    max_test_images_per_class: int | None = field(default=None, metadata={"help": "Cap on test images."})
    prompt_template: list[str] | None = field(default=None, metadata={"help": "Prompts with a {} for the class."})
    held_out: list[str] | None = field(default=None, metadata={"help": "Benchmarks never trained on (name=folder)."})
    evaluate_future: bool | None = field(default=None, metadata={"help": "Also measure the tasks to come."})
    image_cache_gb: float = field(default=DEFAULT_CACHE_GB, metadata={"help": "Largest image cache, GB; 0: none."})
    skip_corrupt: bool = field(default=False, metadata={"help": "Leave out images that cannot be decoded."})
    classifier_alignment: int = field(default=0, metadata={"help": "Steps of classifier alignment after every task."})
    classifier_alignment_learning_rate: float | None = field(default=None, metadata={"help": "Learning rate (5e-3)."})
    seeds: str | None = field(default=None, metadata={"help": "Run once per seed: 1993,1996,1997."})
    num_seeds: int | None = field(default=None, metadata={"help": "Run with this many seeds, from seed on."})
    vary_class_order: bool = field(default=False, metadata={"help": "The seeds draw the class order too."})
    resume: bool = field(default=False, metadata={"help": "Go on where the run in output_dir stopped."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace the run in output_dir."})

    def __post_init__(self):
        check_fields(self, but=("prompt_template",))  # a single prompt is allowed too
        if self.prompt_template is not None:
            check_templates(self.prompt_template)
        if self.learning not in LEARNING:
            raise ValueError(f"learning={self.learning!r} is unknown: expected one of {', '.join(LEARNING)}.")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r} is unknown: expected one of {', '.join(DTYPES)}.")
        if self.scenario is not None and self.scenario not in SCENARIOS:
            raise ValueError(f"scenario={self.scenario!r} is unknown: expected one of {', '.join(SCENARIOS)}.")
        if isinstance(self.prompt_template, list) and len(self.prompt_template) == 1:
            self.prompt_template = self.prompt_template[0]
        given = [self.dataset_name, self.dataset_path, self.datasets]
        if self.benchmark == "none" and sum(one is not None for one in given) != 1:
            raise ValueError(
                "benchmark=none needs exactly one of dataset_name (Hub id), dataset_path (folder) and datasets."
            )
        if self.seeds is not None and self.num_seeds is not None:
            raise ValueError(f"seeds={self.seeds!r} and num_seeds={self.num_seeds} were both given: pass one.")
        if self.classifier_alignment < 0:
            raise ValueError(f"classifier_alignment={self.classifier_alignment}: expected 0 or more.")
        rate = self.classifier_alignment_learning_rate
        if rate is not None and not 0 < rate < float("inf"):
            raise ValueError(f"classifier_alignment_learning_rate={rate}: expected more than 0.")
        self.seed_list(0)  # raises unless the seeds are valid
        if self.learning == "joint" and (self.scenario not in (None, "class") or self.datasets is not None):
            what = f"scenario={self.scenario!r}" if self.datasets is None else f"datasets={self.datasets}"
            raise ValueError(f"learning=joint has one task; {what} needs several.")
        if self.class_names is not None and self.datasets is not None:
            raise ValueError("class_names is for a single dataset; with datasets, leave it out or give name_column.")
        if self.benchmark != "none" and (self.dataset_name or self.datasets) is not None:
            raise ValueError(
                f"dataset_name={self.dataset_name or self.datasets!r} goes with benchmark=none; "
                f"benchmark={self.benchmark!r} takes a local copy as dataset_path."
            )

    def seed_list(self, first: int) -> list[int] | None:
        """The seeds in `seeds`, or `num_seeds` seeds from `first` on; None for a single run.

        Raises:
            ValueError: If they are not whole numbers, one occurs twice, or the list is empty.
        """
        if self.seeds is None and self.num_seeds is None:
            return None
        if self.num_seeds is not None:
            seeds = list(range(first, first + self.num_seeds))
        else:
            parts = [part.strip() for part in str(self.seeds).split(",")]
            seeds = [int(part) for part in parts if part.isdigit()]
            if len(seeds) != len(parts):
                raise ValueError(f"seeds={self.seeds!r}: expected whole numbers, separated by commas.")
        if not seeds or len(set(seeds)) != len(seeds):
            raise ValueError(
                f"seeds={self.seeds!r}, num_seeds={self.num_seeds}: expected at least one, and none twice."
            )
        return seeds


def build_stream(args: RunArguments, seed: int = 0) -> tuple[TaskStream, str | tuple[str, ...]]:
    """The stream of tasks that the arguments describe, and its prompt template or templates.

    Raises:
        ValueError: If the benchmark is unknown, or the dataset does not fit (see `TaskStream.from_dataset`).
    """
    given = {name: getattr(args, name) for name in _STREAM_ARGUMENTS if getattr(args, name) is not None}
    options = {**given, "seed": seed}
    if args.dataset_config is not None:
        options["config_name"] = args.dataset_config
    if args.dataset_revision is not None and args.dataset_path is None:
        options["revision"] = args.dataset_revision
    if args.learning == "joint":
        options |= {"increment": "all", "initial_increment": None}
    if args.benchmark != "none":
        benchmark = get_benchmark(args.benchmark)
        if args.prompt_template is not None and isinstance(benchmark, BenchmarkSequence):
            raise ValueError(
                f"prompt_template={args.prompt_template!r}: every dataset of benchmark {args.benchmark!r} has prompts "
                "of its own."
            )
        return benchmark.stream(args.dataset_path, **options), args.prompt_template or benchmark.prompt_template
    template = args.prompt_template or "a photo of a {}."
    if args.datasets is not None:
        return _stream_of_datasets(args, options), template
    if "increment" not in options:
        if args.scenario != "domain":
            raise ValueError("benchmark=none needs increment, the number of classes of a task.")
        options["increment"] = "all"
    return TaskStream.from_dataset(args.dataset_name or args.dataset_path, **options), template


def _stream_of_datasets(args: RunArguments, options: dict[str, Any]) -> TaskStream:
    scenario = options.pop("scenario", "cross-dataset")
    if scenario not in ("domain", "cross-dataset"):
        raise ValueError(f"scenario={scenario!r}: with datasets, expected 'domain' or 'cross-dataset'.")
    options["increment"] = "all"
    streams = [TaskStream.from_dataset(dataset, **options) for dataset in args.datasets]
    return TaskStream.from_streams(streams, "+".join(stream.name for stream in streams), scenario)


def build_held_out(args: RunArguments, seed: int = 0) -> dict[str, TaskStream]:
    """The held-out benchmarks, each as one task with its own prompts.

    Raises:
        ValueError: If a benchmark is unknown, named twice, a stream of several datasets, or the run's own dataset.
    """
    streams, own = {}, _dataset_ids(args)
    for entry in args.held_out or ():
        name, _, folder = entry.partition("=")
        if name in streams:
            raise ValueError(f"held_out={entry!r}: {name!r} is named twice; expected each benchmark once.")
        benchmark = get_benchmark(name)
        if not isinstance(benchmark, Benchmark):
            raise ValueError(f"held_out={entry!r}: this is a stream of several datasets; name them one by one.")
        if name == args.benchmark or benchmark.dataset_id in own:
            raise ValueError(f"held_out={entry!r}: the run learns that dataset itself; expected others.")
        cap = args.max_test_images_per_class
        stream = benchmark.stream(folder or None, increment="all", max_test_images_per_class=cap, seed=seed)
        streams[name] = stream.map_tasks(
            lambda task, prompts=benchmark.prompt_template: replace(
                task, prompt_template=prompts, train=task.train.select([]), train_rows=None
            )
        )
    return streams


def _dataset_ids(args: RunArguments) -> set[str]:
    """The Hub ids of the datasets that a run learns."""
    if args.benchmark == "none":
        return {name for name in (args.dataset_name, *(args.datasets or ())) if name is not None}
    benchmark = get_benchmark(args.benchmark)
    parts = benchmark.benchmarks if isinstance(benchmark, BenchmarkSequence) else (benchmark,)
    return {each.dataset_id for each in parts if each.dataset_id is not None}
