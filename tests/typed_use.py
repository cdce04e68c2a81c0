"""The public names as a project with a type checker uses them; `make check` lets mypy read it, and nothing runs it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import ProcessorMixin, Trainer, TrainingArguments

from hf_zocl import (
    CLIPClassifier,
    ContinualTaskScheduler,
    LayerAssignment,
    MoEAdapterConfig,
    TaskStream,
    ZeroOrderArguments,
    ZeroOrderMixin,
    ZOCLTrainer,
    ZOCLTrainingArguments,
    load_task_checkpoint,
)


@dataclass
class Arguments(ZeroOrderArguments, TrainingArguments):
    pass


class MyTrainer(ZeroOrderMixin, Trainer):
    def zo_objective(self, model: nn.Module, inputs: dict[str, Any], outputs: Any) -> torch.Tensor:
        return outputs.logits.argmax(-1) != inputs["labels"]


def arguments() -> list[ZeroOrderArguments]:
    return [
        Arguments(output_dir="out", zo_layers="all", zo_queries=4, zo_eps=1e-3),
        ZOCLTrainingArguments(output_dir="out", zo_layers=[2, 4], zo_eps="auto"),
        ZOCLTrainingArguments(output_dir="out", zo_queries={"vision": 2, "language": 16}, zo_sign=True),
        ZOCLTrainingArguments(output_dir="out", zo_learning_rate="vision=1e-3,language=5e-3"),
    ]


def train(model: nn.Module, data: Any) -> tuple[ZOCLTrainer, MyTrainer]:
    zocl = ZOCLTrainer(model, ZOCLTrainingArguments(output_dir="out"), train_dataset=data)
    mine = MyTrainer(model=model, args=Arguments(output_dir="out"), train_dataset=data)
    zocl.train()
    return zocl, mine


def layers(model: nn.Module) -> list[nn.Parameter]:
    return LayerAssignment("vision", "hop-even").split(model, {"vision": 1e-3}).zo_parameters


def learn(model: CLIPClassifier, processor: ProcessorMixin, stream: TaskStream) -> dict[str, Any]:
    scheduler = ContinualTaskScheduler(model, processor, stream, ZOCLTrainingArguments(output_dir="out"))
    return scheduler.run()


def load(repository: str) -> tuple[CLIPClassifier, ProcessorMixin]:
    return load_task_checkpoint(repository, task="best")


CONFIG = MoEAdapterConfig(num_experts=4, top_k=2)
