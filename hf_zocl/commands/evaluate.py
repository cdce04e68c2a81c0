"""Measure any task's checkpoint, as its run did or on another benchmark.

    python -m hf_zocl evaluate runs/quickstart/task-02
    python -m hf_zocl evaluate someone/a-repository --revision task-03 --benchmark cifar10 [--dataset_path folder]

Any further argument is an argument of a recipe, such as --scenario task, --max_test_images_per_class 100 or
--per_device_eval_batch_size 64. A run in bfloat16 on a GPU is measured on a CPU with --bf16 false.
"""

import argparse
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from ..continual.checkpoint_evaluation import NUMERICS, evaluate_checkpoint
from ..continual.run_arguments import RunArguments
from ..files import write_json
from ..report import format_evaluation
from .door import Parser, command
from .recipe import RecipeParser


# The run arguments that do not describe the stream: in an evaluation they would change nothing.
OF_TRAINING = {
    *("preset", "model_name_or_path", "merge_into", "dtype", "held_out", "evaluate_future", "seeds", "num_seeds"),
    *("vary_class_order", "resume", "overwrite_output_dir"),
    *("classifier_alignment", "classifier_alignment_learning_rate"),
}


@command
def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a checkpoint's folder, a run's folder (with --task), or a Hub repository")
    parser.add_argument("--task", type=task_number, help="the task, counted from 1, or best")
    parser.add_argument("--revision", help="a revision on the Hub, instead of --task")
    parser.add_argument("--disable_tqdm", action="store_true")
    parser.add_argument("--output", type=Path, help="a JSON file to write the figures to")
    options, further = parser.parse_known_args()
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
    measured = evaluate_checkpoint(
        options.checkpoint,
        options.task,
        options.revision,
        disable_tqdm=options.disable_tqdm,
        **recipe_arguments(further),
    )
    print(format_evaluation(measured))
    if options.output is not None:
        write_json(options.output, json.loads(json.dumps(measured)))


def task_number(text: str) -> int | str:
    return text if text == "best" else int(text)


def recipe_arguments(argv: list[str]) -> dict[str, Any]:
    """The recipe arguments that were given, without defaults.

    Raises:
        ValueError: If one is not an argument of a recipe.
    """
    known = {*(each.name for each in fields(RunArguments)), *NUMERICS} - OF_TRAINING
    for argument in argv:
        if argument.startswith("--") and argument[2:].split("=")[0] not in known:
            raise ValueError(
                f"{argument} is not an argument of an evaluation: expected one of {', '.join(sorted(known))}."
            )
    parser = RecipeParser((RunArguments, TrainingArguments))
    parser.set_defaults(**dict.fromkeys(known))
    given = vars(parser.parse_args(argv))
    return {name: given[name] for name in known if given[name] is not None}
