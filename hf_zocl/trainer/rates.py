"""The zeroth-order learning rates of a training: those that are given, and those that are chosen once it begins."""

from __future__ import annotations

from transformers.utils import logging

from ..zo import ZOEstimator, balanced_rate
from .arguments import ZeroOrderArguments
from .differences import of_branch


logger = logging.get_logger(__name__)

# Where nothing is measured that one could be chosen by.
DEFAULT_RATE = 3e-4


def first_rates(args: ZeroOrderArguments) -> dict[str | None, float]:
    """The peak learning rates by branch, before anything is measured."""
    return {branch: DEFAULT_RATE if rate is None else rate for branch, rate in args.rates_by_branch.items()}


def chosen_rates(
    args: ZeroOrderArguments, estimator: ZOEstimator, micro_batches: int, is_alone: bool
) -> dict[str | None, float]:
    """The peak learning rates of the branches for which none is given and the derivatives are known.

    Args:
        args: The training's.
        estimator: Has taken on what was measured.
        micro_batches: Those of a step; each has directions of its own.
        is_alone: Whether nothing is first-order.
    """
    rates = {}
    for branch, own in estimator.resolutions.items():
        if args.rates_by_branch[branch] is None and own.is_seen and own.curvature > 0:
            rates[branch] = balanced_rate(
                args.zo_rule,
                args.zo_rule_momentum,
                estimator.queries[branch] * micro_batches,
                own.slope,
                own.curvature,
                is_sign=estimator.sign,
                has_scale=estimator.formula.has_scale,
                is_alone=is_alone,
            )
            logger.info(f"{of_branch(branch)}: zo_learning_rate {rates[branch]:.1e}.")
    return rates
