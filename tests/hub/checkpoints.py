"""Checkpoints that the tests of hf_zocl.hub share: real files, made without training."""

import hashlib
import json
import shutil
from pathlib import Path

import torch
from transformers import AutoProcessor

from hf_zocl.hub import save_task_checkpoint
from hf_zocl.models import CLIPClassifier
from hf_zocl.sample import sample_path
from tests.helpers import mini_clip_classifier


CLASSES = ("airplane", "dog", "frog", "ship", "cat", "truck")


def task_info(task: int = 3, adapter: str = "lora") -> dict:
    """What the scheduler writes after `task` tasks of two classes."""
    matrix = [[0.9], [0.7, 0.8], [0.6, 0.625, 0.75]][:task]
    return {
        "task": task,
        "num_tasks": 3,
        "benchmark": "cifar10-sample",
        "scenario": "class",
        "dataset": None,
        "base_model": "mini-clip",
        "base_model_is_local": True,
        "adapter": adapter,
        "classes": list(CLASSES[: 2 * task]),
        "task_classes": list(CLASSES[2 * task - 2 : 2 * task]),
        "task_sizes": [2] * task,
        "task_titles": [None] * task,
        "class_order": [0, 5, 6, 8, 3, 9][: 2 * task],
        "prompt_template": "a photo of a {}.",
        "assignment": {
            "branch": "dual",
            "layers": "hop-even",
            "towers": {
                tower: {str(layer): "fo" if layer % 2 else "zo" for layer in range(1, depth + 1)}
                for tower, depth in {"vision": 6, "language": 4}.items()
            },
        },
        "metrics": {
            "accuracy_matrix": matrix,
            "seen_accuracy": [0.9, 0.75, 0.65][:task],
            "last": [0.9, 0.75, 0.65][task - 1],
            "avg": sum([0.9, 0.75, 0.65][:task]) / task,
            "forgetting": None if task == 1 else 0.2,
            "backward_transfer": None if task == 1 else -0.2,
        },
        # Highest above zero-shot after the second task: by 0.1, 0.25 and 0.15.
        "zero_shot": {"per_task": [0.8, 0.6, 0.5], "seen_accuracy": [0.8, 0.5, 0.5], "avg": 0.6, "last": 0.5},
        "recipe": {"adapter": adapter, "zo_branch": "dual", "zo_layers": "hop-even"},
        "seed": 0,
        "seconds": 12.3,
        "peak_memory_bytes": 10**9,
        "versions": {"hf_zocl": "0.1.0"},
    }


def adapted_classifier(adapter: str = "lora", **options) -> CLIPClassifier:
    """The embedded mini CLIP with an adapter that changes its predictions."""
    model = mini_clip_classifier(CLASSES, adapter=adapter, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def save_checkpoint(output_dir: Path, task: int = 3, adapter: str = "lora", **options) -> Path:
    processor = AutoProcessor.from_pretrained(sample_path("mini-clip"))
    return save_task_checkpoint(
        output_dir, adapted_classifier(adapter, **options), processor, task_info(task, adapter)
    )


def change_json(file: Path, **changes) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def put_on_hub(cache: Path, repository: str, **revisions: Path) -> Path:
    """Lay folders into a cache as if they had been downloaded from the Hub; `task_01=…` is the revision `task-01`."""
    root = cache / f"models--{repository.replace('/', '--')}"
    for name, folder in revisions.items():
        commit = hashlib.sha1(f"{repository} {name}".encode()).hexdigest()
        snapshot = root / "snapshots" / commit
        for file in (path for path in folder.rglob("*") if path.is_file()):
            blob = root / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
            link = snapshot / file.relative_to(folder)
            for path in (blob, link, root / "refs" / name):
                path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, blob)
            link.symlink_to(blob)
        (root / "refs" / name.replace("_", "-")).write_text(commit)
        for file in ("config.json", "preprocessor_config.json", "added_tokens.json", "chat_template.jinja"):
            if not (folder / file).exists():  # the client notes what it has asked for in vain
                (root / ".no_exist" / commit).mkdir(parents=True, exist_ok=True)
                (root / ".no_exist" / commit / file).touch()
    return root
