"""A log of zeroth-order steps (`ReplayLog`) as a file."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers.utils import logging

from ..files import written_whole
from ..zo import ReplayLog, ReplaySettings


logger = logging.get_logger(__name__)

# How directions are drawn. A log records it, because the same seed drawn in another way gives other directions.
DIRECTION = "packed-rademacher"


def save_replay_log(log: ReplayLog, path: Path) -> None:
    """Write a log as safetensors, with its settings as metadata; its folder is created."""
    path.parent.mkdir(exist_ok=True)
    settings = {**asdict(log.settings), "direction": DIRECTION}
    with written_whole(path) as unfinished:
        save_file(log.tensors(), unfinished, metadata={"settings": json.dumps(settings)})


def is_replay_log(path: Path) -> bool:
    """True of a file that `save_replay_log` has written, in this release or an earlier one."""
    try:
        with safe_open(path, "pt") as file:
            return "settings" in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def load_replay_log(path: str | Path) -> ReplayLog:
    """Read a log.

    Raises:
        ValueError: If the file is not a log, or its directions were drawn in another way.
    """
    try:
        with safe_open(path, "pt") as file:
            settings = json.loads(file.metadata()["settings"])
        direction = settings.pop("direction", "rademacher")
        if direction != DIRECTION:
            raise ValueError(f"its directions are {direction}, which are no longer drawn")
        settings["queries"] = tuple((branch, count) for branch, count in settings["queries"])
        return ReplayLog.from_tensors(ReplaySettings(**settings), load_file(path))
    except (KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{path} is not a log of zeroth-order steps ({error}).") from error


def earlier_log(path: Path, settings: ReplaySettings) -> ReplayLog | None:
    """The log of the steps before a checkpoint; None if there is none, or it has other settings than this training."""
    if not path.is_file():
        return None
    try:
        log = load_replay_log(path)
    except ValueError as error:
        logger.warning(f"{error} The training goes on without a log of its steps.")
        return None
    if log.settings != settings:
        logger.warning(f"{path}: its steps were taken under other arguments, so no log of the steps is kept.")
        return None
    return log
