"""Where a run's progress is shown: bars in a terminal, HTML in a notebook, or plain lines."""

from __future__ import annotations

import html
import logging
import time
from contextlib import ExitStack
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ..report.table import in_columns, percent


class Display:
    """Shows nothing; a subclass shows what it can."""

    def begin(self, done: int, total: int, tasks: int) -> None:
        """A run of `total` steps in `tasks` tasks begins; `done` of the steps were taken before."""

    def begin_task(self, number: int, title: str, done: int, total: int) -> None:
        """A task's training begins; `done` of its steps were taken by an earlier process."""

    def step(self, done: int, total: int, done_of_task: int) -> None:
        """A step was taken: the steps of the run and of the task that are now done."""

    def end_task(self, done: int) -> None:
        """A task's training has ended; `done` steps of the run are done."""

    def evaluate(self, done: int, total: int) -> None:
        """A batch was predicted: `done` of `total`."""

    def end_evaluation(self) -> None:
        """All batches were predicted."""

    def write(self, line: str) -> None:
        """Show a line of the log."""

    def table(self, results: dict[str, Any]) -> None:
        """Show the accuracies after one more task."""

    def close(self) -> None:
        """Close the display: nothing more will be shown."""


class LineDisplay(Display):
    """Plain lines on standard output: one per epoch, and the table row by row."""

    def __init__(self) -> None:
        self._rows = 0

    def write(self, line: str) -> None:
        print(line, flush=True)

    def table(self, results: dict[str, Any]) -> None:
        rows = aligned(table_rows(results), len(results["tasks"]))
        for row in rows[self._rows :]:
            self.write(row)
        self._rows = len(rows)


class BarDisplay(LineDisplay):
    """Two bars at the foot of a terminal, on standard error; table and log lines go above them."""

    def __init__(self) -> None:
        super().__init__()
        self._stack = ExitStack()
        self._stream: tqdm | None = None
        self._task: tqdm | None = None
        self._evaluation: tqdm | None = None
        self._tasks = 0

    def begin(self, done: int, total: int, tasks: int) -> None:
        loggers = [logging.getLogger(), logging.getLogger("transformers")]
        self._stack.enter_context(logging_redirect_tqdm(loggers))
        self._tasks = tasks
        # smoothing=0: the remaining time then includes evaluations.
        self._stream = _bar(total, done, "stream", "{remaining} left", position=0, leave=True, smoothing=0)

    def begin_task(self, number: int, title: str, done: int, total: int) -> None:
        self._skip(done)
        self._name(f"task {number} of {self._tasks}")
        self._task = _bar(total, done, title, "{rate_fmt}", position=1)

    def step(self, done: int, total: int, done_of_task: int) -> None:
        for bar, now in ((self._stream, done), (self._task, done_of_task)):
            if bar is not None:
                bar.update(now - bar.n)
        if self._stream is not None and self._stream.total != total:
            self._stream.total = total
            self._stream.refresh()

    def end_task(self, done: int) -> None:
        self._task = _closed(self._task)
        if self._stream is not None:
            self._skip(done - self._stream.n)  # where a callback stopped it early
            self._stream.refresh()

    def evaluate(self, done: int, total: int) -> None:
        if self._evaluation is None:
            position = 0 if self._stream is None else 1
            self._evaluation = _bar(total, 0, "evaluating", "{rate_fmt}", position=position)
        self._evaluation.update(done - self._evaluation.n)

    def end_evaluation(self) -> None:
        self._evaluation = _closed(self._evaluation)

    def write(self, line: str) -> None:
        tqdm.write(line)

    def close(self) -> None:
        self._task, self._evaluation = _closed(self._task), _closed(self._evaluation)
        self._stream = _closed(self._stream)
        self._stack.close()

    def _skip(self, steps: int) -> None:
        """Move on by steps that this process has not taken, which say nothing of the time that is left."""
        if self._stream is not None:
            self._stream.n += steps
            self._stream.initial += steps

    def _name(self, description: str) -> None:
        if self._stream is not None:
            self._stream.set_description_str(description)


def _bar(total: int, done: int, title: str, end: str, position: int, leave: bool = False, **options: Any) -> tqdm:
    form = f"{{desc:<20}} {{percentage:3.0f}}%|{{bar}}| {{n_fmt}}/{{total_fmt}} steps, {end}"
    if title == "evaluating":
        form = form.replace(" steps", " batches")
    return tqdm(
        desc=title, total=total, initial=done, position=position, leave=leave, bar_format=form,
        dynamic_ncols=True, unit="step", **options,
    )  # fmt: skip


