"""The zeroth-order engine's benchmark: time, arithmetic and memory of one training step (run by peers.py)."""

from __future__ import annotations

import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from engine_report import format_bars, format_rows, format_sweep, write
from engine_rows import BARS, GPU_BARS, PRESET, SHAPES, SWEEP, Row, Setting, choose_rows
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import AutoTokenizer, CLIPConfig, CLIPModel, Trainer, TrainerCallback, TrainingArguments

from hf_zocl import ZOCLTrainer, ZOCLTrainingArguments
from hf_zocl.commands import command, require
from hf_zocl.models import AdapterArguments, CLIPClassifier, add_adapter
from hf_zocl.passes import ForwardState, PlainEvaluation, TowerEvaluation, TowerPlan
from hf_zocl.sample import sample_path
from hf_zocl.zo import LayerAssignment, ZOEstimator, build_zo_optimizer


def run_engine_benchmark(setting: Setting, which: str, output: Path | None) -> None:
    """Time the rows in turn, round by round; then arithmetic and memory, each row in a separate process."""
    bars = BARS if setting.device == "cpu" else BARS + GPU_BARS
    rows = choose_rows(which, bars)
    seconds = time_rows(rows, setting)
    compared = {name for _, *names, figure, _ in bars for name in names if figure.endswith("bytes")}
    for row in tqdm(rows, desc="memory"):
        row.figures.update(seconds[row.name], images_per_second=setting.batch / seconds[row.name]["seconds"])
        if which in ("all", "pays") or row.name in compared or row.kind == "inference":
            row.figures.update(measure_apart(row, setting))
    by_name = {row.name: row for row in rows}
    count_passes(rows)
    sweep = time_rows(SWEEP, replace(setting, batch=max(1, setting.batch // 8))) if which == "all" else {}
    print(format_rows(rows, setting))
    print("\n" + format_bars(bars, by_name))
    if sweep:
        print("\n" + format_sweep(sweep))
    if output is not None:
        write(output, setting, rows, sweep)


def count_passes(rows: list[Row]) -> None:
    """Give each row's arithmetic in passes of its adapter's inference row or, without one, of the first such row."""
    inference = {row.adapter: row.figures["flops"] for row in rows if row.kind == "inference"}
    for row in rows:
        if "flops" in row.figures:
            one = inference.get(row.adapter) or next(iter(inference.values()))
            row.figures["passes"] = row.figures["flops"] / one


# Models and steps.


def build_model(
    setting: Setting, adapter: str, classes: int, frozen: str | None, saved: tuple[str, ...], int8: bool
) -> CLIPClassifier:
    """A CLIP with random weights and an adapter that is not zero."""
    vision, text = (dict(shape) for shape in SHAPES[setting.shape])
    tokenizer = AutoTokenizer.from_pretrained(sample_path("mini-clip"))
    layers, heads, width = vision.pop("layers"), vision.pop("heads"), text["hidden_size"]
    config = CLIPConfig(
        vision_config={
            **vision, "image_size": 224, "num_hidden_layers": layers, "num_attention_heads": heads,
            "intermediate_size": 4 * vision["hidden_size"], "projection_dim": width,
        },
        text_config={
            "hidden_size": width, "num_hidden_layers": 12, "num_attention_heads": text["heads"],
            "intermediate_size": 4 * width, "projection_dim": width, "eos_token_id": tokenizer.eos_token_id,
        },
        projection_dim=width,
    )  # fmt: skip
    torch.manual_seed(0)
    clip = CLIPModel(config)
    if int8:
        quantise(clip)
    more: dict[str, Any] = {"adapter_config": {"modules_to_save": list(saved)}} if saved else {}
    if adapter == PRESET["adapter"]:
        more = {"adapter_config": PRESET["adapter_config"]}
    frozen_parameters = [frozen] if frozen else None
    clip = add_adapter(clip, AdapterArguments(adapter=adapter, frozen_parameters=frozen_parameters, **more))
    for parameter in clip.parameters():
        if parameter.requires_grad and parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.02)
    names = [f"{colour} {thing}" for thing in THINGS for colour in COLOURS][:classes]
    return CLIPClassifier(clip, tokenizer, names).to(setting.device)


def quantise(model: nn.Module) -> None:
    """Make the base's linear layers int8, by torchao; adapters stay as they are."""
    require("torchao", extra="examples")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(
        model, Int8WeightOnlyConfig(), lambda module, name: isinstance(module, nn.Linear) and "lora_" not in name
    )


COLOURS = ("red", "green", "blue", "white", "black", "small", "large", "old", "new", "wooden")
THINGS = ("cat", "dog", "car", "ship", "bird", "horse", "frog", "truck", "house", "tree")


def images(setting: Setting, classes: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(setting.batch, 3, 224, 224, generator=generator)
    return [{"pixel_values": image, "labels": i % classes} for i, image in enumerate(pixels)]


def make_step(
    row: Row, setting: Setting, model: CLIPClassifier, steps: int, at_step: Callable[[], None] = lambda: None
) -> Callable[[], dict[str, float]]:
    """A function that takes `steps` training steps, and returns the seconds of the last and of its zeroth-order part.

    `at_step` is called at the beginning of each step.
    """
    if row.kind in ("fo", "fo-checkpointing", "zocl"):
        return trainer_step(row, setting, model, steps, at_step)
    data = images(setting, row.classes)
    inputs: dict[str, torch.Tensor] = {}
    step = {"inference": inference_step, "mezo": mezo_step, "bare": bare_step}[row.kind](row, model, inputs)
    autocast = torch.autocast(setting.device, torch.bfloat16) if setting.bf16 else nullcontext()

    def timed() -> dict[str, float]:
        for _ in range(steps):
            # Every step makes its batch, as in a Trainer; making it is not timed.
            inputs["pixel_values"] = torch.stack([example["pixel_values"] for example in data]).to(setting.device)
            inputs["labels"] = torch.tensor([example["labels"] for example in data], device=setting.device)
            at_step()
            start = now(setting.device)
            with autocast:
                step()
            seconds = now(setting.device) - start
            inputs.clear()
        return {"seconds": seconds}

    return timed


class StepTimer(TrainerCallback):
    def __init__(self, device: str, at_step: Callable[[], None]):
        self.device, self.seconds, self.at_step = device, 0.0, at_step

    def on_step_begin(self, args, state, control, **kwargs):
        self.at_step()
        self.start = now(self.device)

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds = now(self.device) - self.start


def trainer_step(
    row: Row, setting: Setting, model: CLIPClassifier, steps: int, at_step: Callable[[], None]
) -> Callable[[], dict[str, float]]:
    """A step of `transformers.Trainer` (FO) or of `ZOCLTrainer`, from the batch on the device to the new weights."""
    timer, folder = StepTimer(setting.device, at_step), tempfile.mkdtemp(prefix="hf-zocl-benchmark-")
    options = {
        "output_dir": folder, "max_steps": steps, "per_device_train_batch_size": setting.batch, "report_to": "none",
        "save_strategy": "no", "disable_tqdm": True, "bf16": setting.bf16, "use_cpu": setting.device == "cpu",
        "logging_strategy": "no", "dataloader_pin_memory": False,
    }  # fmt: skip
    if row.kind != "zocl":
        trainer_class, args = Trainer, TrainingArguments(**options)
    else:
        trainer_class = TimedTrainer
        layers = row.layers if isinstance(row.layers, str) else list(row.layers)
        args = ZOCLTrainingArguments(
            **options, zo_branch=row.branch, zo_layers=layers, zo_estimator=row.estimator, zo_queries=row.queries
        )
    trainer = trainer_class(model=model, args=args, train_dataset=images(setting, row.classes), callbacks=[timer])
    trainer.without = row.without

    def step() -> dict[str, float]:
        trainer.optimizer = trainer.lr_scheduler = None
        if row.kind == "fo-checkpointing":
            model.gradient_checkpointing_enable()
        trainer.train()
        model.gradient_checkpointing_disable()  # other rows share the model
        model.zero_grad()
        zo = {"zo_seconds": trainer.zo_seconds} if row.kind == "zocl" else {}
        return {"seconds": timer.seconds, **zo}

    return step


WARM_UP = 4  # images


class TimedTrainer(ZOCLTrainer):
    """A `ZOCLTrainer` that times its zeroth-order part, and may leave out a shortcut.

    What is done once per training (measuring the loss's noise, checking the shortcuts) happens on a few images, in an
    extra step; the following steps take the whole batch.
    """

    without: str | None = None

    def get_train_dataloader(self):
        whole = list(range(len(self.train_dataset)))
        batches = [whole[:WARM_UP]] + [whole] * (self.args.max_steps - 1)
        loader = DataLoader(self.train_dataset, batch_sampler=batches, collate_fn=self.data_collator)
        return self.accelerator.prepare(loader)

    def create_optimizer(self, model=None):
        optimizer = super().create_optimizer(model)
        estimate = self._estimator.estimate

        def timed(*args, **kwargs):
            start = now(self.args.device.type)
            result = estimate(*args, **kwargs)
            self.zo_seconds = now(self.args.device.type) - start
            return result

        self._estimator.estimate = timed
        return optimizer

    def _evaluation(self, *args, **kwargs):
        evaluation = super()._evaluation(*args, **kwargs)
        if self.without == "towers":
            return PlainEvaluation(evaluation.forward, evaluation.before)
        evaluation.reuse_layers = self.without != "layers"
        evaluation.batch_candidates = self.without != "batches"
        evaluation.pack_prompts = self.without not in ("batches", "packing")
        return evaluation


def inference_step(row: Row, model: CLIPClassifier, inputs: dict[str, torch.Tensor]) -> Callable[[], None]:
    def step() -> None:
        with torch.no_grad():
            model(**inputs)

    model.train()
    return step


def bare_step(row: Row, model: CLIPClassifier, inputs: dict[str, torch.Tensor]) -> Callable[[], None]:
    """A step of the estimator without a Trainer; the difference is the cost of the Trainer's machinery."""
    groups = LayerAssignment(row.branch, row.layers).split(model).zo
    estimator = ZOEstimator(groups, row.estimator, row.queries)
    plan = TowerPlan(model, estimator.perturbations.values())
    optimizer = build_zo_optimizer(groups, lr=1e-4)
    device = model.clip.logit_scale.device
    context = torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()

    @torch.no_grad()
    def forward() -> torch.Tensor:
        return model(**inputs).loss

    def step() -> None:
        model.train()
        before = ForwardState(device, model.buffers())
        evaluation = TowerEvaluation(plan, forward, before, lambda: context)
        estimate = estimator.estimate(evaluation, step=0)
        evaluation.close()
        estimator.write([(estimate, 1.0)])
        optimizer.step()
        optimizer.zero_grad()

    return step


def mezo_step(row: Row, model: CLIPClassifier, inputs: dict[str, torch.Tensor]) -> Callable[[], None]:
    """Plain MeZO (Malladi et al. 2023): two full forward passes, prompts of 77 tokens, three loops over parameters."""
    parameters = [p for group in LayerAssignment("dual", "all").split(model).zo for p in group.parameters]
    prompts = [model.prompt_template.format(name) for name in model.class_names]
    tokens = model.tokenizer(prompts, padding="max_length", max_length=77, return_tensors="pt")
    device, eps = model.clip.logit_scale.device, 1e-3
    input_ids, attention_mask = tokens["input_ids"].to(device), tokens["attention_mask"].to(device)

    def move(factor: float) -> None:
        torch.manual_seed(0)
        for parameter in parameters:
            z = torch.normal(0.0, 1.0, parameter.shape, device=device, dtype=parameter.dtype)
            parameter.data.add_(z, alpha=factor)

    def loss() -> float:
        short = model.input_ids, model.attention_mask
        model.input_ids, model.attention_mask = input_ids, attention_mask
        try:
            with torch.no_grad():
                return model(**inputs).loss.item()
        finally:
            model.input_ids, model.attention_mask = short

    def step() -> None:
        model.train()
        move(eps)
        plus = loss()
        move(-2 * eps)
        minus = loss()
        move(eps)
        move(-1e-4 * (plus - minus) / (2 * eps))

    return step


# Measuring.


def now(device: str) -> float:
    if device != "cpu":
        torch.get_device_module(device).synchronize()
    return time.perf_counter()


def time_rows(rows: list[Row], setting: Setting) -> dict[str, dict[str, float]]:
    """The median seconds of every row; the rows take turns, so that other load on the machine affects all alike.

    A turn is two steps, of which the second is timed: the first warms up, and packs the prompts.
    """
    models = {key: build_model(setting, *key) for key in {row.model for row in rows}}
    steps = {row.name: make_step(row, setting, models[row.model], steps=2) for row in rows}
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in steps}
    for _ in tqdm(range(setting.rounds), desc="rounds"):
        for name, step in tqdm(steps.items(), desc="rows", leave=False):
            measured[name].append(step())
    del models, steps
    gc.collect()
    return {
        name: {key: statistics.median(figures[key] for figures in rounds) for key in rounds[0]}
        for name, rounds in measured.items()
    }


def measure_apart(row: Row, setting: Setting) -> dict[str, float]:
    """Memory and arithmetic of a row, in a separate process, so that no other row's memory counts."""
    # Larger buffers come from the system and go back to it, so that resident memory is memory in use.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    described = {name: value for name, value in asdict(row).items() if name != "figures"}
    command = [sys.executable, __file__, json.dumps(described), json.dumps(asdict(setting))]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    if result.returncode:
        sys.exit(f"error: row {row.name!r} failed:\n{result.stderr}")
    return json.loads(result.stdout.splitlines()[-1])


def measure_here(row: Row, setting: Setting) -> dict[str, float]:
    from torch.utils.flop_counter import FlopCounterMode

    torch.set_num_threads(setting.threads)
    model = build_model(setting, *row.model)
    counter, before = FlopCounterMode(display=False), 0

    def at_step() -> None:
        nonlocal before
        before = counter.get_total_flops()

    # A training's first step also measures the noise of the loss and compares its shortcuts with plain passes.
    step = make_step(row, setting, model, steps=2, at_step=at_step)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    gc.collect()
    start = memory_now(setting.device)
    step()
    peak = peak_memory(setting.device)
    activations = peak - (weights if setting.device != "cpu" else start)
    with counter:  # not while measuring memory: the counter makes gradient checkpointing keep activations
        step()
    return {"peak_bytes": peak, "activation_bytes": activations, "flops": counter.get_total_flops() - before}


def memory_now(device: str) -> int:
    if device != "cpu":
        torch.get_device_module(device).reset_peak_memory_stats()
        return torch.get_device_module(device).memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak, so that building the model does not count
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak_memory(device: str) -> int:
    if device != "cpu":
        return torch.get_device_module(device).max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


@command
def main() -> None:
    """Measure one row in this process: `measure_apart` runs it."""
    if len(sys.argv) != 3:
        raise ValueError(
            "scripts/benchmarks/peers.py runs this file, with a row and a setting; give your arguments to that."
        )
    described, settings = map(json.loads, sys.argv[1:])
    print(json.dumps(measure_here(Row(**described), Setting(**settings))))


if __name__ == "__main__":
    main()
