"""`TaskSeries`: a run's model before its training and after each of its tasks, on one base model."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from huggingface_hub import constants as hub_constants
from peft import set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import CLIPModel

from ..files import read_json
from ..models import CLIPClassifier, gives_base_back, trained_adapter
from .checkpoint import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    check_repository_name,
    complete_tasks,
    find_task_checkpoint,
    read_sealed,
)
from .client import answered, persistently
from .load import load_base_model, load_task_checkpoint
from .task_info import TASK_FILE, is_task_name, read_task, task_folder, task_number
from .untrusted import check_finite, refusing


@dataclass(frozen=True)
class Stage:
    """The model at one point of a series.

    Args:
        task: The task that it had just learned; 0: before any.
        known: The positions in `TaskSeries.classes` of the classes that images are predicted among.
        learned: The names of the classes that the task brought.
        title: The task's title, if it has one.
        prompt_template: The prompt or prompts.
        weights: The adapter's weights; None: no adapter.
    """

    task: int
    known: tuple[int, ...]
    learned: tuple[str, ...]
    title: str | None
    prompt_template: str | list[str]
    weights: dict[str, torch.Tensor] | None


class TaskSeries:
    """Classifies images with the model as it was at every stage; the stages share one base model.

    Args:
        model: The classifier, with all the classes.
        stages: The stages; the first one is before any task.
        info: The `task.json` of the last stage.
        untrained: The base model, if switching off the adapter of `model` does not give it (`gives_base_back`).
    """

    def __init__(
        self,
        model: CLIPClassifier,
        stages: Sequence[Stage],
        info: dict[str, Any],
        untrained: CLIPModel | None = None,
    ):
        self.model, self.stages, self.info = model, tuple(stages), info
        self._untrained = None if untrained is None else CLIPClassifier(untrained, model.tokenizer, model.class_names)
        self.classes = model.class_names
        self._texts: dict[int, torch.Tensor] = {}
        self._lock = threading.Lock()  # the stages take turns in one model

    @classmethod
    def load(cls, path: str | Path, **hub_kwargs: Any) -> TaskSeries:
        """Load the checkpoints of all tasks of a run.

        Args:
            path: The run's folder, or its repository on the Hub.
            hub_kwargs: As for `load_task_checkpoint`.

        Raises:
            ValueError: If there is no such run, it has no task, a checkpoint is not as it was saved, or the
                checkpoints are not all of one run.
        """
        tasks = tasks_of(path, **hub_kwargs)
        folders = [find_task_checkpoint(path, task, **hub_kwargs) for task in tasks]
        model, _ = load_task_checkpoint(folders[-1], **hub_kwargs)
        last = _Saved.read(folders[-1])
        stages = [
            _stage(_Saved.read(folder), task, last, model) for folder, task in zip(folders[:-1], tasks, strict=False)
        ]
        stages.append(_stage(last, tasks[-1], last, model))
        before = Stage(0, stages[-1].known, (), None, last.info["prompt_template"], None)
        is_apart = gives_base_back(model.clip.peft_config[trained_adapter(model.clip)])
        untrained = None if is_apart else load_base_model(folders[-1], **hub_kwargs)
        return cls(model, [before, *stages], last.info, untrained)

    @torch.no_grad()
    def probabilities(self, images: Sequence[Any]) -> torch.Tensor:
        """The probabilities of all classes at every stage; zero for classes not yet known there.

        Args:
            images: As `CLIPClassifier.predict` takes them.

        Returns:
            `(images, stages, classes)`, on the CPU.

        Raises:
            ValueError: If an image cannot be read.
        """
        with self._lock:
            pixels = self.model._pixel_values(list(images))
            found = torch.zeros(len(pixels), len(self.stages), len(self.classes))
            for place, stage in enumerate(self.stages):
                known = list(stage.known)
                with self._model_at(stage) as model:
                    logits = self._logits(model, place, pixels)
                found[:, place, known] = logits[:, known].softmax(dim=-1).cpu()
        return found

    @contextmanager
    def _model_at(self, stage: Stage) -> Iterator[CLIPClassifier]:
        """The model as it was at a stage."""
        if stage.weights is not None:
            name = trained_adapter(self.model.clip)
            set_peft_model_state_dict(self.model.clip, stage.weights, adapter_name=name)
            yield self.model
        elif self._untrained is not None:
            yield self._untrained
        else:
            with self.model.clip.disable_adapter():
                yield self.model

    def _logits(self, model: CLIPClassifier, place: int, pixels: torch.Tensor) -> torch.Tensor:
        if place not in self._texts:  # text features depend on the stage, not on the image
            model.set_classes(self.classes, self.stages[place].prompt_template)
            self._texts[place] = model._encode_prompts()
        images = torch.cat([model.encode("vision", part) for part in pixels.split(64)])
        return model.logits(images, self._texts[place])


def tasks_of(path: str | Path, **hub_kwargs: Any) -> list[int]:
    """The tasks of a run that have checkpoints, in order.

    Args:
        path: The run's folder, or its repository on the Hub; if the Hub is switched off, what was downloaded before
            counts.

    Raises:
        ValueError: If there is none.
    """
    folder = Path(path)
    if folder.is_dir():
        tasks = complete_tasks(folder)
        if not tasks:
            hint = f" It is a checkpoint of a run: give {folder.parent}." if (folder / TASK_FILE).is_file() else ""
            raise ValueError(f"{folder}: expected a run's folder, with task-01 and so on.{hint}")
        return tasks
    check_repository_name(str(path))
    if hub_kwargs.get("local_files_only") or hub_constants.is_offline_mode():
        return list(range(1, read_task(find_task_checkpoint(path, **hub_kwargs))["task"] + 1))
    api = HfApi(token=hub_kwargs.get("token"), library_name="hf_zocl")
    refs = persistently(lambda: answered(lambda: api.list_repo_refs(str(path))))
    tasks = sorted(task_number(ref.name) for ref in refs.tags if is_task_name(ref.name))
    if not tasks:
        raise ValueError(f"{path}: expected the repository of a run, with the tags task-01 and so on; it has none.")
    return tasks


@dataclass(frozen=True)
class _Saved:
    """A task's checkpoint as it is on disk, with its checksums verified."""

    folder: Path
    info: dict[str, Any]
    config: dict[str, Any]
    weights: dict[str, torch.Tensor]

    @classmethod
    def read(cls, folder: Path) -> _Saved:
        info, file = read_sealed(folder), folder / ADAPTER_WEIGHTS
        with refusing(f"{file} is damaged: it cannot be read as safetensors"):
            weights = load_file(file)
        check_finite(weights, str(file))
        return cls(folder, info, read_json(folder / ADAPTER_CONFIG), weights)

    @property
    def shapes(self) -> dict[str, tuple[torch.Size, torch.dtype]]:
        return {name: (tensor.shape, tensor.dtype) for name, tensor in self.weights.items()}


