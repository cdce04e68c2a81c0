"""What a run's folder knows of the run: which tasks are complete, and how far the next one is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..files import remove_unfinished
from ..hub.checkpoint import RESULTS_FILE
from ..hub.public import public_recipe
from ..hub.push_on_save import SCRATCH
from ..hub.push_queue import QUEUE_FILE
from ..hub.task_file import read_json, write_json
from ..resumable import ResumeError, is_whole, last_checkpoint, remove_checkpoint
from ..training_args import ZOCLTrainingArguments


# The arguments that define a run, by their names and by how they begin. It may move house, be watched or be kept safe
# in another way, and arguments may come with a new release of a library: the run is still the same.
_OF_THE_RUN = {
    *("model_name_or_path", "dtype", "benchmark", "dataset_name", "datasets", "dataset_config", "dataset_revision"),
    *("train_split", "test_split", "image_column", "label_column", "name_column", "class_names", "test_fraction"),
    *("scenario", "domain_column", "learning", "initial_increment", "increment"),
    *("class_order", "partial_order", "class_order_seed"),
    *("max_train_images_per_class", "max_test_images_per_class", "prompt_template"),
    *("held_out", "evaluate_future", "skip_corrupt"),
    *("adapter", "target_modules", "frozen_parameters"),
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
_OF_THE_RUN_BY_PREFIX = ("zo_", "lora_", "moe_")
# What going on reads and adds to.
_LISTS = ("tasks", "classes", "accuracy_matrix", "seen_accuracy", "details", "future_accuracy", "training")
_NEEDED = dict.fromkeys(_LISTS, list) | dict.fromkeys(("recipe", "zero_shot", "held_out"), dict)
_NEEDED |= dict.fromkeys(("seconds", "peak_memory_bytes"), (int, float))


class RunFolder:
    """A run's folder, and what is true of it at every moment, also when the run was killed.

    - `results.json` is the one place that says which tasks are complete. It is replaced in one move, after everything
      that it speaks of is there; it is there as soon as training begins.
    - `task-NN/` is complete or absent; one that `results.json` does not speak of yet is made anew.
    - `trainer/task-NN/checkpoint-S/` are the Trainer's checkpoints within a task, until the task is complete.

    Args:
        path: The folder.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def start(self, results: dict[str, Any]) -> None:
        """Clear what an earlier run left behind, and write the first results."""
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / RESULTS_FILE).unlink(missing_ok=True)  # first: nothing must be taken for the new run's
        (self.path / QUEUE_FILE).unlink(missing_ok=True)
        for folder in (*self.path.glob("task-[0-9][0-9]*"), *self.path.glob(".task-*.tmp"), *self.path.glob("replay")):
            shutil.rmtree(folder)
        self.remove_checkpoints()
        self.remove_scratch()
        self.write(results)

    def write(self, results: dict[str, Any]) -> None:
        """Replace `results.json`."""
        write_json(self.path / RESULTS_FILE, results)

    def read(
        self,
        recipe: dict[str, Any],
        class_names: Sequence[str],
        base_model_is_local: bool = False,
        processes: int | None = None,
    ) -> dict[str, Any] | None:
        """The results so far, or None if there are none.

        Args:
            recipe: All arguments of the run that is to go on.
            class_names: Its classes, in order of arrival.
            base_model_is_local: Whether `model_name_or_path` is a folder, which may lie elsewhere than it did.
            processes: How many processes are to go on; None: not compared.

        Raises:
            ResumeError: If the folder is the run of another recipe, which names the differing arguments, or of another
                number of processes; or if the file is damaged.
        """
        file = self.path / RESULTS_FILE
        if not file.is_file():
            return None
        try:
            results = read_json(file)
        except ValueError as error:
            raise ResumeError(f"resume: {error}") from error
        missing = [name for name, kind in _NEEDED.items() if not isinstance(results.get(name), kind)]
        if missing:
            raise ResumeError(f"resume: {file} is damaged: expected the results of a run, with {missing[0]}.")
        # A run that was fetched from the Hub has no local paths.
        mine = public_recipe(json.loads(json.dumps(recipe)), base_model_is_local)
        theirs = public_recipe(results["recipe"], base_model_is_local)
        different = [
            f"{key}: {theirs.get(key)!r} there, {mine.get(key)!r} here"
            for key in sorted(mine.keys() | theirs.keys())
            if _defines_the_run(key) and not _is_same(key, theirs, mine)
        ]
        if different:
            raise ResumeError(f"resume: {file} is the run of another recipe ({', '.join(different)}).")
        began = results.get("processes", processes)
        if began != processes is not None:
            raise ResumeError(
                f"resume: {file} is a run of {began} process{'es' if began > 1 else ''}, and {processes} would go on "
                f"with other batches: expected {began}."
            )
        if results["classes"] != list(class_names):
            raise ResumeError(f"resume: {file} is a run over other classes ({', '.join(results['classes'])}).")
        return results

    def trainer_folder(self, task: str) -> Path:
        """Where the Trainer of a task writes."""
        return self.path / "trainer" / task

    def replay_file(self, task: str) -> Path:
        """The log of a task's zeroth-order steps."""
        return self.path / "replay" / f"{task}.safetensors"

    def checkpoint(self, task: str, chosen: str | Path | None = None) -> Path | None:
        """The checkpoint to go on from within the task in progress; None: from the task's beginning.

        Args:
            task: The first task that is not complete, by its name.
            chosen: A checkpoint to go on from; by default, or if it is the run's folder, the last one that is whole.

        Raises:
            ResumeError: If the chosen one is none of this task, or is not whole.
        """
        folder = self.trainer_folder(task)
        if chosen is None or Path(chosen).resolve() == self.path.resolve():
            return last_checkpoint(folder)
        if Path(chosen).resolve().parent != folder.resolve() or not is_whole(Path(chosen)):
            raise ResumeError(
                f"resume_from_checkpoint={str(chosen)!r}: expected true, the run's folder {self.path}, or a whole "
                f"checkpoint of the task in progress, {folder}/checkpoint-…"
            )
        return Path(chosen)

    def remove_checkpoints(self, task: str = "*") -> None:
        """Remove the checkpoints within a task, or within all."""
        for folder in (self.path / "trainer").glob(f"{task}/checkpoint-*"):
            remove_checkpoint(folder)

    def remove_scratch(self) -> None:
        """Remove what a run that was killed was writing, or pushing from within a task; before anything is pushed."""
        for folder in (self.path, self.path / "replay"):
            remove_unfinished(folder)
        for folder in (self.path / "trainer").glob(f"*/{SCRATCH}*"):
            shutil.rmtree(folder, ignore_errors=True)

    def remove_empty_folders(self) -> None:
        """A Trainer makes its folder whether or not it saves anything there."""
        parent = self.path / "trainer"
        for folder in [*parent.glob("*"), parent]:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def _defines_the_run(argument: str) -> bool:
    return argument in _OF_THE_RUN or argument.startswith(_OF_THE_RUN_BY_PREFIX)


def _is_same(argument: str, there: dict[str, Any], here: dict[str, Any]) -> bool:
    """Whether an argument is the same in two recipes; where one lacks it, the other must leave it alone."""
    if argument in there and argument in here:
        mine, theirs = here[argument], there[argument]
        if isinstance(mine, dict) and isinstance(theirs, dict):
            return all(mine[key] == theirs[key] for key in mine.keys() & theirs.keys())
        return mine == theirs
    value = there.get(argument, here.get(argument))
    default = ZOCLTrainingArguments.__dataclass_fields__.get(argument)
    return not value or (default is not None and value == default.default)
