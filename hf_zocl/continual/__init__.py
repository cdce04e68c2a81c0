"""A stream of tasks is run and measured."""

from .checkpoint_evaluation import evaluate_checkpoint
from .scheduler import ContinualTaskScheduler


__all__ = ["ContinualTaskScheduler", "evaluate_checkpoint"]
