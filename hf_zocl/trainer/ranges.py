"""The ranges of the Trainer's own arguments, which it does not check, so that a wrong value breaks far away."""

from __future__ import annotations

import os
from typing import Any

from ..checks import shown


MAPPINGS = (
    *("accelerator_config", "fsdp_config", "deepspeed", "lr_scheduler_kwargs"),
    *("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"),
)
SEEDS = 2**32 - 1  # numpy's
# Argument → what is expected, and a test of a value.
RANGES = {
    **dict.fromkeys(
        ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "ddp_timeout"),
        ("at least 1", lambda value: value >= 1),
    ),
    **dict.fromkeys(
        ("eval_accumulation_steps", "dataloader_prefetch_factor", "torch_empty_cache_steps"),
        ("at least 1", lambda value: value >= 1),
    ),
    **dict.fromkeys(
        ("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "adam_epsilon", "eval_delay"),
        ("0 or more", lambda value: value >= 0),
    ),
    **dict.fromkeys(
        ("logging_steps", "save_steps", "eval_steps"),
        ("more than 0", lambda value: value > 0),
    ),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), ("0 or more and less than 1", lambda value: 0 <= value < 1)),
    **dict.fromkeys(("label_smoothing_factor",), ("0 or more and less than 1", lambda value: 0 <= value < 1)),
    **dict.fromkeys(("seed", "data_seed", "zo_seed"), (f"0 to {SEEDS}", lambda value: 0 <= value <= SEEDS)),
    "max_steps": ("-1 (as many as num_train_epochs) or at least 1", lambda value: value == -1 or value >= 1),
    "dataloader_num_workers": ("0 to 512", lambda value: 0 <= value <= 512),
    "num_train_epochs": ("more than 0 and at most a million", lambda value: 0 < value <= 1e6),
}


def check_ranges(arguments: Any) -> None:
    """Check the numbers and mappings of `transformers.TrainingArguments`.

    Raises:
        ValueError: If a number is out of its range, or a text is neither a mapping nor a file of one.
    """
    for name, (expected, is_right) in RANGES.items():
        value = getattr(arguments, name, None)
        if value is not None and not is_right(value):
            raise ValueError(f"{name}={shown(value)}: expected {expected}.")
    for name in MAPPINGS:
        value = getattr(arguments, name, None)
        if isinstance(value, str) and not value.strip().startswith("{") and not os.path.isfile(value):
            raise ValueError(f"{name}={shown(value)}: expected a mapping, or a JSON file of one.")
