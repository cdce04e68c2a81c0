"""Streams of tasks, the scheduler that runs them, and their metrics."""

from .benchmarks import BENCHMARKS, Benchmark, BenchmarkSequence, get_benchmark
from .checkpoint_evaluation import evaluate_checkpoint
from .scheduler import ContinualTaskScheduler
from .tasks import Task, TaskStream


__all__ = [
    "BENCHMARKS",
    "Benchmark",
    "BenchmarkSequence",
    "ContinualTaskScheduler",
    "Task",
    "TaskStream",
    "evaluate_checkpoint",
    "get_benchmark",
]
