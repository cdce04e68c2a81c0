"""How much of a run's forgetting is real: compare it with zero-shot, and with a classifier that forgets nothing.

    python scripts/studies/reproduce.py all --cells FO dual/all --output_dir runs/plain
    python scripts/studies/reproduce.py all --cells FO dual/all --classifier_alignment 100 --output_dir runs/aligned
    python scripts/studies/forgetting.py runs/plain/cifar10-lora/* runs/aligned/cifar10-lora/* --recipe cifar10

A task is measured among all classes seen, so its accuracy falls as classes arrive, even if the model is not trained:
"of zero-shot" is the same formula on zero-shot's accuracy matrix. `--recipe`, with further arguments as for `train`,
adds a row for linear discriminant analysis on the untrained model's image features. Its means and its covariance are
over all images so far, so nothing about a task is ever lost.
"""

import argparse
import tempfile
from pathlib import Path

import torch

from hf_zocl import ClassifierAlignment
from hf_zocl.commands import Parser, command
from hf_zocl.commands.recipe import build_scheduler, parse_recipe
from hf_zocl.continual.metrics import accuracy_row, summarise
from hf_zocl.continual.metrics import forgetting as forgetting_of
from hf_zocl.continual.plugins.classifier_alignment import image_features
from hf_zocl.data.images import PixelCodec, prepare_images
from hf_zocl.report import Comparison, RunGroup, load_groups
from hf_zocl.report.compare import mean_and_deviation


RIDGE = 0.1  # this share of the mean variance is added to each variance


@command
def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs, or of a run for every seed")
    parser.add_argument("--recipe", help="add the row of a classifier that forgets nothing, on this stream")
    options, further = parser.parse_known_args()
    rows = [row for group in load_groups(options.runs) for row in rows_of(group)]
    if options.recipe:
        with tempfile.TemporaryDirectory() as folder:
            matrix, seen = discriminant_analysis(["--recipe", options.recipe, *further, "--output_dir", folder])
        found = summarise(matrix, seen)
        figures = (f"{100 * found[name]:.1f}" for name in ("avg", "last", "forgetting"))
        rows.append(("discriminant analysis", "", *figures, ""))
    headings = ("setting", "seeds", "Avg", "Last", "forgetting", "of zero-shot")
    print(Comparison(headings, tuple(dict.fromkeys(rows)), "Percent, mean ± standard deviation.").markdown())


def rows_of(group: RunGroup) -> list[tuple[str, ...]]:
    """The row of the untrained model's figures, then the row of the setting's."""
    zero_shot = group.first["zero_shot"]
    own = f"{100 * forgetting_of(zero_shot['accuracy_matrix']):.1f}"
    figures = (mean_and_deviation(100 * group.values(name), 1) for name in ("avg", "last", "forgetting"))
    untrained = ("zero-shot", "", *(f"{100 * zero_shot[name]:.1f}" for name in ("avg", "last")), own, own)
    return [untrained, (group.name, str(len(group.runs)), *figures, own)]


def discriminant_analysis(argv: list[str]) -> tuple[list[list[float]], list[float]]:
    """The accuracy matrix of discriminant analysis on the untrained model, and its accuracy on all classes seen."""
    scheduler = build_scheduler(parse_recipe(argv))
    stream, _ = prepare_images(scheduler.stream, PixelCodec(scheduler.processor.image_processor))
    statistics, tests = ClassifierAlignment(), []
    matrix, seen = [], []
    for task in stream:
        trainer = scheduler._training.trainer(task.name, task)
        statistics.add(*image_features(task.train, trainer))
        tests.append(image_features(task.test, trainer))
        features, labels = map(torch.cat, zip(*tests, strict=True))
        tasks = torch.cat([torch.full((len(own),), number + 1) for number, (_, own) in enumerate(tests)])
        predicted = discriminant(features, **statistics.state()).argmax(dim=1)
        row, accuracy = accuracy_row(predicted.numpy(), labels.numpy(), tasks.numpy())
        matrix.append(row)
        seen.append(accuracy)
    return matrix, seen


def discriminant(
    features: torch.Tensor, means: torch.Tensor, scatter: torch.Tensor, images: torch.Tensor
) -> torch.Tensor:
    """The scores xᵀΣ⁻¹μ − ½ μᵀΣ⁻¹μ, with a ridge on Σ; `(images, classes)`."""
    covariance, means = scatter.double() / images.sum(), means.double()
    covariance += RIDGE * covariance.diagonal().mean() * torch.eye(len(covariance))
    weights = torch.linalg.solve(covariance, means.T)
    return features.double() @ weights - (means.T * weights).sum(dim=0) / 2


if __name__ == "__main__":
    main()
