"""From losses to a gradient estimate, written into `.grad`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import reduce
from operator import add

import torch
from torch import nn

from .assignment import ZOGroup, in_branch
from .directions import Combination, direction_seed
from .estimators import ESTIMATORS, Estimate, Evaluation, Step
from .estimators.base import Way
from .noise import Resolution
from .perturbation import Moments, Perturbation
from .streaming import StreamedPerturbation


# A branch and a layer's label.
Place = tuple[str | None, int | str | None]


class ZOEstimator:
    """Estimates the gradient of a loss in the zeroth-order groups from forward passes alone.

    Equation 2 of arXiv 2506.12409 perturbs one modality and holds the other. So every branch has its own directions,
    and the branches take turns; `together` perturbs all of them at once. The estimator's formula
    (`hf_zocl.zo.estimators`) says which losses are computed, and how they weight the directions.

    A query whose loss is not finite counts for nothing, so one overflow does not spoil the model. In half precision,
    Δᵢ is the move after rounding: a coordinate that did not move takes no step.

    Args:
        groups: The zeroth-order parameters; all groups of a branch are perturbed together.
        estimator: One of `one-sided`, `two-sided`, `conservative`, `fzoo`, `forward-gradient`.
        queries: q, the number of directions; one number, or one per branch.
        sign: Use the sign of the estimate, not its magnitude (gradient sign normalisation of MoZO).
        seed: Keys the directions, together with the step, the micro-step and the query.
        reduce: Averages a tensor of losses over data-parallel ranks.
        together: Whether to perturb all branches at once, if all have the same number of queries. Where every loss is
            a full pass, taking turns would multiply the cost by the number of branches.
        model: If given, parameters are streamed: moved in place, layer by layer, rather than copied. This does not
            apply to `forward-gradient`, whose tangents are as large as the parameters anyway.

    Attributes:
        formula: The estimator's formula.
        resolutions: The `Resolution` of each branch (see `hf_zocl.zo.noise`), where it was measured.

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
        together: bool = False,
    ):
        if estimator not in ESTIMATORS:
            raise ValueError(f"zo_estimator={estimator!r} is unknown: expected one of {', '.join(ESTIMATORS)}.")
        self.formula, self.sign, self.seed, self.reduce = ESTIMATORS[estimator], sign, seed, reduce
        self.resolutions: dict[str | None, Resolution] = {}
        branches: dict[str | None, list[ZOGroup]] = {}
        for group in groups:
            branches.setdefault(group.branch, []).append(group)
        self.is_streamed = model is not None and self.formula.has_eps
        self.perturbations: dict[str | None, Perturbation] = {
            branch: StreamedPerturbation(members, model) if self.is_streamed else Perturbation(members)
            for branch, members in branches.items()
        }
        self.queries = {branch: in_branch(queries, branch) for branch in branches}
        self.moves_together = together and len(set(self.queries.values())) == 1
        least = self.formula.least_queries
        for branch, count in self.queries.items():
            if count < least:
                name = "zo_queries" + (f" ({branch})" if branch else "")
                raise ValueError(f"{name}={count}: zo_estimator={estimator!r} needs at least {least}.")

    def settle(self, resolutions: Mapping[str | None, Resolution]) -> None:
        """Adopt the ε and the precision of the passes that were measured for each branch."""
        self.resolutions = dict(resolutions)
        for branch, resolution in resolutions.items():
            self.perturbations[branch].eps = resolution.eps

    def direction_seeds(self, step: int, micro_step: int = 0) -> dict[str | None, tuple[int, ...]]:
        """The seeds of the queries' directions, by branch; they depend only on the seed, the step and micro-step."""
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
        """Get the losses that the estimate needs, and weight the directions by them.

        Args:
            evaluation: Gives the losses.
            step, micro_step: Key the directions; the micro-step counts the batches of one accumulated step.
            base_loss: L(θ) by `evaluation`, if a first-order pass has it already.
            learning_rate: The size of the SGD step by which `conservative` judges its candidates; one number, or one
                per branch.
            finer: Makes the evaluation for the branches whose resolution asks for a finer one.
        """
        return self.formula.estimate(
            Step(
                perturbations=self.perturbations,
                seeds=self.direction_seeds(step, micro_step),
                ways=self._ways(evaluation, base_loss, finer),
                reduce=self.reduce,
                noise={branch: resolution.noise for branch, resolution in self.resolutions.items()},
                learning_rates={branch: in_branch(learning_rate, branch) for branch in self.queries},
                sign=self.sign,
                moves_together=self.moves_together,
            )
        )

    @torch.no_grad()
    def write(self, estimates: Sequence[tuple[Estimate, float]]) -> dict[Place, Moments]:
        """Set `.grad` of every zeroth-order parameter to Σ scale·g, or to its sign if `sign` is on.

        Args:
            estimates: The estimates of one optimizer step's micro-batches, each with its scale.

        Returns:
            The moments of the sum by branch and layer, before any sign normalisation.
        """
        moments: dict[Place, Moments] = {}
        for branch, perturbation in self.perturbations.items():
            own = perturbation.write(_gradient(estimates, branch), self.sign)
            moments |= {(branch, layer): value for layer, value in own.items()}
        return moments

    @torch.no_grad()
    def stream(self, estimates: Sequence[tuple[Estimate, float]], max_norm: float = 0.0) -> Iterator[None]:
        """Do what `write` does, one layer after another (see `StreamedPerturbation`).

        Args:
            estimates: As for `write`.
            max_norm: Clips the whole gradient as `clip_grad_norm_` does; 0 does not clip.
        """
        factor: torch.Tensor | float = 1.0
        if max_norm > 0:
            whole = reduce(add, self.moments(estimates).values())
            norm = whole.count**0.5 if self.sign else whole.squares.sqrt()
            factor = torch.as_tensor(max_norm / (norm + 1e-6)).clamp(max=1.0)
        for branch, perturbation in self.perturbations.items():
            yield from perturbation.stream(_gradient(estimates, branch), self.sign, factor)

    @torch.no_grad()
    def moments(self, estimates: Sequence[tuple[Estimate, float]]) -> dict[Place, Moments]:
        """The moments that `write` returns, without writing anything."""
        moments: dict[Place, Moments] = {}
        for branch, perturbation in self.perturbations.items():
            own = perturbation.moments(_gradient(estimates, branch))
            moments |= {(branch, layer): value for layer, value in own.items()}
        return moments

    def _ways(
        self, evaluation: Evaluation, base_loss: torch.Tensor | None, finer: Callable[[], Evaluation] | None
    ) -> list[Way]:
        """How each branch is evaluated; the plain way comes first, because the finer one reuses its results."""
        is_finer = {branch: branch in self.resolutions and self.resolutions[branch].finer for branch in self.queries}
        if self.moves_together:
            is_finer = dict.fromkeys(is_finer, any(is_finer.values()))
        ways = [Way([b for b in self.queries if not is_finer[b]], lambda: evaluation, base_loss)]
        ways += [Way([b for b in self.queries if is_finer[b]], finer)]
        return [way for way in ways if way.branches]


def _gradient(estimates: Sequence[tuple[Estimate, float]], branch: str | None) -> list[Combination]:
    return [estimate.gradient[branch].scaled(scale) for estimate, scale in estimates]
