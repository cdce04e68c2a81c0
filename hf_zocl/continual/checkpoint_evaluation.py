"""Any task's checkpoint, measured on any benchmark."""

from __future__ import annotations

import os
import tempfile
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from ..data.images import PixelCodec, prepare_images
from ..data.stream import TaskStream
from ..hub.checkpoint import find_task_checkpoint
from ..hub.load import load_task_checkpoint
from ..hub.task_info import read_task
from .evaluation import StreamEvaluator
from .run_arguments import RunArguments, build_stream


# The Trainer's arguments that may change a measurement, even slightly.
NUMERICS = (
    "per_device_eval_batch_size",
    "bf16",
    "fp16",
    "bf16_full_eval",
    "fp16_full_eval",
    "tf32",
    "use_cpu",
    "seed",
)


def evaluate_checkpoint(
    path: str | os.PathLike[str],
    task: int | str | None = None,
    revision: str | None = None,
    hub_kwargs: dict[str, Any] | None = None,
    **overrides: Any,
) -> dict[str, Any]:
    """Measure a task's checkpoint as its run did, or on another benchmark.

    Args:
        path, task, revision: As for `load_task_checkpoint`.
        hub_kwargs: For `load_task_checkpoint`.
        overrides: Recipe arguments that replace the run's (`RunArguments`, and others such as
            `per_device_eval_batch_size`); None changes nothing. With another `benchmark`, `dataset_name` or `datasets`
            the whole stream is measured; the run's own stream is measured up to the checkpoint's task.

    Returns:
        `checkpoint`, `benchmark`, `scenario`, `task` (the stream's task after which it was measured), `classes`,
        `accuracy_row` (the accuracy on the test images of each task from 1 to `task`), `seen_accuracy`, `details`
        (top-5, calibration error, accuracy by class) and `skipped_images`; accuracies are fractions.

    Raises:
        ValueError: If there is no such checkpoint, its recipe names no benchmark, its classes are not the
            benchmark's, or the dataset does not fit.
    """
    folder = find_task_checkpoint(path, task, revision, **(hub_kwargs or {}))
    info = read_task(folder)
    given = {name: value for name, value in overrides.items() if value is not None}
    is_own = not given.keys() & {"benchmark", "dataset_name", "datasets"}
    run = run_arguments_of(info["recipe"], given, is_own)
    stream, template = build_stream(run, seed=info["recipe"].get("data_seed") or 0)
    index = info["task"] if is_own else len(stream)
    if is_own and list(stream.seen_class_names(index)) != info["classes"]:
        raise ValueError(f"{folder}: its classes ({', '.join(info['classes'])}) are not those of {stream!r}.")
    model, processor = load_task_checkpoint(folder, **(hub_kwargs or {}))
    model.prompt_template = template if "prompt_template" in given or not is_own else info["prompt_template"]
    codec = PixelCodec(processor.image_processor)
    images, skipped = prepare_images(_test_images(stream), codec, run.image_cache_gb, run.skip_corrupt)
    with tempfile.TemporaryDirectory() as unused:
        trainer = Trainer(model, _training_arguments(unused, info["recipe"], given))
        known = info.get("known_classes", ()) if is_own and stream.scenario == "class" else ()
        measured = StreamEvaluator(model, processor, trainer, codec, known).after(images, index)
    return {
        "checkpoint": Path(os.fspath(path)).name if Path(path).exists() else str(path),
        "benchmark": stream.name,
        "scenario": stream.scenario,
        "task": index,
        "classes": list(stream.seen_class_names(index)),
        "accuracy_row": measured["row"],
        "seen_accuracy": measured["seen"],
        "details": measured["details"],
        "skipped_images": skipped,
    }


def run_arguments_of(recipe: dict[str, Any], given: dict[str, Any], is_own: bool) -> RunArguments:
    """The run's arguments, overridden by `given`; for another benchmark, without those of the run's stream."""
    names = {each.name for each in fields(RunArguments)}
    if is_own and "benchmark" not in recipe:
        raise ValueError("the checkpoint was not trained by a recipe, which would name its benchmark: give benchmark.")
    kept = names - {"seeds", "num_seeds"} if is_own else {"image_cache_gb"}
    own = {name: recipe[name] for name in kept & recipe.keys()}
    return RunArguments(**{**own, **{name: value for name, value in given.items() if name in names}})


def _test_images(stream: TaskStream) -> TaskStream:
    """The stream without its training images, so that they are not decoded."""
    return stream.map_tasks(lambda task: replace(task, train=task.train.select([]), train_rows=None))


def _training_arguments(folder: str, recipe: dict[str, Any], given: dict[str, Any]) -> TrainingArguments:
    options = {name: given.get(name, recipe.get(name)) for name in NUMERICS}
    options = {name: value for name, value in options.items() if value is not None}
    return TrainingArguments(
        output_dir=folder,
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=torch.accelerator.is_available(),
        disable_tqdm=given.get("disable_tqdm", False),
        **options,
    )
