"""One task's checkpoint: files in a folder, saved whole or not at all, sealed by checksums, and found again.

A checkpoint is a folder `task-03` with the adapter, the processor, `task.json` (`task_info.py`), `results.json` as it
was then, the data that the report draws (`REPORT_FILES`), the accuracy matrix as a picture, and the model card
(`card.py`). `load.py` makes a model of it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

from huggingface_hub.constants import EVAL_RESULTS_FOLDER
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft import PeftModel
from transformers import ProcessorMixin

from ..checks import WrongTypeError, check_count
from ..files import fingerprint, read_json, replace_folder, write_json
from ..models import CLIPClassifier, trained_adapter
from ..report import RESULTS_FILE, plot_accuracy_matrix
from ..report.gallery import GALLERY_PICTURE
from ..report.predictions import PREDICTIONS_FILE
from ..report.runs import TRAINING_LOG
from .card import render_eval_results, render_task_card
from .client import download
from .task_info import (
    FORMAT_VERSION,
    TASK_FILE,
    check_place,
    is_sealed,
    is_task_name,
    read_task,
    task_digest,
    task_folder,
    task_number,
)


ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
BASE_CONFIG, BASE_WEIGHTS = "config.json", "model*.safetensors"  # a base model next to its adapter
# The files that loading may read: nothing but JSON, safetensors and text.
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
PLUGIN_STATE = "plugins.safetensors"
SEALED_FILES = (*LOADED_FILES, RESULTS_FILE, PLUGIN_STATE)  # a resumed run reads the last two
REQUIRED_FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS)
FIGURE = "accuracy_matrix.png"
REPORT_FILES = (PREDICTIONS_FILE, TRAINING_LOG, GALLERY_PICTURE)  # loading reads none of them


def save_task_checkpoint(
    output_dir: str | Path,
    model: CLIPClassifier,
    processor: ProcessorMixin,
    task: dict[str, Any],
    results: dict[str, Any] | None = None,
    files: Mapping[str, bytes] | None = None,
) -> Path:
    """Save a task's checkpoint into `output_dir/task-NN`: adapter, processor, `task.json`, model card and figure.

    Args:
        output_dir: The run's folder.
        model: A classifier whose CLIP is wrapped by PEFT.
        processor: The CLIP model's processor.
        task: The content of `task.json`, see `hf_zocl.hub.card.render_task_card`.
        results: The run's `results.json` so far; default: the checkpoint has none.
        files: Further files, by name: those that the report and the card show (`REPORT_FILES`), the plug-ins' state.

    Returns:
        The checkpoint's folder; an earlier one of that name is replaced once the new one is complete.
    """
    folder = Path(output_dir) / task_folder(task["task"])
    unfinished = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    save_adapter(model.clip, unfinished)
    processor.save_pretrained(unfinished)
    write_json(unfinished / TASK_FILE, {"format_version": FORMAT_VERSION, **task})
    if results is not None:
        write_json(unfinished / RESULTS_FILE, results)
    for name, content in (files or {}).items():
        (unfinished / name).write_bytes(content)
    plot_accuracy_matrix({**task, **task["metrics"]}, unfinished / FIGURE)
    write_task_card(unfinished, task)
    seal_task_checkpoint(unfinished)
    place_task_checkpoint(unfinished, folder)
    return folder


def save_adapter(clip: PeftModel, folder: Path) -> None:
    """Save the active adapter in a checkpoint's form.

    PEFT would put an adapter that is not called `default` into a subfolder, and would keep an expression that chose
    the modules. Loading refuses such expressions, so the names of the modules take their place.
    """
    name = trained_adapter(clip)
    clip.save_pretrained(folder, selected_adapters=[name])
    own = folder / name
    if name != "default" and own.is_dir():
        for file in own.iterdir():
            file.replace(folder / file.name)
        own.rmdir()
    config = read_json(folder / ADAPTER_CONFIG)
    if any(isinstance(config.get(choice), str) for choice in ("target_modules", "exclude_modules")):
        names = sorted(clip.base_model.targeted_module_names)
        write_json(folder / ADAPTER_CONFIG, {**config, "target_modules": names, "exclude_modules": None})


def write_task_card(
    folder: Path, task: dict[str, Any], repo_id: str | None = None, revision: str | None = None
) -> None:
    """Write a checkpoint's `README.md` and, for a dataset on the Hub, its results (`.eval_results/*.yaml`).

    Args:
        folder: The checkpoint's folder.
        task, repo_id, revision: As for `hf_zocl.hub.card.render_task_card`.
    """
    (folder / "README.md").write_text(str(render_task_card(task, repo_id, revision)), encoding="utf-8")
    for name, content in render_eval_results(task).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8")


def is_of_checkpoint(path: str) -> bool:
    """True if a file with this path in a checkpoint's folder or a repository is part of a checkpoint."""
    folder, _, name = path.rpartition("/")
    if folder:
        return folder == EVAL_RESULTS_FOLDER and name.endswith(".yaml")
    return name in (TASK_FILE, FIGURE, "README.md", *REPORT_FILES) or _is_sealed(name)


