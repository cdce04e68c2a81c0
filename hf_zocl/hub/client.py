"""Requests to the Hub: repeated while a fault may pass, and given up when no answer comes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub import constants as hub_constants
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.utils import parse_ratelimit_headers
from transformers.utils import logging


logger = logging.get_logger(__name__)
T = TypeVar("T")

WAITS = (1, 2, 4, 8, 16)
LONGEST_WAIT = 300
ANSWER_PATIENCE = 60
# Asking again is no use until somebody does something about it.
REFUSALS = {400, 401, 402, 403, 413}


class NoAnswerError(OSError):
    """The Hub took a request but does not answer it."""


def answered(ask: Callable[[], T], patience: float | None = None) -> T:
    """Call `ask`, a small request to the Hub, with a time limit, because the client would wait for ever.

    Args:
        ask: The request, called in a separate thread.
        patience: The limit in seconds; default: `ANSWER_PATIENCE`.

    Raises:
        NoAnswerError: If there is no answer within that time.
    """
    patience = ANSWER_PATIENCE if patience is None else patience
    outcome: dict[str, Any] = {}

    def run() -> None:
        try:
            outcome["answer"] = ask()
        except BaseException as error:
            outcome["error"] = error

    thread = threading.Thread(target=run, name="ask the Hub", daemon=True)
    thread.start()
    thread.join(patience)
    if "error" in outcome:
        raise outcome["error"]
    if "answer" not in outcome:
        raise NoAnswerError(f"{hub_constants.ENDPOINT} has not answered for {patience:g} s")
    return outcome["answer"]


def persistently(
    action: Callable[[], T],
    waits: Sequence[float] | None = None,
    note: Callable[[Exception, float], None] | None = None,
    final: Callable[[Exception], bool] | None = None,
) -> T:
    """Call `action`; if it fails, call it again after each wait, unless the Hub refuses it.

    Args:
        action: The request to the Hub.
        waits: Seconds before each further attempt; default: `WAITS`. The Hub may ask for a longer wait.
        note: Called with every error that another attempt follows, and the seconds until then.
        final: Tells whether an error is a refusal; default: `is_final`.
    """
    for wait in [*(WAITS if waits is None else waits), None]:
        try:
            return action()
        except Exception as error:
            after = asked_wait(error)
            if wait is None or (final or is_final)(error) or after > LONGEST_WAIT:
                raise
            if note is not None:
                note(error, max(wait, after))
            else:
                logger.warning(f"The Hub: {one_line(error)}; trying again in {max(wait, after):g} s.")
            time.sleep(max(wait, after))
    raise AssertionError("the last attempt returns or raises")


def is_final(error: BaseException) -> bool:
    """True for an error that would come again however often the Hub is asked."""
    return status_of(error) in {*REFUSALS, 404} or isinstance(error, (OfflineModeIsEnabled, NoAnswerError))


def status_of(error: BaseException) -> int | None:
    """The status of the Hub's answer behind an error, if there was an answer."""
    response = _response(error)
    return None if response is None else response.status_code


def asked_wait(error: BaseException) -> float:
    """The seconds that the Hub asks to wait, by `Retry-After` (seconds or a date) or by its `RateLimit` header."""
    response = _response(error)
    if response is None:
        return 0.0
    limit = parse_ratelimit_headers(response.headers)
    waits = [float(limit.reset_in_seconds)] if limit is not None and limit.remaining == 0 else [0.0]
    value = response.headers.get("Retry-After", "").strip()
    if value.isdecimal():
        waits.append(float(value))
    elif value:
        try:
            date = parsedate_to_datetime(value)
        except ValueError:
            return max(waits)
        date = date if date.tzinfo is not None else date.replace(tzinfo=timezone.utc)
        waits.append((date - datetime.now(timezone.utc)).total_seconds())
    return max(waits)


def download(repo_id: str, patterns: Sequence[str], revision: str | None = None, **hub_kwargs: Any) -> Path:
    """The folder in the Hub's cache with the files of a repository that match one of `patterns`.

    If the Hub is switched off or does not answer, these are the files that were downloaded before.

    Args:
        repo_id: The repository.
        patterns: Patterns of file names, as in `fnmatch`.
        revision: A branch, a tag or a commit.
        hub_kwargs: `token`, `cache_dir`, `force_download`, `local_files_only` and the like.

    Raises:
        huggingface_hub.errors.HfHubHTTPError: If the Hub has no such repository or revision, or refuses it.
        OSError: If it cannot be reached, and the files were not downloaded before.
    """
    options = {**hub_kwargs, "allow_patterns": list(patterns), "revision": revision}
    if hub_kwargs.get("local_files_only") or hub_constants.is_offline_mode():
        return Path(snapshot_download(repo_id, **{**options, "local_files_only": True}))
    api = HfApi(token=hub_kwargs.get("token"), library_name="hf_zocl")

    def look() -> None:
        """Ask what `snapshot_download` asks without a time limit; it has one for the files themselves."""
        list(api.list_repo_tree(repo_id, recursive=True, revision=api.model_info(repo_id, revision=revision).sha))

    try:
        persistently(lambda: answered(look))
        return Path(persistently(lambda: snapshot_download(repo_id, **options)))
    except Exception as error:
        if status_of(error) is not None and is_final(error):
            raise
        reason = one_line(error)
    try:
        folder = Path(snapshot_download(repo_id, **{**options, "local_files_only": True}))
    except Exception:
        raise OSError(f"{repo_id}: the Hub cannot be reached ({reason}).") from None
    logger.warning(f"{repo_id}: the Hub cannot be reached ({reason}): using what was downloaded before.")
    return folder


def _response(error: BaseException | None) -> Any:
    """The answer of the Hub behind an error, which the client may have wrapped."""
    while error is not None:
        if (response := getattr(error, "response", None)) is not None:
            return response
        error = error.__cause__
    return None


def one_line(error: BaseException, most: int = 1) -> str:
    """An error's class and at most the first `most` lines of its message, on one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:most]) or 'no message'}"
