"""The zeroth-order figures of a step, for the training log."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from operator import add

import torch

from ..zo import Estimate, Moments, Place
from ..zo.perturbation import add_moments


class StepLog:
    """The figures of the latest step's estimates, by their names in the log.

    Attributes:
        figures: For the console and the history.
        by_layer: The variance of every layer, only for the history: it would fill a console.
    """

    def __init__(self) -> None:
        self.figures: dict[str, torch.Tensor | float] = {}
        self.by_layer: dict[str, torch.Tensor] = {}

    def see(self, estimate: Estimate) -> None:
        """Take note of a micro-batch's differences of losses."""
        self.figures["zo_loss_difference"] = torch.cat(list(estimate.differences.values())).abs().mean()

    def see_gradient(
        self, moments: Mapping[Place, Moments], rates: Mapping[str | None, float], peaks: Mapping[str | None, float]
    ) -> None:
        """Take note of the gradient that goes to the optimizer.

        Args:
            moments: The gradient's moments, by branch and layer.
            rates: The current learning rate of every branch.
            peaks: The peak learning rate of every branch.
        """
        branches: dict[str | None, Moments] = {}
        for (branch, layer), own in moments.items():
            add_moments(branches, {branch: own})
            if layer is not None:
                self.by_layer[_name("zo_variance", branch, layer)] = own.variance
        for branch, own in branches.items():
            self.figures[_name("zo_variance", branch)] = own.variance
        self.figures["zo_grad_norm"] = reduce(add, branches.values()).squares.sqrt()
        if len({peaks[branch] for branch in rates}) == 1:
            rates = {None: next(iter(rates.values()))}
        self.figures |= {_name("zo_learning_rate", branch): rate for branch, rate in rates.items()}


def _name(figure: str, branch: str | None, layer: int | str | None = None) -> str:
    return figure + (f"_{branch}" if branch else "") + ("" if layer is None else f"_layer_{layer}")