def _stage(saved: _Saved, task: int, last: _Saved, model: CLIPClassifier) -> Stage:
    """A task's stage, if its adapter has the shape and base model of the last task's, which were checked."""
    info = saved.info
    if info["task"] != task:
        raise ValueError(
            f"{saved.folder / TASK_FILE} does not belong here: it is of task {info['task']}, expected "
            f"{task_folder(task)}."
        )
    same = [(info.get(name), last.info.get(name)) for name in ("adapter", "base_model", "base_model_sha256")]
    names = set(info["classes"]) | set(info.get("known_classes", ()))
    foreign = f"{saved.folder} does not belong here: it is not of the run of {last.folder.name}"
    if saved.config != last.config or any(mine != theirs for mine, theirs in same):
        raise ValueError(f"{foreign}: another adapter or base model.")
    if not names <= {*last.info["classes"], *last.info.get("known_classes", ())}:
        raise ValueError(f"{foreign}: other classes.")
    if saved.shapes != last.shapes:
        raise ValueError(f"{foreign}: weights of other names or shapes.")
    known = tuple(place for place, name in enumerate(model.class_names) if name in names)
    titles = info.get("task_titles") or [None] * task
    return Stage(task, known, tuple(info["task_classes"]), titles[-1], info["prompt_template"], saved.weights)
