"""The seal of a checkpoint: size and SHA-256 of every file that loading reads, kept in `task.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ..files import fingerprint
from ..report.runs import RESULTS_FILE
from .task_file import FORMAT_VERSION, TASK_FILE, check_place, is_sealed, read_json, task_digest, write_json


ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
BASE_CONFIG, BASE_WEIGHTS = "config.json", "model*.safetensors"  # of a base model that lies beside its adapter
# What loading may read: nothing but JSON, safetensors and text.
LOADED_FILES = (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    BASE_CONFIG,
    BASE_WEIGHTS,
    "model.safetensors.index.json",
    "processor_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*.jinja",
)
SEALED_FILES = (*LOADED_FILES, RESULTS_FILE)  # a resumed run reads its results
REQUIRED_FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS)


def seal(info: dict[str, Any], files: Mapping[str, Path | bytes]) -> dict[str, Any]:
    """The content of `task.json` with checksums.

    Args:
        info: The content of `task.json`; an older seal in it is replaced.
        files: The checkpoint's files by their path in it, or their content; those that nothing reads are left out.
    """
    sealed = {name: files[name] for name in sorted(files) if _is_sealed(name)}
    info = {**info, "format_version": FORMAT_VERSION, "files": {n: fingerprint(file) for n, file in sealed.items()}}
    info = json.loads(json.dumps(info))  # as it will be read: lists for tuples, text for keys
    return {**info, "sha256": task_digest(info)}


def seal_task_checkpoint(folder: str | Path) -> None:
    """Write the checksums of a complete checkpoint into its `task.json`; again after any of its files has changed.

    Args:
        folder: The checkpoint's folder.

    Raises:
        ValueError: If it has no `task.json` or no adapter, or a file is a link out of the folder.
    """
    folder = Path(folder)
    files = {name: folder / name for name in _loaded_files(folder)}
    write_json(folder / TASK_FILE, seal(read_json(folder / TASK_FILE), files))


def check_seal(folder: Path, info: dict[str, Any]) -> None:
    """Check that a checkpoint's files are those that were sealed.

    Args:
        folder: The checkpoint's folder.
        info: Its `task.json`, as `read_task` gives it. Without checksums, as the first release wrote it, there are
            only the files themselves to check.

    Raises:
        ValueError: If a file is damaged, missing, or was added, or a link leads out of the folder.
    """
    present = _loaded_files(folder)
    if not is_sealed(info):
        return
    sealed = info.get("files", {})
    for name in sorted({*sealed, *present}):
        if name not in present:
            raise ValueError(f"{folder / name} is missing: {TASK_FILE} lists it.")
        if name not in sealed and name == RESULTS_FILE:
            continue  # earlier releases did not seal it
        if name not in sealed:
            raise ValueError(f"{folder / name} is foreign: {TASK_FILE} does not list it.")
        size = (folder / name).stat().st_size
        if size != sealed[name]["bytes"]:
            raise ValueError(f"{folder / name} is damaged: it has {size} bytes, expected {sealed[name]['bytes']}.")
        if fingerprint(folder / name) != sealed[name]:
            raise ValueError(f"{folder / name} is damaged: its content does not fit its checksum in {TASK_FILE}.")


def _is_sealed(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in SEALED_FILES)


def _loaded_files(folder: Path) -> list[str]:
    """The names of the files that loading reads, each a file of the checkpoint's own."""
    names = sorted(path.name for path in folder.iterdir() if _is_sealed(path.name))
    for name in REQUIRED_FILES:
        if name not in names:
            raise ValueError(f"{folder / name} is missing: a checkpoint cannot be without it.")
    for name in names:
        check_place(folder / name)
    return names
