"""The small CLIP itself: how it is built, measured and saved."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from images import ImageSet, Normalizer
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPProcessor


MAX_PARAMETERS = 6_000_000
PROCESSOR_FILES = ("processor_config.json", "tokenizer.json", "tokenizer_config.json")
EVALUATION_TEMPLATE = "a photo of a {}."
PROJECTION = 256


def build_model(processor_from: Path, width: int, layers: int, text_width: int, text_layers: int) -> CLIPModel:
    """Return a fresh CLIP for the tokenizer and the input size of the model in `processor_from`.

    Raises:
        ValueError: if it has more than `MAX_PARAMETERS` parameters, the most that the package can embed.
    """
    config = CLIPConfig.from_pretrained(processor_from)
    for part, part_width, count in (
        (config.vision_config, width, layers),
        (config.text_config, text_width, text_layers),
    ):
        part.hidden_size, part.intermediate_size, part.projection_dim = part_width, 4 * part_width, PROJECTION
        part.num_hidden_layers, part.num_attention_heads = count, part_width // 32
    config.projection_dim = PROJECTION
    model = CLIPModel(config)
    if model.num_parameters() > MAX_PARAMETERS:
        raise ValueError(
            f"the model has {model.num_parameters():,} parameters, at most {MAX_PARAMETERS:,} are allowed"
        )
    return model


def image_features(model: CLIPModel, pixels: Tensor, drop: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return normalised image features (N, d) and the pooled states before the projection (N, width).

    Args:
        model: The CLIP.
        pixels: Normalised images (N, 3, H, W).
        drop: The share of each image's tokens that is left out, at random (FLIP, arXiv 2212.00794).
    """
    tower = model.vision_model
    states = tower.embeddings(pixels)
    if drop:
        count = states.shape[1] - 1
        kept = torch.rand(len(states), count, device=states.device).topk(round(count * (1 - drop)), -1).indices + 1
        kept = kept.unsqueeze(-1).expand(-1, -1, states.shape[-1])
        states = torch.cat([states[:, :1], states.gather(1, kept)], 1)
    states = tower.encoder(inputs_embeds=tower.pre_layrnorm(states)).last_hidden_state
    pooled = tower.post_layernorm(states[:, 0])
    return F.normalize(model.visual_projection(pooled).float(), dim=-1), pooled


def text_features(model: CLIPModel, processor: CLIPProcessor, texts: list[str]) -> Tensor:
    """Return normalised text features (N, d). No mask is needed: the tower is causal and stops at the first EOS."""
    ids = processor.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")["input_ids"]
    return F.normalize(model.get_text_features(input_ids=ids.to(model.device)).pooler_output.float(), dim=-1)


@torch.inference_mode()
def all_image_features(model: CLIPModel, processor: CLIPProcessor, images: Tensor, batch_size: int = 250) -> Tensor:
    """Return the normalised features of uint8 images, in the model's own precision."""
    model.eval()
    normalize = Normalizer(processor, model.device)
    batches = [normalize(batch.to(model.device).float() / 255) for batch in images.split(batch_size)]
    return torch.cat([image_features(model, batch)[0] for batch in batches])


@torch.inference_mode()
def zero_shot_by_class(model: CLIPModel, processor: CLIPProcessor, image_set: ImageSet) -> Tensor:
    """Return each class's top-1 accuracy in [0, 1] with the prompt `EVALUATION_TEMPLATE`."""
    features = all_image_features(model, processor, image_set.images)
    prompts = [EVALUATION_TEMPLATE.format(name) for name in image_set.class_names]
    right = (features @ text_features(model, processor, prompts).T).argmax(-1).cpu() == image_set.labels.cpu()
    count = torch.bincount(image_set.labels.cpu(), minlength=len(prompts))
    return torch.bincount(image_set.labels.cpu(), right.float(), minlength=len(prompts)) / count.clamp(min=1)


