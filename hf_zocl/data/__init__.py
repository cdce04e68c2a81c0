"""Datasets, benchmarks, and the streams of tasks made from them."""

from .benchmark import Benchmark, BenchmarkSequence
from .benchmarks import BENCHMARKS, get_benchmark
from .stream import TaskStream
from .tasks import Task


__all__ = ["BENCHMARKS", "Benchmark", "BenchmarkSequence", "Task", "TaskStream", "get_benchmark"]
