"""Two-sided differences (SPSA, Spall 1992; MeZO, NeurIPS 2023), with Δᵢ the direction of query i and q queries:

    g = 1/q · Σᵢ [L(θ+εΔᵢ) − L(θ−εΔᵢ)] / 2ε · Δᵢ

With two branches that take turns, L is the mean over both signs of the other branch's first query: up to O(ε²) this is
the same number, and it needs no pass at θ.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ..directions import Combination
from .base import Estimate, Estimator, Point, Step, finite


class TwoSided(Estimator):
    name = "two-sided"
    is_two_sided = True

    def estimate(self, step: Step) -> Estimate:
        ways = [(way, step.turns(way)) for way in step.ways]
        sides = {
            turn: [
                step.points(turn, lambda perturbation, seed, sign=sign: perturbation.query(seed, sign))
                for sign in (1, -1)
            ]
            for _, turns in ways
            for turn in turns
        }
        found: list[torch.Tensor] = []
        for way, turns in ways:
            points: list[Point] = []
            for turn in turns:
                others = [theirs for other, theirs in sides.items() if other != turn]
                # The first query of every other turn, on either side.
                held = [_merged(theirs[i][0] for theirs in others) for i in (0, 1)] if others else [{}]
                points += [
                    {**side, **rest} for query in zip(*sides[turn], strict=True) for side in query for rest in held
                ]
            # The four points of two branches' first queries appear twice: each is evaluated once.
            keys = [frozenset(point.items()) for point in points]
            unique = dict(zip(keys, points, strict=True))
            by_point = dict(zip(unique, way.losses(list(unique.values())), strict=True))
            found += [by_point[key] for key in keys]
        losses = step.reduce(torch.stack(found))
        estimate, first = Estimate(loss=losses.mean()), 0
        for turn in sides:
            queries = len(step.seeds[turn[0]])
            size = queries * 2 * (2 if len(sides) > 1 else 1)
            mine = losses[first : first + size].view(queries, 2, -1).mean(dim=2)
            first += size
            for branch in turn:
                eps = step.perturbations[branch].eps
                differences = estimate.differences[branch] = (mine[:, 0] - mine[:, 1]) / 2
                weights = finite(differences / eps) / queries
                estimate.gradient[branch] = Combination(step.seeds[branch], weights, moved=(eps, -eps))
        return estimate


def _merged(points: Iterable[Point]) -> Point:
    return {perturbation: offset for point in points for perturbation, offset in point.items()}
