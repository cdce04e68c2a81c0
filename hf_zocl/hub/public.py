"""The parts of a run that may leave this machine: a checkpoint's files to push, and text without secrets."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ..files import read_json
from ..report.gallery import GALLERY_PICTURE
from ..sample import resolve
from .card import render_task_card
from .checkpoint import (
    ADAPTER_CONFIG,
    BASE_CONFIG,
    BASE_WEIGHTS,
    RESULTS_FILE,
    checkpoint_parts,
    read_sealed,
    seal,
)
from .task_info import TASK_FILE, check_place, last_component, public_argument, without_local_paths


# Arguments that are always paths, even if a relative path reads like the name of a repository.
PATH_ARGUMENTS = {"output_dir", "logging_dir", "dataset_path", "resume_from_checkpoint", "deepspeed"}
PATH_KEYS = re.compile(r"_?(\w+_)?(name_or_path|file|path|dir)")
TOKENS = re.compile(
    r"\bhf_[A-Za-z0-9]{8,}|\b(?:hf_oauth|hf_jwt|api_org)_[\w.-]+|(?<=Bearer )\S+|(?<=://)[^/\s@]+(?=@)"
)


def public_files(folder: Path, repo_id: str) -> dict[str, Path | bytes]:
    """The files of a task's checkpoint as they are pushed to the repository `repo_id`.

    Only files that this package writes are pushed; notes, logs and anything else in the folder stay here. If the base
    model is a folder on this machine, it is pushed too: the repository is then a whole model with an adapter, which
    transformers loads at any revision. The folder itself is not changed.

    Args:
        folder: A task's checkpoint.
        repo_id: The repository, which `adapter_config.json` names as the place of a base model that is pushed too.

    Returns:
        Path in the repository → a file, or its content with local paths removed; the model card says how to load the
        task from `repo_id`.

    Raises:
        ValueError: If `folder` is no task checkpoint, is not as it was saved, or has a file that is a link out of it.
        FileNotFoundError: If its base model is a local folder that is no longer there or has no safetensors.
    """
    info = read_sealed(folder)  # checked first: the copy gets a new seal, which must not cover up damage
    files: dict[str, Path | bytes] = {
        path.relative_to(folder).as_posix(): path for path in checkpoint_parts(folder) if path.is_file()
    }
    for path in files.values():
        check_place(path)  # a link must not publish a file from elsewhere
    is_local = info["base_model_is_local"]
    if is_local:
        files = {path.name: path for path in base_model_files(folder, info)} | files
    for name, path in list(files.items()):
        if name == RESULTS_FILE or (name.endswith("config.json") and "/" not in name):
            content = read_json(path)
            public = public_record(content, is_local) if name == RESULTS_FILE else _public_config(content)
            if name == ADAPTER_CONFIG and is_local:
                public["base_model_name_or_path"] = repo_id
            if public != content:
                files[name] = _json(public)
    task = public_record(info, is_local)
    if GALLERY_PICTURE not in files:  # the user may have removed it
        task.pop("gallery", None)
    files["README.md"] = str(render_task_card(task, repo_id)).encode()
    files[TASK_FILE] = _json(seal(task, files))
    return files


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def base_model_files(folder: Path, info: dict[str, Any]) -> list[Path]:
    """The configuration and weights of the local base model of a checkpoint.

    Raises:
        FileNotFoundError: If they are no longer there, or are no safetensors.
    """
    recorded = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    # A checkpoint from the Hub holds its base model; the embedded sample is found by its name.
    for place in (folder, Path(resolve(info["base_model"])), Path(recorded or ".")):
        if (place / BASE_CONFIG).is_file():
            weights = sorted(place.glob(BASE_WEIGHTS)) + sorted(place.glob("model.safetensors.index.json"))
            if not weights:
                raise FileNotFoundError(f"{place}: the base model has no model.safetensors; save it again.")
            for path in (place / BASE_CONFIG, *weights):
                check_place(path)
            return [place / BASE_CONFIG, *weights]
    raise FileNotFoundError(
        f"{folder / ADAPTER_CONFIG}: its local base model, {recorded}, is missing, and must be pushed with the "
        "adapter."
    )


def public_record(record: dict[str, Any], base_model_is_local: bool) -> dict[str, Any]:
    """The content of `task.json` or `results.json` without local paths; class names and prompts stay as they are."""
    public = {**record, "recipe": public_recipe(record["recipe"], base_model_is_local)}
    for name in ("benchmark", "dataset", "base_model"):
        if name in record:
            public[name] = without_local_paths(record[name])
    if base_model_is_local and "base_model" in record:
        public["base_model"] = last_component(record["base_model"])
    return public


def public_recipe(recipe: dict[str, Any], base_model_is_local: bool) -> dict[str, Any]:
    """A recipe with paths cut to their last component, so that it is the same on another machine."""
    paths = PATH_ARGUMENTS | ({"model_name_or_path"} if base_model_is_local else set())
    return {
        name: last_component(value) if name in paths and isinstance(value, str) else public_argument(name, value)
        for name, value in recipe.items()
    }


def redact(text: object, token: str | None = None) -> str:
    """`text` without `token`, and without anything else that looks like a token or a password."""
    cleaned = str(text).replace(token, "<token>") if token else str(text)
    return TOKENS.sub("<token>", cleaned)


def _public_config(config: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(config, dict):
        return config
    return {
        key: without_local_paths(value) if PATH_KEYS.fullmatch(key) else _public_config(value)
        for key, value in config.items()
    }
