"""What the processes of `test_distributed.py` run, and the one process that they are compared with.

    torchrun --nproc_per_node 2 --module tests.distributed_worker GROUP FOLDER

leaves what rank 0 found in FOLDER/results.pt.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, IterableDataset
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback, default_data_collator

from hf_zocl import MoEAdapterConfig, ZOCLTrainer, ZOCLTrainingArguments
from hf_zocl.commands.recipe import build_scheduler, parse_recipe
from hf_zocl.models.moe_adapter.layer import MoEAdapter
from hf_zocl.trainer.data_parallel import leave_process_group
from tests.helpers import image_examples, mini_clip_classifier, rows


ROOT = Path(__file__).resolve().parents[1]
PROCESSES = int(os.environ.get("WORLD_SIZE", 1))
GLOBAL_BATCH = 8
# An epoch ends with a batch of 5: in two processes, of 4 and 1. Five batches: four are accumulated, then one.
EXAMPLES = 37
ADAPTERS = {
    "lora": {},
    "moe": {"adapter": "moe", "moe_noise": False, "moe_dropout": 0.0, "adapter_config": {"bottleneck": 8}},
}
BRANCHES = {
    "none": {"zo_branch": "none"},
    "hybrid": {"zo_branch": "language", "zo_layers": "hop-even"},
    "all-zo": {"zo_branch": "dual", "zo_layers": "all"},
}
GRID = {
    f"{adapter}, {branch}, accumulation {count}": {"adapter": adapter, "gradient_accumulation_steps": count, **options}
    for adapter in ADAPTERS
    for branch, options in BRANCHES.items()
    for count in (1, 4)
}
CASES = {
    **GRID,
    # Its epochs end with a batch of 1 and none.
    "an idle process": {**BRANCHES["hybrid"], "examples": 33},
    "an idle process, all-zo": {**BRANCHES["all-zo"], "examples": 33},
    "a loss that counts items": {"adapter": "gpt2", "examples": 33, "zo_branch": "dual", "zo_layers": "hop-even"},
    "a batch sampler of its own": {**BRANCHES["hybrid"], "examples": 33, "own_sampler": True},
    "batches as they come out": {**BRANCHES["hybrid"], "accelerator_config": {"even_batches": False}},
    "batches handed out": {**BRANCHES["hybrid"], "accelerator_config": {"dispatch_batches": True}},
    "an iterable dataset": {**BRANCHES["hybrid"], "iterable": True},
    "after an evaluation": {**BRANCHES["hybrid"], "evaluate": True},
    "two-sided": {**BRANCHES["all-zo"], "zo_estimator": "two-sided", "zo_queries": 2},
    "conservative": {**BRANCHES["all-zo"], "zo_estimator": "conservative", "zo_queries": 2},
    "fzoo": {**BRANCHES["all-zo"], "zo_estimator": "fzoo", "zo_queries": 3, "zo_learning_rate": 1e-4},
}
QUICK = [
    *("lora, none, accumulation 1", "lora, hybrid, accumulation 4", "lora, all-zo, accumulation 1"),
    *("moe, hybrid, accumulation 1", "moe, all-zo, accumulation 4"),
    *(name for name in CASES if name not in GRID),
]
QUICK_STEPS = 5
# What a step sends: an adapter four times as large, and more queries.
PAYLOADS = {
    "none": BRANCHES["none"],
    "hybrid": {**BRANCHES["hybrid"], "zo_queries": 4},
    "all-zo": BRANCHES["all-zo"],
    "all-zo, rank 32": {**BRANCHES["all-zo"], "lora_rank": 32},
    "all-zo, 8 queries": {**BRANCHES["all-zo"], "zo_queries": 8},
    "all-zo, two-sided": {**BRANCHES["all-zo"], "zo_queries": 2, "zo_estimator": "two-sided"},
    "all-zo, conservative": {**BRANCHES["all-zo"], "zo_queries": 2, "zo_estimator": "conservative"},
}
TEST_SIZES = (1, 7, 16, 23)


class InOrder:
    """A batch sampler that shows nothing but its batches and their size."""

    drop_last = False

    def __init__(self, examples: int, batch_size: int):
        self.batches = [list(range(examples))[first : first + batch_size] for first in range(0, examples, batch_size)]
        self.batch_size = batch_size

    def __iter__(self):
        return iter([list(batch) for batch in self.batches])

    def __len__(self):
        return len(self.batches)


class Unsized(IterableDataset):
    """Examples one after another, whose number nobody knows."""

    def __init__(self, examples: list):
        self.examples = examples

    def __iter__(self):
        return iter(self.examples)


class WithOwnSampler(ZOCLTrainer):
    """As other projects' trainers do, it makes its dataloader without asking the bases."""

    def get_train_dataloader(self) -> DataLoader:
        batches = InOrder(len(self.train_dataset), self.args.per_device_train_batch_size)
        loader = DataLoader(self.train_dataset, batch_sampler=batches, collate_fn=default_data_collator)
        return self.accelerator.prepare(loader)


