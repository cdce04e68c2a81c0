"""Learn a stream of tasks: `accelerate launch scripts/train.py --recipe scripts/recipes/quickstart.yaml`."""

import logging
import sys
from pathlib import Path

from hf_zocl.continual.recipe import Recipe, build_scheduler, parse_recipe
from hf_zocl.continual.run_state import ResumeError
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


def run(recipe: Recipe) -> None:
    try:
        scheduler = build_scheduler(recipe)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    if recipe.training.should_save:
        logging.getLogger("hf_zocl").setLevel(logging.INFO)
    try:
        results = scheduler.run(resume=recipe.resume, train=recipe.run.learning != "none")
    except (OSError, ResumeError) as error:
        sys.exit(f"error: {error}")
    if recipe.training.should_save:
        print(f"\n{format_results(results)}\n")
        print(f"Written to {recipe.training.output_dir}: results.json, accuracy_matrix.png, task-01/ …")


if __name__ == "__main__":
    main()
