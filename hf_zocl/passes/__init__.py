"""The cheapest way to compute a loss under a perturbation."""

from .candidates import stacked_linear
from .plain import PlainEvaluation
from .plan import TowerPlan
from .random_state import Buffers, ForwardState
from .stack import StackEvaluation
from .structure import Tower, find_towers
from .task_aware import TaskAware, task_aware
from .towers import TowerEvaluation


__all__ = [
    "Buffers",
    "ForwardState",
    "PlainEvaluation",
    "StackEvaluation",
    "TaskAware",
    "Tower",
    "TowerEvaluation",
    "TowerPlan",
    "find_towers",
    "stacked_linear",
    "task_aware",
]
