"""The content of a checkpoint's `task.json`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..data.stream import TaskStream
from ..data.tasks import Task
from ..models import CLIPClassifier, adapter_name, base_dtype, trained_adapter


def task_info(
    task: Task,
    stream: TaskStream,
    model: CLIPClassifier,
    assignment: dict[str, Any],
    base_model: str,
    known_classes: Sequence[str],
    plugins: Sequence[str],
    results: dict[str, Any],
) -> dict[str, Any]:
    """The content of `task.json`, from which the checkpoint's card is written.

    Args:
        task: The task that is complete.
        stream, model: Its stream, and the model after the task.
        assignment: The branch, the layers, and the split of each tower's layers.
        base_model: The base model's name.
        known_classes: Classes that the model knew before the run.
        plugins: The classes of its plug-ins.
        results: The run's results so far.
    """
    known = [name for name in known_classes if name not in stream.seen_class_names(task.index)]
    seen = stream.class_order[: len(stream.seen_class_names(task.index))]
    measures = ("accuracy_matrix", "seen_accuracy", "last", "avg", "forgetting", "backward_transfer")
    prompts = [earlier.prompt_template for earlier in stream[: task.index]]
    return {
        "task": task.index,
        "num_tasks": len(stream),
        "benchmark": stream.name,
        "scenario": stream.scenario,
        "dataset": stream.dataset_id,
        "base_model": base_model,
        "base_model_is_local": Path(model.config.name_or_path).exists(),
        "base_model_sha256": results.get("fingerprints", {}).get("base_model"),
        "dtype": base_dtype(model.clip),
        "adapter": adapter_name(model.clip.peft_config[trained_adapter(model.clip)]),
        "classes": list(stream.seen_class_names(task.index)),
        **({"known_classes": known} if known else {}),
        "task_classes": list(task.class_names),
        "task_sizes": [len(earlier.class_ids) for earlier in stream[: task.index]],
        "task_titles": [earlier.title for earlier in stream[: task.index]],
        "class_order": [int(label) for label in seen],
        "prompt_template": model.prompt_template,
        **({"task_prompts": prompts} if any(prompts) else {}),
        "assignment": assignment,
        **({"plugins": list(plugins)} if plugins else {}),
        "metrics": {name: results[name] for name in measures},
        **{name: results[name] for name in ("held_out", "zero_shot_retention") if results.get("held_out")},
        **{
            name: results[name] for name in ("zero_shot", "recipe", "seed", "seconds", "peak_memory_bytes", "versions")
        },
    }
