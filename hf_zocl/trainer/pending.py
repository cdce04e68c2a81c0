"""A step's zeroth-order estimates, between their micro-batches and the optimizer's step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from ..zo import Estimate, HybridOptimizer, Moments, ParameterSplit, Place, ZOEstimator
from ..zo.optimizer import RATE_FACTOR, rate_factor
from .step_log import StepLog


class PendingEstimates:
    """Keeps estimates as seeds and weights, and makes a gradient of them only when the optimizer needs it.

    Args:
        split: Which parameters are zeroth-order.
        estimator: The estimator that made the estimates.
        optimizer: The optimizer that steps along their sum.
        max_norm: Clips the sum, separately from the first-order gradients; 0 does not clip.
    """

    def __init__(
        self,
        split: ParameterSplit,
        estimator: ZOEstimator,
        optimizer: HybridOptimizer,
        max_norm: float,
    ):
        self.split, self.estimator, self.optimizer = split, estimator, optimizer
        self.max_norm = max_norm
        self._scaled: list[tuple[Estimate, float]] = []
        self._log = StepLog()
        # The estimates of the last streamed step, and its learning rates.
        self._streamed: list[tuple[Estimate, float]] = []
        self._streamed_rates: dict[str | None, float] = {}

    def __len__(self) -> int:
        return len(self._scaled)

    def __iter__(self) -> Iterator[tuple[Estimate, float]]:
        """Every micro-batch's estimate, and its scale."""
        return iter(self._scaled)

    def add(self, estimate: Estimate, scale: float) -> None:
        """Keep a micro-batch's estimate, and its scale."""
        self._scaled.append((estimate, scale))
        self._log.see(estimate)

    def clear(self) -> None:
        self._scaled.clear()

    def install(self) -> None:
        """Hand the estimate to the optimizer: normalised, and clipped separately from the first-order gradients."""
        estimates = list(self)
        self.clear()
        if self.estimator.is_streamed:
            self._streamed, self._streamed_rates = estimates, dict(self.learning_rates)
            self.optimizer.stream = self.estimator.stream(estimates, self.max_norm)
            return
        self._see_gradient(self.estimator.write(estimates), self.learning_rates)
        if self.max_norm > 0:
            nn.utils.clip_grad_norm_(self.split.zo_parameters, self.max_norm)

    @property
    def learning_rates(self) -> dict[str | None, float]:
        """The current learning rates by branch, in the order of the branches."""
        return {branch: group["lr"] * rate_factor(group) for branch, group in self._groups.items()}

    @property
    def peak_rates(self) -> dict[str | None, float]:
        """The peak learning rates by branch: at the start of a warm-up all current rates are zero."""
        return {branch: _scheduled_peak(group) * rate_factor(group) for branch, group in self._groups.items()}

    @property
    def _groups(self) -> dict[str | None, dict[str, Any]]:
        return {group["zo_branch"]: group for group in self.optimizer.param_groups if "zo_branch" in group}

    def set_peak_rates(self, rates: Mapping[str | None, float]) -> None:
        """Give branches another peak learning rate; the schedule goes on."""
        for branch, rate in rates.items():
            group = self._groups[branch]
            group[RATE_FACTOR] = rate / _scheduled_peak(group)

    def figures(self) -> dict[str, float]:
        """The figures of the latest step, for the console and the history."""
        if self._streamed:  # all directions are drawn again for these figures
            self._see_gradient(self.estimator.moments(self._streamed), self._streamed_rates)
        return {name: float(value) for name, value in self._log.figures.items()}

    def figures_by_layer(self) -> dict[str, float]:
        """The figures of the latest step by layer, only for the history."""
        return {name: float(value) for name, value in self._log.by_layer.items()}

    def _see_gradient(self, moments: dict[Place, Moments], rates: dict[str | None, float]) -> None:
        self._log.see_gradient(moments, rates, self.peak_rates)


def _scheduled_peak(group: Mapping[str, Any]) -> float:
    return group.get("initial_lr", group["lr"])  # some schedules keep no initial rate