def zero_shot_accuracy(model: CLIPModel, processor: CLIPProcessor, image_set: ImageSet) -> float:
    """Return the top-1 accuracy in [0, 1] over all images."""
    count = torch.bincount(image_set.labels.cpu(), minlength=len(image_set.class_names))
    return float((zero_shot_by_class(model, processor, image_set) * count).sum() / count.sum())


def linear_probe(model: CLIPModel, processor: CLIPProcessor, train: ImageSet, test: ImageSet) -> float:
    """Return the accuracy on `test` of a ridge regression on `train`'s features, with a strength chosen on `train`."""
    x = all_image_features(model, processor, train.images).double()
    y = F.one_hot(train.labels.to(model.device), len(train.class_names)).double()
    x = torch.cat([x, torch.ones_like(x[:, :1])], 1)

    def solve(rows: slice, strength: float) -> Tensor:
        gram = x[rows].T @ x[rows] + strength * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        return torch.linalg.solve(gram, x[rows].T @ y[rows])

    part = len(x) * 4 // 5
    held_out, labels = x[part:], y[part:].argmax(-1)

    def accuracy(strength: float) -> float:
        return float(((held_out @ solve(slice(part), strength)).argmax(-1) == labels).double().mean())

    best = max((10.0**power for power in range(-4, 3)), key=accuracy)
    features = all_image_features(model, processor, test.images).double()
    features = torch.cat([features, torch.ones_like(features[:, :1])], 1)
    guesses = (features @ solve(slice(len(x)), best)).argmax(-1).cpu()
    return float((guesses == test.labels.cpu()).double().mean())


@contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """Give an empty folder next to `target` that replaces it on success and is removed on failure.

    A reader thus finds either the old folder or the new one, never half of one.
    """
    staged, old = (target.with_name(f".{target.name}.{suffix}") for suffix in ("new", "old"))
    for leftover in (staged, old):
        shutil.rmtree(leftover, ignore_errors=True)
    staged.mkdir(parents=True)
    try:
        yield staged
        if target.exists():
            target.rename(old)
        staged.rename(target)
    finally:
        for leftover in (staged, old):
            shutil.rmtree(leftover, ignore_errors=True)


def save_float16(model: CLIPModel, processor_from: Path, folder: Path) -> None:
    """Save float16 weights with a float32 config: half the size, and `from_pretrained` loads float32 to train."""
    half = {name: value.detach().cpu().half().contiguous() for name, value in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=half)
    for name in PROCESSOR_FILES:
        shutil.copy(processor_from / name, folder / name)
    for file in folder.iterdir():
        file.chmod(0o644)  # the source may be read-only, and safetensors writes for the owner alone


def moving_average(decay: float) -> Callable[[list[Tensor], list[Tensor], Tensor], None]:
    """Return an exponential moving average for `AveragedModel` that forgets the first steps faster."""

    @torch.no_grad()
    def update(average: list[Tensor], present: list[Tensor], steps: Tensor) -> None:
        torch._foreach_lerp_(average, present, 1 - min(decay, (1 + int(steps)) / (10 + int(steps))))

    return update


class Bridge(nn.Module):
    """The maps that training needs besides the CLIP: from MiniLM's space, and to the teacher's space."""

    def __init__(self, projection: int, width: int, word_width: int, teacher_width: int):
        super().__init__()
        self.words = nn.Linear(word_width, projection, bias=False)
        nn.init.orthogonal_(self.words.weight)
        self.teacher = nn.Linear(width, teacher_width)


@torch.no_grad()
def fit_linear(layer: nn.Linear, inputs: Tensor, targets: Tensor) -> None:
    """Set a layer's weight, and bias if it has one, to the least squares fit of `targets` (N, out) by `inputs`."""
    if layer.bias is not None:
        inputs = torch.cat([inputs, torch.ones_like(inputs[:, :1])], 1)
    found = torch.linalg.lstsq(inputs, targets).solution.T
    layer.weight.copy_(found[:, : layer.in_features])
    if layer.bias is not None:
        layer.bias.copy_(found[:, -1])
