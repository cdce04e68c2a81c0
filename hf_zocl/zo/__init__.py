"""Zeroth-order optimisation of named parameter groups. Needs torch alone."""

from .assignment import LayerAssignment, ParameterSplit, ZOGroup
from .estimator import Estimate, Evaluation, Place, ZOEstimator
from .evaluation import PlainEvaluation, TowerEvaluation, TowerPlan, find_towers, stacked_linear
from .noise import Resolution, rounding_noise
from .optimizer import HybridOptimizer, SignSGD, build_zo_optimizer
from .perturbation import Combination, Moments, Perturbation, direction_seed, draw_direction
from .random_state import Buffers, ForwardState
from .replay import ReplayLog, ReplaySettings
from .streaming import StreamedPerturbation


__all__ = [
    "Buffers",
    "Combination",
    "Estimate",
    "Evaluation",
    "ForwardState",
    "HybridOptimizer",
    "LayerAssignment",
    "Moments",
    "ParameterSplit",
    "Perturbation",
    "Place",
    "PlainEvaluation",
    "ReplayLog",
    "ReplaySettings",
    "Resolution",
    "SignSGD",
    "StreamedPerturbation",
    "TowerEvaluation",
    "TowerPlan",
    "ZOEstimator",
    "ZOGroup",
    "build_zo_optimizer",
    "direction_seed",
    "draw_direction",
    "find_towers",
    "rounding_noise",
    "stacked_linear",
]
