"""`task.json`, a checkpoint's record of itself: written whole, and read with every field checked."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..files import read_json


TASK_FILE = "task.json"
FORMAT_VERSION = 2  # version 1 had no checksums
MODES = ("zo", "fo", "fo+zo")
# Arguments of a recipe that are never paths. `\.layers\.1\.` only begins like one.
_NO_PATHS = re.compile(
    r"zo_layers|frozen_parameters|\w+_(modules|pattern)|modules_to_save|class_names|prompt_template"
)
LOCAL_PATH = re.compile(r"[\\/~]|\.\.?[\\/]|[A-Za-z]:[\\/]|file:")


def task_folder(task: int) -> str:
    """The name of a task's folder, and of its revision on the Hub: `task-01`, `task-02`, …"""
    return f"task-{task:02d}"


def is_task_name(name: str) -> bool:
    """True for a name that `task_folder` gives."""
    number = name.removeprefix("task-")
    return number.isdecimal() and int(number) > 0 and name == task_folder(int(number))


def task_number(name: str) -> int:
    """The task whose folder has this name, as `task_folder` gives it."""
    return int(name.removeprefix("task-"))


def without_local_paths(value: Any) -> Any:
    """A value in which local paths, also within lists and dictionaries, are cut to their last component."""
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


def public_argument(name: str, value: Any) -> Any:
    """The value of a recipe's argument, or of an entry in `adapter_config`, without local paths."""
    if _NO_PATHS.fullmatch(name):
        return value
    if name == "adapter_config" and isinstance(value, dict):
        return {key: public_argument(key, item) for key, item in value.items()}
    return without_local_paths(value)


def last_component(path: str | os.PathLike[str]) -> str:
    """The last component of a path, written for any operating system."""
    return re.split(r"[\\/]+", os.fspath(path).rstrip("\\/"))[-1]


def is_snapshot(folder: Path) -> bool:
    """True for a folder in the Hub's cache, which keeps files in `blobs` and links to them in `snapshots/COMMIT`."""
    return folder.resolve().parent.name == "snapshots"


def check_place(file: Path) -> None:
    """Check that a checkpoint's file is its own, not a link to somewhere else.

    Raises:
        ValueError: If it is a link out of the folder, or no file.
    """
    folder, target = file.parent.resolve(), file.resolve()
    blobs = [folder.parent.parent / "blobs"] if is_snapshot(folder) else []
    if not any(target.is_relative_to(place) for place in [folder, *blobs]):
        raise ValueError(f"{file} does not belong here: it is a link out of the checkpoint's folder.")
    if not target.is_file():
        raise ValueError(f"{file} is damaged: it is not a file.")


def read_task(folder: Path) -> dict[str, Any]:
    """Read a checkpoint's `task.json`, and check all that loading and cards use.

    Raises:
        ValueError: If there is none, this release cannot read it, something in it is missing or of a wrong type, or
            it was changed after it was sealed (`hf_zocl.hub.seal_task_checkpoint`).
    """
    file = folder / TASK_FILE
    if not file.is_file():
        inside = sorted(path.parent.name for path in folder.glob(f"task-*/{TASK_FILE}"))
        hint = f" It holds {inside[0]} to {inside[-1]}: give task." if inside else ""
        raise ValueError(f"{folder} is not a task checkpoint: it has no {TASK_FILE}.{hint}")
    check_place(file)
    info = read_json(file)
    if info.get("format_version") not in range(1, FORMAT_VERSION + 1):
        raise ValueError(f"{file}: format_version={info.get('format_version')!r}, expected 1 to {FORMAT_VERSION}.")
    wrong = next((name for name, (check, _) in _FIELDS.items() if not check(info.get(name, _MISSING))), None)
    if wrong is not None:
        found = f"it is {info[wrong]!r:.80}" if wrong in info else "it is missing"
        raise ValueError(f"{file} is damaged: expected {wrong} to be {_FIELDS[wrong][1]}, but {found}.")
    if problem := _contradiction(info):
        raise ValueError(f"{file} is damaged: {problem}.")
    if (is_sealed(info) or info["format_version"] > 1) and info.get("sha256") != task_digest(info):
        raise ValueError(f"{file} is damaged: its content does not match its checksum.")
    return info


def is_sealed(info: dict[str, Any]) -> bool:
    """True for a `task.json` with checksums; the first release wrote none."""
    return "files" in info or "sha256" in info


