"""How far the rate that `zo_learning_rate: auto` chooses is from the best: two settings on four jobs.

    python scripts/studies/rates.py --cifar10 path/to/cifar10 --tiny_imagenet path/to/tiny-imagenet-32

The jobs: CIFAR-10 in five tasks and 80 classes of Tiny-ImageNet in four (100 and 75 training images per class that the
embedded model has not seen), MiniLM on definitions (examples/data), and a causal language model that has read half of
them and goes on to the other half. The settings: `preset: all-zo` (on the last two jobs, all layer norms and MiniLM's
head, with 16 queries), and every second layer zeroth-order, the others first-order. A column is `auto` times a factor;
a cell is the accuracy in percent: Avg and Last of a stream, of the texts, of the next byte. No test image or text is
read: every fourth training example is held out. Results are kept, so the command can be stopped and repeated.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import yaml
from datasets import load_dataset
from defaults import Job, language_job, make_trainer, text_job
from tqdm.auto import tqdm
from transformers import set_seed

from hf_zocl.commands import Parser, command
from hf_zocl.commands.library import preset_file
from hf_zocl.commands.recipe import build_scheduler, parse_recipe
from hf_zocl.files import read_json, write_json
from hf_zocl.sample.pretraining import pretraining_rows
from hf_zocl.zo import rates


sys.path.append(str(Path(__file__).resolve().parents[1] / "tools"))
from choose_quickstart import write_held_out


SETTINGS = ("all-zo", "hop-even")
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
STEPS = 60  # steps of a training on texts, as in the examples
QUERIES = 16  # queries of these trainings, whose passes cost more than those of CLIP's prompts
CLASSES = 80
# The preset's arguments that apply to CLIP alone.
OF_CLIP = ("adapter", "adapter_config", "frozen_parameters", "zo_branch")


@contextmanager
def times(factor: float) -> Iterator[None]:
    """Make `auto` choose `factor` times the rate that it would."""
    names = ("PART", "CAREFUL_PART", "MAX_MOVE")
    with patch.multiple(rates, **{name: factor * getattr(rates, name) for name in names}):
        yield


def hold_out(
    dataset: str, folder: Path, images: int, exclude: Callable[[np.ndarray], np.ndarray] | None = None
) -> Path:
    """Write the first training images of every class, every fourth as a test image, and return the folder.

    `exclude` gets all labels, and returns the rows to leave out.
    """
    rows = load_dataset(dataset, split="train")
    if exclude is not None:
        (label,) = [name for name, feature in rows.features.items() if hasattr(feature, "names")]
        rows = rows.select(np.setdiff1d(np.arange(len(rows)), exclude(np.array(rows[label]))))
    folder.mkdir(parents=True)
    write_held_out(rows, folder, images)
    return folder


def stream(setting: str, seed: int, arguments: list[str]) -> list[float]:
    chosen = ["--preset", "all-zo", "--adapter", "ln_tuning"]
    if setting == "hop-even":
        chosen = ["--zo_branch", "dual", "--zo_layers", "hop-even", "--zo_learning_rate", "auto"]
    with tempfile.TemporaryDirectory() as folder:
        own = ["--seed", str(seed), "--output_dir", f"{folder}/run", "--save_strategy", "no", "--disable_tqdm", "true"]
        results = build_scheduler(parse_recipe([*arguments, *chosen, *own])).run()
    return [results["avg"], results["last"]]


def texts(setting: str, seed: int, job: Job, first_order_rate: float) -> list[float]:
    """The accuracy on the held-out texts after training: of their classes, or of the next byte."""
    set_seed(seed)
    model = copy.deepcopy(job.model)
    options: dict[str, Any] = {"zo_layers": "hop-even", "learning_rate": first_order_rate}
    if setting == "all-zo":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(any(part in name for part in ("LayerNorm", "ln_", "classifier")))
        preset = yaml.safe_load(preset_file("all-zo").read_text(encoding="utf-8"))
        options = {name: value for name, value in preset.items() if name not in OF_CLIP} | {"zo_queries": QUERIES}
    trainer = make_trainer(replace(job, model=model), max_steps=STEPS, seed=seed, warmup_steps=0.1, **options)
    trainer.train()
    output = trainer.predict(job.held_out)
    logits, labels = output.predictions, output.label_ids
    if logits.ndim == 3:
        logits, labels = logits[:, :-1], labels[:, 1:]
    counted = labels >= 0
    return [float((logits.argmax(-1) == labels)[counted].mean())]


@command
def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar10", required=True, help="Hub id or folder")
    parser.add_argument("--tiny_imagenet", required=True, help="Hub id or folder, at 32×32")
    parser.add_argument("--jobs", nargs="+", help="only these jobs")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=SETTINGS)
    parser.add_argument("--factors", type=float, nargs="+", default=FACTORS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--output", type=Path, default=Path("runs/rates"), help="folder of the cells and the table")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / "cells.json"
    cells: dict[str, list[float]] = read_json(file) if file.is_file() else {}
    with tempfile.TemporaryDirectory() as folder:
        jobs = build_jobs(options.cifar10, options.tiny_imagenet, Path(folder))
        wanted = [
            (setting, name, factor, seed)
            for seed in options.seeds
            for name in options.jobs or jobs
            for setting in options.settings
            for factor in options.factors
        ]
        for setting, name, factor, seed in tqdm(wanted, desc="trainings"):
            key = f"{setting} | {name} | {factor:g} | {seed}"
            if key not in cells:
                measure, *arguments = jobs[name]
                with times(factor):
                    cells[key] = measure(setting, seed, *arguments)
                write_json(file, cells)
    print(table := "\n".join(lines(cells)))
    (options.output / "table.md").write_text(table + "\n", encoding="utf-8")


def build_jobs(cifar10: str, tiny_imagenet: str, folder: Path) -> dict[str, tuple]:
    small = hold_out(cifar10, folder / "cifar10", images=400)
    many = hold_out(tiny_imagenet, folder / "tiny-imagenet", images=100, exclude=pretraining_rows)
    order = np.random.RandomState(1993).permutation(200)[:CLASSES]
    images = ["--max_train_images_per_class", "100", "--max_test_images_per_class", "100"]
    tiny = "--recipe tiny_imagenet_32 --benchmark none --increment 20 --partial_order true".split()
    return {
        "CIFAR-10": (stream, ["--recipe", "cifar10", "--dataset_path", str(small), *images]),
        "Tiny-ImageNet": (
            stream,
            [*tiny, "--dataset_path", str(many), "--class_order", *map(str, order)],
        ),
        "MiniLM": (texts, text_job(STEPS), 5e-4),
        "causal LM": (texts, language_job(STEPS), 2e-3),
    }


def lines(cells: dict[str, list[float]]) -> Iterator[str]:
    """The lines of the table: every cell's mean over the seeds, the best of a row in bold."""
    measured: dict[tuple[str, str], dict[float, list[list[float]]]] = {}
    for key, values in cells.items():
        setting, name, factor, _ = key.split(" | ")
        measured.setdefault((name, setting), {}).setdefault(float(factor), []).append(values)
    factors = sorted({factor for of_factor in measured.values() for factor in of_factor})
    yield "| job | setting | figure | " + " | ".join(f"× {factor:g}" for factor in factors) + " |"
    yield "|---" * (3 + len(factors)) + "|"
    for (name, setting), of_factor in measured.items():
        means = {factor: 100 * np.mean(values, axis=0) for factor, values in of_factor.items()}
        figures = ("Avg", "Last") if len(next(iter(means.values()))) == 2 else ("accuracy",)
        for number, figure in enumerate(figures):
            best = max(mean[number] for mean in means.values())
            row = [as_cell(means[factor][number], best) if factor in means else "" for factor in factors]
            yield f"| {name} | {setting} | {figure} | " + " | ".join(row) + " |"


def as_cell(value: float, best: float) -> str:
    return f"**{value:.1f}**" if value == best else f"{value:.1f}"


if __name__ == "__main__":
    main()
