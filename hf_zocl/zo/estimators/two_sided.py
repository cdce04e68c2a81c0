"""Two-sided differences (SPSA, Spall 1992; MeZO, NeurIPS 2023), with Δᵢ the direction of query i and q queries:

    g = 1/q · Σᵢ [L(θ+εΔᵢ) − L(θ−εΔᵢ)] / 2ε · Δᵢ

With two branches, L is the mean over both signs of the other branch's first query: up to O(ε²) the same number, and no
pass at θ is needed.
"""

from __future__ import annotations

import torch

from ..directions import Combination
from .base import Estimate, Estimator, Point, Step, finite


class TwoSided(Estimator):
    name = "two-sided"
    is_two_sided = True

    def estimate(self, step: Step) -> Estimate:
        sides = {
            branch: [[perturbation.query(seed, sign) for sign in (1, -1)] for seed in step.seeds[branch]]
            for branch, perturbation in step.perturbations.items()
        }
        found: list[torch.Tensor] = []
        for way in step.ways:
            points: list[Point] = []
            for branch in way.branches:
                others = {step.perturbations[other]: theirs[0] for other, theirs in sides.items() if other != branch}
                held = [{other: pair[i] for other, pair in others.items()} for i in (0, 1)] if others else [{}]
                perturbation = step.perturbations[branch]
                points += [{perturbation: side, **rest} for query in sides[branch] for side in query for rest in held]
            # Two branches meet at the four points of their first queries twice: each is evaluated once.
            keys = [frozenset(point.items()) for point in points]
            unique = dict(zip(keys, points, strict=True))
            losses = dict(zip(unique, way.losses(list(unique.values())), strict=True))
            found += [losses[key] for key in keys]
        losses = step.reduce(torch.stack(found))
        estimate, first = Estimate(loss=losses.mean()), 0
        for branch in (branch for way in step.ways for branch in way.branches):
            seeds, eps = step.seeds[branch], step.perturbations[branch].eps
            size = len(seeds) * 2 * (2 if len(sides) > 1 else 1)
            mine = losses[first : first + size].view(len(seeds), 2, -1).mean(dim=2)
            first += size
            differences = estimate.differences[branch] = (mine[:, 0] - mine[:, 1]) / 2
            weights = finite(differences / eps) / len(seeds)
            estimate.gradient[branch] = Combination(seeds, weights, moved=(eps, -eps))
        return estimate
