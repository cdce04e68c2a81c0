"""The phases of a run, watched from the process that kills it."""

from __future__ import annotations

import mmap
import time

import numpy as np

from hf_zocl.commands import train as train_command
from hf_zocl.continual import evaluation, scheduler
from hf_zocl.hub import push
from hf_zocl.trainer import ZOCLTrainer


# The phases that a run may be in, and the function that each of them runs.
PHASES = {
    "starting": (train_command, "build_scheduler"),
    "measuring": (evaluation.StreamEvaluator, "_run"),
    "in a step": (ZOCLTrainer, "training_step"),
    "saving within a task": (ZOCLTrainer, "_save_checkpoint"),
    "saving a task": (scheduler.ContinualTaskScheduler, "_save"),
    "pushing": (push, "push_files"),
}


class Trace:
    """The state of a run's phases, in memory shared by the run and the process that kills it."""

    def __init__(self):
        shape = (len(PHASES), 3)
        self.entered, self.active, self.seconds = (
            np.frombuffer(mmap.mmap(-1, 8 * shape[0] * shape[1]), dtype=np.float64).reshape(shape).T
        )

    def watch(self) -> None:
        """In the run's process, make every phase's function record when it begins and ends."""
        for number, (owner, name) in enumerate(PHASES.values()):
            setattr(owner, name, self._watched(number, getattr(owner, name)))

    def _watched(self, number: int, function):
        def call(*args, **kwargs):
            started = time.perf_counter()
            self.entered[number] += 1
            self.active[number] += 1
            try:
                return function(*args, **kwargs)
            finally:
                self.active[number] -= 1
                self.seconds[number] += time.perf_counter() - started

        return call

    def now(self) -> str:
        return " and ".join(name for name, active in zip(PHASES, self.active, strict=True) if active) or "in between"
