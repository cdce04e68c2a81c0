"""A run's folder: which tasks are complete, and how far the next one has come."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..files import read_json, remove_unfinished, write_json, written_whole
from ..hub.checkpoint import (
    FIGURE,
    RESULTS_FILE,
    added_files,
    checkpoint_parts,
    read_sealed_task,
    remove_task_checkpoint,
)
from ..hub.public import public_recipe
from ..hub.push import QUEUE_FILE, SCRATCH
from ..hub.task_info import TASK_FILE, is_task_name, task_folder, task_number
from ..report.gallery import GALLERY_FILE
from ..report.predictions import PREDICTIONS_FILE, PredictionHistory
from ..report.setting import defines_run
from ..trainer.arguments import ZOCLTrainingArguments
from ..trainer.replay_file import is_replay_log
from ..trainer.resumable import ResumeError, last_checkpoint, remove_checkpoint, unknown_files, what_is_missing


logger = logging.get_logger(__name__)

# The files of a run outside its tasks' folders.
_FILES = (RESULTS_FILE, FIGURE, PREDICTIONS_FILE, GALLERY_FILE, QUEUE_FILE)
# Mappings whose keys differ between releases of transformers.
_OF_RELEASES = ("accelerator_config",)
# The lists in the results that a resumed run reads and extends.
_LISTS = ("tasks", "classes", "accuracy_matrix", "seen_accuracy", "details", "future_accuracy", "training")
_NEEDED: dict[str, Any] = dict.fromkeys(_LISTS, list) | dict.fromkeys(("recipe", "zero_shot", "held_out"), dict)
_NEEDED |= dict.fromkeys(("seconds", "peak_memory_bytes"), (int, float))
_HOW_TO_GO_ON = "--resume goes on with it, --overwrite_output_dir replaces it, another output_dir leaves it alone"


class RunFolderError(ValueError):
    """A run cannot use the folder that it was given."""


class RunFolder:
    """A run's folder. At every moment, even if the run is killed, this is true of it:

    - `results.json` is the one place that says which tasks are complete. It is replaced in one move, once everything
      that it names is there. It exists as soon as the first step is done. `task-NN/results.json` is a copy of it
      after task NN.
    - `task-NN/` is complete or absent; a task that `results.json` does not name yet is trained again.
    - `trainer/task-NN/checkpoint-S/` are the Trainer's checkpoints within a task, until the task is complete.
    - Everything else does not belong to the run, and stays.

    Args:
        path: The folder.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def check(self, resume: bool, overwrite: bool) -> None:
        """Check that a run may use this folder.

        Raises:
            RunFolderError: If it holds a run, and neither or both of `resume` and `overwrite_output_dir` are given.
        """
        if resume and overwrite:
            raise RunFolderError("resume and overwrite_output_dir were both given: pass one.")
        holds = self._evidence()
        if holds is not None and not resume and not overwrite:
            raise RunFolderError(f"output_dir={str(self.path)!r} holds a run ({holds.name}): {_HOW_TO_GO_ON}.")

    def check_free(self, tasks: int) -> None:
        """Check that a run with this number of tasks overwrites nothing in this folder, which holds no run.

        Raises:
            RunFolderError: If a file is there with a name that the run would write.
        """
        there = next((path for path in self._written(tasks, any_task=True) if not _is_of_a_beginning(path)), None)
        if there is not None:
            raise RunFolderError(
                f"{there} already exists, and no {RESULTS_FILE} says that a run wrote it: move it away, or choose "
                "another output_dir."
            )

    @property
    def holds_run(self) -> bool:
        """Tell whether the folder holds a run: its results, or a copy of them."""
        return self._evidence() is not None

    def check_removable(self) -> None:
        """Check that it is known which files here a run wrote, and that no file was added to its checkpoints.

        Raises:
            RunFolderError: If it is not known; if an added file would be loaded with a checkpoint of the next run, or
                has the name of a log of steps, or lies in a checkpoint within a task.
        """
        for task in range(1, len(self._record()["tasks"]) + 1):
            replay = self.replay_file(task_folder(task))
            if replay.is_file() and not is_replay_log(replay):
                raise RunFolderError(
                    f"overwrite_output_dir: {replay} is not of the run that is there: move it away, or choose another "
                    "output_dir."
                )
            for file in added_files(self.path / task_folder(task)):
                raise RunFolderError(
                    f"overwrite_output_dir: {file} was not written by the run there, and would be read with the next "
                    "run's checkpoint: move it away, or choose another output_dir."
                )
            for file in chain.from_iterable(map(unknown_files, self._checkpoints(task_folder(task)))):
                raise RunFolderError(
                    f"overwrite_output_dir: {file} is not known to be of the run there, and is where the next run may "
                    "save: move it away, or choose another output_dir."
                )

    def start(self, results: dict[str, Any], files: Mapping[str, bytes] | None = None) -> None:
        """Remove an earlier run's files, if there was one, then write `files`, then the first results.

        The earlier results are removed last: if this is cut off, they still say what is left to remove.
        """
        if self._evidence() is not None:
            tasks = len(self._record()["tasks"])
            for path in sorted(self._written(tasks), key=lambda path: path.name == RESULTS_FILE):
                if path.parent.parent == self.path / "trainer":
                    remove_checkpoint(path)
                elif path.is_dir():
                    remove_task_checkpoint(path)
                elif path.name != RESULTS_FILE:
                    path.unlink()
                    if path.parent.name == "replay" and not any(path.parent.iterdir()):
                        path.parent.rmdir()
            self.remove_scratch(tasks)
        for name, content in (files or {}).items():
            self.path.mkdir(parents=True, exist_ok=True)
            with written_whole(self.path / name) as unfinished:
                unfinished.write_bytes(content)
        self.write(results)

    def write(self, results: dict[str, Any]) -> None:
        """Replace `results.json`."""
        write_json(self.path / RESULTS_FILE, results)

    def read(
        self,
        recipe: dict[str, Any],
        class_names: Sequence[str],
        base_model_is_local: bool = False,
        after: int | None = None,
        processes: int | None = None,
    ) -> dict[str, Any] | None:
        """The results so far, or None if there are none.

        If `results.json` is lost, the copy in the last complete task's folder takes its place.

        Args:
            recipe: All arguments of the run that is to go on.
            class_names: Its classes, in order of arrival.
            base_model_is_local: Whether `model_name_or_path` is a folder, which may have moved.
            after: Go back to the results after this task.
            processes: The number of processes that are to go on; None: not compared.

        Raises:
            ResumeError: If the run in the folder has another recipe (the message names the differing arguments), other
                classes or another number of processes; or if the file is damaged.
        """
        file = self.path / RESULTS_FILE
        if after is not None:
            file = self.path / task_folder(after) / RESULTS_FILE
            self._read_sealed(after)
        elif not file.is_file():
            copies = self._copies()
            if not copies:
                return None
            file = copies[-1]
        try:
            results = read_json(file)
        except ValueError as error:
            raise ResumeError(f"resume: {error} {self._way_back(file)}") from error
        missing = [name for name, kind in _NEEDED.items() if not isinstance(results.get(name), kind)]
        if missing or (file.parent != self.path and task_folder(len(results["accuracy_matrix"])) != file.parent.name):
            raise ResumeError(
                f"resume: {file} is damaged: expected the results of a run, with {(*missing, 'its tasks')[0]}. "
                f"{self._way_back(file)}"
            )
        # The recipe of a run that was fetched from the Hub has no local paths.
        mine = public_recipe(json.loads(json.dumps(recipe)), base_model_is_local)
        theirs = public_recipe(results["recipe"], base_model_is_local)
        different = [
            f"{key}: {theirs.get(key)!r} there, {mine.get(key)!r} here"
            for key in sorted(mine.keys() | theirs.keys())
            if defines_run(key) and not _is_same(key, theirs, mine)
        ]
        if different:
            raise ResumeError(
                f"resume: {file} is of a run with another recipe ({', '.join(different)}): --overwrite_output_dir "
                "instead of --resume replaces it, another output_dir leaves it alone."
            )
        began = results.get("processes", processes)
        if began != processes is not None:
            raise ResumeError(
                f"resume: {file} is of a run in {began} process{'es' if began > 1 else ''}, and {processes} would "
                f"make other batches: expected {began}."
            )
        if results["classes"] != list(class_names):
            raise ResumeError(f"resume: {file} is of a run with other classes ({', '.join(results['classes'])}).")
        if after is None and file != self.path / RESULTS_FILE:
            logger.warning(f"resume: {self.path / RESULTS_FILE} is missing; its copy {file} is used instead.")
            self.write(results)
        return results

    def take_back(self, results: dict[str, Any]) -> None:
        """Go back to earlier results of a run that may go on: later tasks no longer count as complete."""
        for task in range(len(results["accuracy_matrix"]) + 1, len(results["tasks"]) + 1):
            self.remove_checkpoints(task_folder(task))
        self.write(results)

    def check_tasks(self, done: int) -> None:
        """Check the complete tasks' checkpoints. The run needs the last one; damage to others is only a warning.

        Raises:
            ResumeError: If the last one is damaged; the message says how to go on.
        """
        for task in range(1, done + 1):
            try:
                self._read_sealed(task)
            except ResumeError as error:
                if task == done:
                    raise
                logger.warning(
                    f"{error} The run goes on without it, because it needs only the last complete task; only that "
                    "checkpoint is lost."
                )

    def _read_sealed(self, task: int) -> None:
        folder = self.path / task_folder(task)
        try:
            read_sealed_task(folder)
        except ValueError as error:
            before = [number for number in range(task - 1, 0, -1) if self._is_sealed(number)][:1]
            way = "--overwrite_output_dir starts again"
            if before:
                way = f"--resume_from_checkpoint {self.path / task_folder(before[0])} goes on after task {before[0]}"
            raise ResumeError(f"resume: {error} Put it back, or: {way}.") from error

    def _is_sealed(self, task: int) -> bool:
        try:
            read_sealed_task(self.path / task_folder(task))
        except ValueError:
            return False
        return True

    def trainer_folder(self, task: str) -> Path:
        """The folder in which the Trainer of a task writes."""
        return self.path / "trainer" / task

    def replay_file(self, task: str) -> Path:
        """The log of a task's zeroth-order steps."""
        return self.path / "replay" / f"{task}.safetensors"

    def task_of(self, chosen: str | Path) -> int | None:
        """The task whose folder in this run is `chosen`; None if it is no such folder."""
        chosen = Path(chosen).resolve()
        if chosen.parent != self.path.resolve() or not is_task_name(chosen.name):
            return None
        return task_number(chosen.name)

    def checkpoint(self, task: str, chosen: str | Path | None = None) -> Path | None:
        """The checkpoint within the task in progress to go on from; None: go on from the task's beginning.

        Args:
            task: The name of the first task that is not complete.
            chosen: The checkpoint to go on from; None, or the run's folder: the last one that is whole.

        Raises:
            ResumeError: If the chosen one does not belong to this task, or is not whole.
        """
        folder = self.trainer_folder(task)
        if chosen is None or Path(chosen).resolve() == self.path.resolve():
            return last_checkpoint(folder)
        is_of_task = Path(chosen).resolve().parent == folder.resolve()
        problem = what_is_missing(Path(chosen)) if is_of_task else None
        if problem or not is_of_task:
            raise ResumeError(
                f"resume_from_checkpoint={str(chosen)!r}: expected true, the run's folder {self.path}, a complete "
                f"task in it, or a whole checkpoint of the task in progress, {folder}/checkpoint-…"
                + (f"; {problem}" if problem else "")
            )
        return Path(chosen)

    def remove_checkpoints(self, task: str) -> None:
        """Remove the checkpoints within a task, not files added to them."""
        for folder in self._checkpoints(task):
            remove_checkpoint(folder, keep=unknown_files(folder))

    def remove_scratch(self, tasks: int) -> None:
        """Remove what a killed run was still writing, or pushing within a task; called before anything is pushed."""
        names = [task_folder(task) for task in range(1, tasks + 1)]
        remove_unfinished(self.path, _FILES)
        remove_unfinished(self.path / "replay", {self.replay_file(name).name for name in names})
        for name in names:
            shutil.rmtree(self.path / f".{name}.tmp", ignore_errors=True)
            for folder in self.trainer_folder(name).glob(f"{SCRATCH}checkpoint-*"):
                shutil.rmtree(folder, ignore_errors=True)

    def remove_empty_folders(self, tasks: int) -> None:
        """Remove the Trainers' empty folders: a Trainer makes its folder even if it saves nothing there."""
        names = ("evaluation", *(task_folder(task) for task in range(1, tasks + 1)))
        for folder in (*map(self.trainer_folder, names), self.path / "trainer"):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()

    def _written(self, tasks: int, any_task: bool = False) -> Iterator[Path]:
        """The existing paths of a run of this number of tasks: files, tasks' folders, checkpoints within tasks.

        Args:
            tasks: How many tasks the run has.
            any_task: Also a task's folder that is no checkpoint, but holds a file named like a part of one.
        """
        for name in _FILES:
            if (self.path / name).is_file():
                yield self.path / name
        for task in range(tasks, 0, -1):
            folder = self.path / task_folder(task)
            if (folder / TASK_FILE).is_file() or (any_task and (checkpoint_parts(folder) or folder.is_file())):
                yield folder
            if (replay := self.replay_file(folder.name)).is_file():
                yield replay
            yield from self._checkpoints(folder.name)

    def _checkpoints(self, task: str) -> list[Path]:
        folders = self.trainer_folder(task).glob("checkpoint-*")
        return sorted(folder for folder in folders if re.fullmatch(r"checkpoint-\d+", folder.name))

    def _evidence(self) -> Path | None:
        """The file that shows that there is a run: its results, or a copy of them."""
        file = self.path / RESULTS_FILE
        return file if file.exists() else next(reversed(self._copies()), None)

    def _copies(self) -> list[Path]:
        """The copies of the results in the folders of complete tasks, from the first task on."""
        copies: list[Path] = []
        while (folder := self.path / task_folder(len(copies) + 1)).is_dir():
            if not (folder / TASK_FILE).is_file() or not (folder / RESULTS_FILE).is_file():
                break
            copies.append(folder / RESULTS_FILE)
        return copies

    def _record(self) -> dict[str, Any]:
        """The results of the run in this folder, or a copy of them, which say what the run wrote.

        Raises:
            RunFolderError: If none can be read.
        """
        problem = None
        for file in (self.path / RESULTS_FILE, *reversed(self._copies())):
            try:
                results = read_json(file)
                if isinstance(results.get("tasks"), list) and isinstance(results.get("recipe"), dict):
                    return results
                problem = problem or f"{file} does not hold the results of a run."
            except ValueError as error:
                problem = problem or str(error)
        raise RunFolderError(
            f"overwrite_output_dir: {problem} So it is not known which files the run wrote: move it away, or choose "
            "another output_dir."
        )

    def _way_back(self, file: Path) -> str:
        copies = [copy for copy in self._copies() if copy != file]
        if file.parent != self.path:  # the file is itself a copy: only earlier copies can help
            copies = [copy for copy in copies if copy < file]
        if copies:
            return f"Move it away, and --resume goes on from its copy, {copies[-1]}."
        return "Put it back, or choose another output_dir."


def _is_of_a_beginning(path: Path) -> bool:
    """Tell whether a file holds only the untrained model's predictions, which a run writes before its results."""
    if path.name != PREDICTIONS_FILE:
        return False
    try:
        return not PredictionHistory.read(path).after
    except ValueError:
        return False


def _is_same(argument: str, there: dict[str, Any], here: dict[str, Any]) -> bool:
    """Tell whether an argument is the same in two recipes; if one lacks it, the other must leave it unset."""
    if argument in there and argument in here:
        mine, theirs = here[argument], there[argument]
        if argument in _OF_RELEASES and isinstance(mine, dict) and isinstance(theirs, dict):
            return all(mine[key] == theirs[key] for key in mine.keys() & theirs.keys())
        return mine == theirs
    value = there.get(argument, here.get(argument))
    default = ZOCLTrainingArguments.__dataclass_fields__.get(argument)
    return not value or (default is not None and value == default.default)
