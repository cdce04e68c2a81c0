"""A Space on the Hub: an app and its files, pushed as one commit, never over an app that is not ours."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id

from .client import answered, is_final, one_line, persistently
from .public import redact
from .repository import ForeignRepositoryError, changes


APP_FILE = "app.py"
PATIENCE = 600  # seconds for a push
# The files that the Hub makes in a new Space.
FRESH = {"README.md", ".gitattributes"}


def push_space(
    name: str, files: dict[str, Path | bytes], mark: str, token: str | None = None, private: bool | None = None
) -> str:
    """Push files to a Gradio Space, which is created if it is not there; other files in it stay.

    Args:
        name: The Space, `name` or `user/name`.
        files: Path in the Space → file or content; one is `app.py`.
        mark: The beginning of `app.py`, by which a Space that was pushed like this is recognised.
        token: A token that may write; default: the one of `HF_TOKEN` or `hf auth login`.
        private: Whether a new Space is private; None: the user's or organization's default.

    Returns:
        The Space's full name.

    Raises:
        ForeignRepositoryError: If the Space holds something else.
        ValueError: If there is no token, or the Hub refuses it or the name.
        OSError: If the Hub cannot be reached.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"push_space={name!r}: expected name or user/name ({error})") from None
    if (token := token or get_token()) is None:
        raise ValueError("push_space: there is no token: pass hub_token, set HF_TOKEN or run `hf auth login`.")
    api = HfApi(token=token, library_name="hf_zocl")
    try:
        return persistently(
            lambda: answered(lambda: _push(api, name, files, mark, private), PATIENCE),
            final=lambda error: is_final(error) or isinstance(error, ForeignRepositoryError),
        )
    except ForeignRepositoryError:
        raise
    except Exception as error:  # the client's errors have no common class
        raise OSError(f"push_space={name!r}: {redact(one_line(error, most=3), token)}") from None


def _push(api: HfApi, name: str, files: dict[str, Path | bytes], mark: str, private: bool | None) -> str:
    created = api.create_repo(name, repo_type="space", space_sdk="gradio", private=private, exist_ok=True)
    space = created.repo_id
    _check_free(api, name, space, mark)
    head = api.repo_info(space, repo_type="space").sha
    operations = changes(api, space, head, files, lambda path: False, repo_type="space")
    if operations:
        api.create_commit(space, operations, commit_message="Demo of a run", repo_type="space", parent_commit=head)
    return space


def _check_free(api: HfApi, name: str, space: str, mark: str) -> None:
    tree = api.list_repo_tree(space, repo_type="space", recursive=True)
    there = {entry.path for entry in tree if isinstance(entry, RepoFile)}
    if APP_FILE in there:
        app = Path(api.hf_hub_download(space, APP_FILE, repo_type="space"))
        if app.read_text(encoding="utf-8", errors="replace").startswith(mark):
            return
    if foreign := sorted(there - FRESH):
        raise ForeignRepositoryError(
            f"push_space={name!r}: the Space {space} holds something else ({', '.join(foreign[:3])}), which would be "
            "overwritten: choose another one."
        )
