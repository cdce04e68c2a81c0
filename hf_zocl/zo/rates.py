"""The learning rate of zeroth-order steps, from the slope and the curvature of the loss along random directions.

A step along q directions of ±1 is nearly all noise: it moves every weight by some D, and hardly follows the gradient.
Let L' and L'' be the derivatives of the loss along such a direction, root mean squares. Momentum makes
K = (1+μ)/(1−μ) steps go in about the same direction. A step then gains D·L'·√(q·K), and loses D²·L''·K/2 to curvature;
the difference is greatest at D = √(q/K)·L'/L''. We take half of that, because a batch's slope exceeds the data's. We
take a tenth for `sgd`, whose steps are as long as the estimate and now and then very long, and next to first-order
layers, which soon change the loss and bend it more.

The rule holds at any scale of the loss or the weights, and for any number of weights.
"""

from __future__ import annotations

import math

from .optimizer import BETAS


PART, CAREFUL_PART = 0.5, 0.1
# No weight moves further than this in a step, because the derivatives were measured at θ.
MAX_MOVE = 1e-2


def balanced_rate(
    rule: str,
    momentum: float,
    queries: int,
    slope: float,
    curvature: float,
    is_sign: bool = False,
    has_scale: bool = True,
    is_alone: bool = True,
) -> float:
    """The peak learning rate η at which a step moves every weight by a part of D, and by MAX_MOVE at most.

    Args:
        rule: `sgd`, `sign` or `adamw`.
        momentum: μ of `sgd` and `sign`.
        queries: q, over all micro-batches of a step.
        slope: L' along a random direction of ±1; above 0.
        curvature: L''; above 0.
        is_sign: Whether the rule is given the estimate's sign.
        has_scale: Whether the estimate scales with the loss (`Estimator.has_scale`); that of `fzoo` does not.
        is_alone: Whether nothing is first-order.
    """
    alike = momentum if rule != "adamw" else BETAS[0]
    together = (1 + alike) / (1 - alike)
    part = PART if is_alone and rule != "sgd" else CAREFUL_PART
    move = min(part * math.sqrt(queries / together) * slope / curvature, MAX_MOVE)
    # How far η = 1 moves a weight, root mean square.
    if rule == "sign":
        unit = 1.0
    elif rule == "adamw":
        unit = 1 / math.sqrt(together)
    else:
        estimate = 1.0 if is_sign else (slope if has_scale else 1.0) / math.sqrt(queries)
        unit = estimate / math.sqrt(1 - momentum**2)
    return float(f"{move / unit:.1e}")
