"""`TaskPlugin`: a callback that also acts at the beginning and end of tasks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from transformers import TrainerCallback

from ...data.stream import TaskStream
from ...data.tasks import Task
from ...hub.checkpoint import PLUGIN_STATE
from ...models import CLIPClassifier
from ...trainer import ZOCLTrainer
from ...trainer.resumable import ResumeError


class TaskPlugin(TrainerCallback):
    """A base for methods against forgetting: `ContinualTaskScheduler(..., callbacks=[Mine()])`.

    Its methods do nothing unless a subclass overrides them. As a `TrainerCallback`, it sees every step of every task,
    whether layers are zeroth-order or first-order.

    A resumed run must end like one that never stopped. So `end_task` may depend only on the weights, the task and
    `state()`, not on what this process has done before.
    """

    def begin_run(self, stream: TaskStream, model: CLIPClassifier) -> None:
        """Called before any work, also when a run is resumed; raise a `ValueError` if this does not fit the run."""

    def begin_task(self, task: Task, trainer: ZOCLTrainer) -> None:
        """Called before this trainer trains a task, also when it goes on within the task."""

    def end_task(self, task: Task, trainer: ZOCLTrainer) -> None:
        """Called after a task's last step; the model is measured, saved and trained further as this leaves it."""

    def state(self) -> dict[str, torch.Tensor]:
        """The state after a task, saved with the task's checkpoint."""
        return {}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from what `state` returned; an empty dictionary begins a run."""


def task_plugins(callbacks: Iterable[TrainerCallback]) -> list[TaskPlugin]:
    """The plug-ins among some callbacks.

    Raises:
        ValueError: If two are of one class, because their states are saved under the class's name.
    """
    plugins = [callback for callback in callbacks if isinstance(callback, TaskPlugin)]
    names = [_name(plugin) for plugin in plugins]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"callbacks: {names.count(name)} plug-ins of the class {name}; expected one.")
    return plugins


def plugin_names(plugins: Iterable[TaskPlugin]) -> list[str]:
    """The plug-ins' classes, by name."""
    return sorted(map(_name, plugins))


def plugin_file(plugins: Sequence[TaskPlugin]) -> dict[str, bytes]:
    """The checkpoint file with the plug-ins' states, by its name; empty if there are no plug-ins."""
    if not plugins:
        return {}
    states = {
        f"{_name(plugin)}.{name}": value.detach().cpu().contiguous()
        for plugin in plugins
        for name, value in plugin.state().items()
    }
    return {PLUGIN_STATE: save(states, metadata={_name(plugin): "" for plugin in plugins})}


def load_plugins(plugins: Sequence[TaskPlugin], folder: Path | None) -> None:
    """Load the plug-ins' states from a task's checkpoint folder; None: a run begins.

    Raises:
        ResumeError: If the checkpoint is of a run with other plug-ins, or their states are damaged.
    """
    known: list[str] = []
    states: dict[str, torch.Tensor] = {}
    file = None if folder is None else folder / PLUGIN_STATE
    if file is not None and file.is_file():
        try:
            with safe_open(file, "pt") as content:
                known = sorted(name for name in content.metadata() or {} if name != "format")
                states = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ResumeError(f"resume: {file} is damaged: {error}") from error
    mine = plugin_names(plugins)
    if folder is not None and known != mine:
        raise ResumeError(
            f"resume: the run of {folder} has {_listed(known)}, but this one has {_listed(mine)} (callbacks)."
        )
    for plugin in plugins:
        prefix = f"{_name(plugin)}."
        plugin.load_state({n.removeprefix(prefix): value for n, value in states.items() if n.startswith(prefix)})


def _name(plugin: TaskPlugin) -> str:
    return type(plugin).__name__


def _listed(names: Sequence[str]) -> str:
    return f"the plug-ins {', '.join(names)}" if names else "no plug-ins"
