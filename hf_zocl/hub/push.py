"""Every task's checkpoint to the Hub: in order, in the background, and from a queue that outlives the run.

One repository holds a run. A task is one commit on `main`, whose files are exactly the task's checkpoint, and one tag,
`task-01`, `task-02` and so on.
"""

from __future__ import annotations

import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub import constants as hub_constants
from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    validate_repo_id,
)
from transformers.utils import logging

from ..trainer.arguments import ZOCLTrainingArguments
from .client import REFUSALS, WAITS, answered, persistently, status_of
from .commits import changes, foreign_names, push_files
from .public import public_files, redact
from .push_queue import QUEUE_FILE, PushQueue, task_number
from .task_file import read_task, task_folder


logger = logging.get_logger(__name__)

CHECK_PATIENCE = 60
PATIENCE = 1800


class ForeignRepositoryError(ValueError):
    """A repository holds something else, with which a run's checkpoints would be read."""


@dataclass
class Save:
    """What is pushed from within a task.

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
    """Pushes a run's task checkpoints to one repository, in order, in a thread of its own.

    A push that fails is tried again after a while; one that keeps failing stays in the queue, with those after it, and
    has its next chance with the next task, the next run or `python -m hf_zocl push`.

    Args:
        output_dir: The run's folder.
        repo_id: The repository, `name` or `user/name`; default: the folder's name.
        token: A token that may write; default: the one of `HF_TOKEN` or `hf auth login`.
        private: Whether a new repository is private; None: as the user's or organization's default is.
        waits: Seconds before each further attempt; `Retry-After` makes one longer.
        always_push: Also push a checkpoint within a task while another push is under way.

    Raises:
        ValueError: If `repo_id` is no name of a repository.
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
        self.repo_id: str | None = None  # in full, once the Hub has said it
        self.queue = PushQueue(self.output_dir, name, private)
        self._saves: deque[Save] = deque()
        self._lock = threading.Lock()
        self._worker: threading.Thread | None = None

    @classmethod
    def from_arguments(cls, args: ZOCLTrainingArguments) -> HubPusher:
        """The pusher that `push_to_hub` and its like ask for; the repository is created, if the Hub can be reached.

        Raises:
            ValueError: If `hub_model_id`, `hub_revision` or the token will not do.
        """
        if args.hub_revision not in (None, "main"):
            raise ValueError(f"hub_revision={args.hub_revision!r}: a run's tasks are commits on main; leave it out.")
        pusher = cls(
            args.output_dir,
            args.hub_model_id,
            token=args.hub_token,
            private=args.hub_private_repo,
            always_push=args.hub_always_push,
        )
        pusher.check()
        return pusher

    def check(self) -> None:
        """Create the repository, so that what is wrong with the token or the name is known before any work is done.

        A Hub that is down or switched off (`HF_HUB_OFFLINE`) is no reason not to train: what is pushed then waits.

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
        """Put tasks into the queue, and push in the background; returns at once."""
        with self._lock:
            names = [task_folder(task) for task in tasks]
            # A task that is trained again is pushed again, after those before it.
            self.queue.pending = sorted({*self.queue.pending, *names}, key=task_number)
            self.queue.write()
            self._start()

    def push_save(self, save: Save) -> None:
        """Push what was saved within a task, in the background and once: the task's end pushes what matters of it.

        As with the Trainer, it is left out while another push is under way, unless `always_push` is set.
        """
        with self._lock:
            if self._worker is not None and not self.always_push:
                return save.clear()
            self._saves.append(save)
            self._start()

    def finish(self, patience: float = PATIENCE) -> list[str]:
        """Wait until all is pushed or has failed, try once more what failed before, and report.

        Args:
            patience: Seconds after which an upload that is still going on is left to the next run.

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
        where = f"{self.output_dir}"
        if left:
            reason = self.queue.error or f"still going on after {patience:.0f} s"
            logger.warning(
                f"Not on the Hub yet: {', '.join(left)} ({reason}). They are complete in {where}; push them with "
                f"`python -m hf_zocl push {where}`, or run again with --resume."
            )
        elif self.repo_id is not None:
            logger.info(f"All tasks are on the Hub: {hub_constants.ENDPOINT}/{self.repo_id}")
        return left

    def drain(self) -> dict[str, str]:
        """Push what is in the queue, in order, until it is empty or one push has failed for good.

        Returns:
            Task folder → `pushed`, `unchanged` (it was there already), or why it could not be pushed.
        """
        outcomes: dict[str, str] = {}
        while True:
            with self._lock:
                if not self.queue.pending:
                    return outcomes
                name = self.queue.pending[0]
            try:
                outcomes[name] = self._push_task(name)
            except Exception as error:
                outcomes[name] = self._describe(error)
                logger.warning(f"{name} could not be pushed: {outcomes[name]}")
                with self._lock:
                    self.queue.error = outcomes[name]
                    self.queue.write()
                return outcomes
            with self._lock:
                self.queue.pending.remove(name)
                self.queue.error = None
                self.queue.write()

    def _start(self) -> None:
        """Start the worker where there is work and none at work; the caller holds the lock."""
        if self._worker is None and (self.queue.pending or self._saves):
            # A daemon: a hanging upload must not keep a finished run from ending.
            self._worker = threading.Thread(target=self._work, name="push to the Hub", daemon=True)
            self._worker.start()

    def _work(self) -> None:
        with _no_progress_bars():
            while True:
                self.drain()
                with self._lock:
                    if self.queue.pending and self.queue.error is None:
                        continue  # it came when the one before was just done
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

    def _attempt(self, action: Callable[[], str]) -> str:
        """Do `action`, and again after each of the waits, unless the Hub refuses it."""

        def note(error: Exception, wait: float) -> None:
            if isinstance(error, RepositoryNotFoundError):
                self.repo_id = None  # it was deleted: the next attempt creates it
            logger.warning(f"Pushing failed ({self._describe(error)}); again in {wait:g} s.")

        return persistently(action, self.waits, note, final=self._is_final)

    @staticmethod
    def _is_final(error: Exception) -> bool:
        return status_of(error) in REFUSALS or isinstance(error, (OfflineModeIsEnabled, ForeignRepositoryError))

    def _push_task(self, name: str) -> str:
        folder = self.output_dir / name
        files = public_files(folder, self._attempt(self._repository))
        return self._attempt(lambda: push_files(self._api(), self._repository(), name, files, _message(folder)))

    def _api(self) -> HfApi:
        return HfApi(token=self.token, library_name="hf_zocl")

    def _repository(self) -> str:
        """The repository's full name; it is created if it is not there.

        Raises:
            ForeignRepositoryError: If it holds something else that would be read with a checkpoint.
        """
        if self.repo_id is None:
            api = self._api()
            repo_id = api.create_repo(self.queue.repo_id, private=self.queue.private, exist_ok=True).repo_id
            if foreign := foreign_names(api, repo_id):
                raise ForeignRepositoryError(
                    f"hub_model_id={self.queue.repo_id!r}: the repository {repo_id} holds something else "
                    f"({', '.join(foreign[:3])}), which would be read with the run's checkpoints: choose another one."
                )
            self.repo_id = repo_id
        return self.repo_id

    def _describe(self, error: BaseException) -> str:
        """One line that says what happened and, where the user can do something about it, what."""
        status = status_of(error)
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        text = " ".join(lines[:3]) or "no message"
        if isinstance(error, RuntimeError) and error.__cause__ is not None:
            text += f" {str(error.__cause__).strip().splitlines()[0]}" if str(error.__cause__).strip() else ""
        if status in (401, 403):
            text += f" The token needs the right to write to {self.queue.repo_id}: hub_token, HF_TOKEN, hf auth login."
        return redact(f"{type(error).__name__}: {text}", self.token or get_token())


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Bars of the background would run into the training's own."""
    shown = not are_progress_bars_disabled()
    if shown:
        disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()


def _message(folder: Path) -> str:
    info = read_task(folder)
    return f"Task {info['task']} of {info['num_tasks']}"
