"""Pretrain a small CLIP on the base classes of Tiny-ImageNet at 32x32, for use as the package's embedded model.

    python scripts/pretrain_sample.py --data DATA/tiny-imagenet-32 --mini_clip DATA/mini-clip --cifar10 DATA/cifar10 \
        --output_dir OUT/mini-clip

The incremental classes are never trained on: they stay unseen for continual learning. All images live on the device as
one uint8 tensor and are augmented there in batches, since decoding and augmenting on the host would starve a GPU.
"""

import argparse
import json
import math
import random
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from datasets import ClassLabel, Dataset, Image, load_dataset
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm.auto import tqdm
from transformers import CLIPConfig, CLIPModel, CLIPProcessor

from hf_zocl.commands import Parser, command


MAX_PARAMETERS = 6_000_000
PROCESSOR_FILES = ("processor_config.json", "tokenizer.json", "tokenizer_config.json")
EVALUATION_TEMPLATE = "a photo of a {}."
TEMPLATES = (
    "a photo of a {}.",
    "a photo of the {}.",
    "a photo of one {}.",
    "a photo of many {}.",
    "a photo of my {}.",
    "a photo of a small {}.",
    "a photo of a large {}.",
    "a photo of a nice {}.",
    "a good photo of a {}.",
    "a good photo of the {}.",
    "a bad photo of a {}.",
    "a bad photo of the {}.",
    "a blurry photo of a {}.",
    "a low resolution photo of a {}.",
    "a pixelated photo of a {}.",
    "a bright photo of a {}.",
    "a dark photo of a {}.",
    "a close-up photo of a {}.",
    "a cropped photo of a {}.",
    "a picture of a {}.",
    "an image of a {}.",
    "this is a {}.",
    "there is a {} in the photo.",
    "itap of a {}.",
    "a {}.",
    "{}",
)

CARD = """---
library_name: transformers
pipeline_tag: zero-shot-image-classification
license: apache-2.0
tags: [clip]
---
# {title}

A small real `CLIPModel`: {parameters:.1f} M parameters, {size}×{size} images, patch {patch}, {vision_layers} vision \
layers of width {vision_width} and {text_layers} text layers of width {text_width}, CLIP's own byte-pair encoding cut \
to its first 4,000 merges. The weights are stored in float16 and load as float32.

Pretrained by `scripts/pretrain_sample.py` (image against class prompts, {templates} templates, WordNet synonyms; \
crops, flips, colour jitter, cutmix, mixup, erasing; average of the weights) on the {images:,} training images of the \
{classes} base classes of Tiny-ImageNet at 32×32: {epochs:.1f} epochs of batches of {batch_size}, seed {seed}. The \
other classes of Tiny-ImageNet, and CIFAR-10, it has never seen.

Zero-shot top-1 (prompt "{prompt}"):

{table}
The training images are for research use (Stanford CS231n, from ImageNet).
"""


@dataclass
class ImageSet:
    """Images (N, 3, H, W) in uint8, their labels (N,) and the name of every label."""

    images: Tensor
    labels: Tensor
    class_names: list[str]

    def to(self, device: torch.device) -> "ImageSet":
        return ImageSet(self.images.to(device), self.labels.to(device), self.class_names)


def find_columns(dataset: Dataset) -> tuple[str, str]:
    """Return the names of the image and the label column, found by type because datasets name them differently."""
    images = [name for name, feature in dataset.features.items() if isinstance(feature, Image)]
    labels = [name for name, feature in dataset.features.items() if isinstance(feature, ClassLabel)]
    if len(images) != 1 or len(labels) != 1:
        raise ValueError(f"expected one Image and one ClassLabel column, found {dataset.features}")
    return images[0], labels[0]


