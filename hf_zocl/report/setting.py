"""Which arguments of a recipe define a run, and which may differ between the seeds of one setting."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any


# The arguments that define a run, by name or prefix. Others may change, and new releases of libraries may add some:
# where a run is, how it is monitored and how it is saved do not make it another run.
OF_THE_RUN = {
    *(
        "model_name_or_path",
        "merge_into",
        "dtype",
        "benchmark",
        "dataset_name",
        "datasets",
        "dataset_config",
        "dataset_revision",
    ),
    *("train_split", "test_split", "image_column", "label_column", "name_column", "class_names", "test_fraction"),
    *("scenario", "domain_column", "learning", "initial_increment", "increment"),
    *("class_order", "partial_order", "class_order_seed"),
    *("max_train_images_per_class", "max_test_images_per_class", "prompt_template"),
    *("held_out", "evaluate_future", "skip_corrupt"),
    *("classifier_alignment", "classifier_alignment_learning_rate"),
    *("adapter", "adapter_config", "target_modules", "frozen_parameters"),
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio"),
    *("optim", "optim_args", "optim_target_modules", "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay"),
    *("max_grad_norm", "num_train_epochs", "max_steps"),
    *("per_device_train_batch_size", "auto_find_batch_size", "gradient_accumulation_steps"),
    *("average_tokens_across_devices", "label_smoothing_factor", "neftune_noise_alpha", "label_names"),
    *("bf16", "fp16", "tf32", "torch_compile", "torch_compile_backend", "torch_compile_mode"),
    *("use_liger_kernel", "liger_kernel_config", "parallelism_config", "fsdp", "deepspeed"),
    *("seed", "data_seed", "full_determinism", "accelerator_config", "ignore_data_skip"),
    *("dataloader_drop_last", "train_sampling_strategy", "group_by_length", "length_column_name"),
}
OF_THE_RUN_BY_PREFIX = ("zo_", "lora_", "moe_")
# The seeds, and what is drawn by them or chosen along with them.
OF_A_SEED = {"seed", "data_seed", "zo_seed", "class_order", "class_order_seed"}


def defines_run(argument: str) -> bool:
    return argument in OF_THE_RUN or argument.startswith(OF_THE_RUN_BY_PREFIX)


def other_setting(first: Mapping[str, Any], second: Mapping[str, Any]) -> str | None:
    """An argument in which two recipes of different settings differ; those that only one has are not compared."""
    common = sorted(first.keys() & second.keys() - OF_A_SEED)
    return next((name for name in common if defines_run(name) and _plain(name, first) != _plain(name, second)), None)


def base_name(model: Any) -> str:
    """The last part of a base model's name, because its folder is elsewhere on another machine."""
    return re.split(r"[\\/]+", str(model or "").rstrip("\\/"))[-1]


def _plain(name: str, recipe: Mapping[str, Any]) -> Any:
    return base_name(recipe[name]) if name == "model_name_or_path" else recipe[name]
