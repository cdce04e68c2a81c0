"""`RunMonitor`: all that watches a run: the progress display, and the loggers that `report_to` names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ..data.stream import TaskStream
from ..data.tasks import Task
from ..trainer.arguments import ZOCLTrainingArguments
from .progress import StreamProgress, make_display
from .stream_report import StreamReport
from .stream_steps import StreamSteps


class RunMonitor:
    """Makes the callbacks that watch a run, and tells them what no trainer does. As a context, it lasts for one run.

    Args:
        args: The run's training arguments.
        stream: The tasks.
    """

    def __init__(self, args: ZOCLTrainingArguments, stream: TaskStream):
        self._args, self._stream = args, stream
        self._progress: StreamProgress | None = None
        self._report: StreamReport | None = None

    def __enter__(self) -> RunMonitor:
        display = make_display(self._args)
        self._progress = None if display is None else StreamProgress(display, len(self._stream))
        name = f"{self._stream.name}-{Path(self._args.output_dir).absolute().name}"
        self._report = StreamReport(self._args, name)
        return self

    def __exit__(self, kind, error, trace) -> None:
        if self._progress is not None:
            self._progress.display.close()
        if self._report is not None and error is None:
            self._report.end()
        self._progress = self._report = None

    def begin(self, stream: TaskStream, results: dict[str, Any], goes_on: bool) -> None:
        """Training begins, after the tasks that `results` has.

        Args:
            stream: The tasks as they are trained, without the images that were left out.
            results: The run's results so far.
            goes_on: Whether an earlier process began the run.
        """
        steps = StreamSteps.planned(self._args, [len(task.train) for task in stream])
        if self._progress is not None:
            self._progress.begin(steps, results)
        if self._report is not None:
            self._report.begin(steps, goes_on)

    def callbacks(self, task: Task | None = None) -> list[TrainerCallback]:
        """The callbacks for a task's trainer or, without a task, for a trainer that evaluates."""
        watching: list[TrainerCallback] = [] if self._progress is None else [self._progress]
        if task is not None and self._progress is not None:
            self._progress.begin_task(task)
        if task is not None and self._report is not None:
            self._report.begin_task(task.index)
            watching.append(self._report)
        return watching

    def measured(self, results: dict[str, Any]) -> None:
        """A task was measured."""
        for watcher in (self._progress, self._report):
            if watcher is not None:
                watcher.measured(results)
