"""From losses to a gradient estimate, written into `.grad`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from .assignment import ZOGroup, in_branch
from .perturbation import Combination, Moments, Perturbation, direction_seed
from .streaming import StreamedPerturbation


ESTIMATORS = ("one-sided", "two-sided", "conservative", "fzoo", "forward-gradient")

# Where a loss is asked for: the perturbations that are not at θ, and their offsets. Empty: L(θ).
Point = Mapping[Perturbation, Combination]
# A branch and a layer's label.
Place = tuple[str | None, int | str | None]
# A part of the batch, from its first row to before its last; None: the whole batch.
Rows = tuple[int, int] | None


class Evaluation(Protocol):
    """The way to a loss; see `hf_zocl.zo.evaluation`."""

    batch_rows: int | None

    def losses(self, points: Sequence[Point], rows: Sequence[Rows] | None = None) -> list[torch.Tensor]:
        """The loss at every point, on the whole batch or on some rows of it each; scalars."""


@dataclass
class Estimate:
    """One estimate, by branch: a few numbers, from which `ZOEstimator.write` makes the gradient.

    Attributes:
        gradient: Σᵢ wᵢ·Δᵢ.
        differences: The q loss differences, shape `(q,)`: L(θ+εΔ) − L(θ), or half of L(θ+εΔ) − L(θ−εΔ); for
            `forward-gradient` the derivatives ∇L·Δ.
        loss: L(θ); for `two-sided`, which does without it, the mean of its losses, equal up to O(ε²).
    """

    gradient: dict[str | None, Combination] = field(default_factory=dict)
    differences: dict[str | None, torch.Tensor] = field(default_factory=dict)
    loss: torch.Tensor | None = None


class ZOEstimator:
    """Estimates the gradient of a loss in the zeroth-order groups from forward passes alone.

    Equation 2 of arXiv 2506.12409 perturbs one modality and holds the other, so every branch has its own directions.
    With Δᵢ the direction of query i and g the mean over the q queries:

    - `one-sided`: g = [L(θ+εΔᵢ) − L(θ)] / ε · Δᵢ (equation 2)
    - `two-sided`: g = [L(θ+εΔᵢ) − L(θ−εΔᵢ)] / 2ε · Δᵢ (SPSA; MeZO, NeurIPS 2023). With two branches, L is the mean
      over both signs of the other branch's first query: up to O(ε²) the same number, and no pass at θ is needed.
    - `fzoo`: g = [L(θ+εΔᵢ) − L(θ)] / σ · Δᵢ, σ the standard deviation of the q losses (FZOO, ICLR 2026)
    - `conservative`: the one-sided estimate of every query, and their mean, are tried as an SGD step; the one with the
      lowest loss is g, or zero when no step beats standing still (ZO-SGD-Cons; ZO-LLM, ICML 2024)
    - `forward-gradient`: g = (∇L·Δᵢ) · Δᵢ, without ε, by forward-mode differentiation (Baydin et al. 2022)

    Where a branch's queries share the batch, each has an equal part of it: L is then the loss on that part, both at θ
    and at θ+εΔᵢ. All of them together cost one forward pass, however many they are.

    A query whose loss is not finite counts for nothing, so one overflow does not spoil the weights.

    Args:
        groups: The zeroth-order parameters; all groups of a branch are perturbed together.
        estimator: One of `one-sided`, `two-sided`, `conservative`, `fzoo`, `forward-gradient`.
        queries: q, the number of directions; one number, or one per branch.
        sign: Use the sign of the estimate, not its magnitude (gradient sign normalisation of MoZO).
        direction: `gaussian` or `rademacher`.
        seed: Keys the directions, with the step, the micro-step and the query.
        reduce: Averages a tensor of losses over data-parallel ranks.
        model: Where given, parameters are streamed: moved in place, layer by layer, rather than copied. Not by
            `forward-gradient`, whose tangents are as many as the parameters anyway.
        sharing: The branches whose queries share the batch; of `one-sided` alone.

    Raises:
        ValueError: If the estimator is unknown, has fewer queries than it needs, or cannot have them share the batch.
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
        model: nn.Module | None = None,
        sharing: Collection[str | None] = (),
    ):
        if estimator not in ESTIMATORS:
            raise ValueError(f"zo_estimator={estimator!r} is unknown: expected one of {', '.join(ESTIMATORS)}.")
        if sharing and estimator != "one-sided":
            raise ValueError(f"zo_share_batch=True: expected zo_estimator='one-sided', got {estimator!r}.")
        self.estimator, self.sign, self.seed, self.reduce, self.sharing = estimator, sign, seed, reduce, sharing
        branches: dict[str | None, list[ZOGroup]] = {}
        for group in groups:
            branches.setdefault(group.branch, []).append(group)
        self.is_streamed = model is not None and estimator != "forward-gradient"
        self.perturbations = {
            branch: StreamedPerturbation(members, model, direction)
            if self.is_streamed
            else Perturbation(members, direction)
            for branch, members in branches.items()
        }
        self.queries = {branch: in_branch(queries, branch) for branch in branches}
        least = 2 if estimator == "fzoo" else 1
        for branch, count in self.queries.items():
            if count < least:
                name = "zo_queries" + (f" ({branch})" if branch else "")
                raise ValueError(f"{name}={count}: zo_estimator={estimator!r} needs at least {least}.")

    def direction_seeds(self, step: int, micro_step: int = 0) -> dict[str | None, tuple[int, ...]]:
        """The seeds of the queries' directions by branch: they follow from the seed and the step alone."""
        seeds, first = {}, 0
        for branch, count in self.queries.items():
            numbers = range(first, first + count)
            seeds[branch] = tuple(direction_seed(self.seed, step, micro_step, number) for number in numbers)
            first += count
        return seeds

    @torch.no_grad()
    def estimate(
        self,
        evaluation: Evaluation,
        step: int,
        micro_step: int = 0,
        base_loss: torch.Tensor | None = None,
        learning_rate: float | Mapping[str | None, float] = 0.0,
    ) -> Estimate:
        """Ask for the losses that the estimate needs, all of them at once, and weigh the directions.

        Args:
            evaluation: Gives the losses.
            step, micro_step: Key the directions; the micro-step counts the batches of one accumulated step.
            base_loss: L(θ), if a first-order pass has it already.
            learning_rate: The size of the SGD step by which `conservative` judges its candidates; one number, or one
                per branch.
        """
        seeds = self.direction_seeds(step, micro_step)
        if self.estimator == "two-sided":
            return self._two_sided(evaluation, seeds)
        if self.estimator == "forward-gradient":
            return self._forward_gradient(evaluation, seeds, base_loss)
        estimate = self._one_sided(evaluation, seeds, base_loss)
        if self.estimator == "conservative":
            self._choose(estimate, evaluation, learning_rate)
        return estimate

    @torch.no_grad()
    def write(self, estimates: Sequence[tuple[Estimate, float]]) -> dict[Place, Moments]:
        """Set `.grad` of every zeroth-order parameter to Σ scale·g, or to its sign if `sign` is on.

        Args:
            estimates: The estimates of one optimizer step's micro-batches, and what each counts.

        Returns:
            The moments of the sum by branch and layer, before any sign normalisation.
        """
        moments = {}
        for branch, perturbation in self.perturbations.items():
            own = perturbation.write(_gradient(estimates, branch), self.sign)
            moments |= {(branch, layer): value for layer, value in own.items()}
        return moments

    @torch.no_grad()
    def stream(
        self, estimates: Sequence[tuple[Estimate, float]], factor: float | torch.Tensor = 1.0
    ) -> Iterator[dict[Place, Moments]]:
        """What `write` does, times a factor, for one layer after another (see `StreamedPerturbation`)."""
        for branch, perturbation in self.perturbations.items():
            for moments in perturbation.stream(_gradient(estimates, branch), self.sign, factor):
                yield {(branch, layer): value for layer, value in moments.items()}

    def _one_sided(
        self, evaluation: Evaluation, seeds: Mapping[str | None, tuple[int, ...]], base_loss: torch.Tensor | None
    ) -> Estimate:
        points: list[Point] = [] if base_loss is not None else [{}]
        rows: list[Rows] = [None] * len(points)
        counts = {}
        for branch, perturbation in self.perturbations.items():
            parts: list[Rows] = [None] * len(seeds[branch])
            if branch in self.sharing:
                parts = _parts(evaluation.batch_rows, len(seeds[branch]))
                points, rows = points + [{}] * len(parts), rows + parts
            counts[branch] = len(parts)
            points += [{perturbation: perturbation.query(seed)} for seed in seeds[branch][: len(parts)]]
            rows += parts
        losses = [_wide(loss) for loss in evaluation.losses(points, rows)]
        own = [] if base_loss is None else [_wide(base_loss)]
        base_loss, *losses = self.reduce(torch.stack(own + losses))
        estimate, first = Estimate(loss=base_loss), 0
        for branch, perturbation in self.perturbations.items():
            count, bases = counts[branch], base_loss
            if branch in self.sharing:
                bases = torch.stack(losses[first : first + count])
                first += count
            mine = torch.stack(losses[first : first + count])
            first += count
            differences = estimate.differences[branch] = mine - bases
            divisor = _finite_std(mine) if self.estimator == "fzoo" else perturbation.eps
            weights = torch.zeros(len(seeds[branch]), dtype=mine.dtype, device=mine.device)
            weights[:count] = _finite(differences / divisor) / count  # a query without a part counts for nothing
            estimate.gradient[branch] = Combination(seeds[branch], weights)
        return estimate

    def _two_sided(self, evaluation: Evaluation, seeds: Mapping[str | None, tuple[int, ...]]) -> Estimate:
        sides = {
            perturbation: [[perturbation.query(seed, sign) for sign in (1, -1)] for seed in seeds[branch]]
            for branch, perturbation in self.perturbations.items()
        }
        points: list[Point] = []
        for perturbation, queries in sides.items():
            others = {other: theirs[0] for other, theirs in sides.items() if other is not perturbation}
            held = [{other: pair[i] for other, pair in others.items()} for i in (0, 1)] if others else [{}]
            points += [{perturbation: side, **rest} for query in queries for side in query for rest in held]
        # Two branches meet at the four points of their first queries twice: each is evaluated once.
        keys = [frozenset(point.items()) for point in points]
        unique = dict(zip(keys, points, strict=True))
        losses = dict(zip(unique, map(_wide, evaluation.losses(list(unique.values()))), strict=True))
        losses = self.reduce(torch.stack([losses[key] for key in keys]))
        estimate, first = Estimate(loss=losses.mean()), 0
        for branch, perturbation in self.perturbations.items():
            count = len(seeds[branch])
            size = count * 2 * (2 if len(sides) > 1 else 1)
            mine = losses[first : first + size].view(count, 2, -1).mean(dim=2)
            first += size
            differences = estimate.differences[branch] = (mine[:, 0] - mine[:, 1]) / 2
            estimate.gradient[branch] = Combination(seeds[branch], _finite(differences / perturbation.eps) / count)
        return estimate

    def _forward_gradient(
        self, evaluation: Evaluation, seeds: Mapping[str | None, tuple[int, ...]], base_loss: torch.Tensor | None
    ) -> Estimate:
        tangents: list[Point] = [
            {perturbation: perturbation.tangent(seed)}
            for branch, perturbation in self.perturbations.items()
            for seed in seeds[branch]
        ]
        # Of the attention kernels, the plain one alone has a forward-mode derivative.
        with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
            own = [base_loss] if base_loss is not None else evaluation.losses([{}])
            losses = torch.stack([_wide(loss) for loss in own + evaluation.losses(tangents)])
            values, derivatives = forward_ad.unpack_dual(losses)
        derivatives = torch.zeros_like(values) if derivatives is None else derivatives
        base_loss, *derivatives = self.reduce(torch.cat([values[:1], derivatives[1:]]))
        estimate, first = Estimate(loss=base_loss), 0
        for branch in self.perturbations:
            count = len(seeds[branch])
            mine = estimate.differences[branch] = torch.stack(derivatives[first : first + count])
            first += count
            estimate.gradient[branch] = Combination(seeds[branch], _finite(mine) / count)
        return estimate

    def _choose(
        self, estimate: Estimate, evaluation: Evaluation, learning_rate: float | Mapping[str | None, float]
    ) -> None:
        """Replace the mean over the queries by the candidate whose step has the lowest loss."""
        for branch, perturbation in self.perturbations.items():
            mean = estimate.gradient[branch]
            rows = [torch.zeros_like(mean.weights), *torch.diag(mean.weights * len(mean.seeds))]
            if len(mean.seeds) > 1:
                rows.append(mean.weights)
            size = in_branch(learning_rate, branch)
            steps = [Combination(mean.seeds, row, -size, self.sign) for row in rows[1:]]
            losses = [_wide(loss) for loss in evaluation.losses([{perturbation: step} for step in steps])]
            losses = torch.cat([estimate.loss.view(1), self.reduce(torch.stack(losses))]).nan_to_num(nan=torch.inf)
            # Indexing with the winner stays on the device; "no update" is a row of zeros.
            winner = torch.stack(rows).index_select(0, losses.argmin().view(1))[0]
            estimate.gradient[branch] = Combination(mean.seeds, winner)


def _gradient(estimates: Sequence[tuple[Estimate, float]], branch: str | None) -> list[Combination]:
    return [estimate.gradient[branch].scaled(scale) for estimate, scale in estimates]


def _parts(batch: int, queries: int) -> list[Rows]:
    """Equal parts of a batch, at most one for each query: the smallest that divide it."""
    size = next(size for size in range(1, batch + 1) if batch % size == 0 and size * queries >= batch)
    return [(first, first + size) for first in range(0, batch, size)]


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """In float32 at least: a difference of two losses needs it."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _finite_std(losses: torch.Tensor) -> torch.Tensor:
    """The standard deviation of the finite losses, above zero, without waiting for a count of them."""
    finite = losses.isfinite()
    count, known = finite.sum(), losses.nan_to_num(0.0, 0.0, 0.0) * finite
    squares = ((known - known.sum() / count) * finite).square().sum()
    return (squares / (count - 1)).sqrt().nan_to_num(0.0).clamp_min(torch.finfo(losses.dtype).tiny)


def _finite(weights: torch.Tensor) -> torch.Tensor:
    return torch.nan_to_num(weights, nan=0.0, posinf=0.0, neginf=0.0)
