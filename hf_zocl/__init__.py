"""Zeroth- and first-order optimisation mixed per layer, and continual learning of CLIP, on Hugging Face's Trainer."""

from .continual import ContinualTaskScheduler, Task, TaskStream
from .hub import load_task_checkpoint
from .models import CLIPClassifier, MoEAdapterConfig, MoEAdapterModel
from .trainer import ZOCLTrainer
from .training_args import ZOCLTrainingArguments
from .zo import LayerAssignment


__version__ = "0.1.0"

__all__ = [
    "CLIPClassifier",
    "ContinualTaskScheduler",
    "LayerAssignment",
    "MoEAdapterConfig",
    "MoEAdapterModel",
    "Task",
    "TaskStream",
    "ZOCLTrainer",
    "ZOCLTrainingArguments",
    "load_task_checkpoint",
]