def is_loaded(path: str) -> bool:
    """True if loading would read a file with this path along with the checkpoint next to it."""
    return "/" not in path and _is_sealed(path)


def checkpoint_parts(folder: Path) -> list[Path]:
    """The files in a folder that are parts of its checkpoint; `task.json` last: no checkpoint is without it."""
    files = [*folder.glob("*"), *(folder / EVAL_RESULTS_FOLDER).glob("*")]
    ours = [file for file in files if is_of_checkpoint(file.relative_to(folder).as_posix())]
    present = [file for file in ours if file.is_file() or file.is_symlink()]
    return sorted(present, key=lambda file: (file.name == TASK_FILE, file))


def is_of(path: str, info: dict[str, Any]) -> bool:
    """True if a file with this path is part of the very checkpoint with this `task.json`.

    For checkpoints of the first release, which had no checksums, only the name counts.
    """
    if not is_of_checkpoint(path):
        return False
    if not is_sealed(info) or path == RESULTS_FILE:  # earlier releases did not seal the results
        return True
    if "/" in path:
        return path in render_eval_results(info)
    return path in info.get("files", {}) or not _is_sealed(path)


def added_files(folder: Path) -> list[Path]:
    """The files in a checkpoint's folder that are named like a part of it, but that its `task.json` does not list."""
    try:
        info = read_task(folder)
    except ValueError:
        return []
    return [file for file in checkpoint_parts(folder) if not is_of(file.relative_to(folder).as_posix(), info)]


def place_task_checkpoint(unfinished: Path, folder: Path) -> None:
    """Replace an earlier checkpoint by a complete one; files that are no part of a checkpoint stay."""
    remove_task_checkpoint(folder)
    if not folder.exists():
        return replace_folder(unfinished, folder)
    for file in checkpoint_parts(unfinished):
        target = folder / file.relative_to(unfinished)
        target.parent.mkdir(exist_ok=True)
        shutil.move(file, target)
    shutil.rmtree(unfinished)


def remove_task_checkpoint(folder: Path) -> None:
    """Remove a checkpoint's own files, not those added to it, and its folder if nothing else is in it."""
    added = added_files(folder)
    for file in checkpoint_parts(folder):
        if file not in added:
            file.unlink()
    for path in (folder / EVAL_RESULTS_FOLDER, folder):
        with suppress(OSError):  # not empty, or not there
            path.rmdir()


def seal(info: dict[str, Any], files: Mapping[str, Path | bytes]) -> dict[str, Any]:
    """The content of `task.json` with checksums.

    Args:
        info: The content of `task.json`; an older seal in it is replaced.
        files: Path in the checkpoint → file or content; files that nothing reads get no checksum.
    """
    sealed = {name: files[name] for name in sorted(files) if _is_sealed(name)}
    info = {**info, "format_version": FORMAT_VERSION, "files": {n: fingerprint(file) for n, file in sealed.items()}}
    info = json.loads(json.dumps(info))  # as it will be read back: tuples become lists, keys text
    return {**info, "sha256": task_digest(info)}


def seal_task_checkpoint(folder: str | Path) -> None:
    """Write the checksums of a complete checkpoint into its `task.json`; repeat it after changing any of its files.

    Args:
        folder: The checkpoint's folder.

    Raises:
        ValueError: If it has no `task.json` or no adapter, or a file is a link out of the folder.
    """
    folder = Path(folder)
    files = {name: folder / name for name in _loaded_files(folder)}
    write_json(folder / TASK_FILE, seal(read_json(folder / TASK_FILE), files))


def read_sealed(folder: Path) -> dict[str, Any]:
    """Read a checkpoint's `task.json`, and check that its files are those that were sealed.

    Raises:
        ValueError: If the folder is not a task's checkpoint as it was saved.
    """
    info = read_task(folder)
    _check_seal(folder, info)
    return info


def read_sealed_task(folder: Path) -> dict[str, Any]:
    """`read_sealed` for a run's folder `task-NN`.

    Raises:
        ValueError: If the folder is not, as it was saved, the checkpoint of that task.
    """
    info = read_sealed(folder)
    if task_folder(info["task"]) != folder.name:
        raise ValueError(f"{folder / TASK_FILE} does not belong here: it is of task {info['task']}.")
    return info


