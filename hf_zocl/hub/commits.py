"""A task's files as one commit of a repository and one tag; the same files again are no commit."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils.sha import git_hash, sha_fileobj
from transformers.utils import logging

from .checkpoint import is_of_checkpoint
from .push_queue import is_task_name, task_number
from .seal import ADAPTER_WEIGHTS
from .task_file import TASK_FILE


logger = logging.get_logger(__name__)

# The Trainer's checkpoint within a task, until the task is complete.
LAST_CHECKPOINT = "last-checkpoint/"


def push_files(api: HfApi, repo_id: str, tag: str, files: dict[str, Path | bytes], message: str) -> str:
    """Make one commit on `main` whose checkpoint is `files` and let `tag` name it; nothing if it is that already.

    Whatever else is on `main` stays. A tag that names other files moves, and the tags of later tasks go: they belong
    to a run that this one replaces, whose commits stay in the history.

    Args:
        api: The client.
        repo_id: The repository.
        tag: The tag, `task-03`.
        files: Path in the repository → file or content.
        message: The commit's message.

    Returns:
        `pushed`, or `unchanged`.
    """
    refs = api.list_repo_refs(repo_id)
    tags = {ref.name: ref.target_commit for ref in refs.tags}
    if tag in tags and not changes(api, repo_id, tags[tag], files, _of_a_task):
        return "unchanged"
    head = next(ref.target_commit for ref in refs.branches if ref.name == "main")
    operations = changes(api, repo_id, head, files, _of_a_task)
    commit = head  # a commit whose answer was lost is there already
    if operations:
        commit = api.create_commit(repo_id, operations, commit_message=message, parent_commit=head).oid
    stale = [name for name in tags if name == tag or (is_task_name(name) and task_number(name) > task_number(tag))]
    for name in stale:
        logger.warning(f"{repo_id}: tag {name} was that of other files, at {tags[name]}; it is replaced.")
        api.delete_tag(repo_id, tag=name)
    try:
        api.create_tag(repo_id, tag=tag, revision=commit)
    except HfHubHTTPError as error:
        # There is one by now: its answer was lost, or another has made it in between.
        if error.response.status_code != 409 or _tags(api, repo_id).get(tag) != commit:
            raise
    return "pushed"


def foreign_names(api: HfApi, repo_id: str) -> list[str]:
    """What a repository that holds no run has of the names of a checkpoint's files and tasks' tags.

    Loading would take these files for the checkpoint's, and pushing would replace them. A card is no obstacle: the
    Hub's own form makes one.
    """
    names = [entry.path for entry in api.list_repo_tree(repo_id) if isinstance(entry, RepoFile)]
    if TASK_FILE in names:
        return []
    # Within the first task the adapter alone is pushed.
    files = [name for name in names if is_of_checkpoint(name) and name not in ("README.md", ADAPTER_WEIGHTS)]
    return files + [f"the tag {tag}" for tag in _tags(api, repo_id) if is_task_name(tag)]


def _tags(api: HfApi, repo_id: str) -> dict[str, str]:
    return {ref.name: ref.target_commit for ref in api.list_repo_refs(repo_id).tags}


def changes(
    api: HfApi, repo_id: str, revision: str, files: dict[str, Path | bytes], is_ours: Callable[[str], bool]
) -> list[CommitOperationAdd | CommitOperationDelete]:
    """What turns the tree at `revision` into `files`, as far as its paths are ours."""
    tree = api.list_repo_tree(repo_id, recursive=True, revision=revision)
    there = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
    gone = [CommitOperationDelete(path) for path in there if path not in files and is_ours(path)]
    changed = [(path, content) for path, content in files.items() if not _is_same(content, there.get(path))]
    return gone + [CommitOperationAdd(path, content) for path, content in changed]


def _of_a_task(path: str) -> bool:
    return is_of_checkpoint(path) or path.startswith(LAST_CHECKPOINT)


def _is_same(content: Path | bytes, entry: RepoFile | None) -> bool:
    if entry is None or entry.size != (len(content) if isinstance(content, bytes) else content.stat().st_size):
        return False
    if entry.lfs is None:
        return git_hash(content if isinstance(content, bytes) else content.read_bytes()) == entry.blob_id
    with io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as file:
        return sha_fileobj(file).hex() == entry.lfs.sha256
