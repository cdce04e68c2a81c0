"""A run's folder, restored from the Hub."""

from __future__ import annotations

import shutil
from pathlib import Path, PureWindowsPath
from typing import Any

from huggingface_hub import HfApi, get_token, snapshot_download
from huggingface_hub.errors import RepositoryNotFoundError
from transformers.utils import logging

from ..files import written_whole
from .checkpoint import FIGURE, RESULTS_FILE, is_of_checkpoint, place_task_checkpoint
from .client import answered, persistently
from .public import redact
from .push_queue import is_task_name, task_number
from .seal import check_seal
from .task_file import read_task


logger = logging.get_logger(__name__)


def fetch_run(repo_id: str, output_dir: str | Path, token: str | None = None, **hub_kwargs: Any) -> int:
    """Restore the folder of a run from the repository that it was pushed to.

    Args:
        repo_id: The repository, `name` or `user/name`.
        output_dir: Receives the folders `task-NN`, as the tags have them, and the last one's results and figure.
        token: A token that may read; default: the one of `HF_TOKEN` or `hf auth login`.
        hub_kwargs: Further arguments for `huggingface_hub.snapshot_download`.

    Returns:
        The last task that was fetched; 0 if the repository holds no task, or does not exist.

    Raises:
        OSError: If the Hub cannot be reached.
        ValueError: If `output_dir` holds a run, or a tag something else than its task's checkpoint, whole.
    """
    output_dir = Path(output_dir)
    if (output_dir / RESULTS_FILE).is_file():
        raise ValueError(f"{output_dir} holds a run already: fetch into another folder.")
    token = token or get_token()
    api = HfApi(token=token, library_name="hf_zocl")
    try:
        if "/" not in repo_id:
            repo_id = f"{persistently(lambda: answered(api.whoami))['name']}/{repo_id}"
        refs = persistently(lambda: answered(lambda: api.list_repo_refs(repo_id)))
        tags = {ref.name: ref.target_commit for ref in refs.tags if is_task_name(ref.name)}
    except RepositoryNotFoundError:
        return 0
    except Exception as error:
        raise OSError(f"{repo_id}: the run cannot be fetched from the Hub: {redact(error, token)}") from None
    names = sorted(tags, key=task_number)
    if not names:
        return 0
    output_dir.mkdir(parents=True, exist_ok=True)
    for name in names:
        _fetch_task(api, repo_id, name, tags[name], output_dir, token, hub_kwargs)
    for file in (FIGURE, RESULTS_FILE):  # the results last, for they say that the rest is there
        with written_whole(output_dir / file) as unfinished:
            shutil.copyfile(output_dir / names[-1] / file, unfinished)
    logger.info(f"Fetched from {repo_id}: {', '.join(names)}")
    return task_number(names[-1])


def _fetch_task(
    api: HfApi, repo_id: str, name: str, commit: str, output_dir: Path, token: str | None, hub_kwargs: dict[str, Any]
) -> None:
    """Fetch one task's folder; it is complete or absent."""
    unfinished = output_dir / f".{name}.tmp"
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        paths = persistently(lambda: answered(lambda: api.list_repo_files(repo_id, revision=commit)))
        for path in paths:
            windows = PureWindowsPath(path)  # which knows every way out that other systems know
            if windows.anchor or ".." in windows.parts:
                raise PermissionError(f"the file name {path!r} leads out of the folder")
        options = {"allow_patterns": [path for path in paths if is_of_checkpoint(path)], "token": token, **hub_kwargs}
        persistently(lambda: snapshot_download(repo_id, revision=commit, local_dir=unfinished, **options))
    except Exception as error:  # the client's errors have no common class
        raise OSError(f"{repo_id}, {name}: it cannot be fetched from the Hub: {redact(error, token)}") from None
    shutil.rmtree(unfinished / ".cache", ignore_errors=True)  # the client's notes
    info = read_task(unfinished)
    check_seal(unfinished, info)
    found = info["task"]
    if found != task_number(name) or not all((unfinished / file).is_file() for file in (FIGURE, RESULTS_FILE)):
        raise ValueError(f"{repo_id}: the tag {name} does not hold that task's checkpoint (it is of task {found}).")
    place_task_checkpoint(unfinished, output_dir / name)
