"""The estimators, one file each with its formula on top; a new one is a file and a line here."""

from .base import Estimate, Estimator, Evaluation, Point, Step
from .conservative import Conservative
from .forward_gradient import ForwardGradient
from .fzoo import FZOO
from .one_sided import OneSided
from .two_sided import TwoSided


# By the name that `zo_estimator` gives them.
ESTIMATORS: dict[str, Estimator] = {
    each.name: each
    for each in (
        OneSided(),
        TwoSided(),
        Conservative(),
        FZOO(),
        ForwardGradient(),
    )
}

__all__ = ["ESTIMATORS", "Estimate", "Estimator", "Evaluation", "Point", "Step"]
