"""The model that a run begins with: a CLIP model and a fresh adapter, or an adapter that is trained further."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from transformers import AutoProcessor, ProcessorMixin
from transformers.utils import find_adapter_config_file, logging

from ..files import replace_folder
from ..models import AdapterArguments, adapter_arguments, add_adapter, freeze
from ..sample import resolve
from .checkpoint import (
    base_model_of,
    check_base_model,
    check_repository_name,
    load_base_model,
    load_clip,
    read_adapter_config,
    read_clip_config,
)
from .client import download
from .known import read_processor
from .seal import ADAPTER_CONFIG, BASE_CONFIG, SEALED_FILES, check_seal
from .task_file import TASK_FILE, read_task


logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Pretrained:
    """A model to train, and what is known of it.

    Args:
        clip: The CLIP model with the adapter that is trained.
        processor: Its processor.
        base_model: What checkpoints name as the base model.
        adapter: The arguments of the adapter's shape, by name.
        known_classes: The classes that a task's checkpoint has learned already.
    """

    clip: PeftModel
    processor: ProcessorMixin
    base_model: str
    adapter: dict[str, Any]
    known_classes: tuple[str, ...] = ()


def load_pretrained(
    name: str,
    args: AdapterArguments,
    dtype: str = "auto",
    seed: int = 0,
    num_tasks: int = 1,
    merge_into: str | Path | None = None,
) -> Pretrained:
    """Load the model that a run begins with.

    Args:
        name: A CLIP model (Hub id, folder, or embedded), which is given a fresh adapter; or a task's checkpoint or an
            adapter of PEFT's, folder or Hub id, which is trained further.
        args: The fresh adapter.
        dtype: The base model's dtype.
        seed: Of the fresh adapter's initial weights.
        num_tasks: The length of the stream.
        merge_into: Merge the adapter of `name` into its base model, keep the result in this folder, and give it a
            fresh adapter; a merged model that is there already is taken as it is.

    Raises:
        ValueError: If there is no such model, a checkpoint is damaged, `args` ask for another adapter than the one
            that is trained further, or the adapter cannot be merged or go on with another stream.
    """
    folder = _adapter_folder(name)
    if merge_into is not None:
        if folder is None:
            raise ValueError(f"merge_into={str(merge_into)!r}: {name!r} has no adapter to merge.")
        return _fresh(str(_merged(folder, Path(merge_into), dtype)), args, dtype, seed, num_tasks)
    return _fresh(name, args, dtype, seed, num_tasks) if folder is None else _go_on(name, folder, args, dtype)


def _fresh(name: str, args: AdapterArguments, dtype: str, seed: int, num_tasks: int) -> Pretrained:
    base = resolve(name)
    torch.manual_seed(seed)
    clip = load_clip(base, read_clip_config(base, {}), dtype, {})
    clip = add_adapter(clip, args, num_tasks=num_tasks)
    given = {each.name: getattr(args, each.name) for each in fields(args)}
    return Pretrained(clip, AutoProcessor.from_pretrained(base), name, given)


def _go_on(name: str, folder: Path, args: AdapterArguments, dtype: str) -> Pretrained:
    clip, info = _load_adapted(folder, dtype, is_trainable=True)
    config = clip.peft_config["default"]
    found = adapter_arguments(config)
    _check_arguments(name, args, found)
    if getattr(config, "num_routers", 1) > 1:
        raise ValueError(
            f"model_name_or_path={name!r}: its adapter has a router for each of {config.num_routers} tasks of its own "
            "stream, and none for those of another: train a fresh one on its base model."
        )
    freeze(clip, args.frozen_parameters or ())
    known = () if info is None else (*info["classes"], *info.get("known_classes", ()))
    logger.info(f"Going on with the adapter of {name}" + (f", which knows {', '.join(known)}." if known else "."))
    processor = _processor(folder, info, clip)
    base_model = config.base_model_name_or_path if info is None else info["base_model"]
    shape = {each.name: getattr(args, each.name) for each in fields(args)} | found
    return Pretrained(clip, processor, base_model, shape, known)


def _load_adapted(folder: Path, dtype: str, is_trainable: bool) -> tuple[PeftModel, dict[str, Any] | None]:
    """The adapter in `folder` on its base model, and its `task.json`, if it has one."""
    info = read_task(folder) if (folder / TASK_FILE).is_file() else None
    if info is not None:
        check_seal(folder, info)
    config: PeftConfig = read_adapter_config(folder, info)
    base = base_model_of(folder, info, config)
    clip = load_base_model(folder, base, config, dtype, {})
    config.base_model_name_or_path = str(base)
    clip.config.name_or_path = str(base)
    adapted = PeftModel.from_pretrained(clip, folder, config=config, is_trainable=is_trainable)
    if info is not None:
        check_base_model(adapted, info, base)
    return adapted, info


def _processor(folder: Path, info: dict[str, Any] | None, clip: PeftModel) -> ProcessorMixin:
    """A task's checkpoint has the processor; of another adapter it is the base model's."""
    if info is not None:
        return read_processor(folder, clip.config.text_config.vocab_size)
    return AutoProcessor.from_pretrained(clip.peft_config["default"].base_model_name_or_path)


def _adapter_folder(name: str) -> Path | None:
    """The folder of the adapter that `name` is, downloaded if need be; None if it is a model of its own.

    Raises:
        ValueError: If it is the folder of a whole run.
    """
    if resolve(name) != name:  # embedded
        return None
    folder = Path(name)
    if not folder.is_dir():
        check_repository_name(name)
        found = find_adapter_config_file(name)
        return None if found is None else download(name, [TASK_FILE, *SEALED_FILES])
    if (folder / ADAPTER_CONFIG).is_file():
        return folder
    tasks = sorted(file.parent.name for file in folder.glob(f"task-*/{TASK_FILE}"))
    if tasks and not (folder / BASE_CONFIG).is_file():
        raise ValueError(
            f"model_name_or_path={name!r} is the folder of a run, with {tasks[0]} to {tasks[-1]}: name one of them, "
            f"{folder / tasks[-1]}."
        )
    return None


def _check_arguments(name: str, args: AdapterArguments, found: dict[str, Any]) -> None:
    """What is asked for must be the adapter that is there; an argument's default asks for nothing."""
    default = AdapterArguments()
    for key, value in found.items():
        given = getattr(args, key)
        if _sorted(given) not in (_sorted(value), _sorted(getattr(default, key))):
            raise ValueError(
                f"{key}={given!r}: the adapter of model_name_or_path={name!r}, which is trained further, has "
                f"{value!r}; leave {key} out, or give merge_into, which trains a fresh adapter."
            )


def _sorted(value: Any) -> Any:
    return sorted(value) if isinstance(value, Iterable) and not isinstance(value, str) else value


def _merged(adapter: Path, folder: Path, dtype: str) -> Path:
    """The folder with the base model into which an adapter was merged."""
    if (folder / BASE_CONFIG).is_file():
        return folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"merge_into={str(folder)!r} holds something else: expected a merged model, or a new folder.")
    clip, info = _load_adapted(adapter, dtype, is_trainable=False)
    processor = _processor(adapter, info, clip)
    try:
        merged = clip.merge_and_unload()
    except (AttributeError, ValueError, NotImplementedError) as error:
        raise ValueError(f"merge_into: the adapter in {adapter} cannot be merged ({error}).") from error
    unfinished = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    merged.save_pretrained(unfinished)
    processor.save_pretrained(unfinished)
    replace_folder(unfinished, folder)
    return folder