def task_digest(info: dict[str, Any]) -> str:
    """SHA-256 of the content of a `task.json`, whatever its blanks and the order of its keys."""
    rest = {name: value for name, value in info.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _contradiction(info: dict[str, Any]) -> str | None:
    """The first contradiction within a `task.json`, as text; None if there is none."""
    tasks, metrics = info["task"], info["metrics"]
    lengths = {"task_sizes": info["task_sizes"], "metrics.accuracy_matrix": metrics["accuracy_matrix"]}
    lengths |= {"metrics.seen_accuracy": metrics["seen_accuracy"]}
    if "task_titles" in info:
        lengths["task_titles"] = info["task_titles"]
    for name, values in lengths.items():
        if len(values) != tasks:
            return f"{name} has {len(values)} entries after task {tasks}"
    if any(len(row) != number for number, row in enumerate(metrics["accuracy_matrix"], start=1)):
        return "metrics.accuracy_matrix is not a lower triangle"
    if len(info["zero_shot"]["seen_accuracy"]) < tasks or info["num_tasks"] < tasks:
        return f"zero_shot or num_tasks covers fewer than {tasks} tasks"
    if info.get("scenario") != "domain" and sum(info["task_sizes"]) != len(info["classes"]):
        return f"task_sizes add up to {sum(info['task_sizes'])}, but there are {len(info['classes'])} classes"
    return None


def _is_text(value: Any) -> bool:
    """True for text that a file can hold: without half characters (lone surrogates)."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def is_number(value: Any) -> bool:
    """True for a finite number; a bool is not a number."""
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number too large for a float
        return False


def _is_prompt(value: Any) -> bool:
    """True for a prompt with one `{}` and no other field, because fields can reach into the formatted object."""
    return _is_text(value) and value.count("{}") == 1 and not {"{", "}"} & set(value.replace("{}", ""))


def _list(check: Callable[[Any], bool], least: int = 0) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and len(value) >= least and all(map(check, value))


def _dict(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(check, value.values()))


def _or_none(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or check(value)


def _either(*checks: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: any(check(value) for check in checks)


def _with(**fields: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: (
        isinstance(value, dict) and all(check(value.get(name, _MISSING)) for name, check in fields.items())
    )


def _optional(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is _MISSING or check(value)


_MISSING = object()
_NUMBERS = _list(is_number, least=1)
_LAYERS = _either(_is_text, _list(_either(_is_text, _is_count)))
_MODES_BY_LAYER = _dict(lambda mode: _is_text(mode) and mode in MODES)
_PROMPTS = _either(_is_prompt, _list(_is_prompt, least=1))
_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "task": (lambda value: _is_count(value) and value > 0, "a number from 1"),
    "num_tasks": (lambda value: _is_count(value) and value > 0, "a number from 1"),
    "benchmark": (_is_text, "text"),
    "scenario": (_optional(_is_text), "text"),
    "dataset": (_or_none(_is_text), "text or null"),
    "base_model": (lambda value: _is_text(value) and value != "", "the name of a model"),
    "base_model_is_local": (_is_flag, "true or false"),
    "base_model_sha256": (_optional(_or_none(_is_text)), "a checksum"),
    "dtype": (_optional(_or_none(_is_text)), "a dtype"),
    "adapter": (_is_text, "text"),
    "classes": (_list(_is_text, least=1), "a list of names"),
    "known_classes": (_optional(_list(_is_text)), "a list of names"),
    "task_classes": (_list(_is_text), "a list of names"),
    "task_sizes": (_list(_is_count, least=1), "a list of numbers"),
    "task_titles": (_optional(_list(_or_none(_is_text))), "a list of titles"),
    "class_order": (_list(_is_count), "a list of labels"),
    "prompt_template": (_PROMPTS, "prompts with one {} each, for the class"),
    "task_prompts": (_optional(_list(_or_none(_PROMPTS))), "prompts with one {} each, by task"),
    "assignment": (
        _with(
            branch=_is_text,
            layers=_LAYERS,
            towers=_dict(_MODES_BY_LAYER),
        ),
        f"branch, layers and towers ({', '.join(MODES)})",
    ),
    "plugins": (_optional(_list(_is_text)), "a list of names"),
    "metrics": (
        _with(
            accuracy_matrix=_list(_NUMBERS, least=1),
            seen_accuracy=_NUMBERS,
            last=is_number,
            avg=is_number,
            forgetting=_or_none(is_number),
            backward_transfer=_or_none(is_number),
        ),
        "accuracies",
    ),
    "zero_shot": (_with(seen_accuracy=_NUMBERS), "accuracies"),
    "zero_shot_retention": (_optional(_or_none(is_number)), "a number"),
    "held_out": (_optional(_dict(_with(zero_shot=is_number, after=_NUMBERS))), "accuracies by name"),
    "gallery": (_optional(_with(task=_is_count, images=_is_count, forgotten=_is_count)), "a task and two numbers"),
    "recipe": (lambda value: isinstance(value, dict), "the run's arguments"),
    "seed": (_is_count, "a number"),
    "seconds": (_or_none(is_number), "a number"),
    "peak_memory_bytes": (_or_none(_is_count), "a number"),
    "versions": (_dict(_is_text), "versions by package"),
    "files": (_optional(_dict(_with(bytes=_is_count, sha256=_is_text))), "sizes and checksums by file"),
    "sha256": (_optional(_is_text), "a checksum"),
}