def _check_seal(folder: Path, info: dict[str, Any]) -> None:
    """Refuse files that are damaged, missing or added, and links out of the folder.

    The first release wrote no checksums: then only the presence and the place of the files are checked.
    """
    present = _loaded_files(folder)
    if not is_sealed(info):
        return
    sealed = info.get("files", {})
    for name in sorted({*sealed, *present}):
        if name not in present:
            raise ValueError(f"{folder / name} is missing: {TASK_FILE} lists it.")
        if name not in sealed and name == RESULTS_FILE:
            continue  # earlier releases did not seal the results
        if name not in sealed:
            raise ValueError(f"{folder / name} does not belong here: {TASK_FILE} does not list it.")
        size = (folder / name).stat().st_size
        if size != sealed[name]["bytes"]:
            raise ValueError(f"{folder / name} is damaged: it has {size} bytes, expected {sealed[name]['bytes']}.")
        if fingerprint(folder / name) != sealed[name]:
            raise ValueError(f"{folder / name} is damaged: its content does not match its checksum in {TASK_FILE}.")


def _is_sealed(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in SEALED_FILES)


def _loaded_files(folder: Path) -> list[str]:
    """The names of the sealed files in the folder; refused if a required one is missing, or one is a link out."""
    names = sorted(path.name for path in folder.iterdir() if _is_sealed(path.name))
    for name in REQUIRED_FILES:
        if name not in names:
            raise ValueError(f"{folder / name} is missing: every checkpoint needs it.")
    for name in names:
        check_place(folder / name)
    return names


def find_task_checkpoint(
    path: str | Path, task: int | Literal["best"] | None = None, revision: str | None = None, **hub_kwargs: Any
) -> Path:
    """The folder of one task's checkpoint, downloaded if it is on the Hub; arguments as for `load_task_checkpoint`.

    Raises:
        ValueError: If there is no such folder, or `task` and `revision` are both given.
    """
    if task is not None and revision is not None:
        raise ValueError(f"task={task} and revision={revision!r} were both given: they name the same thing, pass one.")
    if isinstance(task, str) and task != "best":
        raise WrongTypeError(f"task={task!r}: expected a number from 1, or 'best'.")
    if task is not None and not isinstance(task, str):
        check_count("task", task)
    folder = Path(path)
    if folder.is_dir():
        number = best_task(read_task(_newest(folder))) if task == "best" else task
        return folder / task_folder(number) if number is not None else folder
    check_repository_name(str(path))
    if task == "best":
        task = best_task(read_task(download(str(path), [TASK_FILE], **hub_kwargs)))
    revision = task_folder(task) if task is not None else revision
    return download(str(path), [TASK_FILE, *SEALED_FILES], revision, **hub_kwargs)


def best_task(info: dict[str, Any]) -> int:
    """The task after which accuracy on all classes seen was furthest above zero-shot accuracy.

    Accuracy alone would always name the first task, because it falls as classes are added. Zero-shot accuracy
    over the same classes falls with it, so the difference is what training has gained. Of equals, the later task wins,
    because it knows more classes.

    Args:
        info: The newest checkpoint's `task.json`.
    """
    pairs = zip(info["metrics"]["seen_accuracy"], info["zero_shot"]["seen_accuracy"], strict=False)
    return max((seen - zero_shot, number) for number, (seen, zero_shot) in enumerate(pairs, start=1))[1]


def complete_tasks(output_dir: Path) -> list[int]:
    """The tasks whose checkpoints are in `output_dir`, in order; in a run's folder, those complete by its results.

    A task that is complete by the results counts even if its folder is gone, as long as some task's folder is left.

    Raises:
        ValueError: If the results cannot be read.
    """
    tasks = sorted(task_number(folder.name) for folder in output_dir.glob("task-*") if is_task_name(folder.name))
    if not tasks or not (output_dir / RESULTS_FILE).is_file():
        return tasks
    done = len(read_json(output_dir / RESULTS_FILE).get("accuracy_matrix", ()))
    return list(range(1, done + 1))  # a resumed run trains the next one again


def _newest(folder: Path) -> Path:
    folders = [file.parent for file in folder.glob(f"task-*/{TASK_FILE}") if is_task_name(file.parent.name)]
    if not folders:
        raise ValueError(f"task='best': {folder} holds no task checkpoints (task-01, …).")
    return max(folders, key=lambda each: (len(each.name), each.name))


def check_repository_name(name: str) -> None:
    """Check that a name that is no folder can be that of a repository.

    Raises:
        ValueError: If it cannot.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"{name} is neither a folder nor the name of a repository on the Hub.") from error
