"""A run's repository on the Hub: each task is one commit and one tag; the run's folder can be restored from them."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path, PureWindowsPath
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils.sha import git_hash, sha_fileobj
from transformers.utils import logging

from ..files import read_json, written_whole
from ..report.predictions import PREDICTIONS_FILE
from .checkpoint import (
    ADAPTER_WEIGHTS,
    FIGURE,
    RESULTS_FILE,
    checkpoint_parts,
    is_loaded,
    is_of,
    is_of_checkpoint,
    place_task_checkpoint,
    read_sealed,
)
from .client import answered, persistently
from .public import redact
from .task_info import TASK_FILE, is_task_name, task_number


logger = logging.get_logger(__name__)

# Folder of the Trainer's checkpoint within a task, until the task is complete.
LAST_CHECKPOINT = "last-checkpoint/"


class ForeignRepositoryError(ValueError):
    """A repository holds something else that would be read with a run's checkpoints."""


def push_files(api: HfApi, repo_id: str, tag: str, files: dict[str, Path | bytes], message: str) -> str:
    """Make one commit on `main` whose checkpoint is `files`, and tag it; do nothing if the tag has these files.

    Anything else on `main` stays. A tag with other files is moved, and the tags of later tasks are deleted: they
    belong to an earlier run, which this one replaces and whose commits stay in the history.

    Args:
        api: The client.
        repo_id: The repository.
        tag: The tag, `task-03`.
        files: Path in the repository → file or content.
        message: The commit's message.

    Returns:
        `pushed`, or `unchanged`.

    Raises:
        ForeignRepositoryError: If somebody has added a file that would be read with the checkpoint.
    """
    refs = api.list_repo_refs(repo_id)
    tags = {ref.name: ref.target_commit for ref in refs.tags}
    if tag in tags and not changes(api, repo_id, tags[tag], files, _was_pushed(api, repo_id, tags[tag])):
        return "unchanged"
    head = next(ref.target_commit for ref in refs.branches if ref.name == "main")
    was_pushed = _was_pushed(api, repo_id, head)
    tree = _tree(api, repo_id, head)
    if foreign := [path for path in tree if path not in files and is_loaded(path) and not was_pushed(path)]:
        raise ForeignRepositoryError(
            f"{repo_id}: somebody has put {', '.join(foreign[:3])} on main, which would be read with the run's "
            "checkpoint: remove or rename it there."
        )
    operations = _operations(tree, files, was_pushed)
    commit = head  # nothing to do if an earlier attempt committed and its answer was lost
    if operations:
        commit = api.create_commit(repo_id, operations, commit_message=message, parent_commit=head).oid
    stale = [name for name in tags if name == tag or (is_task_name(name) and task_number(name) > task_number(tag))]
    for name in stale:
        logger.warning(f"{repo_id}: tag {name} pointed to other files, at {tags[name]}; it is replaced.")
        api.delete_tag(repo_id, tag=name)
    try:
        api.create_tag(repo_id, tag=tag, revision=commit)
    except HfHubHTTPError as error:
        # The tag exists by now: an earlier answer was lost, or another process made it.
        if error.response.status_code != 409 or _tags(api, repo_id).get(tag) != commit:
            raise
    return "pushed"


def make_repository(api: HfApi, name: str, private: bool | None) -> str:
    """Create a repository if it is not there.

    Args:
        api: The client.
        name: The repository, as `hub_model_id` gives it.
        private: Whether a new one is private; None: the user's or organization's default.

    Returns:
        Its full name.

    Raises:
        ForeignRepositoryError: If it holds something else that would be read with a checkpoint.
    """
    repo_id = api.create_repo(name, private=private, exist_ok=True).repo_id
    if foreign := _foreign_names(api, repo_id):
        raise ForeignRepositoryError(
            f"hub_model_id={name!r}: the repository {repo_id} holds something else "
            f"({', '.join(foreign[:3])}), which would be read with the run's checkpoints: choose another one."
        )
    return repo_id


def _foreign_names(api: HfApi, repo_id: str) -> list[str]:
    """What stands in the way in a repository: files that would be read with a checkpoint or, if it holds no run, files
    that pushing would replace and tasks' tags.

    A card is no obstacle, because the Hub's form for new repositories makes one.
    """
    names = [entry.path for entry in api.list_repo_tree(repo_id) if isinstance(entry, RepoFile)]
    if TASK_FILE in names:
        was_pushed = _was_pushed(api, repo_id, "main")
        return [name for name in names if is_loaded(name) and not was_pushed(name)]
    # Within the first task, only the adapter is pushed, so that it may be there.
    files = [name for name in names if is_of_checkpoint(name) and name not in ("README.md", ADAPTER_WEIGHTS)]
    return files + [f"the tag {tag}" for tag in _tags(api, repo_id) if is_task_name(tag)]


def changes(
    api: HfApi,
    repo_id: str,
    revision: str,
    files: dict[str, Path | bytes],
    is_ours: Callable[[str], bool],
    repo_type: str = "model",
) -> list[CommitOperationAdd | CommitOperationDelete]:
    """The operations that turn the tree at `revision` into `files`; only paths that are ours are deleted."""
    return _operations(_tree(api, repo_id, revision, repo_type), files, is_ours)


def _tree(api: HfApi, repo_id: str, revision: str, repo_type: str = "model") -> dict[str, RepoFile]:
    tree = api.list_repo_tree(repo_id, recursive=True, revision=revision, repo_type=repo_type)
    return {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}


def _operations(
    tree: dict[str, RepoFile], files: dict[str, Path | bytes], is_ours: Callable[[str], bool]
) -> list[CommitOperationAdd | CommitOperationDelete]:
    gone = [CommitOperationDelete(path) for path in tree if path not in files and is_ours(path)]
    changed = [(path, content) for path, content in files.items() if not _is_same(content, tree.get(path))]
    return gone + [CommitOperationAdd(path, content) for path, content in changed]


