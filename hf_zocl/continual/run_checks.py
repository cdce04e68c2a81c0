"""Checks, before any work, of what would break a run's measuring, schedule or resuming."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import get_scheduler

from ..data.stream import TaskStream
from ..trainer.arguments import ZOCLTrainingArguments
from ..trainer.resumable import ResumeError


_EVALUATES = "the scheduler evaluates after every task"
_HALF = (
    "bf16_full_eval and fp16_full_eval would leave the weights in half precision for the training that follows; bf16 "
    "and fp16 also apply while the scheduler evaluates"
)
_MEASURED = "a run is measured with {needed!r}"
# The argument, the value that it must have (or None), and why.
_NEEDED = {
    "eval_strategy": ("no", _EVALUATES),
    "eval_on_start": (False, _EVALUATES),
    "load_best_model_at_end": (False, _EVALUATES),
    "bf16_full_eval": (False, _HALF),
    "fp16_full_eval": (False, _HALF),
    "prediction_loss_only": (False, _MEASURED),
    "label_names": (["labels"], _MEASURED),
    "eval_do_concat_batches": (True, _MEASURED),
    "batch_eval_metrics": (False, _MEASURED),
    "neftune_noise_alpha": (
        None,
        "it adds noise to a language model's input embeddings, and an image classifier has none",
    ),
}


def check_measurable(args: ZOCLTrainingArguments) -> None:
    """Check that a run with these arguments can be measured and scheduled.

    Raises:
        ValueError: If it cannot; the message names the argument.
    """
    for name, (needed, why) in _NEEDED.items():
        value = getattr(args, name)
        if value is not None and value != needed:
            shown = str(getattr(value, "value", value)) if isinstance(needed, str) else value
            raise ValueError(f"{name}={shown!r}: {why.format(needed=needed)}; leave it out.")
    _check_schedule(args)


def check_batches(args: ZOCLTrainingArguments, stream: TaskStream) -> None:
    """Check that every task has a batch to train on.

    Raises:
        ValueError: If a task has none; the message names it.
    """
    batch = args.train_batch_size * args.world_size
    for task in stream:
        if args.dataloader_drop_last and len(task.train) < batch:
            raise ValueError(
                f"dataloader_drop_last=True: {task.name} has {len(task.train)} training images, less than a batch of "
                f"{batch} (per_device_train_batch_size), so no step would be taken; expected False, or a smaller "
                "batch."
            )


def _check_schedule(args: ZOCLTrainingArguments) -> None:
    """Make the learning rate schedule once, so that one that lacks an argument fails before any work is done."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    try:
        get_scheduler(args.lr_scheduler_type, optimizer, 0, 10, scheduler_specific_kwargs=args.lr_scheduler_kwargs)
    except (TypeError, ValueError) as error:
        kind, options = str(args.lr_scheduler_type.value), args.lr_scheduler_kwargs
        raise ValueError(f"lr_scheduler_type={kind!r}, lr_scheduler_kwargs={options}: {error}.") from error


def check_fingerprints(here: dict[str, str], there: dict[str, str], output_dir: Path) -> None:
    """Check that a run goes on with the images and the base model that it began with.

    Raises:
        ResumeError: If it does not.
    """
    for name, value in here.items():
        if there.get(name, value) != value:
            raise ResumeError(
                f"resume: the {name.replace('_', ' ')} {'have' if name == 'images' else 'has'} changed since the run "
                f"in {output_dir} began: it can only go on with what it began with."
            )


def check_measuring(here: Mapping[str, Any], there: Mapping[str, Any], output_dir: Path) -> None:
    """Check that a run goes on being measured as it began: by the same prompts, among the same classes.

    Args:
        here: How this run would be measured.
        there: How `results.json` says that it began, by the same names; earlier releases may lack some.

    Raises:
        ResumeError: If it does not; the message names the first difference.
    """
    for name, value in here.items():
        value = list(value) if isinstance(value, tuple) else value
        if there.get(name, value) != value:
            raise ResumeError(
                f"resume: {name}={value!r}, but the run in {output_dir} began with {there[name]!r}: it can only go on "
                "with what it began with."
            )
