"""Learn a stream of tasks: `accelerate launch scripts/train.py --recipe scripts/recipes/quickstart.yaml`."""

import logging
import os
import sys
from pathlib import Path

import torch.distributed as dist

from hf_zocl.continual.recipe import Recipe, build_scheduler, parse_recipe
from hf_zocl.continual.run_state import ResumeError
from hf_zocl.continual.task_check import TaskError
from hf_zocl.data_parallel import leave_process_group
from hf_zocl.report import compare_groups, format_results, load_seeds


def main() -> None:
    logging.basicConfig(format="%(message)s")
    try:
        if restarts() > 0:
            join_again()
        recipe = parse_recipe()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    recipes = recipe.per_seed()
    for one in recipes:
        run(one)
    if len(recipes) > 1 and recipe.training.should_save:
        # These seeds alone: the folder may hold other runs.
        comparison = compare_groups([load_seeds([Path(one.training.output_dir) for one in recipes])])
        comparison.write(Path(recipe.training.output_dir))
        print(f"{comparison.markdown()}\n\nWritten to {recipe.training.output_dir}: comparison.md, seed-…")


def run(recipe: Recipe) -> None:
    try:
        scheduler = build_scheduler(recipe)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    logging.getLogger("hf_zocl").setLevel(logging.INFO if recipe.training.should_save else logging.ERROR)
    try:
        results = scheduler.run(resume=recipe.resume or restarts() > 0, train=recipe.run.learning != "none")
    except (OSError, ResumeError, TaskError) as error:
        sys.exit(f"error: {error}")
    if recipe.training.should_save:
        print(f"\n{format_results(results)}\n")
        print(f"Written to {recipe.training.output_dir}: results.json, accuracy_matrix.png, task-01/ …")


def restarts() -> int:
    """How often torchrun has started all processes anew because one had died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def join_again() -> None:
    """Form the process group where the processes before have left no addresses of theirs.

    torchrun's own store outlives them, and new ones that read it wait for the dead (pytorch issue 135712).

    Raises:
        ValueError: If it is the store of several machines, which count their restarts differently.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or dist.is_initialized():
        return
    if int(os.environ["GROUP_WORLD_SIZE"]) > 1:
        raise ValueError("To start processes anew on several machines, set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1.")
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(store=dist.PrefixStore(f"restart-{restarts()}", store), rank=rank, world_size=count)


if __name__ == "__main__":
    try:
        main()
    finally:
        leave_process_group()