def _closed(bar: tqdm | None) -> tqdm | None:
    """Close a bar; None takes its place."""
    if bar is not None:
        bar.close()
    return None


class NotebookDisplay(Display):
    """One output of a notebook cell, redrawn as the run goes on."""

    every = 0.5  # seconds between two redraws
    lines = 6  # lines of the log that stay visible

    def __init__(self) -> None:
        self._handle: Any = None
        self._drawn = 0.0
        self._bars: dict[str, tuple[int, int, str]] = {}
        self._log: list[str] = []
        self._table = ""
        self._tasks, self._began, self._began_at = 0, 0, 0.0

    def begin(self, done: int, total: int, tasks: int) -> None:
        self._tasks, self._began, self._began_at = tasks, done, time.perf_counter()
        self._bars["stream"] = (done, total, "stream")
        self._draw()

    def begin_task(self, number: int, title: str, done: int, total: int) -> None:
        self._began += done  # what another process took says nothing of the time that is left
        of_stream = self._bars.get("stream", (0, 0, ""))
        self._bars["stream"] = (*of_stream[:2], f"task {number} of {self._tasks}")
        self._bars["task"] = (done, total, title)
        self._draw()

    def step(self, done: int, total: int, done_of_task: int) -> None:
        self._bars["stream"] = (done, total, self._bars["stream"][2])
        self._bars["task"] = (done_of_task, *self._bars["task"][1:])
        self._draw_now_and_then()

    def end_task(self, done: int) -> None:
        self._bars.pop("task", None)
        self._began += done - self._bars["stream"][0]  # where a callback stopped it early
        self._bars["stream"] = (done, *self._bars["stream"][1:])
        self._draw()

    def evaluate(self, done: int, total: int) -> None:
        self._bars["evaluation"] = (done, total, "evaluating")
        self._draw_now_and_then()

    def end_evaluation(self) -> None:
        self._bars.pop("evaluation", None)
        self._draw()

    def write(self, line: str) -> None:
        self._log = [*self._log, line][-self.lines :]
        self._draw()

    def table(self, results: dict[str, Any]) -> None:
        head, *rows = table_rows(results)
        self._table = _html_table(head, rows)
        self._draw()

    def _draw_now_and_then(self) -> None:
        if time.perf_counter() - self._drawn >= self.every:
            self._draw()

    def _draw(self) -> None:
        from IPython.display import HTML, display  # always there in a notebook

        self._drawn = time.perf_counter()
        content = HTML("<div>" + "".join([*map(self._bar, self._bars), self._lines(), self._table]) + "</div>")
        if self._handle is None:
            self._handle = display(content, display_id=True)
        else:
            self._handle.update(content)

    def _bar(self, name: str) -> str:
        done, total, title = self._bars[name]
        unit = "batches" if name == "evaluation" else "steps"
        text = f"{html.escape(title)} · {done}/{total} {unit}"
        taken = done - self._began
        if name == "stream" and taken > 0 and done < total:
            seconds = (time.perf_counter() - self._began_at) / taken * (total - done)
            text += f" · {tqdm.format_interval(seconds)} left"
        return f'<div><progress value="{done}" max="{max(total, 1)}" style="width:20em"></progress> {text}</div>'

    def _lines(self) -> str:
        return f"<pre>{html.escape(chr(10).join(self._log))}</pre>" if self._log else ""


def table_rows(results: dict[str, Any]) -> list[list[str]]:
    """The accuracies so far in percent: a heading, and a row for each task that was trained.

    The columns over all tasks come first, so that rows already written stay right as the table grows.
    """
    untrained = results["zero_shot"]["seen_accuracy"]
    rows = [["accuracy (%)", "zero-shot", "all seen", *(f"task {n}" for n in range(1, len(results["tasks"]) + 1))]]
    for number, row in enumerate(results["accuracy_matrix"], start=1):
        accuracies = [untrained[number - 1], results["seen_accuracy"][number - 1], *row]
        rows.append([f"after task {number}", *map(percent, accuracies)])
    return rows


def aligned(rows: list[list[str]], tasks: int) -> list[str]:
    """The rows as lines, with columns wide enough for the whole table of `tasks` tasks."""
    first = len(f"after task {tasks}")
    widths = [max(first, len(rows[0][0])), *map(len, rows[0][1:])]
    return [in_columns(row, widths) for row in rows]


def _html_table(head: list[str], rows: list[list[str]]) -> str:
    def cells(tag: str, values: list[str]) -> str:
        return "".join(f'<{tag} style="text-align:right">{html.escape(value)}</{tag}>' for value in values)

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f"<table><thead><tr>{cells('th', head)}</tr></thead><tbody>{body}</tbody></table>"
