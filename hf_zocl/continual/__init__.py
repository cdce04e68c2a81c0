"""Running and measuring a stream of tasks."""

from .checkpoint_evaluation import evaluate_checkpoint
from .scheduler import ContinualTaskScheduler


__all__ = ["ContinualTaskScheduler", "evaluate_checkpoint"]