def load_images(path: str, split: str, classes: list[int] | None = None, max_images: int | None = None) -> ImageSet:
    """Decode the images of `classes` (all if None) into one tensor; label k is the k-th of `classes`."""
    dataset = load_dataset(path, split=split)
    image_column, label_column = find_columns(dataset)
    names = dataset.features[label_column].names
    classes = list(range(len(names))) if classes is None else classes
    position = np.full(len(names), -1)
    position[classes] = np.arange(len(classes))
    labels = position[np.asarray(dataset[label_column][:])]
    rows = np.flatnonzero(labels >= 0)[:max_images]
    images = [np.asarray(row[image_column].convert("RGB")) for row in dataset.select(rows)]
    shapes = {image.shape for image in images}
    if len(shapes) != 1:
        raise ValueError(f"images of one size expected in {path!r} ({split}), found the shapes {sorted(shapes)}")
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    return ImageSet(pixels, torch.from_numpy(labels[rows]), [names[label] for label in classes])


class Normalizer:
    """The image processor's rescaling and normalisation on a device batch; images already have the model's size."""

    def __init__(self, processor: CLIPProcessor, device: torch.device):
        self.mean = torch.tensor(processor.image_processor.image_mean, device=device).view(3, 1, 1)
        self.std = torch.tensor(processor.image_processor.image_std, device=device).view(3, 1, 1)

    def __call__(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std


def random_crop_flip(images: Tensor) -> Tensor:
    """Crop each image at its own place, scale and aspect (padding by reflection where it leaves the image), and flip.

    One resampling does all of it, with no loop over the images.
    """
    n, device = len(images), images.device
    scale = torch.empty(n, device=device).uniform_(0.65, 1.05)
    aspect = torch.empty(n, device=device).uniform_(-0.15, 0.15).exp()
    flip = torch.randint(0, 2, (n,), device=device) * 2 - 1
    theta = torch.zeros(n, 2, 3, device=device)
    theta[:, 0, 0] = scale * aspect * flip
    theta[:, 1, 1] = scale / aspect
    theta[:, :, 2] = torch.empty(n, 2, device=device).uniform_(-0.25, 0.25)  # 4 of 32 pixels
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def colour_jitter(images: Tensor, strength: float = 0.4) -> Tensor:
    """Change brightness, contrast and saturation of each image in [0, 1] by its own factors."""
    factors = torch.empty(3, len(images), 1, 1, 1, device=images.device).uniform_(1 - strength, 1 + strength)
    images = images * factors[0]
    images = torch.lerp(images.mean((1, 2, 3), keepdim=True), images, factors[1])
    return torch.lerp(images.mean(1, keepdim=True), images, factors[2]).clamp(0, 1)


def random_boxes(images: Tensor, low: float, high: float) -> Tensor:
    """Return a mask (N, 1, H, W) with one random box per image, of `low` to `high` of its area before clipping."""
    n, _, height, width = images.shape
    draw = torch.rand(3, n, 1, 1, device=images.device)
    half = (low + (high - low) * draw[0]).sqrt() / 2
    y = (torch.arange(height, device=images.device) + 0.5).view(1, -1, 1) / height
    x = (torch.arange(width, device=images.device) + 0.5).view(1, 1, -1) / width
    return (((y - draw[1]).abs() < half) & ((x - draw[2]).abs() < half)).unsqueeze(1)


def mix(images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Apply cutmix, mixup or random erasing to the batch; `targets` (N, C) are mixed as the images are."""
    partner = torch.randperm(len(images), device=images.device)
    choice = random.random()
    if choice < 0.5:
        box = random_boxes(images, 0.0, 1.0)
        images = torch.where(box, images[partner], images)
        kept = 1 - box.float().mean((1, 2, 3))
    elif choice < 0.8:
        # Kumaraswamy(0.8, 0.8) stands in for Beta(0.8, 0.8): it needs no sampler that waits for the device.
        kept = (1 - torch.rand(len(images), device=images.device) ** 1.25) ** 1.25
        images = torch.lerp(images[partner], images, kept.view(-1, 1, 1, 1))
    else:
        return torch.where(random_boxes(images, 0.02, 0.3), torch.rand_like(images), images), targets
    return images, torch.lerp(targets[partner], targets, kept.unsqueeze(1))


class PromptTable:
    """Every prompt (template, class, synonym) tokenised once, so that a step draws its prompts on the device."""

    def __init__(self, processor: CLIPProcessor, synonyms: list[list[str]], device: torch.device):
        most = max(map(len, synonyms))
        names = [name for group in synonyms for name in group + group[:1] * (most - len(group))]
        prompts = [template.format(name) for template in TEMPLATES for name in names]
        ids = processor.tokenizer(prompts, padding=True, truncation=True, return_tensors="pt")["input_ids"]
        self.ids = ids.view(len(TEMPLATES), len(synonyms), most, -1).to(device)
        self.counts = torch.tensor([len(group) for group in synonyms], device=device)
        self.classes = torch.arange(len(synonyms), device=device)

    def draw(self) -> Tensor:
        """Return one prompt per class (C, L): a random template and, in half of the cases, a random synonym.

        The other half takes the first name, the one that prompts are made of later.
        """
        chance = torch.rand(2, len(self.counts), device=self.ids.device)
        synonym = torch.where(chance[0] < 0.5, 0, (chance[1] * self.counts).long())
        return self.ids[random.randrange(len(TEMPLATES)), self.classes, synonym]


def build_model(args: argparse.Namespace) -> CLIPModel:
    """Return a fresh CLIP that shares the mini CLIP's tokenizer and input size.

    Raises:
        ValueError: if it has more than `MAX_PARAMETERS`, the most that the package can embed.
    """
    config = CLIPConfig.from_pretrained(args.mini_clip)
    for part, width, layers in (
        (config.vision_config, args.width, args.vision_layers),
        (config.text_config, args.text_width, args.text_layers),
    ):
        part.hidden_size, part.intermediate_size = width, 4 * width
        part.num_hidden_layers, part.num_attention_heads = layers, width // 32
    model = CLIPModel(config)
    if model.num_parameters() > MAX_PARAMETERS:
        raise ValueError(
            f"the model has {model.num_parameters():,} parameters, at most {MAX_PARAMETERS:,} are allowed: "
            "choose smaller --width, --text_width, --vision_layers or --text_layers"
        )
    return model


def class_logits(model: CLIPModel, pixels: Tensor, input_ids: Tensor) -> Tensor:
    """Return scaled cosine similarities (N, C). No mask is needed: the tower is causal and stops at the first EOS."""
    images = F.normalize(model.get_image_features(pixel_values=pixels).pooler_output.float(), dim=-1)
    texts = F.normalize(model.get_text_features(input_ids=input_ids).pooler_output.float(), dim=-1)
    return model.logit_scale.exp() * images @ texts.T


def make_optimizer(model: CLIPModel, args: argparse.Namespace) -> torch.optim.AdamW:
    """AdamW that decays matrices alone: decaying norms, biases and the logit scale only hurts."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": args.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.98), fused=model.device.type == "cuda")


