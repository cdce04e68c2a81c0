"""The tasks that wait to be pushed, in a file that outlives the run."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from transformers.utils import logging

from .checkpoint import RESULTS_FILE
from .task_file import read_json, task_folder, write_json


logger = logging.get_logger(__name__)

QUEUE_FILE = "push_queue.json"


@dataclass
class PushQueue:
    """The tasks that wait to be pushed, kept in `output_dir/push_queue.json` as long as there are any; no token.

    Args:
        output_dir: The run's folder.
        repo_id: The repository as it was asked for, with or without a user's name before it.
        private: Whether the repository is private, if it has to be created.
        pending: The names of the tasks' folders, the next one first.
        error: Why the next one could not be pushed.
    """

    output_dir: Path
    repo_id: str
    private: bool | None = None
    pending: list[str] = field(default_factory=list)
    error: str | None = None

    @classmethod
    def read(cls, output_dir: Path) -> PushQueue | None:
        """The queue that an earlier run left, if it left one.

        Raises:
            ValueError: If the file is no queue.
        """
        file = output_dir / QUEUE_FILE
        if not file.is_file():
            return None
        try:
            queue = cls(output_dir, **json.loads(file.read_text(encoding="utf-8")))
            is_list = isinstance(queue.pending, list) and all(isinstance(name, str) for name in queue.pending)
            if not isinstance(queue.repo_id, str) or not is_list or queue.private not in (None, True, False):
                raise TypeError("repo_id is text, pending a list of names, private true, false or null")
            return queue
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{file}: expected a queue of tasks to push, as a run leaves it ({error}).") from error

    def write(self) -> None:
        """Write it, or remove an empty one; on a full disk it lives on in memory, and a resumed run makes it anew."""
        file = self.output_dir / QUEUE_FILE
        try:
            if self.pending:
                content = asdict(self)
                del content["output_dir"]
                write_json(file, content)
            else:
                file.unlink(missing_ok=True)
        except OSError as error:
            logger.warning(f"{file} could not be written ({error}); run again with --resume to push what is left.")


def complete_tasks(output_dir: Path) -> list[int]:
    """The tasks whose checkpoints `output_dir` holds, in order; of a run's folder, those that its results speak of.

    A task that the results speak of counts also where its folder is gone.

    Raises:
        ValueError: If the results cannot be read.
    """
    tasks = sorted(task_number(folder.name) for folder in output_dir.glob("task-*") if is_task_name(folder.name))
    if not tasks or not (output_dir / RESULTS_FILE).is_file():
        return tasks
    done = len(read_json(output_dir / RESULTS_FILE).get("accuracy_matrix", ()))
    return list(range(1, done + 1))  # a run that was killed makes the next one again


def is_task_name(name: str) -> bool:
    number = name.removeprefix("task-")
    return number.isdecimal() and int(number) > 0 and name == task_folder(int(number))


def task_number(name: str) -> int:
    return int(name.removeprefix("task-"))
