"""From losses to a gradient estimate, written into `.grad`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from .assignment import ZOGroup
from .perturbation import Perturbation, direction_seed, draw_directions


ESTIMATORS = ("one-sided", "two-sided", "conservative", "fzoo")

# The loss at the present parameters, given the branch whose parameters differ from θ (None: none does).
BranchLoss = Callable[[str | None], torch.Tensor]


@dataclass
class Estimate:
    """What one estimate saw, by branch; everything stays on the device.

    Attributes:
        differences: The q loss differences, shape `(q,)`: L(θ+εΔ) − L(θ), or half of L(θ+εΔ) − L(θ−εΔ).
        variance: The variance of the estimate's coordinates, before any sign normalisation, scalar.
    """

    differences: dict[str | None, torch.Tensor] = field(default_factory=dict)
    variance: dict[str | None, torch.Tensor] = field(default_factory=dict)


class ZOEstimator:
    """Estimates the gradient of a loss in the zeroth-order groups from forward passes alone.

    The branches take turns: while one is perturbed, the other stays at θ (equation 2 of arXiv 2506.12409 holds the
    other modality fixed). With Δᵢ the direction of query i and g the mean over the q queries:

    - `one-sided`: g = [L(θ+εΔᵢ) − L(θ)] / ε · Δᵢ (equation 2)
    - `two-sided`: g = [L(θ+εΔᵢ) − L(θ−εΔᵢ)] / 2ε · Δᵢ (SPSA; MeZO, NeurIPS 2023)
    - `fzoo`: g = [L(θ+εΔᵢ) − L(θ)] / σ · Δᵢ, σ the standard deviation of the q losses (FZOO, ICLR 2026)
    - `conservative`: the one-sided estimate of every query, and their mean, are tried as an SGD step; the one with the
      lowest loss is g, or zero when no step beats standing still (ZO-SGD-Cons; ZO-LLM, ICML 2024)

    A query whose loss is not finite counts for nothing, so one overflow does not spoil the weights.

    Args:
        groups: The zeroth-order parameters; all groups of a branch are perturbed together.
        estimator: One of `one-sided`, `two-sided`, `conservative`, `fzoo`.
        queries: q, the number of directions; one number, or one per branch.
        sign: Use the sign of the estimate, not its magnitude (gradient sign normalisation of MoZO).
        direction: `gaussian` or `rademacher`.
        seed: Keys the directions, with the step, the micro-step and the query.
        reduce: Averages a tensor of losses over data-parallel ranks.

    Raises:
        ValueError: If the estimator is unknown, or has fewer queries than it needs.
    """

    def __init__(
        self,
        groups: Sequence[ZOGroup],
        estimator: str = "one-sided",
        queries: int | Mapping[str | None, int] = 1,
        sign: bool = False,
        direction: str = "gaussian",
        seed: int = 0,
        reduce: Callable[[torch.Tensor], torch.Tensor] = lambda losses: losses,
    ):
        if estimator not in ESTIMATORS:
            raise ValueError(f"zo_estimator={estimator!r} is unknown: expected one of {', '.join(ESTIMATORS)}.")
        self.estimator, self.sign, self.direction = estimator, sign, direction
        self.seed, self.reduce = seed, reduce
        self.branches: dict[str | None, list[ZOGroup]] = {}
        for group in groups:
            self.branches.setdefault(group.branch, []).append(group)
        self.queries = {branch: queries if isinstance(queries, int) else queries[branch] for branch in self.branches}
        least = 2 if estimator == "fzoo" else 1
        for branch, count in self.queries.items():
            if count < least:
                name = "zo_queries" + (f" ({branch})" if branch else "")
                raise ValueError(f"{name}={count}: zo_estimator={estimator!r} needs at least {least}.")

    @property
    def needs_base_loss(self) -> bool:
        """Whether the estimate uses L(θ)."""
        return self.estimator != "two-sided"

    @torch.no_grad()
    def accumulate(
        self,
        loss: BranchLoss,
        step: int,
        micro_step: int = 0,
        base_loss: torch.Tensor | None = None,
        scale: float = 1.0,
        learning_rate: float = 0.0,
    ) -> Estimate:
        """Add `scale` times the estimate to `.grad` of every zeroth-order parameter.

        Args:
            loss: Evaluates the loss, a scalar, at the parameters as they are when it is called.
            step, micro_step: Key the directions; the micro-step counts the batches of one accumulated step.
            base_loss: L(θ), if a first-order pass has it already.
            scale: What the loss of this micro-batch counts in the accumulated step.
            learning_rate: The size of the SGD step by which `conservative` judges its candidates.
        """
        if base_loss is None and self.needs_base_loss:
            base_loss = loss(None)
        estimate = Estimate()
        first = 0
        for branch, groups in self.branches.items():
            last = first + self.queries[branch]
            seeds = [direction_seed(self.seed, step, micro_step, number) for number in range(first, last)]
            first = last
            query = _BranchQueries(groups, seeds, self.direction, loss, branch, self.reduce)
            with query.perturbation.saved():
                gradient, estimate.differences[branch] = self._gradient(query, base_loss, learning_rate)
            estimate.variance[branch] = _variance(gradient)
            self._add_to_grad(groups, gradient, scale)
        return estimate

    def normalise(self) -> None:
        """Replace the accumulated estimate by its sign, if `sign` is on; to be called once before the optimizer."""
        if not self.sign:
            return
        for group in (group for groups in self.branches.values() for group in groups):
            torch._foreach_sign_([parameter.grad for parameter in group.parameters])

    def _gradient(
        self, query: _BranchQueries, base_loss: torch.Tensor | None, learning_rate: float
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        if self.estimator == "two-sided":
            differences = query.two_sided_differences()
            return query.combine(differences / len(differences)), differences
        losses, base_loss = query.losses(base_loss)
        differences = losses - base_loss
        if self.estimator == "one-sided":
            return query.combine(differences / len(differences)), differences
        if self.estimator == "fzoo":
            deviation = losses.std().clamp_min(torch.finfo(losses.dtype).tiny)
            return query.combine(differences / len(differences) / deviation, per_eps=False), differences
        return self._conservative(query, differences, base_loss, learning_rate), differences

    def _conservative(
        self, query: _BranchQueries, differences: torch.Tensor, base_loss: torch.Tensor, learning_rate: float
    ) -> list[torch.Tensor]:
        candidates = list(torch.diag(differences))
        if len(differences) > 1:
            candidates.append(differences / len(differences))
        losses = [base_loss]
        for candidate in candidates:
            update = query.combine(candidate)
            if self.sign:
                torch._foreach_sign_(update)
            losses.append(query.loss_at(update, -learning_rate))
        losses = torch.cat([losses[0].view(1), self.reduce(torch.stack(losses[1:]))]).nan_to_num(nan=torch.inf)
        # Indexing with the winner stays on the device; "no update" is a row of zeros.
        rows = torch.stack([torch.zeros_like(differences), *candidates])
        return query.combine(rows[losses.argmin()])

    @staticmethod
    def _add_to_grad(groups: Sequence[ZOGroup], gradient: Sequence[torch.Tensor], scale: float) -> None:
        parameters = [parameter for group in groups for parameter in group.parameters]
        for parameter, piece in zip(parameters, gradient, strict=True):
            piece = piece.mul_(scale).to(parameter.dtype)
            parameter.grad = piece if parameter.grad is None else parameter.grad.add_(piece)


class _BranchQueries:
    """The q queries of one branch; a direction is drawn from its seed when it is needed and kept no longer."""

    def __init__(
        self,
        groups: Sequence[ZOGroup],
        seeds: Sequence[int],
        direction: str,
        loss: BranchLoss,
        branch: str | None,
        reduce: Callable[[torch.Tensor], torch.Tensor],
    ):
        self.groups, self.seeds, self.direction = groups, seeds, direction
        self.loss, self.branch, self.reduce = loss, branch, reduce
        self.perturbation = Perturbation(groups)

    def losses(self, base_loss: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """L(θ+εΔᵢ), shape `(q,)`, and L(θ), both averaged over the ranks."""
        losses = [_wide(base_loss)]
        for seed in self.seeds:
            self.perturbation.perturb(self._draw(seed))
            losses.append(_wide(self.loss(self.branch)))
        losses = self.reduce(torch.stack(losses))
        return losses[1:], losses[0]

    def two_sided_differences(self) -> torch.Tensor:
        """[L(θ+εΔᵢ) − L(θ−εΔᵢ)] / 2, shape `(q,)`, averaged over the ranks."""
        differences = []
        for seed in self.seeds:
            direction = self._draw(seed)
            self.perturbation.perturb(direction, sign=1)
            forward = _wide(self.loss(self.branch))
            self.perturbation.perturb(direction, sign=-1)
            differences.append((forward - _wide(self.loss(self.branch))) / 2)
        return self.reduce(torch.stack(differences))

    def loss_at(self, update: Sequence[torch.Tensor], factor: float) -> torch.Tensor:
        """L(θ + factor·update)."""
        self.perturbation.move(update, factor)
        return _wide(self.loss(self.branch))

    def combine(self, weights: torch.Tensor, per_eps: bool = True) -> list[torch.Tensor]:
        """Σᵢ wᵢ·Δᵢ, divided by the ε of each parameter unless `per_eps` is off; one tensor a parameter."""
        total: list[torch.Tensor] | None = None
        weights = torch.nan_to_num(weights, nan=0.0, posinf=0.0, neginf=0.0)
        for weight, seed in zip(weights, self.seeds, strict=True):
            term = torch._foreach_mul([_wide(direction) for direction in self._draw(seed)], weight)
            total = term if total is None else torch._foreach_add(total, term)
        if per_eps:
            torch._foreach_div_(total, self.perturbation.eps)
        return total

    def _draw(self, seed: int) -> list[torch.Tensor]:
        return draw_directions(self.groups, seed, self.direction)


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """In float32 at least: a difference of two losses needs it."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _variance(gradient: Sequence[torch.Tensor]) -> torch.Tensor:
    """The variance over all coordinates of a gradient, as if its tensors were one vector."""
    return torch.cat([piece.flatten() for piece in gradient]).var(correction=0)