def learning_rate_factor(progress: float, warmup: float = 0.05) -> float:
    """Linear warm-up, then a cosine to zero; `progress` runs from 0 to 1."""
    if progress < warmup:
        return progress / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - warmup) / (1 - warmup))))


def batches(train_set: ImageSet, batch_size: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield `steps` batches of images in [0, 1] and one-hot labels, shuffled anew in every epoch."""
    per_epoch = len(train_set.labels) // batch_size
    for step in range(steps):
        if step % per_epoch == 0:
            order = torch.randperm(len(train_set.labels), device=train_set.labels.device)
        rows = order[step % per_epoch * batch_size :][:batch_size]
        targets = F.one_hot(train_set.labels[rows], len(train_set.class_names)).float()
        yield train_set.images[rows].float() / 255, targets


def train(
    model: CLIPModel, train_set: ImageSet, prompts: PromptTable, normalize: Normalizer, args: argparse.Namespace
) -> tuple[CLIPModel, float]:
    """Train `model`; return the moving average of its weights, which generalises better, and the epochs it took."""
    device = model.device
    batch_size = min(args.batch_size, len(train_set.labels))
    per_epoch = len(train_set.labels) // batch_size
    steps = args.max_steps or args.epochs * per_epoch
    optimizer = make_optimizer(model, args)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(args.ema_decay))
    logits_of = torch.compile(class_logits) if args.compile else class_logits
    start, done = time.monotonic(), 0
    bar = tqdm(batches(train_set, batch_size, steps), total=steps, desc="pretraining", unit="step", mininterval=2)
    for step, (images, targets) in enumerate(bar):
        # A time limit shortens the schedule instead of cutting it off: the rate still ends at zero.
        progress = max((step + 1) / (steps + 1), (time.monotonic() - start) / args.time_limit)
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * learning_rate_factor(progress)
        images, targets = mix(colour_jitter(random_crop_flip(images)), targets)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = logits_of(model, normalize(images), prompts.draw())
        loss = F.cross_entropy(logits, targets, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))
        average.update_parameters(model)
        done += 1
        if step % 100 == 0:
            report_loss(bar, step, loss.item(), step / per_epoch)
    return average.module, done / per_epoch


def report_loss(bar: tqdm, step: int, loss: float, epoch: float) -> None:
    """Show the loss, and stop a diverged run at once rather than at its end."""
    if not math.isfinite(loss):
        raise RuntimeError(f"the loss is {loss} at step {step}: lower --learning_rate")
    bar.set_postfix(loss=f"{loss:.3f}", epoch=f"{epoch:.1f}", refresh=False)


@torch.inference_mode()
def zero_shot_accuracy(
    model: CLIPModel, processor: CLIPProcessor, image_set: ImageSet, batch_size: int = 100
) -> float:
    """Return the top-1 accuracy in [0, 1] with the prompt `EVALUATION_TEMPLATE`, in the model's own precision."""
    model.eval()
    normalize = Normalizer(processor, model.device)
    prompts = [EVALUATION_TEMPLATE.format(name) for name in image_set.class_names]
    ids = processor.tokenizer(prompts, padding=True, truncation=True, return_tensors="pt")["input_ids"]
    texts = F.normalize(model.get_text_features(input_ids=ids.to(model.device)).pooler_output, dim=-1)
    correct = 0
    for images, labels in zip(image_set.images.split(batch_size), image_set.labels.split(batch_size), strict=True):
        pixels = normalize(images.to(model.device).float() / 255)
        features = model.get_image_features(pixel_values=pixels).pooler_output
        correct += (features @ texts.T).argmax(-1).cpu().eq(labels.cpu()).sum().item()
    return correct / len(image_set.labels)


def compare(models: dict[str, CLIPModel], processor: CLIPProcessor, image_sets: dict[str, ImageSet]) -> str:
    """Return a Markdown table with the zero-shot accuracy of every model on every image set."""
    rows = [["images", "chance", *models], ["---"] * (len(models) + 2)]
    for name, image_set in image_sets.items():
        figures = [zero_shot_accuracy(model, processor, image_set) for model in models.values()]
        chance = 1 / len(image_set.class_names)
        rows.append([f"{name} ({len(image_set.labels):,})", *(f"{100 * value:.1f}%" for value in (chance, *figures))])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


@contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """Give an empty folder beside `target` that replaces it on success and vanishes on failure.

    A reader thus finds the old folder or the new one, never half of one.
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
    """Save float16 weights under a config that says float32: half the size, and a plain `from_pretrained` trains."""
    half = {name: value.detach().cpu().half().contiguous() for name, value in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=half)
    for name in PROCESSOR_FILES:
        shutil.copy(processor_from / name, folder / name)
    for file in folder.iterdir():
        file.chmod(0o644)  # the source may be read-only, and safetensors writes for the owner alone


def write_card(folder: Path, model: CLIPModel, title: str, table: str, **facts: object) -> None:
    """Write the model card, its figures taken from the model and the run."""
    vision, text = model.config.vision_config, model.config.text_config
    card = CARD.format(
        title=title,
        parameters=model.num_parameters() / 1e6,
        size=vision.image_size,
        patch=vision.patch_size,
        vision_layers=vision.num_hidden_layers,
        vision_width=vision.hidden_size,
        text_layers=text.num_hidden_layers,
        text_width=text.hidden_size,
        templates=len(TEMPLATES),
        prompt=EVALUATION_TEMPLATE,
        table=table,
        **facts,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def parse_args() -> argparse.Namespace:
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--data", type=Path, required=True, help="tiny-imagenet-32: a dataset folder with class_order.json")
    add("--mini_clip", type=Path, required=True, help="the model that gives tokenizer, processor and the comparison")
    add("--cifar10", type=Path, required=True, help="a CIFAR-10 dataset folder, for measuring zero-shot accuracy")
    add("--output_dir", type=Path, required=True, help="the new model's folder; must not exist")
    add("--epochs", type=int, default=300)
    add("--batch_size", type=int, default=512)
    add("--learning_rate", type=float, default=1e-3)
    add("--weight_decay", type=float, default=0.05)
    add("--ema_decay", type=float, default=0.999, help="decay per step of the weights' moving average")
    add("--width", type=int, default=192, help="width of the vision tower, a multiple of 32")
    add("--vision_layers", type=int, default=10)
    add("--text_width", type=int, default=128, help="width of the text tower, a multiple of 32")
    add("--text_layers", type=int, default=4)
    add("--device", default="auto", help="auto takes a GPU where there is one")
    add("--seed", type=int, default=0)
    add("--compile", action="store_true", help="torch.compile the forward pass")
    add("--time_limit", type=float, default=math.inf, help="seconds of training; the schedule is shortened to fit")
    add("--max_steps", type=int, help="steps instead of epochs, for a smoke run")
    add("--max_images", type=int, help="the most images to take of each split, for a smoke run")
    args = parser.parse_args()
    for name in ("width", "text_width"):
        if getattr(args, name) % 32:
            parser.error(f"--{name} must be a multiple of 32, got {getattr(args, name)}")
    if args.output_dir.exists():
        parser.error(f"--output_dir {args.output_dir} exists already")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    return args


@command
def main() -> None:
    args = parse_args()
    random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    device = torch.device(args.device)
    order = json.loads((args.data / "class_order.json").read_text(encoding="utf-8"))
    processor = CLIPProcessor.from_pretrained(args.mini_clip)
    model = build_model(args).to(device)

    data, limit = str(args.data), args.max_images
    train_set = load_images(data, "train", order["base"], limit).to(device)
    prompts = PromptTable(processor, [order["synonyms"][label] for label in order["base"]], device)
    print(f"{model.num_parameters():,} parameters, {len(train_set.labels):,} training images, on {device}")
    average, epochs = train(model, train_set, prompts, Normalizer(processor, device), args)

    image_sets = {
        "CIFAR-10 test": load_images(str(args.cifar10), "test", max_images=limit),
        "base classes, validation": load_images(data, "valid", order["base"], limit),
        "unseen classes, validation": load_images(data, "valid", order["incremental"], limit),
    }
    models = {"new": average, "mini CLIP before": CLIPModel.from_pretrained(args.mini_clip).to(device)}
    table = compare(models, processor, image_sets)
    print(table)
    with staged_folder(args.output_dir) as folder:
        save_float16(average, args.mini_clip, folder)
        facts = {"images": len(train_set.labels), "classes": len(order["base"]), "epochs": epochs}
        facts |= {"batch_size": args.batch_size, "seed": args.seed}
        write_card(folder, average, args.output_dir.name, table, **facts)
    print(f"wrote {args.output_dir}")


if __name__ == "__main__":
    main()
