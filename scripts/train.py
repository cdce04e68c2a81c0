"""Learn a stream of tasks: `accelerate launch scripts/train.py --recipe scripts/recipes/quickstart.yaml`."""

import logging
import sys

from hf_zocl.continual.recipe import build_scheduler, parse_recipe
from hf_zocl.report import format_results


def main() -> None:
    logging.basicConfig(format="%(message)s")
    try:
        recipe = parse_recipe()
        scheduler = build_scheduler(recipe)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    if recipe.training.should_save:
        logging.getLogger("hf_zocl").setLevel(logging.INFO)
    results = scheduler.run(resume=recipe.run.resume, train=recipe.run.learning != "none")
    if recipe.training.should_save:
        print(f"\n{format_results(results)}\n")
        print(f"Written to {recipe.training.output_dir}: results.json, accuracy_matrix.png, task-01/ …")


if __name__ == "__main__":
    main()
