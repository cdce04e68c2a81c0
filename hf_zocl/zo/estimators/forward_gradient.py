"""Forward gradients (Baydin et al. 2022): derivatives by forward-mode differentiation, without ε:

    g = 1/q · Σᵢ (∇L·Δᵢ) · Δᵢ

A pass takes twice the memory of inference.
"""

from __future__ import annotations

import torch
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..directions import Combination
from .base import Estimate, Estimator, Point, Step, finite, wide


class ForwardGradient(Estimator):
    name = "forward-gradient"
    has_eps = False

    def estimate(self, step: Step) -> Estimate:
        (way,) = step.ways
        turns = step.turns(way)
        tangents: list[Point] = [
            point
            for turn in turns
            for point in step.points(turn, lambda perturbation, seed: perturbation.tangent(seed))
        ]
        # Only the plain attention kernel has a forward-mode derivative.
        with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
            known = [wide(way.base_loss)] if way.base_loss is not None else way.losses([{}])
            losses = torch.stack(known + way.losses(tangents))
            values, derivatives = forward_ad.unpack_dual(losses)
        derivatives = torch.zeros_like(values) if derivatives is None else derivatives
        base_loss, *derivatives = step.reduce(torch.cat([values[:1], derivatives[1:]]))
        estimate, first = Estimate(loss=base_loss), 0
        for turn in turns:
            queries = len(step.seeds[turn[0]])
            mine = torch.stack(derivatives[first : first + queries])
            first += queries
            for branch in turn:
                estimate.differences[branch] = mine
                estimate.gradient[branch] = Combination(step.seeds[branch], finite(mine) / queries)
        return estimate
