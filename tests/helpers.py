"""Tiny models and data that several tests share."""

from pathlib import Path

import torch
from transformers import AutoProcessor, CLIPModel

from hf_zocl.models import AdapterArguments, CLIPClassifier, add_adapter
from hf_zocl.sample import sample_path


CLASSES = ("cat", "dog", "ship")


def mini_clip_classifier(class_names=CLASSES, **adapter) -> CLIPClassifier:
    """The embedded mini CLIP with LoRA, from one seed."""
    torch.manual_seed(0)
    folder = sample_path("mini-clip")
    clip = add_adapter(CLIPModel.from_pretrained(folder), AdapterArguments(**adapter))
    return CLIPClassifier(clip, AutoProcessor.from_pretrained(folder).tokenizer, class_names)


def image_batch(size: int = 8, classes: int = len(CLASSES), seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(size) % classes
    pixel_values = torch.randn(size, 3, 32, 32, generator=generator) + labels.view(-1, 1, 1, 1)
    return {"pixel_values": pixel_values, "labels": labels}


def image_examples(size: int = 32, classes: int = len(CLASSES)) -> list[dict]:
    batch = image_batch(size, classes)
    return [{"pixel_values": batch["pixel_values"][i], "labels": int(batch["labels"][i])} for i in range(size)]


def folders(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())
