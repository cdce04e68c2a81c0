"""What `hub_strategy` pushes within a task, as the Trainer does: `every_save`, `checkpoint`, `all_checkpoints`."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..models import adapter_weights
from .push import HubPusher, Save
from .task_file import task_folder


SCRATCH = ".push-"  # begins the name of a folder that lives as long as its push
PUSHED = (".safetensors", ".json", ".pt", ".pth")  # not the arguments (.bin): they hold tokens and paths


class PushOnSave(TrainerCallback):
    """Pushes the adapter at every save within a task, and the Trainer's checkpoint with it where that is asked for.

    Args:
        pusher: Pushes it.
        strategy: `every_save`: the adapter; `checkpoint`: also the checkpoint, as `last-checkpoint/`;
            `all_checkpoints`: also every checkpoint, as `checkpoints/task-03/checkpoint-40/`.
        task: The task, counted from 1.
    """

    def __init__(self, pusher: HubPusher, strategy: str, task: int):
        self.pusher, self.strategy, self.task = pusher, strategy, task

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        weights = {name: tensor.cpu().contiguous() for name, tensor in adapter_weights(model.clip).items()}
        files: dict[str, Path | bytes] = {"adapter_model.safetensors": save(weights, metadata={"format": "pt"})}
        scratch, replaces = None, ()
        if self.strategy != "every_save":
            scratch = checkpoint.with_name(f"{SCRATCH}{checkpoint.name}")  # the Trainer may remove its own meanwhile
            folder = "last-checkpoint/"
            if self.strategy == "all_checkpoints":
                folder = f"checkpoints/{task_folder(self.task)}/{checkpoint.name}/"
            files |= {folder + path.name: path for path in _second_names(checkpoint, scratch)}
            replaces = (folder,)
        self.pusher.push_save(Save(files, replaces, f"Task {self.task}, step {state.global_step}", scratch))


def _second_names(source: Path, target: Path) -> list[Path]:
    """Give a folder's files a second name in `target`, or copy them where the file system has no links."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    for path in source.iterdir():
        if path.suffix in PUSHED and path.is_file() and not path.is_symlink() and not path.name.startswith("."):
            try:
                os.link(path, target / path.name)
            except OSError:
                shutil.copy2(path, target / path.name)
    return sorted(target.iterdir())
