"""A CLIP model and a list of class prompts, as an image classifier."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from torch import nn
from transformers import BaseImageProcessor, CLIPModel, PreTrainedTokenizerBase
from transformers.image_utils import load_image
from transformers.utils import ModelOutput

from .moe_adapter import collect_balance_losses


Images = str | os.PathLike | Image.Image | np.ndarray | torch.Tensor | Sequence[Any]


@dataclass
class CLIPClassifierOutput(ModelOutput):
    """
    Attributes:
        loss: Cross-entropy over the present classes, scalar; where labels are given. In training mode with the
            adapters' load-balancing loss, where they have one.
        logits: Scaled cosine similarities, float32 or wider, `(batch, classes)`.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None


class CLIPClassifier(nn.Module):
    """Classifies an image by the cosine similarity of its feature with the text features of the class prompts.

    Args:
        clip: A `CLIPModel`, or one wrapped by PEFT.
        tokenizer: The model's tokenizer.
        class_names: The classes, in the order of their labels; `set_classes` changes them.
        prompt_template: A prompt with one `{}` for the class name; or several, whose features of unit length are
            averaged, class by class (prompt ensembling; Radford et al., CLIP, 2021, section 3.1.4).

    Raises:
        ValueError: If a template has not exactly one `{}`, or there is none.
    """

    image_processor: BaseImageProcessor | None = None  # what `predict` makes pixel values with
    reloads_frozen_weights = True  # they are the base model's, so a training's checkpoints need not hold them

    def __init__(
        self,
        clip: CLIPModel,
        tokenizer: PreTrainedTokenizerBase,
        class_names: Sequence[str],
        prompt_template: str | Sequence[str] = "a photo of a {}.",
    ):
        super().__init__()
        self.clip = clip
        self.tokenizer = tokenizer
        self.prompt_template = prompt_template
        self.set_classes(class_names)

    @property
    def config(self):
        return self.clip.config

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> set[str]:
        """What `DistributedDataParallel` need not send: every process has the same prompts and positions."""
        return {name for name, _ in self.named_buffers()}

    @property
    def couples_towers(self) -> bool:
        """Whether the loss has a part that is not made of the towers' features (read by `hf_zocl.zo.TowerPlan`)."""
        return self.has_balance_loss

    @property
    def has_balance_loss(self) -> bool:
        """Whether an adapter adds a load-balancing loss in training."""
        configs = getattr(self.clip, "peft_config", {}).values()
        return any(getattr(config, "balance_loss", 0) > 0 for config in configs)

    def set_classes(self, class_names: Sequence[str], prompt_template: str | Sequence[str] | None = None) -> None:
        """Set the classes; their prompts are padded to the longest of them, not to the context length.

        Args:
            class_names: The classes, in the order of their labels.
            prompt_template: Their prompt or prompts, until the next call; default: the classifier's own.
        """
        self.class_names = tuple(class_names)
        templates = _templates(self.prompt_template if prompt_template is None else prompt_template)
        self.prompts_per_class = len(templates)
        prompts = [template.format(name) for name in self.class_names for template in templates]
        tokens = self.tokenizer(
            prompts,
            padding=True,
            truncation=True,
            max_length=self.clip.config.text_config.max_position_embeddings,
            return_tensors="pt",
        )
        device = self.clip.logit_scale.device
        self.register_buffer("input_ids", tokens["input_ids"].to(device), persistent=False)
        self.register_buffer("attention_mask", tokens["attention_mask"].to(device), persistent=False)
        self._clear_text_cache()

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> CLIPClassifierOutput:
        """
        Args:
            pixel_values: `(batch, channels, height, width)`.
            labels: Indices into the classes, `(batch,)`.
        """
        if not (self.training and self.has_balance_loss):
            return self._classify(pixel_values, labels)
        with collect_balance_losses(self.clip) as balance_losses:
            output = self._classify(pixel_values, labels)
        if output.loss is not None:
            output.loss = output.loss + sum(balance_losses)
        return output

    def _classify(self, pixel_values: torch.Tensor, labels: torch.Tensor | None) -> CLIPClassifierOutput:
        image_embeds = self.encode("vision", pixel_values)
        text_embeds = self.encode("language") if self.training else self._cached_text_embeds()
        logits = self.logits(image_embeds, text_embeds)
        return CLIPClassifierOutput(
            loss=F.cross_entropy(logits, labels) if labels is not None else None, logits=logits
        )

    def encode(self, tower: str, pixel_values: torch.Tensor | None = None) -> torch.Tensor:
        """The features of one tower, of unit length: of the images (`vision`) or of the prompts (`language`)."""
        if tower == "vision":
            outputs = self.clip.get_image_features(pixel_values=pixel_values)
        else:
            outputs = self.clip.get_text_features(input_ids=self.input_ids, attention_mask=self.attention_mask)
        features = F.normalize(outputs.pooler_output, dim=-1)
        if tower == "language" and self.prompts_per_class > 1:
            ensemble = features.unflatten(0, (-1, self.prompts_per_class)).mean(dim=1)
            features = F.normalize(ensemble, dim=-1)
        return features

    def logits(self, image_embeds: torch.Tensor, text_embeds: torch.Tensor) -> torch.Tensor:
        """Scaled cosine similarities, in float32 at least, as a difference of two losses needs them.

        Args:
            image_embeds, text_embeds: Features of unit length, `(batch, dim)` and `(classes, dim)`.
        """
        dtype = torch.promote_types(image_embeds.dtype, torch.float32)
        with torch.autocast(image_embeds.device.type, enabled=False):
            similarity = image_embeds.to(dtype) @ text_embeds.to(dtype).T
            return similarity * self.clip.logit_scale.to(dtype).exp()

    @torch.no_grad()
    def predict(self, images: Images, batch_size: int = 64) -> tuple[list[str], torch.Tensor]:
        """Name what is on images: `names, probabilities = model.predict(["cat.png", "dog.png"])`.

        Args:
            images: One image or several: files, URLs, PIL images, or arrays of bytes `(height, width, channels)`; or
                what an image processor has made of them, `(batch, channels, height, width)`.
            batch_size: Images that go through the model at once.

        Returns:
            The class name of every image, and the probabilities of all classes, `(images, classes)`.

        Raises:
            ValueError: If the classifier has no `image_processor`, which `load_task_checkpoint` gives it, and the
                images need one; or if an array holds no bytes.
        """
        self.eval()
        if not isinstance(images, torch.Tensor):
            is_one = isinstance(images, (str, os.PathLike, Image.Image)) or getattr(images, "ndim", 4) < 4
            images = [images] if is_one else list(images)
        probabilities = [
            self(self._pixel_values(images[start : start + batch_size])).logits.softmax(dim=-1)
            for start in range(0, len(images), batch_size)
        ]
        probabilities = torch.cat(probabilities) if probabilities else torch.empty(0, len(self.class_names))
        return [self.class_names[i] for i in probabilities.argmax(dim=-1).tolist()], probabilities

    def _pixel_values(self, images: torch.Tensor | list[Any]) -> torch.Tensor:
        if not isinstance(images, torch.Tensor):
            if self.image_processor is None:
                raise ValueError("predict: set image_processor (processor.image_processor), or give pixel values.")
            images = self.image_processor([_read_image(image) for image in images], return_tensors="pt").pixel_values
        return images.to(self.clip.logit_scale.device)

    def begin_task(self, task: int) -> None:
        """Tell the adapter that a task begins, counted from 1, if it has anything of its own for each."""
        if hasattr(self.clip, "begin_task"):
            self.clip.begin_task(task)
        self._clear_text_cache()

    def end_task(self, task: int) -> None:
        """Tell the adapter that a task has been trained, if it cares."""
        if hasattr(self.clip, "end_task"):
            self.clip.end_task(task)

    def extra_logs(self) -> dict[str, float]:
        """What the adapter has to say in a training log, by name."""
        return self.clip.extra_logs() if hasattr(self.clip, "extra_logs") else {}

    def training_state(self) -> dict[str, torch.Tensor]:
        """What the adapter counts while a task is trained, for a checkpoint within the task; by name."""
        return self.clip.training_state() if hasattr(self.clip, "training_state") else {}

    def load_training_state(self, state: dict[str, torch.Tensor]) -> None:
        """Count on from what `training_state` gave."""
        if hasattr(self.clip, "load_training_state"):
            self.clip.load_training_state(state)

    def train(self, mode: bool = True) -> CLIPClassifier:
        self._clear_text_cache()
        return super().train(mode)

    def gradient_checkpointing_enable(self, *args, **kwargs) -> None:
        self.clip.gradient_checkpointing_enable(*args, **kwargs)

    def gradient_checkpointing_disable(self) -> None:
        self.clip.gradient_checkpointing_disable()

    def activation_checkpointing_enable(self, *args, **kwargs) -> None:
        self.clip.activation_checkpointing_enable(*args, **kwargs)

    def activation_checkpointing_disable(self) -> None:
        self.clip.activation_checkpointing_disable()

    def _cached_text_embeds(self) -> torch.Tensor:
        """In evaluation the prompts are encoded once; anew after new classes, `eval()`, another adapter or weights.

        Weights changed behind torch's back (through `.data`, by a fused optimizer) are seen at the next `eval()`.
        """
        adapters = [m for m in self.clip.modules() if isinstance(m, BaseTunerLayer)]
        version = (
            sum(parameter._version for parameter in self.parameters()),
            tuple((layer.disable_adapters, *layer.active_adapters) for layer in adapters),
        )
        if torch.is_grad_enabled():
            return self.encode("language")
        if self._text_cache is None or self._text_cache[0] != version:
            self._text_cache = (version, self.encode("language"))
        return self._text_cache[1]

    def _clear_text_cache(self) -> None:
        self._text_cache: tuple[tuple, torch.Tensor] | None = None


def _read_image(image: str | os.PathLike | Image.Image | np.ndarray) -> Image.Image:
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8:
            raise ValueError(f"predict: an array holds {image.dtype}, expected bytes (uint8).")
        image = Image.fromarray(image)
    return load_image(os.fspath(image) if isinstance(image, os.PathLike) else image)


def _templates(prompt_template: str | Sequence[str]) -> tuple[str, ...]:
    templates = (prompt_template,) if isinstance(prompt_template, str) else tuple(prompt_template)
    if not templates:
        raise ValueError("prompt_template is empty: expected at least one prompt.")
    for template in templates:
        if template.count("{}") != 1:
            raise ValueError(f"prompt_template={template!r}: expected one '{{}}' for the class name.")
    return templates
