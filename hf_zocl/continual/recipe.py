"""A recipe (YAML) and the command line, read into arguments, and a run built from them."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoProcessor, CLIPModel, HfArgumentParser

from ..models import AdapterArguments, CLIPClassifier, add_adapter
from ..sample import resolve
from ..training_args import ZOCLTrainingArguments
from .benchmarks import get_benchmark
from .scheduler import ContinualTaskScheduler
from .tasks import TaskStream


@dataclass
class RunArguments:
    """The model and the stream of tasks of a run.

    Args:
        model_name_or_path: A CLIP model: Hub id, local folder, or the embedded `mini-clip`.
        benchmark: A registered benchmark, or `none` for any image-classification dataset.
        dataset_name: Hub id of the dataset under `benchmark=none`.
        dataset_path: A local copy of the benchmark's dataset, or the dataset itself under `benchmark=none`.
        dataset_config: The dataset's configuration, where it has several.
        train_split, test_split, image_column, label_column: Chosen by name and feature type unless given.
        initial_increment, increment: Classes of the first task, and of every other.
        class_order: Label ids in order of arrival; else drawn by `class_order_seed`.
        class_order_seed: Seed of numpy's permutation; 1993 is the field's.
        max_train_images_per_class, max_test_images_per_class: Caps, drawn at random by `data_seed` or 0.
        prompt_template: The class prompt, with a `{}` for the name; default: the benchmark's.
        resume: Go on after the last complete task in `output_dir`.
    """

    model_name_or_path: str = field(default="mini-clip", metadata={"help": "Hub id, folder, or mini-clip."})
    benchmark: str = field(default="cifar10-sample", metadata={"help": "A registered benchmark, or none."})
    dataset_name: str | None = field(default=None, metadata={"help": "Hub id of a dataset (benchmark=none)."})
    dataset_path: str | None = field(default=None, metadata={"help": "Local folder of the dataset."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    train_split: str | None = field(default=None, metadata={"help": "Split to train on."})
    test_split: str | None = field(default=None, metadata={"help": "Split to test on."})
    image_column: str | None = field(default=None, metadata={"help": "Column of images."})
    label_column: str | None = field(default=None, metadata={"help": "Column of labels."})
    initial_increment: int | None = field(default=None, metadata={"help": "Classes of the first task."})
    increment: int | None = field(default=None, metadata={"help": "Classes of every other task."})
    class_order: list[int] | None = field(default=None, metadata={"help": "Label ids in order of arrival."})
    class_order_seed: int | None = field(default=None, metadata={"help": "Seed of the class order (1993)."})
    max_train_images_per_class: int | None = field(default=None, metadata={"help": "Cap on training images."})
    max_test_images_per_class: int | None = field(default=None, metadata={"help": "Cap on test images."})
    prompt_template: str | None = field(default=None, metadata={"help": "Prompt with a {} for the class name."})
    resume: bool = field(default=False, metadata={"help": "Go on after the last complete task in output_dir."})

    def __post_init__(self):
        if self.benchmark == "none" and (self.dataset_name is None) == (self.dataset_path is None):
            raise ValueError("benchmark=none needs exactly one of dataset_name (Hub id) and dataset_path (folder).")
        if self.benchmark != "none" and self.dataset_name is not None:
            raise ValueError(
                f"dataset_name={self.dataset_name!r} goes with benchmark=none; "
                f"benchmark={self.benchmark!r} takes a local copy as dataset_path."
            )


@dataclass(frozen=True)
class Recipe:
    """The arguments of one run."""

    run: RunArguments
    adapter: AdapterArguments
    training: ZOCLTrainingArguments

    def to_dict(self) -> dict[str, Any]:
        """All arguments by name, tokens masked."""
        return {**asdict(self.run), **asdict(self.adapter), **self.training.to_dict()}


def parse_recipe(argv: Sequence[str] | None = None) -> Recipe:
    """Read `--recipe FILE.yaml` and any further `--argument value`, which override the file.

    Args:
        argv: The command line without the program's name; default: `sys.argv`.

    Raises:
        ValueError: If the file is missing or no mapping, or names an argument that does not exist.
    """
    parser = HfArgumentParser(
        (RunArguments, AdapterArguments, ZOCLTrainingArguments),
        description="Learn a stream of tasks. Any argument may stand in the recipe; the command line overrides it.",
    )
    parser.add_argument("--recipe", help="A YAML file of arguments.")
    given, _ = _RecipeOnly().parse_known_args(argv)
    if given.recipe is not None:
        parser.set_defaults(**_read_recipe(Path(given.recipe)))
    run, adapter, training, _ = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    return Recipe(run, adapter, training)


class _RecipeOnly(HfArgumentParser):
    def __init__(self):
        super().__init__((), add_help=False, allow_abbrev=False)
        self.add_argument("--recipe")


def _read_recipe(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"--recipe {path}: there is no such file.")
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"--recipe {path}: expected a mapping of argument: value, got {type(content).__name__}.")
    known = {f.name for cls in (RunArguments, AdapterArguments, ZOCLTrainingArguments) for f in fields(cls) if f.init}
    for key in content:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"{path}: unknown argument {key!r}.{hint}")
    return content


def build_stream(args: RunArguments, seed: int = 0) -> tuple[TaskStream, str]:
    """The stream of tasks that the arguments describe, and its prompt template.

    Raises:
        ValueError: If the benchmark is unknown, or the dataset does not fit (see `TaskStream.from_dataset`).
    """
    names = ("train_split", "test_split", "image_column", "label_column", "initial_increment", "increment")
    names += ("class_order", "class_order_seed", "max_train_images_per_class", "max_test_images_per_class")
    options = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    options["seed"] = seed
    if args.dataset_config is not None:
        options["config_name"] = args.dataset_config
    if args.benchmark != "none":
        benchmark = get_benchmark(args.benchmark)
        return benchmark.stream(args.dataset_path, **options), args.prompt_template or benchmark.prompt_template
    if "increment" not in options:
        raise ValueError("benchmark=none needs increment, the number of classes of a task.")
    stream = TaskStream.from_dataset(args.dataset_name or args.dataset_path, **options)
    return stream, args.prompt_template or "a photo of a {}."


def build_scheduler(recipe: Recipe) -> ContinualTaskScheduler:
    """Load the model and the stream, add the adapter, and make the scheduler; nothing is trained or written yet."""
    run, training = recipe.run, recipe.training
    stream, template = build_stream(run, seed=training.data_seed or 0)
    base = resolve(run.model_name_or_path)
    processor = AutoProcessor.from_pretrained(base)
    torch.manual_seed(training.seed)  # the adapter's initial weights
    clip = add_adapter(CLIPModel.from_pretrained(base), recipe.adapter, num_tasks=len(stream))
    model = CLIPClassifier(clip, processor.tokenizer, stream.class_names, template)
    if not torch.accelerator.is_available():
        training.dataloader_pin_memory = False  # there is nowhere to copy to; torch would warn once a task
    return ContinualTaskScheduler(model, processor, stream, training, recipe=recipe.to_dict())
