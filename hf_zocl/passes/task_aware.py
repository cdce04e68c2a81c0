"""`TaskAware`: what a model may do at the beginning and the end of a task, and what it may say about itself."""

from __future__ import annotations

import torch
from torch import nn


class TaskAware:
    """A base for models, or for adapters within them, that take part in their own training.

    The methods do nothing by default, so a model overrides those it needs: `class Mine(TaskAware, nn.Module)`. A model
    that is not `TaskAware` is trained as it is.

    Attributes:
        couples_towers: Whether the loss depends on more than the towers' features, or later reads inner states or
            weights that it does not read at first. Every loss then takes a full forward pass, even without towers.
        reloads_frozen_weights: Whether the frozen weights come from a base model that is loaded again, so that
            checkpoints within a training leave them out.
    """

    couples_towers: bool = False
    reloads_frozen_weights: bool = False

    def begin_task(self, task: int) -> None:
        """Called before a task is trained, and before its trained parameters are asked for; `task` counts from 1."""

    def end_task(self, task: int) -> None:
        """Called when a task has been trained, before it is evaluated and saved; `task` counts from 1."""

    def extra_logs(self) -> dict[str, float]:
        """Figures for the training log since the last call, by name."""
        return {}

    def training_state(self) -> dict[str, torch.Tensor]:
        """The counts, other than buffers, that forward passes change, for a checkpoint within a task."""
        return {}

    def load_training_state(self, state: dict[str, torch.Tensor]) -> None:
        """Continue from the counts that `training_state` returned."""


_UNAWARE = TaskAware()


def task_aware(model: nn.Module | None) -> TaskAware:
    """The outermost `TaskAware` module of a model, wrapped by PEFT or not; one that does nothing if there is none."""
    modules = () if model is None else model.modules()
    return next((module for module in modules if isinstance(module, TaskAware)), _UNAWARE)
