"""Tiny models, data and trainings that several tests share."""

import shutil
import tempfile
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoProcessor, CLIPConfig, CLIPModel

from hf_zocl import ZOCLTrainer, ZOCLTrainingArguments
from hf_zocl.models import AdapterArguments, CLIPClassifier, add_adapter
from hf_zocl.report import figures
from hf_zocl.sample import sample_path


CLASSES = ("cat", "dog", "ship")


def slow_but_for(quick, cases):
    """The cases of a test, of which only those in `quick` run without the slow tests."""
    assert all(case in cases for case in quick)
    values = [case if isinstance(case, tuple) else (case,) for case in cases]
    marks = [() if case in quick else pytest.mark.slow for case in cases]
    return [pytest.param(*value, marks=mark) for value, mark in zip(values, marks, strict=True)]


@cache
def _small_clip() -> tempfile.TemporaryDirectory:
    sample, folder = sample_path("mini-clip"), tempfile.TemporaryDirectory(prefix="small-clip-")
    config = CLIPConfig.from_pretrained(sample)
    config.projection_dim, config.vision_config.patch_size = 32, 8
    for tower in (config.vision_config, config.text_config):
        tower.hidden_size, tower.intermediate_size, tower.num_attention_heads, tower.projection_dim = 32, 64, 2, 32
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        CLIPModel(config).save_pretrained(folder.name)
    for file in sample.glob("*.json"):
        if file.name != "config.json":
            shutil.copy(file, folder.name)
    return folder


def small_clip() -> str:
    """The folder of a model with the layers and the processor of the embedded one, narrow and untrained.

    For runs of which the assertions ask nothing that a trained model alone can give. It goes with the process.
    """
    return _small_clip().name


def mini_clip_classifier(class_names=CLASSES, **adapter) -> CLIPClassifier:
    """The embedded mini CLIP with LoRA, from one seed."""
    torch.manual_seed(0)
    folder = sample_path("mini-clip")
    clip = add_adapter(CLIPModel.from_pretrained(folder), AdapterArguments(**adapter))
    return CLIPClassifier(clip, AutoProcessor.from_pretrained(folder).tokenizer, class_names)


class _Picture:
    def savefig(self, file, **options) -> None:
        Path(file).write_bytes(b"a picture")


def draw_quickly(patch: pytest.MonkeyPatch) -> None:
    """Have runs write a file for their accuracy matrix without drawing it, which takes as long as a short training."""
    patch.setattr(figures, "draw_accuracy_matrix", lambda results: _Picture())


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


class Mlp(nn.Module):
    """A regression with dropout; `layers.0` can be zeroth-order and the rest first-order."""

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(4, 16), nn.Linear(16, 1)])
        self.dropout = nn.Dropout(dropout)
        self.forwards: list[bool] = []
        self.losses: list[float] = []

    def forward(self, x, labels=None):
        self.forwards.append(self.layers[0].weight.requires_grad)
        output = self.layers[1](self.dropout(self.layers[0](x).tanh())).squeeze(-1)
        loss = F.mse_loss(output, labels)
        self.losses.append(loss.item())
        return {"loss": loss, "logits": output}


def rows(count: int = 32) -> list[dict]:
    generator = torch.Generator().manual_seed(5)
    return [{"x": x, "labels": x.sum()} for x in torch.randn(count, 4, generator=generator)]


def arguments(tmp_path, cls=ZOCLTrainingArguments, **options):
    defaults = {
        "output_dir": str(tmp_path / "trainer"),
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "max_steps": 2,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
    }
    return cls(**{**defaults, **options})


def train(tmp_path, model=None, trainer_class=ZOCLTrainer, callbacks=(), data=None, **options):
    trainer = trainer_class(
        model=model or mini_clip_classifier(),
        args=arguments(tmp_path, **options),
        train_dataset=data or image_examples(),
        callbacks=list(callbacks),
    )
    trainer.train()
    return trainer


def training_logs(trainer) -> list[dict]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]
