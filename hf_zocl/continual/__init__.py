"""Streams of tasks, the scheduler that runs them, and their metrics."""

from .benchmarks import BENCHMARKS, Benchmark, get_benchmark
from .scheduler import ContinualTaskScheduler
from .tasks import Task, TaskStream


__all__ = ["BENCHMARKS", "Benchmark", "ContinualTaskScheduler", "Task", "TaskStream", "get_benchmark"]
