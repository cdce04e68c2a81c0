"""The display of a running training: a bar for the stream above the task's own, a line per epoch, a growing table."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import numpy as np
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import is_in_notebook

from ..data.tasks import Task
from .displays import BarDisplay, Display, LineDisplay, NotebookDisplay
from .stream_steps import StreamSteps


LONGEST_TITLE = 32


def without_own_display(trainer: Trainer, given: Iterable[TrainerCallback] = ()) -> None:
    """Remove from a trainer the stock callbacks that show its progress or print its logs.

    Args:
        trainer: The trainer, just made.
        given: The callbacks that the caller gave it; these stay, whatever they are.
    """
    kept = {id(callback) for callback in given}
    for callback in list(trainer.callback_handler.callbacks):
        is_stock = type(callback) in (PrinterCallback, ProgressCallback)
        # The notebook callback can only be imported in a notebook.
        is_stock |= type(callback).__module__ == "transformers.utils.notebook"
        if is_stock and id(callback) not in kept:
            trainer.remove_callback(callback)


def make_display(args: TrainingArguments) -> Display | None:
    """A run's display, in the main process alone: lines with `disable_tqdm`, HTML in a notebook, otherwise bars."""
    if args.process_index != 0:
        return None
    if args.disable_tqdm:
        return LineDisplay()
    return NotebookDisplay() if is_in_notebook() else BarDisplay()


class StreamProgress(TrainerCallback):
    """Shows how far a run is; one instance serves the trainers of all tasks, and those that evaluate.

    Args:
        display: Where it is shown.
        tasks: How many tasks the stream has.
    """

    def __init__(self, display: Display, tasks: int):
        self.display, self.tasks = display, tasks
        self.steps = StreamSteps([0] * tasks)
        self._task: Task | None = None
        self._batches = 0
        self._epoch = _Epoch()

    def begin(self, steps: StreamSteps, results: dict[str, Any]) -> None:
        """The run begins, or goes on after the tasks in `results`."""
        self.steps = steps
        done = len(results["accuracy_matrix"])
        self.display.begin(steps.before(done + 1), steps.total, self.tasks)
        if 0 < done < self.tasks:
            self.measured(results)

    def begin_task(self, task: Task) -> None:
        """This task's training comes next."""
        self._task = task

    def measured(self, results: dict[str, Any]) -> None:
        """A task was measured."""
        self._task = None
        self.display.table(results)

    # Called by a trainer.

    def on_train_begin(self, args, state, control, **kwargs):
        self.steps.correct(self._task.index, state.max_steps)
        self._epoch = _Epoch()
        title = f"{self._task.name}: {one_line(self._task.title or ', '.join(self._task.class_names))}"
        self.display.begin_task(self._task.index, title, state.global_step, state.max_steps)
        self._show(state)

    def on_epoch_begin(self, args, state, control, **kwargs):
        self._finish_epoch(state)
        self._epoch = _Epoch(int(state.epoch + 1e-6) + 1, state.global_step, time.perf_counter())

    def on_step_end(self, args, state, control, **kwargs):
        self._show(state)

    def on_log(self, args, state, control, logs=None, **kwargs):
        self._epoch.see(logs or {})

    def on_train_end(self, args, state, control, **kwargs):
        self._finish_epoch(state)
        self.display.end_task(self.steps.before(self._task.index + 1))

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        self._batches += 1
        try:
            batches = len(eval_dataloader)
        except TypeError:  # the loader does not know its length
            return
        self.display.evaluate(self._batches, batches)

    def on_predict(self, args, state, control, **kwargs):
        self._batches = 0
        self.display.end_evaluation()

    on_evaluate = on_predict

    def _show(self, state) -> None:
        done = self.steps.before(self._task.index) + state.global_step
        self.display.step(done, self.steps.total, state.global_step)

    def _finish_epoch(self, state) -> None:
        """Write the line of an epoch that took a step; late, because its last figures are logged after its end."""
        steps = state.global_step - self._epoch.began
        if self._epoch.number and steps > 0:
            where = f"Task {self._task.index} of {self.tasks}, epoch {self._epoch.number} of {state.num_train_epochs}"
            figures = self._epoch.figures(state.num_train_epochs)
            self.display.write(f"{where}: {', '.join([*figures, f'{steps} steps in {self._epoch.seconds:.1f} s'])}")
        self._epoch = _Epoch()


class _Epoch:
    """What is known of one epoch; number 0 stands for no epoch."""

    def __init__(self, number: int = 0, began: int = 0, started: float = 0.0):
        self.number, self.began, self.started = number, began, started
        self._logged: dict[str, list[float]] = {}

    def see(self, logs: dict[str, float]) -> None:
        for name in ("loss", "zo_loss_difference", "train_loss"):
            if name in logs:
                self._logged.setdefault(name, []).append(logs[name])

    def figures(self, epochs: int) -> list[str]:
        """The means of what was logged; if no loss was, the task's, provided that this was its only epoch."""
        logged = dict(self._logged)
        of_task = logged.pop("train_loss", None)
        if "loss" not in logged and of_task is not None and epochs == 1:
            logged = {"loss": of_task, **logged}
        shown = {"loss": "loss", "zo_loss_difference": "ZO difference"}
        return [f"{shown[name]} {float(np.mean(values)):.4g}" for name, values in logged.items()]

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started


def one_line(text: str) -> str:
    """Text that fits a bar: one line, without control characters, not too long."""
    clean = "".join(character if character.isprintable() else " " for character in text)
    clean = " ".join(clean.split())
    return clean if len(clean) <= LONGEST_TITLE else f"{clean[: LONGEST_TITLE - 1]}…"
