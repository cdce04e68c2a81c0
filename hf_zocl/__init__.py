"""Zeroth- and first-order optimisation mixed per layer, and continual learning of CLIP, on Hugging Face's Trainer.

A name is imported on first use. The MoE adapters, which PEFT must know, are imported as soon as PEFT is.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .peft_hook import register_with_peft


if TYPE_CHECKING:
    from .continual import ClassifierAlignment, ContinualTaskScheduler, TaskPlugin
    from .data import Task, TaskStream
    from .hub import load_task_checkpoint
    from .models import CLIPClassifier, MoEAdapterConfig, MoEAdapterModel
    from .passes import TaskAware
    from .trainer import ZeroOrderArguments, ZeroOrderMixin, ZOCLTrainer, ZOCLTrainingArguments, zeroth_order
    from .zo import LayerAssignment


__version__ = "0.1.0"

# Imported on first use: `hf_zocl.zo` needs only torch.
_HOMES = {
    "CLIPClassifier": "models",
    "ClassifierAlignment": "continual",
    "ContinualTaskScheduler": "continual",
    "LayerAssignment": "zo",
    "MoEAdapterConfig": "models",
    "MoEAdapterModel": "models",
    "Task": "data",
    "TaskAware": "passes",
    "TaskPlugin": "continual",
    "TaskStream": "data",
    "ZOCLTrainer": "trainer",
    "ZOCLTrainingArguments": "trainer",
    "ZeroOrderArguments": "trainer",
    "ZeroOrderMixin": "trainer",
    "load_task_checkpoint": "hub",
    "zeroth_order": "trainer",
}

__all__ = [
    "CLIPClassifier",
    "ClassifierAlignment",
    "ContinualTaskScheduler",
    "LayerAssignment",
    "MoEAdapterConfig",
    "MoEAdapterModel",
    "Task",
    "TaskAware",
    "TaskPlugin",
    "TaskStream",
    "ZOCLTrainer",
    "ZOCLTrainingArguments",
    "ZeroOrderArguments",
    "ZeroOrderMixin",
    "load_task_checkpoint",
    "zeroth_order",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


register_with_peft()
