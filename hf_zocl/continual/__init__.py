"""Running and measuring a stream of tasks."""

from .checkpoint_evaluation import evaluate_checkpoint
from .plugins import ClassifierAlignment, TaskPlugin
from .scheduler import ContinualTaskScheduler


__all__ = ["ClassifierAlignment", "ContinualTaskScheduler", "TaskPlugin", "evaluate_checkpoint"]
