"""From losses to a gradient estimate, written into `.grad`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from .assignment import ZOGroup, in_branch
from .noise import Resolution
from .perturbation import Combination, Moments, Perturbation, direction_seed
from .streaming import StreamedPerturbation


ESTIMATORS = ("one-sided", "two-sided", "conservative", "fzoo", "forward-gradient")

# Where a loss is asked for: the perturbations that are not at θ, and their offsets. Empty: L(θ).
Point = Mapping[Perturbation, Combination]
# A branch and a layer's label.
Place = tuple[str | None, int | str | None]
# Rounding moves a loss by up to so many times its number format's spacing.
ROUNDING = 4


class Evaluation(Protocol):
    """The way to a loss; see `hf_zocl.zo.evaluation`."""

    def losses(self, points: Sequence[Point]) -> list[torch.Tensor]:
        """The loss at every point; scalars."""


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
    - `fzoo`: g = [L(θ+εΔᵢ) − L(θ)] / σ · Δᵢ, σ the standard deviation of the q losses (FZOO, ICLR 2026); zero where σ
      is no greater than the rounding of a loss
    - `conservative`: the one-sided estimate of every query, and their mean, are tried as an SGD step; the one with the
      lowest loss is g, or zero when no step beats standing still (ZO-SGD-Cons; ZO-LLM, ICML 2024). With several
      branches, their steps together are tried as well, and one branch steps alone where that is lower
    - `forward-gradient`: g = (∇L·Δᵢ) · Δᵢ, without ε, by forward-mode differentiation (Baydin et al. 2022)

    A query whose loss is not finite counts for nothing, so one overflow does not spoil the weights. Where weights are
    kept in half precision, Δᵢ is the move that was made, after rounding: what did not move is not stepped.

    Args:
        groups: The zeroth-order parameters; all groups of a branch are perturbed together.
        estimator: One of `one-sided`, `two-sided`, `conservative`, `fzoo`, `forward-gradient`.
        queries: q, the number of directions; one number, or one per branch.
        sign: Use the sign of the estimate, not its magnitude (gradient sign normalisation of MoZO).
        seed: Keys the directions, with the step, the micro-step and the query.
        reduce: Averages a tensor of losses over data-parallel ranks.
        model: Where given, parameters are streamed: moved in place, layer by layer, rather than copied. Not by
            `forward-gradient`, whose tangents are as many as the parameters anyway.

    Attributes:
        resolutions: By branch, how fine its differences are (see `hf_zocl.zo.noise`), where that was measured.

    Raises:
        ValueError: If the estimator is unknown, or has fewer queries than it needs.
    """

    def __init__(
        self,
        groups: Sequence[ZOGroup],
        estimator: str = "one-sided",
        queries: int | Mapping[str | None, int] = 1,
        sign: bool = False,
        seed: int = 0,
        reduce: Callable[[torch.Tensor], torch.Tensor] = lambda losses: losses,
        model: nn.Module | None = None,
    ):
        if estimator not in ESTIMATORS:
            raise ValueError(f"zo_estimator={estimator!r} is unknown: expected one of {', '.join(ESTIMATORS)}.")
        self.estimator, self.sign, self.seed, self.reduce = estimator, sign, seed, reduce
        self.resolutions: dict[str | None, Resolution] = {}
        branches: dict[str | None, list[ZOGroup]] = {}
        for group in groups:
            branches.setdefault(group.branch, []).append(group)
        self.is_streamed = model is not None and estimator != "forward-gradient"
        self.perturbations = {
            branch: StreamedPerturbation(members, model) if self.is_streamed else Perturbation(members)
            for branch, members in branches.items()
        }
        self.queries = {branch: in_branch(queries, branch) for branch in branches}
        least = 2 if estimator == "fzoo" else 1
        for branch, count in self.queries.items():
            if count < least:
                name = "zo_queries" + (f" ({branch})" if branch else "")
                raise ValueError(f"{name}={count}: zo_estimator={estimator!r} needs at least {least}.")

    def settle(self, resolutions: Mapping[str | None, Resolution]) -> None:
        """Take on the ε and the precision of the passes that were measured for each branch."""
        self.resolutions = dict(resolutions)
        for branch, resolution in resolutions.items():
            self.perturbations[branch].eps = resolution.eps

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
        finer: Callable[[], Evaluation] | None = None,
    ) -> Estimate:
        """Ask for the losses that the estimate needs, all of them at once, and weigh the directions.

        Args:
            evaluation: Gives the losses.
            step, micro_step: Key the directions; the micro-step counts the batches of one accumulated step.
            base_loss: L(θ) by `evaluation`, if a first-order pass has it already.
            learning_rate: The size of the SGD step by which `conservative` judges its candidates; one number, or one
                per branch.
            finer: Makes the evaluation of the branches whose resolution asks for a finer one.
        """
        seeds = self.direction_seeds(step, micro_step)
        if self.estimator == "forward-gradient":
            return self._forward_gradient(evaluation, seeds, base_loss)
        ways = self._ways(evaluation, base_loss, finer)
        if self.estimator == "two-sided":
            return self._two_sided(ways, seeds)
        estimate, bases = self._one_sided(ways, seeds)
        if self.estimator == "conservative":
            self._choose(estimate, ways, bases, learning_rate)
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

    def _ways(
        self, evaluation: Evaluation, base_loss: torch.Tensor | None, finer: Callable[[], Evaluation] | None
    ) -> list[_Way]:
        """Which branches are evaluated how; the plain way first, for a finer one reuses what it has computed."""
        is_finer = {branch: branch in self.resolutions and self.resolutions[branch].finer for branch in self.queries}
        ways = [_Way([b for b in self.queries if not is_finer[b]], lambda: evaluation, base_loss)]
        ways += [_Way([b for b in self.queries if is_finer[b]], finer)]
        return [way for way in ways if way.branches]

    def _one_sided(
        self, ways: Sequence[_Way], seeds: Mapping[str | None, tuple[int, ...]]
    ) -> tuple[Estimate, dict[str | None, torch.Tensor]]:
        """The estimate, and every branch's L(θ)."""
        losses: list[torch.Tensor] = []
        for way in ways:
            points: list[Point] = [] if way.base_loss is not None else [{}]
            for branch in way.branches:
                perturbation = self.perturbations[branch]
                points += [{perturbation: perturbation.query(seed)} for seed in seeds[branch]]
            own = [] if way.base_loss is None else [way.base_loss]
            losses += [_wide(loss) for loss in own + way.evaluation.losses(points)]
        rest = self.reduce(torch.stack(losses))
        estimate, bases = Estimate(loss=rest[0]), {}
        for way in ways:
            base_loss, rest = rest[0], rest[1:]
            for branch in way.branches:
                mine, rest = rest.tensor_split([len(seeds[branch])])
                eps, bases[branch] = self.perturbations[branch].eps, base_loss
                differences = estimate.differences[branch] = mine - base_loss
                is_fzoo = self.estimator == "fzoo"
                quotients = self._over_deviation(branch, mine, base_loss) if is_fzoo else differences / eps
                weights = _finite(quotients) / len(mine)
                estimate.gradient[branch] = Combination(seeds[branch], weights, moved=(eps, 0.0))
        return estimate, bases

    def _over_deviation(self, branch: str | None, losses: torch.Tensor, base_loss: torch.Tensor) -> torch.Tensor:
        """FZOO's quotient; zero where the losses differ by no more than their rounding, of which it would be made."""
        noise = self.resolutions[branch].noise if branch in self.resolutions else 0.0
        least = (ROUNDING * torch.finfo(losses.dtype).eps * base_loss.abs()).clamp_min(noise)
        deviation = _finite_std(losses)
        return torch.where(deviation > least, (losses - base_loss) / deviation, 0.0)

    def _two_sided(self, ways: Sequence[_Way], seeds: Mapping[str | None, tuple[int, ...]]) -> Estimate:
        sides = {
            branch: [[perturbation.query(seed, sign) for sign in (1, -1)] for seed in seeds[branch]]
            for branch, perturbation in self.perturbations.items()
        }
        found: list[torch.Tensor] = []
        for way in ways:
            points: list[Point] = []
            for branch in way.branches:
                others = {self.perturbations[other]: theirs[0] for other, theirs in sides.items() if other != branch}
                held = [{other: pair[i] for other, pair in others.items()} for i in (0, 1)] if others else [{}]
                perturbation = self.perturbations[branch]
                points += [{perturbation: side, **rest} for query in sides[branch] for side in query for rest in held]
            # Two branches meet at the four points of their first queries twice: each is evaluated once.
            keys = [frozenset(point.items()) for point in points]
            unique = dict(zip(keys, points, strict=True))
            losses = dict(zip(unique, map(_wide, way.evaluation.losses(list(unique.values()))), strict=True))
            found += [losses[key] for key in keys]
        losses = self.reduce(torch.stack(found))
        estimate, first = Estimate(loss=losses.mean()), 0
        for branch in (branch for way in ways for branch in way.branches):
            count, eps = len(seeds[branch]), self.perturbations[branch].eps
            size = count * 2 * (2 if len(sides) > 1 else 1)
            mine = losses[first : first + size].view(count, 2, -1).mean(dim=2)
            first += size
            differences = estimate.differences[branch] = (mine[:, 0] - mine[:, 1]) / 2
            weights = _finite(differences / eps) / count
            estimate.gradient[branch] = Combination(seeds[branch], weights, moved=(eps, -eps))
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
        self,
        estimate: Estimate,
        ways: Sequence[_Way],
        bases: Mapping[str | None, torch.Tensor],
        learning_rate: float | Mapping[str | None, float],
    ) -> None:
        """Replace the mean over the queries by the candidate whose step has the lowest loss, branch by branch.

        Indexing with the winner stays on the device; "no update" is a row of zeros.
        """
        steps: Point = {}
        gains: list[torch.Tensor] = []
        for way in ways:
            for branch in way.branches:
                mean, perturbation = estimate.gradient[branch], self.perturbations[branch]
                rows = [torch.zeros_like(mean.weights), *torch.diag(mean.weights * len(mean.seeds))]
                if len(mean.seeds) > 1:
                    rows.append(mean.weights)
                candidates = [replace(mean, weights=row) for row in rows]
                size = in_branch(learning_rate, branch)
                points: list[Point] = [{perturbation: self._step(candidate, size)} for candidate in candidates[1:]]
                gain = self._gains(way, points, bases[branch])
                winner = gain.argmin().view(1)
                gains.append(gain.index_select(0, winner))
                estimate.gradient[branch] = replace(mean, weights=torch.stack(rows).index_select(0, winner)[0])
                steps[perturbation] = self._step(estimate.gradient[branch], size)
        if len(steps) < 2:
            return
        # Steps that are good alone may not be good together.
        together = self._gains(ways[-1], [steps], bases[ways[-1].branches[0]])
        options = torch.cat([together[1:], *gains])
        keep = torch.cat([torch.ones(1, len(gains)), torch.eye(len(gains))]).to(options.device)
        kept = keep.index_select(0, options.argmin().view(1))[0]
        for number, branch in enumerate(branch for way in ways for branch in way.branches):
            mean = estimate.gradient[branch]
            estimate.gradient[branch] = replace(mean, weights=mean.weights * kept[number].to(mean.weights.dtype))

    def _step(self, gradient: Combination, size: float) -> Combination:
        """The SGD step along a gradient."""
        return replace(gradient, scale=-size, sign=self.sign)

    def _gains(self, way: _Way, points: Sequence[Point], base_loss: torch.Tensor) -> torch.Tensor:
        """0, and then the loss at every point less that at θ."""
        losses = self.reduce(torch.stack([_wide(loss) for loss in way.evaluation.losses(points)]))
        return torch.cat([torch.zeros_like(losses[:1]), (losses - base_loss).nan_to_num(nan=torch.inf)])


@dataclass
class _Way:
    """Branches whose losses are compared with one another, and their evaluation, made when it is first used."""

    branches: list[str | None]
    make: Callable[[], Evaluation]
    base_loss: torch.Tensor | None = None

    @cached_property
    def evaluation(self) -> Evaluation:
        return self.make()


def _gradient(estimates: Sequence[tuple[Estimate, float]], branch: str | None) -> list[Combination]:
    return [estimate.gradient[branch].scaled(scale) for estimate, scale in estimates]


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """In float32 at least: a difference of two losses needs it."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _finite_std(losses: torch.Tensor) -> torch.Tensor:
    """The standard deviation of the finite losses, without waiting for a count of them."""
    finite = losses.isfinite()
    count, known = finite.sum(), losses.nan_to_num(0.0, 0.0, 0.0) * finite
    squares = ((known - known.sum() / count) * finite).square().sum()
    return (squares / (count - 1)).sqrt().nan_to_num(0.0, 0.0)


def _finite(weights: torch.Tensor) -> torch.Tensor:
    return torch.nan_to_num(weights, nan=0.0, posinf=0.0, neginf=0.0)
