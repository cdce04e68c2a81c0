"""`ClassifierAlignment`: after every task, the text tower learns to tell all classes seen apart."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import nn
from torch.utils.data import TensorDataset

from ...checks import check_count
from ...data.stream import TaskStream
from ...data.tasks import Task
from ...models import CLIPClassifier
from ...models.clip_classifier import CLIPClassifierOutput
from ...passes.random_state import uncounted
from ...trainer import ZOCLTrainer
from ...trainer.arguments import ZOCLTrainingArguments
from ...zo.assignment import locate
from ..progress import without_own_display
from ..task_check import TaskCheck
from .plugin import TaskPlugin


class ClassifierAlignment(TaskPlugin):
    """Classifier alignment (SLCA, Zhang et al., ICCV 2023, section 3.3), with the text tower as the classifier.

    A task is trained among its own classes, so nothing teaches the model to tell a cat from the ships of an earlier
    task. This keeps the mean μ_c of the image features of every class, and the covariance Σ of all classes around
    their means, with the vision tower as it was when the task ended. After a task, it trains the text tower's adapter
    on

        −log softmax_c(logit_scale · cos(x, text_c)),    x ~ N(μ_c, Σ),  c uniform over the classes seen.

    No image is kept; a task's own images take one forward pass. A step costs a pass of the text tower. Text layers
    that are zeroth-order in the task are zeroth-order here too, at their own rate.

    Args:
        steps: Optimizer steps after a task.
        learning_rate: The peak learning rate of first-order text layers; it falls along a cosine.
        batch_size: Features drawn per step, over all processes.

    Raises:
        ValueError: If a number is out of its range.
    """

    def __init__(self, steps: int = 100, learning_rate: float = 5e-3, batch_size: int = 256):
        check_count("steps", steps)
        check_count("batch_size", batch_size)
        if not 0 < learning_rate < float("inf"):
            raise ValueError(f"learning_rate={learning_rate}: expected more than 0.")
        self.steps, self.learning_rate, self.batch_size = steps, learning_rate, batch_size
        self.load_state({})

    def begin_run(self, stream: TaskStream, model: CLIPClassifier) -> None:
        if stream.scenario != "class":
            raise ValueError(
                f"classifier alignment: scenario={stream.scenario!r} does not predict among all classes seen; "
                "expected 'class'."
            )
        if not _trained_in_text_tower(model):
            raise ValueError(
                "classifier alignment: it trains only the text tower, of which no parameter is trained here."
            )
        self._stream = stream

    def state(self) -> dict[str, torch.Tensor]:
        return {"means": self._means, "scatter": self._scatter, "images": self._images}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        self._means = state.get("means", torch.empty(0, 0))
        # Double precision, because the root of a singular matrix turns a rounding of 1e-7 into 3e-4.
        self._scatter = state.get("scatter", torch.empty(0, 0)).double()
        self._images = state.get("images", torch.empty(0, dtype=torch.int64))

    def end_task(self, task: Task, trainer: ZOCLTrainer) -> None:
        model: CLIPClassifier = trainer.accelerator.unwrap_model(trainer.model)
        with uncounted(model):  # adapters count only the task's own steps
            self.add(*image_features(task.train, trainer))
            model.set_classes(self._stream.seen_class_names(task.index), self._first_template(model))
            prompts = _PromptClassifier(model)
            zero_order = _zero_order_names(prompts, trainer.args)
            with _text_tower_alone(model):
                self._align(task, trainer, prompts, zero_order)

    def add(self, features: torch.Tensor, labels: torch.Tensor) -> None:
        """Add the statistics of further classes.

        Args:
            features: Image features, `(images, dim)`.
            labels: Their arrival labels, `(images,)`, which follow those of the classes already known.
        """
        features, known = features.double(), len(self._means)
        classes = range(known, int(labels.max()) + 1)
        means = torch.stack([features[labels == label].mean(dim=0) for label in classes])
        around = features - means[labels - known]
        scatter = around.T @ around
        self._scatter = scatter + self._scatter if known else scatter
        self._means = torch.cat([self._means, means.float()]) if known else means.float()
        self._images = torch.cat([self._images, torch.bincount(labels - known)])

    def draw(self, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw unit-length features of all known classes, `(count, dim)`, and their labels, `(count,)`."""
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(len(self._means), (count,), generator=generator)
        values, vectors = torch.linalg.eigh(self._scatter / self._images.sum())
        # The symmetric root, because the signs of the eigenvectors themselves depend on the last bit.
        root = (vectors * values.clamp(min=0).sqrt() @ vectors.T).float()
        noise = torch.randn(count, len(root), generator=generator) @ root
        return F.normalize(self._means[labels] + noise, dim=-1), labels

    def _align(self, task: Task, trainer: ZOCLTrainer, prompts: _PromptClassifier, zero_order: list[str]) -> None:
        args = trainer.args
        per_process = max(1, self.batch_size // args.world_size)
        features = self.draw(self.steps * per_process * args.world_size, args.seed + 1_000_003 * task.index)
        alignment = _trainer(
            trainer,
            prompts,
            train_dataset=TensorDataset(*features),
            data_collator=_collate,
            max_steps=self.steps,
            per_device_train_batch_size=per_process,
            learning_rate=self.learning_rate,
            lr_scheduler_type="cosine",
            lr_scheduler_kwargs=None,
            warmup_steps=0,
            # By name, because a scheme such as hop-odd may have no layer in this tower.
            zo_branch="language" if zero_order else "none",
            zo_layers=[f"^{re.escape(name)}$" for name in zero_order] or "all",
            zo_seed=None if args.zo_seed is None else args.zo_seed + 500_009,  # other directions than the task's
        )
        check = TaskCheck(f"the classifier alignment of {task.name}", alignment)
        alignment.train()
        check.finish()

    @staticmethod
    def _first_template(model: CLIPClassifier) -> str:
        """The prompt that trains: the first of several."""
        template = model.prompt_template
        return template if isinstance(template, str) else template[0]


def _collate(rows: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {"image_embeds": torch.stack([row[0] for row in rows]), "labels": torch.stack([row[1] for row in rows])}


class _PromptClassifier(nn.Module):
    """A classifier of image features, which runs the text tower alone."""

    def __init__(self, classifier: CLIPClassifier):
        super().__init__()
        self.classifier = classifier

    def forward(self, image_embeds: torch.Tensor, labels: torch.Tensor) -> CLIPClassifierOutput:
        logits = self.classifier.logits(image_embeds, self.classifier.encode("language"))
        return CLIPClassifierOutput(loss=F.cross_entropy(logits, labels), logits=logits)


class _ImageFeatures(nn.Module):
    """A classifier's image features, in place of logits."""

    def __init__(self, classifier: CLIPClassifier):
        super().__init__()
        self.classifier = classifier

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> CLIPClassifierOutput:
        features = self.classifier.encode("vision", pixel_values).float()
        return CLIPClassifierOutput(loss=features.new_zeros(()), logits=features)


def image_features(images: Dataset, trainer: ZOCLTrainer) -> tuple[torch.Tensor, torch.Tensor]:
    """A model's image features, `(images, dim)`, and the arrival labels, `(images,)`; the same in every process."""
    collator = copy.copy(trainer.data_collator)
    collator.first_label = 0
    features = _ImageFeatures(trainer.accelerator.unwrap_model(trainer.model))
    output = _trainer(trainer, features, data_collator=collator, zo_branch="none").predict(images)
    return torch.as_tensor(output.predictions), torch.as_tensor(output.label_ids)


def _trainer(trainer: ZOCLTrainer, model: nn.Module, train_dataset=None, data_collator=None, **changed) -> ZOCLTrainer:
    """A second trainer next to a task's, which saves, logs and shows nothing."""
    # The inner model keeps its own checkpointing. Releases of transformers have one name or both.
    names = ("activation_checkpointing", "gradient_checkpointing")
    checkpointing = {name: False for name in names if hasattr(trainer.args, name)}
    args = dataclasses.replace(
        trainer.args,
        gradient_accumulation_steps=1,
        auto_find_batch_size=False,
        label_smoothing_factor=0.0,
        neftune_noise_alpha=None,
        dataloader_drop_last=False,
        dataloader_num_workers=0,
        dataloader_persistent_workers=False,
        dataloader_prefetch_factor=None,
        train_sampling_strategy="random",
        **checkpointing,
        save_strategy="no",
        eval_strategy="no",
        logging_strategy="no",
        load_best_model_at_end=False,
        **changed,
    )
    made = ZOCLTrainer(model=model, args=args, train_dataset=train_dataset, data_collator=data_collator)
    without_own_display(made)
    return made


def _trained_in_text_tower(model: nn.Module) -> list[str]:
    """The names of the text tower's parameters that are trained."""
    return [n for n, parameter in model.named_parameters() if parameter.requires_grad and locate(n)[0] == "language"]


def _zero_order_names(model: nn.Module, args: ZOCLTrainingArguments) -> list[str]:
    """The names of the text tower's parameters that are zeroth-order in a task."""
    split = args.layer_assignment.split(model)
    return [name for group in split.zo if group.branch == "language" for name in group.names]


@contextmanager
def _text_tower_alone(model: nn.Module) -> Iterator[None]:
    """A context in which only the text tower's trained parameters require a gradient."""
    kept = set(_trained_in_text_tower(model))
    frozen = [p for name, p in model.named_parameters() if p.requires_grad and name not in kept]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
