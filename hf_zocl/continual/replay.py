"""A task's adapter, rebuilt from the adapter before it and the log of its zeroth-order steps."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, set_peft_model_state_dict

from ..files import read_json
from ..hub.load import load_pretrained, read_adapter_weights
from ..hub.task_info import task_folder
from ..models import AdapterArguments
from ..passes import task_aware
from ..trainer.replay_file import load_replay_log
from ..zo import LayerAssignment
from .run_folder import RESULTS_FILE, RunFolder


@dataclass(frozen=True)
class Rebuilt:
    """A rebuilt adapter, compared with the one in the task's checkpoint.

    Args:
        steps: How many steps were taken again.
        different: The names of the parameters that are not equal bit for bit.
        largest_difference: The largest absolute difference of two weights.
        log_bytes: The size of the log.
        checkpoint_bytes: The size of the adapter's weights in the checkpoint.
    """

    steps: int
    different: tuple[str, ...]
    largest_difference: float
    log_bytes: int
    checkpoint_bytes: int


def rebuild_task(run: str | Path, task: int, device: str = "cpu") -> Rebuilt:
    """Rebuild the adapter after `task`, and compare it with the checkpoint.

    Args:
        run: The folder of a run in which all trainable parameters are zeroth-order.
        task: The task, counted from 1. The checkpoint of the task before it is read; for the first task, the
            adapter is drawn again from the run's seed.
        device: The run's device: directions are drawn there, and another kind of device draws others.

    Raises:
        ValueError: If there is no such run or task, or the task has no log.
    """
    folder = RunFolder(run)
    log_file = folder.replay_file(task_folder(task))
    weights_file = folder.path / task_folder(task) / "adapter_model.safetensors"
    for file in (folder.path / RESULTS_FILE, weights_file):
        if not file.is_file():
            raise ValueError(f"{file}: there is no such file, so {folder.path} holds no complete task {task}.")
    if not log_file.is_file():
        raise ValueError(
            f"{log_file}: there is no such file. Only a run whose trained weights are all zeroth-order "
            "(zo_branch=dual, zo_layers=all), in float32 and changed by nothing else (classifier_alignment=0) writes "
            "one."
        )
    results = read_json(folder.path / RESULTS_FILE)
    recipe = results["recipe"]
    model = _adapted_model(recipe, len(results["tasks"])).to(device)
    if task > 1:
        set_peft_model_state_dict(model, read_adapter_weights(folder.path / task_folder(task - 1)))
    task_aware(model).begin_task(task)
    log = load_replay_log(log_file)
    split = LayerAssignment(recipe["zo_branch"], recipe["zo_layers"]).split(model)
    log.replay(split.zo, model)
    names = [name for group in split.zo for name in group.names]
    rebuilt = {name: p.detach().clone() for name, p in zip(names, split.zo_parameters, strict=True)}
    set_peft_model_state_dict(model, read_adapter_weights(weights_file.parent))
    saved = dict(model.named_parameters())
    return Rebuilt(
        steps=len(log.steps),
        different=tuple(name for name, value in rebuilt.items() if not torch.equal(value, saved[name])),
        largest_difference=max(float((value - saved[name].detach()).abs().max()) for name, value in rebuilt.items()),
        log_bytes=log_file.stat().st_size,
        checkpoint_bytes=weights_file.stat().st_size,
    )


def _adapted_model(recipe: dict[str, Any], num_tasks: int) -> PeftModel:
    """The model with the adapter that the run began with."""
    arguments = AdapterArguments(
        **{each.name: recipe[each.name] for each in fields(AdapterArguments) if each.name in recipe}
    )
    name, dtype, seed = (recipe[each] for each in ("model_name_or_path", "dtype", "seed"))
    return load_pretrained(name, arguments, dtype, seed, num_tasks, recipe.get("merge_into")).clip