def train(
    steps: int,
    adapter: str = "lora",
    examples: int = EXAMPLES,
    evaluate: bool = False,
    own_sampler: bool = False,
    iterable: bool = False,
    **options,
) -> Any:
    """Train the mini CLIP with `GLOBAL_BATCH` examples a step, over however many processes there are.

    Args:
        evaluate: Predict before training, as the scheduler does.
        own_sampler: Train in order, by a batch sampler without a `sampler`.
        iterable: The dataset has no length, and the main process hands its batches out.

    Returns:
        The trainer, and the adapter before training.
    """
    adapter_options = {name: options.pop(name) for name in ("lora_dropout", "lora_rank") if name in options}
    if adapter == "gpt2":
        model, data = small_gpt2(), sentences(examples)
    else:
        model, data = mini_clip_classifier(**ADAPTERS[adapter], **adapter_options), image_examples(examples)
    data = Unsized(data) if iterable else data
    settings = {
        "per_device_train_batch_size": GLOBAL_BATCH // PROCESSES,
        "learning_rate": 0.05,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "zo_eps": 0.03,
        "zo_optim": "sgd",  # a sign would make much of the last bit
        "zo_learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "ddp_find_unused_parameters": False,
    }
    with tempfile.TemporaryDirectory() as folder:
        args = ZOCLTrainingArguments(output_dir=folder, max_steps=steps, **{**settings, **options})
        trainer_class = WithOwnSampler if own_sampler else ZOCLTrainer
        trainer = trainer_class(model=model, args=args, train_dataset=data)
        if evaluate:
            trainer.predict(image_examples(8))
        start = adapter_of(model)
        counter = Payload()
        trainer.add_callback(counter)
        trainer.train()
    trainer.payload = counter.steps
    return trainer, start


def adapter_of(model: torch.nn.Module) -> torch.Tensor:
    """The adapter as one vector; the whole model where it has none."""
    named = {name: p.detach().flatten() for name, p in model.named_parameters()}
    adapter = [vector for name, vector in named.items() if "lora_" in name or "moe_" in name]
    return torch.cat(adapter or list(named.values()))


def small_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 30, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
    quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**sizes, **quiet, bos_token_id=0, eos_token_id=0))


def sentences(count: int) -> list[dict[str, torch.Tensor]]:
    """Of which more or fewer words count."""
    words = [torch.arange(12).roll(number) + number % 17 for number in range(count)]
    return [
        {"input_ids": ids, "labels": torch.where(torch.arange(12) < n % 10, -100, ids)} for n, ids in enumerate(words)
    ]


class Payload(TrainerCallback):
    """What a step hands to the process group, from the end of the one before."""

    def __init__(self):
        self.steps: list[dict[str, list[int]]] = []

    def on_step_end(self, *args, **kwargs):
        if dist.is_initialized():
            self.steps.append(dict(dist.group.WORLD.payload))
            dist.group.WORLD.payload.clear()


def run_cases(names: Iterable[str], steps: int) -> dict[str, dict]:
    """For every case: the losses of all steps, the adapter, how far it moved, and what the processes differ by."""
    results = {}
    for name in names:
        trainer, start = train(steps, **CASES[name])
        end = adapter_of(trainer.model)
        results[name] = {
            "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
            "adapter": end,
            "moved": float((end - start).norm() / start.norm()),
            "spread": spread(end),
        }
    return results


def spread(vector: torch.Tensor) -> float:
    """How far the processes' vectors are apart."""
    if not dist.is_initialized():
        return 0.0
    low, high = vector.clone(), vector.clone()
    dist.all_reduce(low, dist.ReduceOp.MIN)
    dist.all_reduce(high, dist.ReduceOp.MAX)
    return float((high - low).max())


def run_payloads() -> dict[str, dict]:
    """For every method: what its third step sends, by collective, and the bytes of its first-order parameters."""
    results = {}
    for name, options in PAYLOADS.items():
        trainer, _ = train(3, **options)
        split = trainer.split
        first_order = split.fo.values() if split else [p for p in trainer.model.parameters() if p.requires_grad]
        results[name] = {"sent": trainer.payload[-1], "fo_bytes": sum(4 * p.numel() for p in first_order)}
    return results


