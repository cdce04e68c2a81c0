"""Paths of this machine are nobody else's business: what is shown or pushed keeps their last component alone."""

from __future__ import annotations

import os
import re
from typing import Any


LOCAL_PATH = re.compile(r"[\\/~]|\.\.?[\\/]|[A-Za-z]:[\\/]|file:")


def without_local_paths(value: Any) -> Any:
    """A value, or what lists and dictionaries hold, with the last component of every local path."""
    if isinstance(value, list):
        return [without_local_paths(item) for item in value]
    if isinstance(value, dict):
        return {key: without_local_paths(item) for key, item in value.items()}
    if not isinstance(value, str):
        return value
    name, equals, path = value.partition("=")  # held_out=name=folder
    if equals and LOCAL_PATH.match(path):
        return f"{name}={last_component(path)}"
    return last_component(value) if LOCAL_PATH.match(value) else value


def last_component(path: str | os.PathLike[str]) -> str:
    return re.split(r"[\\/]+", os.fspath(path).rstrip("\\/"))[-1]
