"""Push a run's checkpoints to the Hub: in order, in the background, and from a queue that outlives the run.

A push writes

- when a task is complete: one commit on `main` and the tag `task-03`. The commit holds exactly that task's checkpoint
  (`public.public_files`): adapter, processor, `task.json`, `results.json`, figure, card, and a base model that is a
  local folder. `last-checkpoint/` is deleted; anything else on `main` stays (`repository.push_files`).
- within a task, if `hub_strategy` says so: one commit with the adapter, and with the Trainer's checkpoint in
  `last-checkpoint/` or `checkpoints/task-03/checkpoint-40/` (`PushOnSave`); no tag.
- into the run's folder: `push_queue.json`, as long as a task waits (`PushQueue`).
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_token
from huggingface_hub import constants as hub_constants
from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    validate_repo_id,
)
from safetensors.torch import save
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from ..files import write_json
from ..models import adapter_weights
from ..trainer.arguments import ZOCLTrainingArguments
from .checkpoint import ADAPTER_WEIGHTS
from .client import REFUSALS, WAITS, answered, one_line, persistently, status_of
from .public import public_files, redact
from .repository import LAST_CHECKPOINT, ForeignRepositoryError, changes, make_repository, push_files
from .task_info import read_task, task_folder, task_number


logger = logging.get_logger(__name__)

QUEUE_FILE = "push_queue.json"
CHECK_PATIENCE = 60
PATIENCE = 1800
SCRATCH = ".push-"  # prefix of a folder that is kept only during its push
PUSHED = (".safetensors", ".json", ".pt", ".pth")  # not the arguments (.bin): they hold tokens and paths


@dataclass
class PushQueue:
    """The tasks that wait to be pushed; while there are any, `output_dir/push_queue.json` keeps them, without a token.

    Args:
        output_dir: The run's folder.
        repo_id: The repository as it was asked for, with or without the user's name.
        private: Whether the repository is private, if it has to be created.
        pending: The names of the tasks' folders, the next one first.
        error: Why the first pending task could not be pushed.
    """

    output_dir: Path
    repo_id: str
    private: bool | None = None
    pending: list[str] = field(default_factory=list)
    error: str | None = None

    @classmethod
    def read(cls, output_dir: Path) -> PushQueue | None:
        """Read the queue that an earlier run left, if any; raise a ValueError if the file is no queue."""
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
        """Write the queue's file, or remove it if the queue is empty; if that fails, a resumed run makes it again."""
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


@dataclass
class Save:
    """A push of something saved within a task.

    Args:
        files: Path in the repository → file or content.
        replaces: Folders of the repository, ending in `/`, whose other files are deleted.
        message: The commit's message.
        scratch: A folder to remove afterwards.
    """

    files: dict[str, Path | bytes]
    replaces: tuple[str, ...]
    message: str
    scratch: Path | None = None

    def clear(self) -> None:
        if self.scratch is not None:
            shutil.rmtree(self.scratch, ignore_errors=True)


