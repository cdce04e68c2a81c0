"""One task's checkpoint: saved whole or not at all, loaded in one line."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft import PeftConfig, PeftModel
from transformers import AutoProcessor, CLIPModel, ProcessorMixin

from ..models import CLIPClassifier
from ..report import plot_accuracy_matrix
from ..sample import resolve
from .model_card import render_task_card


TASK_FILE = "task.json"
RESULTS_FILE = "results.json"
FORMAT_VERSION = 1


def task_folder(task: int) -> str:
    """The name of a task's folder, and of its revision on the Hub: `task-01`, `task-02`, …"""
    return f"task-{task:02d}"


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write beside, then rename: the file is whole at any moment."""
    unfinished = path.with_name(f".{path.name}.tmp")
    unfinished.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


def save_task_checkpoint(
    output_dir: str | Path,
    model: CLIPClassifier,
    processor: ProcessorMixin,
    task: dict[str, Any],
    results: dict[str, Any] | None = None,
) -> Path:
    """Save the adapter, the processor, `task.json` and the model card into `output_dir/task-NN`.

    Args:
        output_dir: The run's folder.
        model: A classifier whose CLIP is wrapped by PEFT.
        processor: The CLIP model's processor.
        task: The content of `task.json`, see `hf_zocl.hub.model_card.render_task_card`.
        results: The run's results so far, for `results.json` and `accuracy_matrix.png`.

    Returns:
        The checkpoint's folder; one of that name is replaced once the new one is complete.
    """
    folder = Path(output_dir) / task_folder(task["task"])
    unfinished = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.clip.save_pretrained(unfinished)
    processor.save_pretrained(unfinished)
    write_json(unfinished / TASK_FILE, {"format_version": FORMAT_VERSION, **task})
    (unfinished / "README.md").write_text(str(render_task_card(task)), encoding="utf-8")
    if results is not None:
        write_json(unfinished / RESULTS_FILE, results)
        plot_accuracy_matrix(results, unfinished / "accuracy_matrix.png")
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(unfinished, folder)
    return folder


def find_task_checkpoint(
    path: str | Path, task: int | None = None, revision: str | None = None, **hub_kwargs: Any
) -> Path:
    """The folder of one task's checkpoint, downloaded if it lies on the Hub; arguments as `load_task_checkpoint`'s.

    Raises:
        ValueError: If there is no such folder, or `task` and `revision` are both given.
    """
    if task is not None and revision is not None:
        raise ValueError(f"task={task} and revision={revision!r} were both given: they name the same thing, pass one.")
    folder = Path(path)
    if not folder.is_dir():
        _check_repository(str(path))
        patterns = ["*.json", "*.safetensors"]
        revision = task_folder(task) if task is not None else revision
        return Path(snapshot_download(str(path), revision=revision, allow_patterns=patterns, **hub_kwargs))
    return folder / task_folder(task) if task is not None else folder


def load_task_checkpoint(
    path: str | Path, task: int | None = None, revision: str | None = None, **hub_kwargs: Any
) -> tuple[CLIPClassifier, ProcessorMixin]:
    """Load the model after one task: `model, processor = load_task_checkpoint("runs/quickstart/task-05")`.

    Args:
        path: A checkpoint's folder, a run's folder (with `task`), or a repository on the Hub.
        task: The task, counted from 1: the folder `task-NN` of a run, or the revision of a repository.
        revision: A revision on the Hub, instead of `task`.
        hub_kwargs: `token`, `cache_dir` and the like, for `huggingface_hub.snapshot_download`.

    Returns:
        The classifier with the classes of all tasks seen so far, in evaluation mode, and the processor.

    Raises:
        ValueError: If there is no such folder, it holds no task checkpoint, or `task` and `revision` are both given.
    """
    folder = find_task_checkpoint(path, task, revision, **hub_kwargs)
    info = read_task(folder)
    clip = CLIPModel.from_pretrained(_base_model(folder, info))
    processor = AutoProcessor.from_pretrained(folder)
    model = CLIPClassifier(
        PeftModel.from_pretrained(clip, folder), processor.tokenizer, info["classes"], info["prompt_template"]
    )
    return model.eval(), processor


def _check_repository(name: str) -> None:
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"{name} is neither a folder nor the name of a repository on the Hub.") from error


def read_task(folder: Path) -> dict[str, Any]:
    """Read a checkpoint's `task.json`.

    Raises:
        ValueError: If there is none, or this release cannot read it.
    """
    file = folder / TASK_FILE
    if not file.is_file():
        raise ValueError(f"{folder} is not a task checkpoint: it has no {TASK_FILE}.")
    info = json.loads(file.read_text(encoding="utf-8"))
    if info.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"{file}: format_version={info.get('format_version')!r}, expected {FORMAT_VERSION}.")
    return info


def _base_model(folder: Path, info: dict[str, Any]) -> str:
    """The embedded sample by its name; any other base model as PEFT recorded it."""
    embedded = resolve(info["base_model"])
    return embedded if embedded != info["base_model"] else PeftConfig.from_pretrained(folder).base_model_name_or_path
