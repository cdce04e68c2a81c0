"""A run of three tasks with class names that are not harmless, made without training."""

from pathlib import Path

import torch
from transformers import AutoProcessor

from hf_zocl.hub import save_task_checkpoint
from hf_zocl.sample import sample_path
from tests.helpers import mini_clip_classifier
from tests.hub.checkpoints import task_info


ORDER = [0, 5, 6, 8, 3, 9]
# A name for each label of the embedded sample.
NAMES = [f"class {label}" for label in range(10)]
NAMES[0] = "<script>document.title = 'owned'</script>"
NAMES[5] = "<img src=x onerror=\"document.title='owned'\">"
NAMES[6] = "a ${1+1} {{2*2}} name that is long enough to need more room than a phone has for it"
CLASSES = [NAMES[label] for label in ORDER]


def save_run(
    folder: Path, tasks: int = 3, adapter: str = "lora", adapter_config: dict | None = None, **recipe
) -> Path:
    """Checkpoints whose adapters differ, of the embedded sample."""
    processor = AutoProcessor.from_pretrained(sample_path("mini-clip"))
    model = mini_clip_classifier(CLASSES, adapter=adapter, adapter_config=adapter_config)
    for task in range(1, tasks + 1):
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn_like(parameter))
        info = task_info(task, adapter)
        info |= {"classes": CLASSES[: 2 * task], "task_classes": CLASSES[2 * task - 2 : 2 * task]}
        own = {"benchmark": "cifar10-sample", "class_order": ORDER, "partial_order": True, "increment": 2}
        info["recipe"] |= {**own, "class_names": NAMES, **recipe}
        save_task_checkpoint(folder, model, processor, info)
    return folder
