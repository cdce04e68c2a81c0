"""`StreamReport`: the loggers that `report_to` names see one run, whose steps go on from task to task."""

from __future__ import annotations

import copy
import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from .stream_steps import StreamSteps


class StreamReport(TrainerCallback):
    """Passes the events of all tasks' trainers to the callbacks of `report_to`, as if there were one training.

    The run begins with the first task that is trained and ends with the last. Its steps are counted through all tasks
    (`StreamSteps`), and every log names its task. After each task, the accuracies are reported.

    Args:
        args: The run's training arguments.
        name: The run's name, unless `run_name` is given.

    Raises:
        ValueError, RuntimeError: If `report_to` names a logger that is unknown or not installed.
    """

    def __init__(self, args: TrainingArguments, name: str):
        # The Trainer reports its arguments, so they must hold no token.
        self.args = dataclasses.replace(args, run_name=args.run_name or name, hub_token=None, push_to_hub=False)
        self.callbacks = [callback() for callback in get_reporting_integration_callbacks(args.report_to)]
        self._steps = StreamSteps([])
        self._task = 0
        self._last: tuple[Any, Any, dict[str, Any]] | None = None  # state, control, other arguments
        self._has_begun = False
        self._wandb_before: Any = None

    def begin(self, steps: StreamSteps, goes_on: bool) -> None:
        """The run begins; one that goes on puts TensorBoard's files next to the earlier ones."""
        self._steps = steps
        self._wandb_before = _wandb_run()
        logs = sorted((Path(self.args.output_dir) / "runs").glob("*/events.out.tfevents.*"), key=os.path.getmtime)
        if goes_on and logs:
            for callback in self.callbacks:
                if getattr(callback, "logging_dir", "") is None:
                    callback.logging_dir = str(logs[-1].parent)

    def begin_task(self, task: int) -> None:
        """This task's training comes next."""
        self._task = task

    def measured(self, results: dict[str, Any]) -> None:
        """Report the accuracies after the task, at its last step."""
        if self._last is None:
            return
        row, number = results["accuracy_matrix"][-1], len(results["accuracy_matrix"])
        logs = {"eval_seen_accuracy": results["seen_accuracy"][-1]}
        logs["eval_zero_shot_seen_accuracy"] = results["zero_shot"]["seen_accuracy"][number - 1]
        logs |= {f"eval_accuracy_task_{index:02d}": value for index, value in enumerate(row, start=1)}
        logs["task"] = number
        state, control, rest = self._last
        ended = copy.copy(state)
        ended.global_step = self._steps.before(number + 1)
        self._tell("on_log", ended, control, {**rest, "logs": logs})

    def end(self) -> None:
        """The run is complete."""
        if self._last is None:
            return
        self._tell("on_train_end", *self._last)
        self._last = None
        # wandb's callback leaves its run open, and this process's next run would go on in it.
        if self._wandb_before is None and (run := _wandb_run()) is not None:
            run.finish()

    # Called by a trainer.

    def on_init_end(self, args, state, control, **kwargs):
        if self._last is None and not self._has_begun:
            self._tell("on_init_end", state, control, kwargs)

    def on_train_begin(self, args, state, control, **kwargs):
        self._steps.correct(self._task, state.max_steps)
        self._remember(state, control, kwargs)
        if not self._has_begun:
            self._has_begun = True
            self._tell("on_train_begin", *self._last)

    def on_log(self, args, state, control, logs=None, **kwargs):
        self._remember(state, control, kwargs)
        state, control, rest = self._last
        self._tell("on_log", state, control, {**rest, "logs": {**(logs or {}), "task": self._task}})

    def on_save(self, args, state, control, **kwargs):
        for callback in self.callbacks:  # unchanged: the checkpoint is where the task's own trainer put it
            callback.on_save(args, state, control, **kwargs)

    def _remember(self, state, control, rest: dict[str, Any]) -> None:
        """Keep the last state, with its steps counted over the whole run."""
        shifted = copy.copy(state)
        shifted.global_step = self._steps.before(self._task) + state.global_step
        shifted.max_steps = self._steps.total
        self._last = (shifted, control, rest)

    def _tell(self, event: str, state, control, rest: dict[str, Any]) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(self.args, state, control, **rest)


def _wandb_run() -> Any:
    """The run that wandb has open in this process, if it was imported."""
    return getattr(sys.modules.get("wandb"), "run", None)