class Remembers(torch.nn.Module):
    """A loss of a running mean, which every pass reads and changes; of `layers.0` it knows nothing."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList([torch.nn.Linear(4, 4), torch.nn.Linear(4, 1)])
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x, labels=None):
        states = x + 0 * self.layers[0](x)
        loss = (self.layers[1](states - self.mean).squeeze(-1) - labels).square().mean()
        self.mean.lerp_(states.detach().mean(0), 0.5)
        return {"loss": loss}


def run_with_a_buffer(folder: Path, layers: Any) -> dict[str, list[float]]:
    """The differences of losses of a training, and its losses, and those of one that goes on from its second step."""
    found = {}
    for name, start in [("whole", None), ("resumed", str(folder / "checkpoint-2"))]:
        args = ZOCLTrainingArguments(
            str(folder),
            zo_layers=layers,
            max_steps=4,
            save_steps=2,
            logging_steps=1,
            report_to="none",
            disable_tqdm=True,
        )
        trainer = ZOCLTrainer(Remembers(), args, train_dataset=rows())
        trainer.train(resume_from_checkpoint=start)
        found[name] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        found["differences"] = [e["zo_loss_difference"] for e in trainer.state.log_history if "loss" in e]
    return found


def predict() -> dict[int, Any]:
    """The logits and labels of test sets of several sizes."""
    results = {}
    for size in TEST_SIZES:
        with tempfile.TemporaryDirectory() as folder:
            args = ZOCLTrainingArguments(folder, per_device_eval_batch_size=4, dataloader_pin_memory=False)
            output = ZOCLTrainer(model=mini_clip_classifier(), args=args).predict(image_examples(size))
        results[size] = {"logits": output.predictions, "labels": output.label_ids}
    return results


def frozen_experts() -> list[list[int]]:
    """What every process freezes after a task in which each has used another expert most."""
    adapter = MoEAdapter(MoEAdapterConfig(num_experts=3, freeze_experts=1), 8, 8)
    adapter.usage = torch.tensor([[[5.0, 4, 0], [0.0, 4, 5]][dist.get_rank()]] * 2)
    adapter.end_task()
    found = [torch.zeros(3, dtype=torch.int) for _ in range(PROCESSES)]
    dist.all_gather(found, adapter.frozen.int())
    return [frozen.tolist() for frozen in found]


def run_stream(output_dir: Path, *arguments: str) -> dict[str, Any]:
    """A stream of tasks, see `stream_recipe`."""
    return build_scheduler(parse_recipe(stream_recipe(output_dir, *arguments))).run()


def stream_recipe(output_dir: Path, *arguments: str) -> list[str]:
    """Two tasks of the quickstart's sample, few steps, and as many test images as no number of processes divides."""
    recipe = ["--recipe", str(ROOT / "scripts/recipes/quickstart.yaml"), "--output_dir", str(output_dir)]
    recipe += ["--initial_increment", "5", "--increment", "5", "--max_steps", "2", "--zo_sign", "false"]
    # Within a task every process saves its own random state.
    recipe += ["--zo_queries", "vision=1,language=2", "--save_strategy", "no"]
    recipe += ["--zo_optim", "sgd", "--zo_momentum", "0", "--max_test_images_per_class", "7"]
    recipe += ["--per_device_train_batch_size", str(32 // PROCESSES), "--per_device_eval_batch_size", "9"]
    recipe += ["--classifier_alignment", "0"]
    return [*recipe, "--disable_tqdm", "true", *arguments]


def run_aligned_stream(output_dir: Path) -> dict[str, Any]:
    """The same with classifier alignment, where text layers are of both kinds; and the adapter after it."""
    # Adam's first steps go by signs, which make much of the last bit.
    options = ["--classifier_alignment", "3", "--zo_layers", "hop-even", "--optim", "sgd", "--zo_eps", "0.03"]
    scheduler = build_scheduler(parse_recipe(stream_recipe(output_dir, *options)))
    results = scheduler.run()
    adapter = torch.cat([p.detach().flatten() for p in scheduler.model.parameters() if p.requires_grad])
    return {**results, "adapter": adapter, "spread": spread(adapter)}


def main() -> None:
    group, folder = sys.argv[1], Path(sys.argv[2])
    sys.path.insert(0, str(ROOT / "scripts" / "benchmarks"))
    from scaling import start_counting

    start_counting()
    rank = dist.get_rank()
    results: dict[str, Any] = {"predictions": predict()} if group != "buffers" else {}
    if group == "buffers":
        results["buffers"] = {str(layers): run_with_a_buffer(folder / str(layers), layers) for layers in ([1], "all")}
    if group == "grid":
        results["cases"] = run_cases(GRID, steps=50)
    if group == "quick":
        results["cases"] = run_cases(QUICK, QUICK_STEPS)
        results["payloads"] = run_payloads()
        results["frozen"] = frozen_experts()
        # Were another process to write, it would be seen.
        results["stream"] = run_stream(folder / f"run-of-rank-{rank}")
    if group == "aligned":
        results["stream"] = run_aligned_stream(folder / f"run-of-rank-{rank}")
    if rank == 0:
        torch.save(results, folder / "results.pt")
    leave_process_group()


if __name__ == "__main__":
    main()
