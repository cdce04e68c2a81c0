"""A dataset becomes a stream of tasks."""

from .benchmarks import BENCHMARKS, Benchmark, BenchmarkSequence, get_benchmark
from .tasks import Task, TaskStream


__all__ = ["BENCHMARKS", "Benchmark", "BenchmarkSequence", "Task", "TaskStream", "get_benchmark"]
