"""Low-rank directions (LOZO, Chen et al., ICLR 2025) against dense ones, at equal numbers of forward passes.

    python scripts/studies/low_rank.py 0 2 8     # ranks; 0: dense, which is MeZO

The last two layers and the head of the text classifier of text_classifier.py are trained whole, by two-sided
differences and plain SGD. A matrix moves along U·Vᵀ/√r: U is drawn at every step, and V is kept for 50 steps. Rates
are tuned as there: threefold apart, until the best lies between two others, on held-out training texts.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from copy import deepcopy

import numpy as np
import torch
from text_classifier import EPS, TUNED_SEED, Split, Top, accuracy, extract_model, prepare, tune
from torch import nn

from hf_zocl.commands import Parser, command
from hf_zocl.report.compare import mean_and_deviation


LAZY = 50


def direction(parameter: nn.Parameter, rank: int, step: int, number: int) -> torch.Tensor:
    fresh = torch.Generator().manual_seed(1_000_003 * step + number)
    if not rank or parameter.ndim != 2 or min(parameter.shape) <= rank:
        return torch.randn(parameter.shape, generator=fresh)
    kept = torch.Generator().manual_seed(1_000_003 * (step // LAZY) + number + 500_009)
    rows = torch.randn(parameter.shape[0], rank, generator=fresh)
    columns = torch.randn(parameter.shape[1], rank, generator=kept)
    return rows @ columns.T / rank**0.5


@torch.no_grad()
def run(top: Top, data: dict[str, Split], rank: int, rate: float, seed: int, split: str, steps: int) -> float:
    torch.manual_seed(seed)
    model = deepcopy(top).eval()
    model.head.reset_parameters()
    parameters = list(model.parameters())
    inputs, mask, labels = data["train"]
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        rows = torch.randint(len(labels), (16,), generator=generator)
        drawn = [direction(parameter, rank, step + 10_000 * seed, n) for n, parameter in enumerate(parameters)]
        losses = []
        for size in (EPS, -2 * EPS):
            for parameter, along in zip(parameters, drawn, strict=True):
                parameter.add_(along, alpha=size)
            losses.append(float(nn.functional.cross_entropy(model(inputs[rows], mask[rows]), labels[rows])))
        slope = (losses[0] - losses[1]) / (2 * EPS)
        for parameter, along in zip(parameters, drawn, strict=True):
            parameter.add_(along, alpha=EPS - rate * (1 - step / steps) * slope)
    return accuracy(model, data[split])


@command
def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ranks", type=int, nargs="+", help="0: dense")
    parser.add_argument("--passes", type=int, default=420, help="forward passes of a run")
    parser.add_argument("--seeds", type=int, default=3, help="runs at the chosen rate")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        top, data = prepare(str(extract_model(folder)))
    steps = options.passes // 2
    for rank in options.ranks:
        tried = tune(1e-3, lambda rate, rank=rank: run(top, data, rank, rate, TUNED_SEED, "held-out", steps))
        rate = max(tried, key=tried.__getitem__)
        start = time.process_time()
        found = [run(top, data, rank, rate, seed, "test", steps) for seed in range(options.seeds)]
        seconds = (time.process_time() - start) / options.seeds
        accuracies = mean_and_deviation(100 * np.array(found), 1)
        print(f"| {rank or 'dense'} | {rate:.2g} | {accuracies} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
