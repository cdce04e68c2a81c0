"""Zeroth-order optimisation of named parameter groups. Needs torch alone."""

from .assignment import LayerAssignment, ParameterSplit, ZOGroup
from .estimator import Estimate, ZOEstimator
from .evaluation import ForwardState, PlainEvaluation, TowerEvaluation
from .optimizer import HybridOptimizer, SignSGD, build_zo_optimizer
from .perturbation import Perturbation, direction_seed, draw_directions


__all__ = [
    "Estimate",
    "ForwardState",
    "HybridOptimizer",
    "LayerAssignment",
    "ParameterSplit",
    "Perturbation",
    "PlainEvaluation",
    "SignSGD",
    "TowerEvaluation",
    "ZOEstimator",
    "ZOGroup",
    "build_zo_optimizer",
    "direction_seed",
    "draw_directions",
]
