"""The parts that all estimators share: the request (`Step`), the losses (`Evaluation`) and the result (`Estimate`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch

from ..directions import Combination
from ..perturbation import Perturbation


# Where a loss is computed: the offset of each perturbation that is not at θ. Empty: L(θ).
Point = Mapping[Perturbation, Combination]


class Evaluation(Protocol):
    """Computes losses at given points; see `hf_zocl.passes`."""

    def losses(self, points: Sequence[Point]) -> list[torch.Tensor]:
        """The loss at every point; scalars."""


@dataclass
class Estimate:
    """One estimate, by branch: a few numbers, from which `ZOEstimator.write` makes the gradient.

    Attributes:
        gradient: Σᵢ wᵢ·Δᵢ.
        differences: The q loss differences, shape `(q,)`: L(θ+εΔ) − L(θ), or half of L(θ+εΔ) − L(θ−εΔ); for
            `forward-gradient` the derivatives ∇L·Δ.
        loss: L(θ); for `two-sided`, which has no pass at θ, the mean of its losses, equal up to O(ε²).
    """

    gradient: dict[str | None, Combination] = field(default_factory=dict)
    differences: dict[str | None, torch.Tensor] = field(default_factory=dict)
    loss: torch.Tensor | None = None


@dataclass
class Way:
    """Branches that are evaluated in the same way, and their evaluation, made when it is first used.

    Attributes:
        branches: By name.
        make: Makes the evaluation.
        base_loss: L(θ) by this evaluation, where known.
    """

    branches: list[str | None]
    make: Callable[[], Evaluation]
    base_loss: torch.Tensor | None = None

    @cached_property
    def evaluation(self) -> Evaluation:
        return self.make()

    def losses(self, points: Sequence[Point]) -> list[torch.Tensor]:
        """The loss at every point, in float32 at least: a difference of two losses needs that."""
        return [wide(loss) for loss in self.evaluation.losses(points)]


@dataclass
class Step:
    """A request to an estimator: estimate the gradient of one micro-batch along these directions.

    Attributes:
        perturbations: By branch.
        seeds: The seeds of every branch's directions.
        ways: How each branch is evaluated.
        reduce: Averages a tensor of losses over data-parallel ranks.
        noise: By branch, the standard deviation of a loss's rounding, where it was measured.
        learning_rates: By branch, the size of the step that will be taken.
        sign: Whether that step will follow the sign of the estimate.
        moves_together: Whether all branches move at once, so that every difference counts for each of them; else they
            take turns. Branches that move at once have the same number of queries and a single way.
    """

    perturbations: Mapping[str | None, Perturbation]
    seeds: Mapping[str | None, tuple[int, ...]]
    ways: Sequence[Way]
    reduce: Callable[[torch.Tensor], torch.Tensor]
    noise: Mapping[str | None, float]
    learning_rates: Mapping[str | None, float]
    sign: bool
    moves_together: bool = False

    def turns(self, way: Way) -> list[tuple[str | None, ...]]:
        """The branches of a way, grouped by those that move at once."""
        return [tuple(way.branches)] if self.moves_together else [(branch,) for branch in way.branches]

    def points(
        self, branches: Sequence[str | None], offset: Callable[[Perturbation, int], Combination]
    ) -> list[Point]:
        """A point for every query, at which these branches are moved.

        Args:
            branches: The branches of one turn.
            offset: Gives the offset for a perturbation and a direction's seed.
        """
        rows = zip(*(self.seeds[branch] for branch in branches), strict=True)
        moved = [self.perturbations[branch] for branch in branches]
        return [{own: offset(own, seed) for own, seed in zip(moved, row, strict=True)} for row in rows]


class Estimator:
    """A formula: which losses it needs, and how they weight the directions.

    Attributes:
        name: Its value of the argument `zo_estimator`.
        least_queries: How many directions of a branch it needs.
        is_two_sided: Whether it compares both sides of θ, so that truncation comes from the third derivative.
        has_eps: Whether it moves the parameters by ε; else it differentiates.
        has_scale: Whether the estimate scales with the gradient, and so with the loss.
        judges_steps: Whether it chooses among plain SGD steps by the loss after each.
    """

    name: str
    least_queries = 1
    is_two_sided = False
    has_eps = True
    has_scale = True
    judges_steps = False

    def estimate(self, step: Step) -> Estimate:
        raise NotImplementedError


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in float32 at least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def finite(weights: torch.Tensor) -> torch.Tensor:
    """The weights, with 0 in place of any that is not finite: such a query counts for nothing."""
    return torch.nan_to_num(weights, nan=0.0, posinf=0.0, neginf=0.0)
