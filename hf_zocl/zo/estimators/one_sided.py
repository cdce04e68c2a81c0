"""One-sided differences, with Δᵢ the direction of query i and q queries:

g = 1/q · Σᵢ [L(θ+εΔᵢ) − L(θ)] / ε · Δᵢ        (equation 2 of arXiv 2506.12409)
"""

from __future__ import annotations

import torch

from ..directions import Combination
from .base import Estimate, Estimator, Point, Step, finite, wide


class OneSided(Estimator):
    name = "one-sided"

    def estimate(self, step: Step) -> Estimate:
        return self.estimate_and_bases(step)[0]

    def estimate_and_bases(self, step: Step) -> tuple[Estimate, dict[str | None, torch.Tensor]]:
        """The estimate, and L(θ) of every branch by the branch's own passes."""
        losses: list[torch.Tensor] = []
        for way in step.ways:
            points: list[Point] = [] if way.base_loss is not None else [{}]
            for branches in step.turns(way):
                points += step.points(branches, lambda perturbation, seed: perturbation.query(seed))
            known = [] if way.base_loss is None else [wide(way.base_loss)]
            losses += known + way.losses(points)
        rest = step.reduce(torch.stack(losses))
        estimate, bases = Estimate(loss=rest[0]), {}
        for way in step.ways:
            base_loss, rest = rest[0], rest[1:]
            for branches in step.turns(way):
                mine, rest = rest.tensor_split([len(step.seeds[branches[0]])])
                for branch in branches:
                    seeds, eps = step.seeds[branch], step.perturbations[branch].eps
                    bases[branch], estimate.differences[branch] = base_loss, mine - base_loss
                    weights = finite(self.quotients(mine, base_loss, eps, step.noise.get(branch, 0.0))) / len(mine)
                    estimate.gradient[branch] = Combination(seeds, weights, moved=(eps, 0.0))
        return estimate, bases

    def quotients(self, losses: torch.Tensor, base_loss: torch.Tensor, eps: float, noise: float) -> torch.Tensor:
        """The weight of each direction, from its loss, shape `(q,)`."""
        return (losses - base_loss) / eps