def _was_pushed(api: HfApi, repo_id: str, revision: str) -> Callable[[str], bool]:
    """A function that tells whether a file at a revision belongs to the checkpoint there, or to one within a task."""
    try:
        info = read_json(Path(api.hf_hub_download(repo_id, TASK_FILE, revision=revision)))
    except EntryNotFoundError:
        return lambda path: path.startswith(LAST_CHECKPOINT)
    return lambda path: is_of(path, info) or path.startswith(LAST_CHECKPOINT)


def fetch_run(repo_id: str, output_dir: str | Path, token: str | None = None, **hub_kwargs: Any) -> int:
    """Restore the folder of a run from the repository that it was pushed to.

    Args:
        repo_id: The repository, `name` or `user/name`.
        output_dir: Receives the folders `task-NN`, as they are at the tags, and copies of the last one's results,
            predictions and figure.
        token: A token that may read; default: the one of `HF_TOKEN` or `hf auth login`.
        hub_kwargs: Further arguments for `huggingface_hub.snapshot_download`.

    Returns:
        The last task that was fetched; 0 if the repository holds no task, or does not exist.

    Raises:
        OSError: If the Hub cannot be reached.
        ValueError: If `output_dir` holds a run or files that would be replaced, or a tag does not hold its task's
            whole checkpoint.
    """
    output_dir = Path(output_dir)
    if (output_dir / RESULTS_FILE).is_file():
        raise ValueError(f"{output_dir} holds a run already: fetch into another folder.")
    token = token or get_token()
    api = HfApi(token=token, library_name="hf_zocl")
    try:
        if "/" not in repo_id:
            repo_id = f"{persistently(lambda: answered(api.whoami))['name']}/{repo_id}"
        tags = persistently(lambda: answered(lambda: _tags(api, repo_id)))
    except RepositoryNotFoundError:
        return 0
    except Exception as error:
        raise OSError(f"{repo_id}: the run cannot be fetched from the Hub: {redact(error, token)}") from None
    names = sorted(filter(is_task_name, tags), key=task_number)
    if not names:
        return 0
    _check_free(output_dir, names)
    output_dir.mkdir(parents=True, exist_ok=True)
    for name in reversed(names):  # the first task last: without it there is no run, so a fetch can be repeated
        _fetch_task(api, repo_id, name, tags[name], output_dir, token, hub_kwargs)
    for file in (FIGURE, PREDICTIONS_FILE, RESULTS_FILE):  # the results last, because they say that the rest is there
        if not (output_dir / names[-1] / file).is_file():  # earlier releases kept no predictions
            continue
        with written_whole(output_dir / file) as unfinished:
            shutil.copyfile(output_dir / names[-1] / file, unfinished)
    logger.info(f"Fetched from {repo_id}: {', '.join(names)}")
    return task_number(names[-1])


def _check_free(output_dir: Path, names: list[str]) -> None:
    """Refuse files that fetching would replace, except those of a fetch that was cut off."""
    has_first = (output_dir / names[0] / TASK_FILE).is_file()  # the first task is fetched last
    there = [] if has_first else [output_dir / file for file in (FIGURE, PREDICTIONS_FILE)]
    for folder in (output_dir / name for name in names):
        if folder.is_file():
            there.append(folder)
        elif not (folder / TASK_FILE).is_file():
            there += checkpoint_parts(folder)
    found = next((path for path in there if path.exists()), None)
    if found is not None:
        raise ValueError(
            f"{found} already exists, and no {RESULTS_FILE} says that a run wrote it: move it away, or fetch into "
            "another folder."
        )


def _fetch_task(
    api: HfApi, repo_id: str, name: str, commit: str, output_dir: Path, token: str | None, hub_kwargs: dict[str, Any]
) -> None:
    """Fetch one task's folder; it is complete or absent."""
    unfinished = output_dir / f".{name}.tmp"
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        paths = persistently(lambda: answered(lambda: api.list_repo_files(repo_id, revision=commit)))
        for path in paths:
            windows = PureWindowsPath(path)  # it also knows the ways out of a folder that exist on other systems
            if windows.anchor or ".." in windows.parts:
                raise PermissionError(f"the file name {path!r} leads out of the folder")
        options = {"allow_patterns": [path for path in paths if is_of_checkpoint(path)], "token": token, **hub_kwargs}
        persistently(lambda: snapshot_download(repo_id, revision=commit, local_dir=unfinished, **options))
    except Exception as error:  # the client's errors have no common class
        raise OSError(f"{repo_id}, {name}: it cannot be fetched from the Hub: {redact(error, token)}") from None
    shutil.rmtree(unfinished / ".cache", ignore_errors=True)  # the client's own records
    found = read_sealed(unfinished)["task"]
    if found != task_number(name) or not all((unfinished / file).is_file() for file in (FIGURE, RESULTS_FILE)):
        raise ValueError(f"{repo_id}: the tag {name} does not hold that task's checkpoint (it is of task {found}).")
    place_task_checkpoint(unfinished, output_dir / name)


def _tags(api: HfApi, repo_id: str) -> dict[str, str]:
    return {ref.name: ref.target_commit for ref in api.list_repo_refs(repo_id).tags}


def _is_same(content: Path | bytes, entry: RepoFile | None) -> bool:
    if entry is None or entry.size != (len(content) if isinstance(content, bytes) else content.stat().st_size):
        return False
    if entry.lfs is None:
        return git_hash(content if isinstance(content, bytes) else content.read_bytes()) == entry.blob_id
    with io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as file:
        return sha_fileobj(file).hex() == entry.lfs.sha256
