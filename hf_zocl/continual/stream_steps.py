"""`StreamSteps`: where a task's step stands in the whole run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import TrainingArguments


@dataclass
class StreamSteps:
    """The number of steps of each task: planned ahead, and corrected when its Trainer begins.

    A task's steps begin where the plan of the tasks before it ends, so they are numbered alike in a resumed run, and
    after a task that a callback stopped early.

    Args:
        of_task: The steps of every task, in order.
    """

    of_task: list[int]

    @classmethod
    def planned(cls, args: TrainingArguments, sizes: Sequence[int]) -> StreamSteps:
        """The steps that a `Trainer` with these arguments will take, for tasks with these numbers of images."""
        return cls([_steps(args, size) for size in sizes])

    @property
    def total(self) -> int:
        return sum(self.of_task)

    def before(self, task: int) -> int:
        """The number of steps of all tasks before this one; tasks count from 1."""
        return sum(self.of_task[: task - 1])

    def correct(self, task: int, steps: int) -> None:
        """Set the steps of one task."""
        self.of_task[task - 1] = steps


def _steps(args: TrainingArguments, size: int) -> int:
    if args.max_steps > 0:
        return args.max_steps
    processes = 1 if args.accelerator_config.split_batches else args.world_size
    batches = size / (args.train_batch_size * processes)
    batches = math.floor(batches) if args.dataloader_drop_last else math.ceil(batches)
    updates = max(math.ceil(batches / args.gradient_accumulation_steps), 1)
    return math.ceil(args.num_train_epochs * updates)
