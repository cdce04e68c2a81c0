"""Learn a stream of tasks: `accelerate launch -m hf_zocl train --recipe quickstart`."""

import logging
import os
from contextlib import ExitStack
from pathlib import Path

import psutil
import torch.distributed as dist

from ..continual.folder_lock import FolderLock
from ..continual.processes import by_main_process
from ..continual.run_folder import RunFolder, RunFolderError
from ..hub.push import HubPusher
from ..report import COMPARISON_FILES, RESULTS_FILE, compare_groups, format_results, load_seeds
from ..trainer.data_parallel import leave_process_group
from .door import command
from .recipe import Recipe, build_scheduler, parse_recipe


def main() -> None:
    try:
        learn()
    finally:
        leave_process_group()


@command
def learn() -> None:
    logging.basicConfig(format="%(message)s")
    if restarts() > 0:
        join_again()
    recipe = parse_recipe()
    recipes = recipe.per_seed()
    with ExitStack() as stack:
        by_main_process(recipe.training, lambda: prepare(recipe, recipes, stack))
        for one in recipes:
            run(one)
        if len(recipes) > 1 and recipe.training.should_save:
            # Only these seeds, because the folder may hold other runs.
            comparison = compare_groups([load_seeds([Path(one.training.output_dir) for one in recipes])])
            comparison.write(Path(recipe.training.output_dir))
            print(f"{comparison.markdown()}\n\nWritten to {recipe.training.output_dir}: comparison.md, seed-…")


def prepare(recipe: Recipe, recipes: list[Recipe], stack: ExitStack) -> None:
    """Check every folder and repository before the first run; several seeds also lock the folder that they share.

    Raises:
        FolderInUseError, ValueError: If a folder is in use or would lose files, or the Hub refuses a repository.
    """
    for one in recipes:
        with FolderLock(one.training.output_dir):
            RunFolder(one.training.output_dir).check(bool(resume_of(one)), overwrites(one))
    if len(recipes) == 1:
        return
    folder = Path(recipe.training.output_dir)
    stack.enter_context(FolderLock(folder))
    there = next((folder / name for name in COMPARISON_FILES if (folder / name).exists()), None)
    if there is not None and not recipe.resume and not recipe.run.overwrite_output_dir:
        raise RunFolderError(
            f"{there} already exists: --resume and --overwrite_output_dir replace it, another output_dir leaves it "
            "alone."
        )
    for one in recipes:
        if one.training.push_to_hub:
            HubPusher.from_arguments(one.training)


def run(recipe: Recipe) -> None:
    scheduler = build_scheduler(recipe)
    logging.getLogger("hf_zocl").setLevel(logging.INFO if recipe.training.should_save else logging.ERROR)
    with recipe.placing():
        results = scheduler.run(resume_of(recipe), recipe.learns, overwrites(recipe))
    if recipe.training.should_save:
        print(f"\n{format_results(results)}\n")
        checkpoints = ", task-01/ …" if recipe.learns else ""
        print(f"Written to {recipe.training.output_dir}: results.json, accuracy_matrix.png{checkpoints}")


def resume_of(recipe: Recipe) -> bool | str:
    """The `resume` to run with: as asked for, or True if this launch began the run and was restarted."""
    return recipe.resume or (restarts() > 0 and is_begun(recipe))


def overwrites(recipe: Recipe) -> bool:
    return recipe.run.overwrite_output_dir and not (restarts() > 0 and is_begun(recipe))


def is_begun(recipe: Recipe) -> bool:
    """Tell whether this launch began the run in `output_dir`: the launcher's process outlives restarts."""
    results = Path(recipe.training.output_dir) / RESULTS_FILE
    return results.is_file() and results.stat().st_mtime >= psutil.Process(os.getppid()).create_time()


def restarts() -> int:
    """The number of times that torchrun has restarted all processes because one died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def join_again() -> None:
    """Form the process group with a store that has no addresses of earlier processes.

    torchrun's store outlives the processes, and new ones that read it wait for the dead (pytorch issue 135712).

    Raises:
        ValueError: If several machines share the store, because they count their restarts differently.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or dist.is_initialized():
        return
    if int(os.environ["GROUP_WORLD_SIZE"]) > 1:
        raise ValueError("To restart processes on several machines, set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1.")
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(store=dist.PrefixStore(f"restart-{restarts()}", store), rank=rank, world_size=count)
