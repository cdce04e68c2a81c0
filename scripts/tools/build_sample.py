"""Build the package's embedded dataset, a class-balanced part of CIFAR-10; `pretrain_sample.py` makes the model.

python scripts/tools/build_sample.py --cifar10 DATA/cifar10
"""

import argparse
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from small_clip import staged_folder

from hf_zocl.commands import Parser, command


SAMPLE_DIR = Path(__file__).resolve().parents[2] / "hf_zocl" / "sample"

DATASET_CARD = """---
pretty_name: CIFAR-10 sample
license: unknown
language: [en]
task_categories: [image-classification]
size_categories: [1K<n<10K]
source_datasets: [cifar10]
---
# cifar10-sample

{train} training and {test} test images of [CIFAR-10](https://www.cs.toronto.edu/~kriz/cifar.html) (Alex Krizhevsky, \
*Learning Multiple Layers of Features from Tiny Images*, 2009), for examples and tests that run without a download. \
The images are for research use; the package's licence does not cover them.

Columns as in the original: `img` (32×32) and `label` (ten classes). Sampled by `scripts/tools/build_sample.py`: of \
every class {train_per_class} of the training and {test_per_class} of the test images, drawn at random without \
replacement (seed {seed}), in their original order, their JPEG bytes unchanged. Test images come from the original \
test split.
"""


def sample_rows(labels: np.ndarray, per_class: int, rng: np.random.Generator) -> np.ndarray:
    """Return the sorted rows of `per_class` random images of every class.

    Raises:
        ValueError: if a class has fewer.
    """
    chosen = []
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        if len(rows) < per_class:
            raise ValueError(f"class {label} has {len(rows)} images, {per_class} were asked for")
        chosen.append(rng.choice(rows, per_class, replace=False))
    return np.sort(np.concatenate(chosen))


def sample_split(source: Path, split: str, per_class: int, rng: np.random.Generator) -> pa.Table:
    """Take a split's sample from its parquet files; JPEG bytes and schema (class names) stay as they are."""
    files = sorted((source / "data").glob(f"{split}-*.parquet"))
    if not files:
        raise FileNotFoundError(f"no data/{split}-*.parquet in {source}")
    table = pa.concat_tables([pq.read_table(file) for file in files])
    return table.take(sample_rows(table.column("label").to_numpy(), per_class, rng))


def build_dataset(args: argparse.Namespace) -> None:
    """Write cifar10-sample."""
    rng = np.random.default_rng(args.seed)
    per_class = {"train": args.train_images_per_class, "test": args.test_images_per_class}
    with staged_folder(args.output_dir / "cifar10-sample") as folder:
        (folder / "data").mkdir()
        counts = {}
        for split, number in per_class.items():
            table = sample_split(args.cifar10, split, number, rng)
            pq.write_table(table, folder / "data" / f"{split}-00000-of-00001.parquet")
            counts[split] = f"{table.num_rows:,}"
        card = DATASET_CARD.format(
            train_per_class=per_class["train"], test_per_class=per_class["test"], seed=args.seed, **counts
        )
        (folder / "README.md").write_text(card, encoding="utf-8")


def parse_args() -> argparse.Namespace:
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--cifar10", type=Path, required=True, help="CIFAR-10 as a dataset folder")
    parser.add_argument("--output_dir", type=Path, default=SAMPLE_DIR, help="default: the package's own sample folder")
    parser.add_argument("--train_images_per_class", type=int, default=400)
    parser.add_argument("--test_images_per_class", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


@command
def main() -> None:
    args = parse_args()
    build_dataset(args)
    files = [file for file in (args.output_dir / "cifar10-sample").rglob("*.*") if file.is_file()]
    print(f"{sum(file.stat().st_size for file in files) / 1e6:.1f} MB in {args.output_dir / 'cifar10-sample'}")


if __name__ == "__main__":
    main()
