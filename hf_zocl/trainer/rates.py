"""The zeroth-order learning rates of a training: those that are given, and those that are chosen once it begins."""

from __future__ import annotations

from transformers import SchedulerType
from transformers.utils import logging

from ..zo import ZOEstimator, balanced_rate
from .arguments import ZeroOrderArguments, ZOCLTrainingArguments
from .differences import of_branch


logger = logging.get_logger(__name__)

# Used where nothing is measured from which a rate could be chosen.
DEFAULT_RATE = 3e-4


def first_rates(args: ZeroOrderArguments) -> dict[str | None, float]:
    """The peak learning rates by branch, before anything is measured."""
    return {branch: DEFAULT_RATE if rate is None else rate for branch, rate in args.rates_by_branch.items()}


def check_schedule(args: ZOCLTrainingArguments, is_alone: bool) -> None:
    """Refuse a schedule that ends at a given rate, if the rate that it starts from is yet to be chosen.

    Args:
        args: The training's arguments.
        is_alone: Whether nothing is first-order; else the schedule's numbers are for the first-order rate.

    Raises:
        ValueError: If `min_lr` or `lr_end` is given with `zo_learning_rate="auto"`, or the schedule is `greedy`, which
            has such bounds of its own.
    """
    kind, given = args.lr_scheduler_type, args.lr_scheduler_kwargs or {}
    if kind == "greedy" and None in args.rates_by_branch.values():
        raise ValueError(
            "lr_scheduler_type='greedy' keeps rates between min_lr (1e-3 by default) and max_lr, and "
            "zo_learning_rate='auto' is chosen only as the training begins: give a number as zo_learning_rate."
        )
    names = [name for name in ("min_lr", "lr_end") if given.get(name)]
    is_absolute = is_alone or kind == SchedulerType.REDUCE_ON_PLATEAU
    if names and is_absolute and None in args.rates_by_branch.values():
        raise ValueError(
            f"lr_scheduler_kwargs={given}: {names[0]} is a learning rate, and zo_learning_rate='auto' is chosen only "
            "as the training begins: give a number as zo_learning_rate, or a schedule that ends at a fraction of it "
            "(cosine_with_min_lr with min_lr_rate)."
        )


def chosen_rates(
    args: ZeroOrderArguments, estimator: ZOEstimator, micro_batches: int, scale: float, is_alone: bool
) -> dict[str | None, float]:
    """The peak learning rates of the branches for which none is given and the derivatives are known.

    Args:
        args: The training's arguments.
        estimator: The estimator, after it has adopted what was measured.
        micro_batches: The number of micro-batches in a step; each has directions of its own.
        scale: The scale of a micro-batch's estimate in the step's gradient.
        is_alone: Whether nothing is first-order.
    """
    rates = {}
    counted = scale * micro_batches  # 1 if the step's loss is the mean over micro-batches, more if it is the sum
    for branch, own in estimator.resolutions.items():
        if args.rates_by_branch[branch] is None and own.is_seen and own.curvature > 0:
            rates[branch] = balanced_rate(
                args.zo_rule,
                args.zo_rule_momentum,
                estimator.queries[branch] * micro_batches,
                own.slope * counted,
                own.curvature * counted,
                is_sign=estimator.sign,
                has_scale=estimator.formula.has_scale,
                is_alone=is_alone,
            )
            logger.info(f"{of_branch(branch)}: zo_learning_rate {rates[branch]:.1e}.")
    return rates