class HubPusher:
    """Pushes a run's task checkpoints to one repository, in order, in a background thread.

    A failed push is tried again after a while. If it keeps failing, it stays in the queue with those after it, until
    the next task, the next run or `python -m hf_zocl push` tries it again.

    Args:
        output_dir: The run's folder.
        repo_id: The repository, `name` or `user/name`; default: the folder's name.
        token: A token that may write; default: the one of `HF_TOKEN` or `hf auth login`.
        private: Whether a new repository is private; None: the user's or organization's default.
        waits: Seconds before each further attempt; `Retry-After` may lengthen a wait.
        always_push: Also push a checkpoint within a task while another push is under way.

    Raises:
        ValueError: If `repo_id` cannot be the name of a repository.
    """

    def __init__(
        self,
        output_dir: str | Path,
        repo_id: str | None = None,
        token: str | None = None,
        private: bool | None = None,
        waits: Sequence[float] = WAITS,
        always_push: bool = False,
    ):
        self.output_dir = Path(output_dir)
        name = repo_id or self.output_dir.absolute().name
        try:
            validate_repo_id(name)
        except HFValidationError as error:
            raise ValueError(f"hub_model_id={name!r}: expected name or user/name ({error})") from None
        self.token, self.waits, self.always_push = token, waits, always_push
        self.repo_id: str | None = None  # the full name, once the Hub has given it
        self.queue = PushQueue(self.output_dir, name, private)
        self._saves: deque[Save] = deque()
        self._lock = threading.Lock()
        self._worker: threading.Thread | None = None

    @classmethod
    def from_arguments(cls, args: ZOCLTrainingArguments) -> HubPusher:
        """Make the pusher that `push_to_hub` and `hub_*` ask for, and the repository, if the Hub can be reached.

        Raises:
            ValueError: If `hub_model_id`, `hub_revision` or the token is not usable.
        """
        if args.hub_revision not in (None, "main"):
            raise ValueError(f"hub_revision={args.hub_revision!r}: a run's tasks are commits on main; leave it out.")
        options = {"token": args.hub_token, "private": args.hub_private_repo, "always_push": args.hub_always_push}
        pusher = cls(args.output_dir, args.hub_model_id, **options)
        pusher.check()
        return pusher

    def check(self) -> None:
        """Create the repository, so that a wrong token or name is known before any work is done.

        If the Hub is down or switched off (`HF_HUB_OFFLINE`), training goes on, and checkpoints wait to be pushed.

        Raises:
            ValueError: If there is no token, or the Hub refuses it; or if the repository holds another model.
        """
        if hub_constants.is_offline_mode():
            logger.warning(f"HF_HUB_OFFLINE is set: checkpoints wait in {self.output_dir / QUEUE_FILE}.")
            return
        if self.token is None and get_token() is None:
            raise ValueError(
                "push_to_hub=True: there is no token: pass hub_token, set HF_TOKEN or run `hf auth login`."
            )
        try:
            answered(self._repository, CHECK_PATIENCE)
        except ForeignRepositoryError:
            raise
        except Exception as error:
            reason = self._describe(error)
            if status_of(error) in REFUSALS:
                raise ValueError(f"push_to_hub=True, hub_model_id={self.queue.repo_id!r}: {reason}") from None
            logger.warning(f"The Hub cannot be reached ({reason}). Training goes on; checkpoints wait to be pushed.")

    def push(self, *tasks: int) -> None:
        """Add tasks to the queue and push in the background; returns at once."""
        with self._lock:  # sorted, because a task may be trained and pushed again
            self.queue.pending = sorted({*self.queue.pending, *map(task_folder, tasks)}, key=task_number)
            self.queue.write()
            self._start()

    def push_save(self, save: Save) -> None:
        """Push something saved within a task, in the background and once: the task's end pushes what matters anyway.

        As with the Trainer, it is skipped while another push is under way, unless `always_push` is set.
        """
        with self._lock:
            if self._worker is not None and not self.always_push:
                return save.clear()
            self._saves.append(save)
            self._start()

    def finish(self, patience: float = PATIENCE) -> list[str]:
        """Try once more what failed before, wait until all is pushed or has failed, and report.

        Args:
            patience: Seconds to wait; an upload that is still going on then is left to the next run.

        Returns:
            The names of the task folders that are not pushed.
        """
        with self._lock:
            self._start()
            worker = self._worker
        if worker is not None:
            worker.join(patience)
        with self._lock:
            left = list(self.queue.pending)
        if left:
            reason = self.queue.error or f"still going on after {patience:.0f} s"
            logger.warning(
                f"Not on the Hub yet: {', '.join(left)} ({reason}). They are complete in {self.output_dir}; push them "
                f"with `python -m hf_zocl push {self.output_dir}`, or run again with --resume."
            )
        elif self.repo_id is not None:
            logger.info(f"All tasks are on the Hub: {hub_constants.ENDPOINT}/{self.repo_id}")
        return left

    def drain(self) -> dict[str, str]:
        """Push the queue's tasks, in order, until it is empty or one push has failed for good.

        Returns:
            Task folder → `pushed`, `unchanged` (it was already there), or why it could not be pushed.
        """
        outcomes: dict[str, str] = {}
        while True:
            with self._lock:
                if not self.queue.pending:
                    return outcomes
                name = self.queue.pending[0]
            reason = None
            try:
                outcomes[name] = self._push_task(name)
            except Exception as error:
                outcomes[name] = reason = self._describe(error)
                logger.warning(f"{name} could not be pushed: {reason}")
            with self._lock:
                self.queue.error = reason
                if reason is None:
                    self.queue.pending.remove(name)
                self.queue.write()
            if reason is not None:
                return outcomes

    def _start(self) -> None:
        """Start the worker thread if there is work and none is running; the caller holds the lock."""
        if self._worker is None and (self.queue.pending or self._saves):
            # A daemon, because a hanging upload must not keep a finished run from ending.
            self._worker = threading.Thread(target=self._work, name="push to the Hub", daemon=True)
            self._worker.start()

    def _work(self) -> None:
        with _no_progress_bars():
            while True:
                self.drain()
                with self._lock:
                    if self.queue.pending and self.queue.error is None:
                        continue  # a task came just after the queue was empty
                    if not self._saves:
                        self._worker = None
                        return
                    save = self._saves.popleft()
                self._push_save(save)

    def _push_save(self, save: Save) -> None:
        try:
            api, repo_id = self._api(), self._repository()
            operations = changes(api, repo_id, "main", save.files, lambda path: path.startswith(save.replaces))
            if operations:
                api.create_commit(repo_id, operations, commit_message=save.message)
        except Exception as error:
            logger.warning(f"{save.message} could not be pushed: {self._describe(error)}")
        finally:
            save.clear()

    def _push_task(self, name: str) -> str:
        def note(error: Exception, wait: float) -> None:
            if isinstance(error, RepositoryNotFoundError):
                self.repo_id = None  # the repository was deleted: the next attempt creates it again
            logger.warning(f"Pushing failed ({self._describe(error)}); trying again in {wait:g} s.")

        def is_final(error: Exception) -> bool:
            return status_of(error) in REFUSALS or isinstance(error, (OfflineModeIsEnabled, ForeignRepositoryError))

        folder = self.output_dir / name
        files = public_files(folder, persistently(self._repository, self.waits, note, is_final))
        info = read_task(folder)
        message = f"Task {info['task']} of {info['num_tasks']}"
        return persistently(
            lambda: push_files(self._api(), self._repository(), name, files, message), self.waits, note, is_final
        )

    def _api(self) -> HfApi:
        return HfApi(token=self.token, library_name="hf_zocl")

    def _repository(self) -> str:
        """The repository's full name; the repository is created if it is not there."""
        if self.repo_id is None:
            self.repo_id = make_repository(self._api(), self.queue.repo_id, self.queue.private)
        return self.repo_id

    def _describe(self, error: BaseException) -> str:
        """One line that says what happened and, if there is a remedy, what the user can do."""
        text = one_line(error, most=3)
        if isinstance(error, RuntimeError) and str(error.__cause__ or "").strip():
            text += f" {str(error.__cause__).strip().splitlines()[0]}"
        if status_of(error) in (401, 403):
            text += f" The token needs the right to write to {self.queue.repo_id}: hub_token, HF_TOKEN, hf auth login."
        return redact(text, self.token or get_token())


