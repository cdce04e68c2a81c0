"""Learn a stream of tasks: `accelerate launch scripts/train.py --recipe scripts/recipes/quickstart.yaml`."""

import sys

from hf_zocl.continual.recipe import build_scheduler, parse_recipe
from hf_zocl.report import format_results


def main() -> None:
    try:
        recipe = parse_recipe()
        scheduler = build_scheduler(recipe)
    except ValueError as error:
        sys.exit(f"error: {error}")
    results = scheduler.run(resume=recipe.run.resume)
    if recipe.training.should_save:
        print(format_results(results))
        print(f"\nWritten to {recipe.training.output_dir}: results.json, accuracy_matrix.png, task-01/ …")


if __name__ == "__main__":
    main()
