"""Choose the quickstart's stream and rates on the embedded sample's training images alone.

    python scripts/tools/choose_quickstart.py --grid increment=2,5 --grid learning_rate=1e-3,2e-3

Every fourth training image of a class serves as a test image; the sample's own test images are not read. A candidate
is the whole recipe with some arguments changed. The winner has the greatest accuracy after its last task minus
zero-shot; the table also shows forgetting, how many of the ten classes are above 10 %, and the time. Further arguments
go to every candidate, as on the command line of scripts/train.py.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from tqdm.auto import tqdm

from hf_zocl.commands import Parser, command
from hf_zocl.commands.recipe import build_scheduler, parse_recipe
from hf_zocl.sample import sample_path


PART = 4


def write_held_out(images: Dataset, folder: Path, per_class: int | None = None) -> None:
    """Write all training images, or the first `per_class`, as a dataset; every fourth of a class is a test image."""
    (label_column,) = [name for name, feature in images.features.items() if hasattr(feature, "names")]
    seen: dict[int, int] = {}
    rows: dict[str, list[int]] = {"train": [], "test": []}
    for row, label in enumerate(images[label_column]):
        number = seen[label] = seen.get(label, 0) + 1
        if per_class is None or number <= per_class:
            rows["test" if number % PART == 0 else "train"].append(row)
    for split, mine in rows.items():
        images.select(mine).to_parquet(folder / f"{split}.parquet")


def measure(argv: list[str]) -> dict[str, Any]:
    """Run a candidate, and return the figures of its row."""
    results = build_scheduler(parse_recipe(argv)).run()
    classes = results["details"][-1]["per_class_accuracy"]
    return {
        "Last": results["last"],
        "above zero-shot": results["last"] - results["zero_shot"]["last"],
        "Avg": results["avg"],
        "forgetting": results["forgetting"],
        "classes above 10 %": sum(accuracy > 0.1 for accuracy in classes),
        "seconds": results["seconds"],
    }


def row(name: str, figures: dict[str, Any]) -> str:
    cells = [
        f"{value:.1%}" if abs(value) <= 1 and isinstance(value, float) else f"{value:.0f}"
        for value in figures.values()
    ]
    return f"| {name} | " + " | ".join(cells) + " |"


@command
def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--grid", action="append", default=[], metavar="ARGUMENT=VALUE|VALUE")
    options, further = parser.parse_known_args()
    names = [grid.partition("=")[0] for grid in options.grid]
    values = [grid.partition("=")[2].split("|") for grid in options.grid]
    found: list[tuple[str, dict[str, Any]]] = []
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "images"
        data.mkdir()
        write_held_out(load_dataset(str(sample_path("cifar10-sample")), split="train"), data)
        common = ["--recipe", options.recipe, "--benchmark", "none", "--dataset_path", str(data)]
        common += ["--prompt_template", "a photo of a {}.", "--increment", "2", "--disable_tqdm", "true", *further]
        for number, chosen in enumerate(tqdm(list(itertools.product(*values)), unit="candidate")):
            changed = [word for name, value in zip(names, chosen, strict=True) for word in (f"--{name}", value)]
            figures = measure([*common, *changed, "--output_dir", str(Path(folder) / f"run-{number}")])
            found.append((" ".join(changed) or "as it is", figures))
            tqdm.write(row(*found[-1]))
    found.sort(key=lambda one: -one[1]["above zero-shot"])
    head = ["candidate", *found[0][1]]
    print("\n".join(["", f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(row(*one) for one in found)]))


if __name__ == "__main__":
    main()