class PushOnSave(TrainerCallback):
    """Pushes the adapter at every save within a task, with the Trainer's checkpoint if that is asked for.

    Args:
        pusher: The pusher.
        strategy: `every_save`: the adapter; `checkpoint`: also the checkpoint, as `last-checkpoint/`;
            `all_checkpoints`: also every checkpoint, as `checkpoints/task-03/checkpoint-40/`.
        task: The task, counted from 1.
    """

    def __init__(self, pusher: HubPusher, strategy: str, task: int):
        self.pusher, self.strategy, self.task = pusher, strategy, task

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        weights = {name: tensor.cpu().contiguous() for name, tensor in adapter_weights(model.clip).items()}
        files: dict[str, Path | bytes] = {ADAPTER_WEIGHTS: save(weights, metadata={"format": "pt"})}
        scratch: Path | None = None
        replaces: tuple[str, ...] = ()
        if self.strategy != "every_save":
            scratch = checkpoint.with_name(f"{SCRATCH}{checkpoint.name}")  # the Trainer may remove its own meanwhile
            folder = LAST_CHECKPOINT
            if self.strategy == "all_checkpoints":
                folder = f"checkpoints/{task_folder(self.task)}/{checkpoint.name}/"
            files |= {folder + path.name: path for path in _second_names(checkpoint, scratch)}
            replaces = (folder,)
        self.pusher.push_save(Save(files, replaces, f"Task {self.task}, step {state.global_step}", scratch))


def _second_names(source: Path, target: Path) -> list[Path]:
    """Hard-link a folder's files into `target`, or copy them if the file system has no links."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    for path in source.iterdir():
        if path.suffix in PUSHED and path.is_file() and not path.is_symlink() and not path.name.startswith("."):
            try:
                os.link(path, target / path.name)
            except OSError:
                shutil.copy2(path, target / path.name)
    return sorted(target.iterdir())


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Hide the Hub's progress bars, which would run into those of the training."""
    shown = not are_progress_bars_disabled()
    if shown:
        disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()
