"""ZO-SGD-Cons (ZO-LLM, ICML 2024): a step is taken only where the loss after it is lower.

The one-sided estimate of every query, and their mean, are tried as an SGD step; g is the one with the lowest loss, or
zero if none lowers the loss. With several branches, their steps are also tried together, and only one branch steps
if that gives a lower loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from ..directions import Combination
from .base import Estimate, Point, Step, Way
from .one_sided import OneSided


class Conservative(OneSided):
    name = "conservative"
    judges_steps = True

    def estimate(self, step: Step) -> Estimate:
        estimate, bases = self.estimate_and_bases(step)
        self._choose(step, estimate, bases)
        return estimate

    def _choose(self, step: Step, estimate: Estimate, bases: Mapping[str | None, torch.Tensor]) -> None:
        """Replace the mean over the queries by the candidate whose step has the lowest loss, branch by branch.

        Indexing with the winner stays on the device; "no update" is a row of zeros.
        """
        steps: Point = {}
        gains: list[torch.Tensor] = []
        turns = [(way, turn) for way in step.ways for turn in step.turns(way)]
        for way, turn in turns:
            rows = {branch: _candidates(estimate.gradient[branch]) for branch in turn}
            points: list[Point] = [
                {
                    step.perturbations[branch]: _sgd_step(
                        step, replace(estimate.gradient[branch], weights=own[number]), branch
                    )
                    for branch, own in rows.items()
                }
                for number in range(1, len(rows[turn[0]]))
            ]
            gain = _gains(step, way, points, bases[turn[0]])
            winner = gain.argmin().view(1)
            gains.append(gain.index_select(0, winner))
            for branch, own in rows.items():
                weights = torch.stack(own).index_select(0, winner)[0]
                estimate.gradient[branch] = replace(estimate.gradient[branch], weights=weights)
                steps[step.perturbations[branch]] = _sgd_step(step, estimate.gradient[branch], branch)
        if len(turns) < 2:
            return
        # Steps that are good alone may not be good together.
        together = _gains(step, step.ways[-1], [steps], bases[step.ways[-1].branches[0]])
        options = torch.cat([together[1:], *gains])
        keep = torch.cat([torch.ones(1, len(gains)), torch.eye(len(gains))]).to(options.device)
        kept = keep.index_select(0, options.argmin().view(1))[0]
        for number, branch in enumerate(branch for _, turn in turns for branch in turn):
            mean = estimate.gradient[branch]
            estimate.gradient[branch] = replace(mean, weights=mean.weights * kept[number].to(mean.weights.dtype))


def _candidates(mean: Combination) -> list[torch.Tensor]:
    """The weights of the candidates: no step, every query's own estimate, and their mean."""
    rows = [torch.zeros_like(mean.weights), *torch.diag(mean.weights * len(mean.seeds))]
    return [*rows, mean.weights] if len(mean.seeds) > 1 else rows


def _sgd_step(step: Step, gradient: Combination, branch: str | None) -> Combination:
    return replace(gradient, scale=-step.learning_rates[branch], sign=step.sign)


def _gains(step: Step, way: Way, points: Sequence[Point], base_loss: torch.Tensor) -> torch.Tensor:
    """0, then the loss at every point minus the loss at θ."""
    losses = step.reduce(torch.stack(way.losses(points)))
    return torch.cat([torch.zeros_like(losses[:1]), (losses - base_loss).nan_to_num(nan=torch.inf)])
