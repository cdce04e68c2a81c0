"""What the processes of `test_distributed.py` run, and the one process that they are compared with."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import PartialState

from hf_zocl import ZOCLTrainer, ZOCLTrainingArguments
from hf_zocl.continual.recipe import build_scheduler, parse_recipe
from tests.helpers import image_examples, mini_clip_classifier


GLOBAL_BATCH = 8
# An epoch ends with a batch of 5: in two processes, of 4 and 1. Five batches: four are accumulated, then one.
EXAMPLES = 37
ADAPTERS = {"lora": {}, "moe": {"adapter": "moe", "moe_noise": False, "moe_dropout": 0.0, "moe_bottleneck": 8}}
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
SHARED = {"zo_parallelism": "queries", "zo_queries": 3}
CASES = {
    **GRID,
    # Its epochs end with a batch of 1 and none.
    "an idle process": {**BRANCHES["hybrid"], "examples": 33},
    "an idle process, all-zo": {**BRANCHES["all-zo"], "examples": 33},
    "two-sided": {**BRANCHES["all-zo"], "zo_estimator": "two-sided", "zo_queries": 2},
    "conservative": {**BRANCHES["all-zo"], "zo_estimator": "conservative", "zo_queries": 2},
    "fzoo": {**BRANCHES["all-zo"], "zo_estimator": "fzoo", "zo_queries": 3, "zo_learning_rate": 1e-4},
    "queries": {**BRANCHES["all-zo"], **SHARED},
    "queries, hybrid": {**BRANCHES["hybrid"], **SHARED},
    "queries, two-sided": {**BRANCHES["all-zo"], **SHARED, "zo_estimator": "two-sided"},
    "queries, more processes than queries": {**BRANCHES["hybrid"], "zo_parallelism": "queries"},
    "queries, dropout": {**BRANCHES["hybrid"], **SHARED, "lora_dropout": 0.1},
}


def train(
    output_dir: str, steps: int, adapter: str = "lora", examples: int = EXAMPLES, evaluate: bool = False, **options
) -> dict:
    """Train the mini CLIP with `GLOBAL_BATCH` examples a step, over however many processes there are.

    Args:
        evaluate: Predict before training, as the scheduler does.

    Returns:
        The losses of all steps, the trained adapter as one vector, how far it has moved, and the trainer.
    """
    dropout = options.pop("lora_dropout", 0.0)
    model = mini_clip_classifier(lora_dropout=dropout, **ADAPTERS[adapter])
    has_own_batches = options.get("zo_parallelism") != "queries"
    settings = {
        "per_device_train_batch_size": GLOBAL_BATCH // (PartialState(cpu=True).num_processes if has_own_batches else 1),
        "learning_rate": 0.05,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "zo_eps": 0.03,
        "zo_learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "ddp_find_unused_parameters": False,
    }
    args = ZOCLTrainingArguments(output_dir=output_dir, max_steps=steps, **{**settings, **options})
    trainer = ZOCLTrainer(model=model, args=args, train_dataset=image_examples(examples))
    if evaluate:
        trainer.predict(image_examples(8))
    start = adapter_of(model)
    trainer.train()
    end = adapter_of(model)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"losses": losses, "adapter": end, "moved": float((end - start).norm() / start.norm()), "trainer": trainer}


def adapter_of(model: torch.nn.Module) -> torch.Tensor:
    named = [p.detach().flatten() for name, p in model.named_parameters() if "lora_" in name or "moe_" in name]
    return torch.cat(named)


def run_cases(names: Iterable[str], steps: int) -> dict[str, dict]:
    results = {}
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            result = train(folder, steps, **CASES[name])
        del result["trainer"]
        result["spread"] = spread(result["adapter"])
        results[name] = result
    return results


def spread(vector: torch.Tensor) -> float:
    """How far the processes' vectors are apart."""
    if not dist.is_initialized():
        return 0.0
    low, high = vector.clone(), vector.clone()
    dist.all_reduce(low, dist.ReduceOp.MIN)
    dist.all_reduce(high, dist.ReduceOp.MAX)
    return float((high - low).max())


if __name__ == "__main__":
    import sys, time
    names = [n for n in CASES if sys.argv[2] in n]
    t=time.time()
    r = run_cases(names, int(sys.argv[3]))
    if PartialState().is_main_process:
        torch.save(r, sys.argv[1]); print("seconds", time.time()-t)
