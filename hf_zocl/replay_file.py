"""A log of zeroth-order steps (`ReplayLog`) as a file."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from .zo import ReplayLog, ReplaySettings


def save_replay_log(log: ReplayLog, path: Path) -> None:
    """Write a log as safetensors, its settings as their metadata; beside, then renamed; its folder is made."""
    path.parent.mkdir(exist_ok=True)
    unfinished = path.with_name(f".{path.name}.tmp")
    save_file(log.tensors(), unfinished, metadata={"settings": json.dumps(asdict(log.settings))})
    os.replace(unfinished, path)


def load_replay_log(path: str | Path) -> ReplayLog:
    """Read a log.

    Raises:
        ValueError: If the file is none.
    """
    try:
        with safe_open(path, "pt") as file:
            settings = json.loads(file.metadata()["settings"])
        settings["queries"] = tuple((branch, count) for branch, count in settings["queries"])
        return ReplayLog.from_tensors(ReplaySettings(**settings), load_file(path))
    except (KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{path} is no log of zeroth-order steps ({error}).") from error
