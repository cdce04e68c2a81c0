"""Choose the quickstart's stream and rates, on the embedded sample's training images alone.

    python scripts/tools/choose_quickstart.py --grid increment=2,5 --grid learning_rate=1e-3,2e-3 --output chosen.json

A quarter of every class's training images stand in for the test images; the sample's own test images are not read. Every
candidate is the whole recipe with some arguments changed, and the table has what a run prints at its end.
"""

from __future__ import annotations

from pathlib import Path

from datasets import DatasetDict, load_dataset

from hf_zocl.commands import Parser, command
from hf_zocl.commands.recipe import build_scheduler, parse_recipe
from hf_zocl.sample import sample_path


PART = 4


def training_images_in_two() -> DatasetDict:
    """The sample's training images, every fourth of a class as a test image."""
    images = load_dataset(str(sample_path("cifar10-sample")), split="train")
    seen: dict[int, int] = {}
    rows: dict[str, list[int]] = {"train": [], "test": []}
    for row, label in enumerate(images["label"]):
        seen[label] = seen.get(label, 0) + 1
        rows["test" if seen[label] % PART == 0 else "train"].append(row)
    return DatasetDict({name: images.select(mine) for name, mine in rows.items()})


def measure(arguments: list[str], folder: Path) -> dict[str, float]:
    recipe = parse_recipe(arguments)
    results = build_scheduler(recipe).run()
    classes = [accuracy for accuracy in results.get("class_accuracy", {}).values()]
    return results


@command
def main() -> None:
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--grid", action="append", default=[], metavar="ARGUMENT=VALUE,VALUE")
    parser.add_argument("--output", type=Path)
