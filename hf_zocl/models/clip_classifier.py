"""A CLIP model and a list of class prompts, as an image classifier."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from torch import nn
from transformers import BaseImageProcessor, BatchEncoding, CLIPModel, PreTrainedTokenizerBase
from transformers.utils import ModelOutput

from ..checks import check_count, check_texts, check_type, check_writable, shown
from ..passes.task_aware import TaskAware, task_aware
from ..private_names import version
from .moe_adapter import collect_balance_losses
from .pixels import read_image


PROMPTS_AT_ONCE = 1024  # that go through the text tower at once when images are predicted
# One lock for all classifiers: a lock in a module could be neither copied nor pickled with it.
_CLASSES = threading.RLock()

Images = str | os.PathLike | Image.Image | np.ndarray | torch.Tensor | Sequence[Any]


@dataclass
class CLIPClassifierOutput(ModelOutput):
    """
    Attributes:
        loss: Cross-entropy over the current classes, scalar; None without labels. In training mode it includes the
            adapters' load-balancing loss, if they have one.
        logits: Scaled cosine similarities, float32 or wider, `(batch, classes)`.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None


class CLIPClassifier(TaskAware, nn.Module):
    """Classifies an image by the cosine similarity of its feature with the text features of the class prompts.

    Args:
        clip: A `CLIPModel`, or one wrapped by PEFT.
        tokenizer: The model's tokenizer.
        class_names: The classes, in the order of their labels; `set_classes` changes them.
        prompt_template: A prompt with one `{}` for the class name; or several, whose features of unit length are
            averaged, class by class (prompt ensembling; Radford et al., CLIP, 2021, section 3.1.4).

    Raises:
        TypeError: If the class names are not a list of texts.
        ValueError: If there is no class, two have the same prompt, or a template does not have exactly one `{}`.
    """

    image_processor: BaseImageProcessor | None = None  # with which `predict` makes pixel values
    reloads_frozen_weights = True

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
        """Buffers that `DistributedDataParallel` need not send: prompts and positions are the same everywhere."""
        return {name for name, _ in self.named_buffers()}

    @property
    def couples_towers(self) -> bool:
        return self.has_balance_loss

    @property
    def has_balance_loss(self) -> bool:
        """True if an adapter adds a load-balancing loss in training."""
        configs = getattr(self.clip, "peft_config", {}).values()
        return any(getattr(config, "balance_loss", 0) > 0 for config in configs)

    def set_classes(self, class_names: Sequence[str], prompt_template: str | Sequence[str] | None = None) -> None:
        """Set the classes; their prompts are padded to the longest of them, not to the context length.

        Args:
            class_names: The classes, in the order of their labels.
            prompt_template: Their prompt or prompts, until the next call; default: the classifier's own.

        Raises:
            TypeError, ValueError: As for the class; the classes then stay as they were.
        """
        templates = self._templates(prompt_template)
        tokens = self._tokens(class_names, templates)
        device = self.clip.logit_scale.device
        with _CLASSES:
            self.class_names, self.prompts_per_class = tuple(class_names), len(templates)
            self.register_buffer("input_ids", tokens["input_ids"].to(device), persistent=False)
            self.register_buffer("attention_mask", tokens["attention_mask"].to(device), persistent=False)
            self._clear_text_cache()

    def check_classes(self, class_names: Sequence[str], prompt_template: str | Sequence[str] | None = None) -> None:
        """Raise what `set_classes` would raise, and set nothing."""
        self._tokens(class_names, self._templates(prompt_template))

    def _templates(self, prompt_template: str | Sequence[str] | None) -> tuple[str, ...]:
        return check_templates(self.prompt_template if prompt_template is None else prompt_template)

    def _tokens(self, class_names: Sequence[str], templates: Sequence[str]) -> BatchEncoding:
        """The prompts' tokens, class by class; checked to differ between classes."""
        check_texts("class_names", class_names)
        if not len(class_names):
            raise ValueError("class_names is empty: expected at least one class.")
        length = self.clip.config.text_config.max_position_embeddings
        tokens = prompt_tokens(self.tokenizer, class_names, templates, length)
        greatest, known = int(tokens["input_ids"].max()), self.clip.config.text_config.vocab_size
        if greatest >= known:
            raise ValueError(
                f"the tokenizer ({type(self.tokenizer).__name__}) is another model's: it gives token {greatest}, and "
                f"the model has {known} tokens, counted from 0."
            )
        for first, second, template in same_prompts(tokens, len(class_names), templates)[:1]:
            names = class_names[first], class_names[second]
            prompts = [template.replace("{}", name) for name in names]
            cut = max(len(self.tokenizer(prompt, verbose=False)["input_ids"]) for prompt in prompts) > length
            why = (
                f"they differ only beyond the {length} tokens that the model reads"
                if cut
                else "its tokenizer does not tell them apart (letters' case, spaces, Unicode forms)"
            )
            raise ValueError(
                f"class_names: the classes {shown(names[0])} and {shown(names[1])} (numbers {first} and {second}) "
                f"have the same prompt for the model, {shown(prompts[0])}: {why}; expected names that it tells apart."
            )
        return tokens

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
        if tower == "language":
            return self._text_features(self.input_ids, self.attention_mask)
        return F.normalize(self.clip.get_image_features(pixel_values=pixel_values).pooler_output, dim=-1)

    def _text_features(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        outputs = self.clip.get_text_features(input_ids=input_ids, attention_mask=attention_mask)
        features = F.normalize(outputs.pooler_output, dim=-1)
        if self.prompts_per_class > 1:
            ensemble = features.unflatten(0, (-1, self.prompts_per_class)).mean(dim=1)
            features = F.normalize(ensemble, dim=-1)
        return features

    def logits(self, image_embeds: torch.Tensor, text_embeds: torch.Tensor) -> torch.Tensor:
        """Scaled cosine similarities, in at least float32, because a difference of two losses needs it.

        Args:
            image_embeds, text_embeds: Features of unit length, `(batch, dim)` and `(classes, dim)`.
        """
        dtype = torch.promote_types(image_embeds.dtype, torch.float32)
        with torch.autocast(image_embeds.device.type, enabled=False):
            similarity = image_embeds.to(dtype) @ text_embeds.to(dtype).T
            return similarity * self.clip.logit_scale.to(dtype).exp()

    @torch.no_grad()
    def predict(self, images: Images, batch_size: int = 64) -> tuple[list[str], torch.Tensor]:
        """Predict the classes of images: `names, probabilities = model.predict(["cat.png", "dog.png"])`.

        Args:
            images: One image or several: files, URLs, PIL images, or arrays of bytes `(height, width, channels)`; or
                an image processor's output, `(batch, channels, height, width)`.
            batch_size: Images that go through the model at once.

        Returns:
            The class name of every image, and the probabilities of all classes, `(images, classes)`.

        The prompts are encoded once, and again after new classes, another adapter or other weights. (After a change
        that torch does not see, call `eval()`.) Several threads may predict at once.

        Raises:
            TypeError: If `batch_size` is not a whole number.
            ValueError: If `batch_size` is less than 1; if the images need an `image_processor` and the classifier has
                none (`load_task_checkpoint` sets it); or if an image cannot be read, see `read_image`.
        """
        check_count("batch_size", batch_size)
        if self.training:
            self.eval()
        if not isinstance(images, torch.Tensor):
            is_one = isinstance(images, (str, os.PathLike, Image.Image)) or getattr(images, "ndim", 4) < 4
            images = [images] if is_one else list(images)
        with _CLASSES:  # another thread may be setting other classes
            names, text_embeds = self.class_names, self._cached_text_embeds()
        probabilities = [
            self.logits(self.encode("vision", self._pixel_values(images[start : start + batch_size])), text_embeds)
            for start in range(0, len(images), batch_size)
        ]
        if not probabilities:
            return [], torch.empty(0, len(names))
        probabilities = torch.cat(probabilities).softmax(dim=-1)
        return [names[i] for i in probabilities.argmax(dim=-1).tolist()], probabilities

    def _pixel_values(self, images: torch.Tensor | list[Any]) -> torch.Tensor:
        if not isinstance(images, torch.Tensor):
            if self.image_processor is None:
                raise ValueError("predict: set image_processor (processor.image_processor), or give pixel values.")
            try:
                images = [read_image(image) for image in images]
            except ValueError as error:
                raise ValueError(f"predict: {error}") from error
            images = self.image_processor(images, return_tensors="pt").pixel_values
        return images.to(self.clip.logit_scale.device)

    def begin_task(self, task: int) -> None:
        task_aware(self.clip).begin_task(task)
        self._clear_text_cache()

    def end_task(self, task: int) -> None:
        task_aware(self.clip).end_task(task)

    def extra_logs(self) -> dict[str, float]:
        return task_aware(self.clip).extra_logs()

    def training_state(self) -> dict[str, torch.Tensor]:
        return task_aware(self.clip).training_state()

    def load_training_state(self, state: dict[str, torch.Tensor]) -> None:
        task_aware(self.clip).load_training_state(state)

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
        """The text features, encoded once in evaluation, and again after new classes, `eval()`, another adapter or
        other weights.

        Changes that torch does not see (through `.data`, by a fused optimizer) take effect at the next `eval()`.
        """
        if torch.is_grad_enabled():
            return self.encode("language")
        with _CLASSES:
            version, cached = self._weights_version(), self._text_cache
            if cached is None or cached[0] != version:
                cached = self._text_cache = (version, self._encode_prompts())
        return cached[1]

    def _weights_version(self) -> tuple:
        """A value that changes whenever the text features may: weights, or an adapter switched, merged or scaled."""
        adapters = [m for m in self.clip.modules() if isinstance(m, BaseTunerLayer)]
        tensors = [*self.clip.parameters(), *self.clip.buffers()]
        return (
            sum(map(version, tensors)),
            hash(tuple(tensor.data_ptr() for tensor in tensors)),
            tuple((layer.disable_adapters, *layer.active_adapters, *layer.merged_adapters) for layer in adapters),
            tuple(scale for layer in adapters for scale in getattr(layer, "scaling", {}).items()),
        )

    def _encode_prompts(self) -> torch.Tensor:
        """The text features without a gradient, some prompts at a time: memory does not grow with their number."""
        size = max(1, PROMPTS_AT_ONCE // self.prompts_per_class)
        if len(self.class_names) <= size:
            return self.encode("language")
        rows = size * self.prompts_per_class
        parts = zip(self.input_ids.split(rows), self.attention_mask.split(rows), strict=True)
        return torch.cat([self._text_features(ids, mask) for ids, mask in parts])

    def _clear_text_cache(self) -> None:
        self._text_cache: tuple[tuple, torch.Tensor] | None = None


def check_templates(prompt_template: str | Sequence[str]) -> tuple[str, ...]:
    """The prompt or prompts as a tuple.

    Raises:
        TypeError: If one is not a text.
        ValueError: If there is none, or one does not have exactly one `{}`, or has another brace.
    """
    templates = (prompt_template,) if isinstance(prompt_template, str) else tuple(prompt_template)
    if not templates:
        raise ValueError("prompt_template is empty: expected at least one prompt.")
    for template in templates:
        check_type("prompt_template", template, str, "text")
        check_writable("prompt_template", template)
        if template.count("{}") != 1 or {"{", "}"} & set(template.replace("{}", "")):
            raise ValueError(
                f"prompt_template={template!r}: expected one '{{}}', for the class name, and no other brace."
            )
    return templates


def prompt_tokens(
    tokenizer: PreTrainedTokenizerBase, class_names: Sequence[str], templates: Sequence[str], length: int
) -> BatchEncoding:
    """The tokens of all prompts, class by class, cut off at `length` and padded to the longest; tensors."""
    prompts = [template.replace("{}", name) for name in class_names for template in templates]
    return tokenizer(prompts, padding=True, truncation=True, max_length=length, return_tensors="pt")


def same_prompts(tokens: BatchEncoding, classes: int, templates: Sequence[str]) -> list[tuple[int, int, str]]:
    """Pairs of classes that a prompt cannot tell apart: both numbers, and the prompt's template."""
    found = []
    by_template = tokens["input_ids"].unflatten(0, (classes, len(templates))).numpy()
    for place, template in enumerate(templates):
        first: dict[bytes, int] = {}
        for number, row in enumerate(by_template[:, place]):
            if (earlier := first.setdefault(row.tobytes(), number)) != number:
                found.append((earlier, number, template))
    return found


def in_training_dtype(model: nn.Module, dtype: str) -> nn.Module:
    """The model in the dtype it is trained in: `dtype`, but float32 if `auto` found half precision.

    Half precision rounds away what small steps do to weights, and is many times slower on a CPU; bf16 autocast over
    float32 weights has neither fault.
    """
    is_half = any(p.dtype.itemsize < 4 for p in model.parameters() if p.dtype.is_floating_point)
    return model.float() if dtype == "auto" and is_half else model
