"""Zeroth-order optimisation of named parameter groups. Needs only torch."""

from .assignment import LayerAssignment, ParameterSplit, ZOGroup
from .directions import Combination, direction_seed, draw_direction
from .estimator import Place, ZOEstimator
from .estimators import ESTIMATORS, Estimate, Evaluation
from .noise import Resolution, rounding_noise
from .optimizer import HybridOptimizer, SignSGD, build_zo_optimizer
from .perturbation import Moments, Perturbation
from .rates import balanced_rate
from .replay import ReplayLog, ReplaySettings
from .streaming import StreamedPerturbation


__all__ = [
    "ESTIMATORS",
    "Combination",
    "Estimate",
    "Evaluation",
    "HybridOptimizer",
    "LayerAssignment",
    "Moments",
    "ParameterSplit",
    "Perturbation",
    "Place",
    "ReplayLog",
    "ReplaySettings",
    "Resolution",
    "SignSGD",
    "StreamedPerturbation",
    "ZOEstimator",
    "ZOGroup",
    "balanced_rate",
    "build_zo_optimizer",
    "direction_seed",
    "draw_direction",
    "rounding_noise",
]
