"""Learn a stream of tasks: `accelerate launch scripts/train.py --recipe scripts/recipes/quickstart.yaml`."""

import logging
import os
import sys
from pathlib import Path

from accelerate import PartialState

from hf_zocl.continual.recipe import Recipe, build_scheduler, parse_recipe
from hf_zocl.report import compare_runs, format_results


def main() -> None:
    logging.basicConfig(format="%(message)s")
    try:
        recipe = parse_recipe()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    recipes = recipe.per_seed()
    for one in recipes:
        run(one)
    if len(recipes) > 1 and recipe.training.should_save:
        comparison = compare_runs([Path(recipe.training.output_dir)])
        comparison.write(Path(recipe.training.output_dir))
        print(f"{comparison.markdown()}\n\nWritten to {recipe.training.output_dir}: comparison.md, seed-…")
    PartialState().destroy_process_group()


def run(recipe: Recipe) -> None:
    try:
        scheduler = build_scheduler(recipe)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    logging.getLogger("hf_zocl").setLevel(logging.INFO if recipe.training.should_save else logging.ERROR)
    # torchrun starts all processes anew when one has died: the run goes on from its last state.
    was_restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    results = scheduler.run(resume=recipe.run.resume or was_restarted, train=recipe.run.learning != "none")
    if recipe.training.should_save:
        print(f"\n{format_results(results)}\n")
        print(f"Written to {recipe.training.output_dir}: results.json, accuracy_matrix.png, task-01/ …")


if __name__ == "__main__":
    main()
