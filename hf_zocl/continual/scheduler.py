"""`ContinualTaskScheduler`: train, evaluate, checkpoint, task by task."""

from __future__ import annotations

import dataclasses
import json
import platform
import shutil
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from peft import set_peft_model_state_dict
from peft.utils import load_peft_weights
from transformers import ProcessorMixin, TrainerCallback
from transformers.utils import logging

from ..hub.checkpoint import save_task_checkpoint, task_folder, write_json
from ..models import CLIPClassifier, adapter_name
from ..report import plot_accuracy_matrix
from ..trainer import ZOCLTrainer
from ..training_args import ZOCLTrainingArguments
from .metrics import accuracy_row, average_accuracy, last_accuracy, summarise
from .tasks import Task, TaskStream


logger = logging.get_logger(__name__)

RESULTS_FILE = "results.json"
_PACKAGES = ("hf_zocl", "torch", "transformers", "peft", "datasets", "accelerate", "huggingface_hub")
# A run may move house, or be watched in another way, and still be the same run.
_NOT_THE_RUN = {"output_dir", "resume", "report_to", "run_name", "disable_tqdm", "logging_steps", "dataset_path"}


class ContinualTaskScheduler:
    """Runs a stream of tasks: each is trained on its own classes and evaluated on all classes seen.

    Args:
        model: The classifier; its CLIP is wrapped by PEFT, and what requires a gradient is trained.
        processor: The CLIP model's processor.
        stream: The tasks.
        args: The training arguments of every task; `output_dir` receives `results.json`, `accuracy_matrix.png` and a
            folder per task.
        recipe: What `results.json` and the model cards say of how the run was made; default: `args`.
        callbacks: Handed to every task's trainer.
        trainer_class: `ZOCLTrainer` or a subclass.

    Raises:
        ValueError: If the layer assignment does not fit the model.
    """

    def __init__(
        self,
        model: CLIPClassifier,
        processor: ProcessorMixin,
        stream: TaskStream,
        args: ZOCLTrainingArguments,
        recipe: dict[str, Any] | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        trainer_class: type[ZOCLTrainer] = ZOCLTrainer,
    ):
        if args.push_to_hub:
            raise ValueError("push_to_hub=True: in this release task checkpoints stay in output_dir.")
        if args.eval_strategy != "no" or args.eval_on_start or args.load_best_model_at_end:
            raise ValueError(
                "The scheduler evaluates after every task: leave eval_strategy, eval_on_start and "
                "load_best_model_at_end as they are."
            )
        self.model, self.processor, self.stream, self.args = model, processor, stream, args
        self.recipe = recipe if recipe is not None else args.to_dict()
        self.callbacks, self.trainer_class = list(callbacks), trainer_class
        self.output_dir = Path(args.output_dir)
        split = args.layer_assignment.split(model, args.zo_eps, args.zo_eps_vision, args.zo_eps_language)
        self._towers = split.describe()

    def run(self, resume: bool = False) -> dict[str, Any]:
        """Run the stream.

        Args:
            resume: Go on after the last task that `output_dir` holds complete; without one, start from the beginning.

        Returns:
            The content of `results.json`; accuracies are fractions.

        Raises:
            ValueError: On `resume`, if `output_dir` holds the run of another recipe.
        """
        results = self._read_results() if resume else None
        if results is None:
            results = self._start()
        else:
            self._load_adapter(len(results["accuracy_matrix"]))
        started = time.perf_counter() - results["seconds"]
        for task in self.stream[len(results["accuracy_matrix"]) :]:
            logger.info(f"Task {task.index} of {len(self.stream)}: {', '.join(task.class_names)}")
            if hasattr(self.model, "begin_task"):
                self.model.begin_task(task.index)  # before the trainer asks which parameters are trainable
            trainer = self._train(task)
            if hasattr(self.model, "end_task"):
                self.model.end_task(task.index)
            row, seen = self._evaluate(task, trainer)
            results["accuracy_matrix"].append(row)
            results["seen_accuracy"].append(seen)
            results.update(summarise(results["accuracy_matrix"], results["seen_accuracy"]))
            results["seconds"] = time.perf_counter() - started
            results["peak_memory_bytes"] = max(results["peak_memory_bytes"], _peak_memory_bytes())
            self._save(task, results)
        self._remove_empty_folders()
        return results

    def _start(self) -> dict[str, Any]:
        """Measure zero-shot, then clear what an earlier run left behind."""
        started = time.perf_counter()
        results = {
            "benchmark": self.stream.name,
            "recipe": self.recipe,
            "classes": list(self.stream.class_names),
            "zero_shot": self._zero_shot(),
            "accuracy_matrix": [],
            "seen_accuracy": [],
            "seconds": time.perf_counter() - started,
            "peak_memory_bytes": _peak_memory_bytes(),
            "seed": self.args.seed,
            "versions": _versions(),
        }
        if self.args.should_save:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            (self.output_dir / RESULTS_FILE).unlink(missing_ok=True)
            for folder in self.output_dir.glob("task-[0-9][0-9]*"):
                shutil.rmtree(folder)
        return results

    def _train(self, task: Task) -> ZOCLTrainer:
        self.model.set_classes(task.class_names)
        # Every task draws directions of its own.
        zo_seed = (self.args.seed if self.args.zo_seed is None else self.args.zo_seed) + 1_000_003 * task.index
        trainer = self._trainer(task.name, first_label=task.first_label, train_dataset=task.train, zo_seed=zo_seed)
        trainer.train()
        return trainer

    def _evaluate(self, task: Task, trainer: ZOCLTrainer) -> tuple[list[float], float]:
        """The accuracies on the test images of tasks 1 to `task`, predicting among all their classes."""
        self.model.set_classes(self.stream.seen_class_names(task.index))
        trainer.data_collator.first_label = 0
        trainer.preprocess_logits_for_metrics = lambda logits, labels: _first(logits).argmax(dim=-1)
        output = trainer.predict(self.stream.seen_test(task.index), metric_key_prefix=task.name)
        return accuracy_row(output.predictions, output.label_ids, self._tasks_of(output.label_ids))

    def _zero_shot(self) -> dict[str, Any]:
        """The untrained model by the same protocol; one pass over all test images serves every task."""
        counts = [len(self.stream.seen_class_names(task.index)) for task in self.stream]
        self.model.set_classes(self.stream.class_names)
        trainer = self._trainer("zero-shot", first_label=0)
        trainer.preprocess_logits_for_metrics = lambda logits, labels: torch.stack(
            [_first(logits)[:, :count].argmax(dim=-1) for count in counts], dim=-1
        )
        output = trainer.predict(self.stream.seen_test(len(self.stream)), metric_key_prefix="zero_shot")
        labels, matrix, seen = output.label_ids, [], []
        for index, count in enumerate(counts):
            rows = labels < count
            row, accuracy = accuracy_row(output.predictions[rows, index], labels[rows], self._tasks_of(labels[rows]))
            matrix.append(row)
            seen.append(accuracy)
        return {
            "per_task": matrix[-1],
            "accuracy_matrix": matrix,
            "seen_accuracy": seen,
            "avg": average_accuracy(seen),
            "last": last_accuracy(seen),
        }

    def _trainer(
        self,
        name: str,
        first_label: int,
        train_dataset: datasets.Dataset | None = None,
        zo_seed: int | None = None,
    ) -> ZOCLTrainer:
        args = dataclasses.replace(
            self.args,
            output_dir=str(self.output_dir / "trainer" / name),
            run_name=f"{self.args.run_name or self.stream.name}-{name}",
            zo_seed=zo_seed,
            remove_unused_columns=False,  # the collator makes the model's inputs from the image column
            report_to=self.args.report_to if train_dataset is not None else "none",
        )
        return self.trainer_class(
            model=self.model,
            args=args,
            train_dataset=train_dataset,
            data_collator=ImageCollator(self.processor, self.stream.arrival_labels, first_label),
            callbacks=list(self.callbacks),
        )

    def _tasks_of(self, labels: np.ndarray) -> np.ndarray:
        """The task, counted from 1, of every arrival label."""
        starts = [task.first_label for task in self.stream]
        return np.searchsorted(starts, labels, side="right")

    def _save(self, task: Task, results: dict[str, Any]) -> None:
        if not self.args.should_save:
            return
        save_task_checkpoint(self.output_dir, self.model, self.processor, self._task_info(task, results))
        write_json(self.output_dir / RESULTS_FILE, results)
        plot_accuracy_matrix(results, self.output_dir / "accuracy_matrix.png")

    def _remove_empty_folders(self) -> None:
        """A Trainer makes its folder whether or not it saves anything there."""
        if not self.args.should_save:
            return
        parent = self.output_dir / "trainer"
        for folder in [*parent.glob("*"), parent]:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()

    def _task_info(self, task: Task, results: dict[str, Any]) -> dict[str, Any]:
        """The content of `task.json`."""
        base_model = self.recipe.get("model_name_or_path") or self.model.config.name_or_path
        seen = self.stream.class_order[: task.first_label + len(task.class_ids)]
        measures = ("accuracy_matrix", "seen_accuracy", "last", "avg", "forgetting", "backward_transfer")
        return {
            "task": task.index,
            "num_tasks": len(self.stream),
            "benchmark": self.stream.name,
            "dataset": self.stream.dataset_id,
            "base_model": base_model,
            "base_model_is_local": Path(self.model.config.name_or_path).exists(),
            "adapter": self.recipe.get("adapter") or adapter_name(self.model.clip.peft_config["default"]),
            "classes": list(self.stream.seen_class_names(task.index)),
            "task_classes": list(task.class_names),
            "task_sizes": [len(earlier.class_ids) for earlier in self.stream[: task.index]],
            "class_order": [int(label) for label in seen],
            "prompt_template": self.model.prompt_template,
            "assignment": {"branch": self.args.zo_branch, "layers": self.args.zo_layers, "towers": self._towers},
            "metrics": {name: results[name] for name in measures},
            **{
                name: results[name]
                for name in ("zero_shot", "recipe", "seed", "seconds", "peak_memory_bytes", "versions")
            },
        }

    def _read_results(self) -> dict[str, Any] | None:
        """The results of the complete tasks in `output_dir`, if there are any."""
        file = self.output_dir / RESULTS_FILE
        if not file.is_file():
            logger.warning(f"resume: {file} does not exist, so the run starts from the beginning.")
            return None
        results = json.loads(file.read_text(encoding="utf-8"))
        mine = json.loads(json.dumps(self.recipe))
        keys = sorted((mine.keys() | results["recipe"].keys()) - _NOT_THE_RUN)
        different = [key for key in keys if mine.get(key) != results["recipe"].get(key)]
        if different:
            details = ", ".join(
                f"{key}: {results['recipe'].get(key)!r} there, {mine.get(key)!r} here" for key in different
            )
            raise ValueError(f"resume: {file} is the run of another recipe ({details}).")
        if results["classes"] != list(self.stream.class_names):
            raise ValueError(f"resume: {file} is a run over other classes ({', '.join(results['classes'])}).")
        return results

    def _load_adapter(self, task: int) -> None:
        weights = load_peft_weights(str(self.output_dir / task_folder(task)), device=str(self.args.device))
        set_peft_model_state_dict(self.model.clip, weights)


class ImageCollator:
    """Makes a batch of a task's images: the processor's pixel values, and labels in order of arrival.

    Args:
        processor: The CLIP model's processor.
        arrival_labels: The position in the class order of every label id of the dataset.
        first_label: Subtracted from the arrival labels: training sees the task's own classes alone.
    """

    def __init__(self, processor: ProcessorMixin, arrival_labels: np.ndarray, first_label: int = 0):
        self.image_processor = processor.image_processor
        self.arrival_labels, self.first_label = arrival_labels, first_label

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        images = [example["image"] for example in examples]
        labels = self.arrival_labels[[example["label"] for example in examples]] - self.first_label
        pixel_values = self.image_processor(images=images, return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixel_values, "labels": torch.as_tensor(labels, dtype=torch.long)}


def _first(logits: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    return logits[0] if isinstance(logits, tuple) else logits


def _peak_memory_bytes() -> int:
    """The greatest memory of the process so far: the accelerator's allocations, or resident memory on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # not on Windows
        import psutil

        return psutil.Process().memory_info().peak_wset
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}
