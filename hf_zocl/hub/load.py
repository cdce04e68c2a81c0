"""Load a model: a task's checkpoint to predict with, or any CLIP model or adapter to begin a run with."""

from __future__ import annotations

import shutil
from collections import ChainMap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoProcessor, CLIPConfig, CLIPModel, ProcessorMixin
from transformers.utils import find_adapter_config_file, logging

from ..checks import first_of
from ..files import fingerprint, read_json, replace_folder, write_json
from ..models import (
    AdapterArguments,
    CLIPClassifier,
    adapter_arguments,
    adapter_name,
    add_adapter,
    base_digest,
    configured,
    freeze,
    in_training_dtype,
    peft_config,
    trained_adapter,
)
from ..models.clip_classifier import check_templates, prompt_tokens, same_prompts
from ..sample import resolve
from .checkpoint import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    BASE_CONFIG,
    BASE_WEIGHTS,
    SEALED_FILES,
    check_repository_name,
    find_task_checkpoint,
    read_sealed,
    read_sealed_task,
    save_adapter,
)
from .client import download
from .task_info import TASK_FILE, is_snapshot
from .untrusted import (
    check_adapter,
    check_adapter_config,
    check_finite,
    check_model_config,
    read_processor,
    refusing,
    saved_on_trial,
)


logger = logging.get_logger(__name__)

MERGED_FROM = "merged_from.json"  # in a merged model's folder: the checksums of its adapter
_DOWNLOAD_OPTIONS = ("token", "cache_dir", "local_files_only", "force_download")


def load_task_checkpoint(
    path: str | Path,
    task: int | Literal["best"] | None = None,
    revision: str | None = None,
    base_model: str | Path | None = None,
    **hub_kwargs: Any,
) -> tuple[CLIPClassifier, ProcessorMixin]:
    """Load the model after one task: `model, processor = load_task_checkpoint("user/repo", task=3)`.

    Only JSON, safetensors and text are read, and no code of a repository is run.

    Args:
        path: A checkpoint's folder, a run's folder (with `task`), or a repository on the Hub.
        task: The task, counted from 1: the folder `task-NN` of a run, or the revision of a repository; or `best`, see
            `best_task`. Default: the folder itself, or the newest checkpoint of a repository.
        revision: A revision on the Hub, instead of `task`.
        base_model: The base model's folder or name, if it is no longer where the checkpoint says.
        hub_kwargs: `token`, `cache_dir` and the like, for `huggingface_hub.snapshot_download`.

    Returns:
        The classifier in evaluation mode, with the classes of all tasks seen so far and those that the run already
        knew; and the processor. If tasks are whole datasets, a class that several of them have is there once.

    Raises:
        ValueError: If there is no such folder, it holds no task checkpoint, `task` and `revision` are both given, or a
            file of the checkpoint is damaged, missing, or belongs to another checkpoint.
        huggingface_hub.errors.HfHubHTTPError: If the Hub has no such repository or revision.
    """
    folder = find_task_checkpoint(path, task, revision, **hub_kwargs)
    with _hinting_at_download(folder):
        info = read_sealed(folder)
    options = _download_options(hub_kwargs)
    clip, _ = _load_adapted(folder, info, _dtype(info), base_model, options)
    processor = read_processor(folder, clip.config.text_config.vocab_size)
    classes = _classes(info, clip, processor)
    model = CLIPClassifier(clip, processor.tokenizer, classes, info["prompt_template"])
    model.image_processor = processor.image_processor
    return model.eval(), processor


def _download_options(hub_kwargs: dict[str, Any]) -> dict[str, Any]:
    """The `hub_kwargs` that loading the base model takes as well."""
    return {name: hub_kwargs[name] for name in _DOWNLOAD_OPTIONS if name in hub_kwargs}


def _classes(info: dict[str, Any], clip: CLIPModel, processor: ProcessorMixin) -> list[str]:
    """The classes to predict among, and those known before; one that several datasets or runs share appears once.

    Outside of the `class` scenario, a run need not tell its classes from those known before: `Cat` from `cat`.
    """
    names, templates = [*info["classes"], *info.get("known_classes", ())], check_templates(info["prompt_template"])
    first = 0 if info.get("scenario") == "cross-dataset" else len(info["classes"])
    length = clip.config.text_config.max_position_embeddings
    tokens = prompt_tokens(processor.tokenizer, names, templates, length)
    repeated = {number for _, number, _ in same_prompts(tokens, len(names), templates) if number >= first}
    return [name for number, name in enumerate(names) if number not in repeated]


def load_base_model(folder: Path, **hub_kwargs: Any) -> CLIPModel:
    """Load the base model of a task's checkpoint, without the adapter.

    Args:
        folder: The checkpoint's folder.
        hub_kwargs: As for `load_task_checkpoint`.

    Raises:
        ValueError: As `load_task_checkpoint`.
    """
    info = read_sealed(folder)
    config = _read_adapter_config(folder, info)
    options = _download_options(hub_kwargs)
    base = _base_model_of(folder, info, config)
    return _load_base_model(folder, base, config, _dtype(info), options).eval()


def _dtype(info: dict[str, Any]) -> str:
    """The run's dtype, so that the model predicts as it did there. The recipe of a run in Python may lack it."""
    return info["recipe"].get("dtype") or info.get("dtype") or "auto"


def check_adapter_reloads(model: PeftModel) -> None:
    """Check, before any training, that a checkpoint of the active adapter could be loaded again.

    Raises:
        ValueError: If loading would refuse its configuration, or PEFT cannot build the adapter from it alone.
        OSError: If there is no room for a temporary copy.
    """
    what = f"no checkpoint of the adapter {trained_adapter(model)!r} could be loaded again"
    with saved_on_trial(partial(save_adapter, model), what) as folder:
        config = _read_adapter_config(folder, None)
        check_adapter(folder, model.get_base_model().config, config)
        if str(begun := getattr(config, "init_lora_weights", None)).startswith("pissa_niter"):
            raise ValueError(
                f"init_lora_weights={begun!r} takes a random part of the base model's weights out, and loading would "
                "draw another: expected 'pissa'."
            )


def read_adapter_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The adapter's weights in a run's folder `task-NN`, on the CPU.

    Raises:
        ValueError: If the folder is not, as it was saved, the checkpoint of that task.
    """
    read_sealed_task(folder)
    file = folder / ADAPTER_WEIGHTS
    with refusing(f"{file} is damaged: it cannot be read as safetensors"):
        return load_file(file)


@dataclass(frozen=True)
class Pretrained:
    """A model to train, and what is known about it.

    Args:
        clip: The CLIP model with the adapter to train.
        processor: Its processor.
        base_model: The base model's name in checkpoints.
        adapter: The arguments that make the adapter, by name.
        known_classes: The classes that the task's checkpoint, if it is one, learned before.
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
        name: A CLIP model (Hub id, folder, or embedded), which gets a fresh adapter; or a task's checkpoint or another
            PEFT adapter (folder or Hub id), which is trained further.
        args: The fresh adapter.
        dtype: The base model's dtype.
        seed: Seed of the fresh adapter's initial weights.
        num_tasks: The number of tasks in the stream.
        merge_into: Merge the adapter of `name` into its base model, keep the result in this folder, and give it a
            fresh adapter; a merged model that is already there is used as it is.

    Raises:
        ValueError: If there is no such model, a checkpoint is damaged, `args` ask for an adapter other than the one
            that is trained further, or the adapter cannot be merged or learn another stream.
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
    clip = _load_clip(base, _read_clip_config(base, {}), dtype, {})
    clip = add_adapter(clip, args, num_tasks=num_tasks)
    given = {each.name: getattr(args, each.name) for each in fields(args)}
    return Pretrained(clip, AutoProcessor.from_pretrained(base), name, given)


def _go_on(name: str, folder: Path, args: AdapterArguments, dtype: str) -> Pretrained:
    clip, info = _load_to_go_on(folder, dtype, is_trainable=True)
    config = clip.peft_config["default"]
    found = adapter_arguments(config)
    _check_arguments(name, args, config)
    if getattr(config, "num_routers", 1) > 1:
        raise ValueError(
            f"model_name_or_path={name!r}: its adapter has a router for each of its own stream's {config.num_routers} "
            "tasks, and none for new tasks: train a fresh adapter on its base model."
        )
    freeze(clip, args.frozen_parameters or ())
    processor = _processor(folder, info, clip)
    known = () if info is None else tuple(_classes(info, clip, processor))
    logger.info(f"Going on with the adapter of {name}" + (f", which knows {', '.join(known)}." if known else "."))
    base_model = config.base_model_name_or_path if info is None else info["base_model"]
    shape = {each.name: getattr(args, each.name) for each in fields(args)} | found
    return Pretrained(clip, processor, base_model, shape, known)


def _load_to_go_on(folder: Path, dtype: str, is_trainable: bool) -> tuple[PeftModel, dict[str, Any] | None]:
    """The adapter in `folder` on its base model, whose place it records, and its `task.json`, if it has one."""
    info = read_sealed(folder) if (folder / TASK_FILE).is_file() else None
    adapted, base = _load_adapted(folder, info, dtype, is_trainable=is_trainable)
    adapted.peft_config["default"].base_model_name_or_path = adapted.config.name_or_path = str(base)
    return adapted, info


def _processor(folder: Path, info: dict[str, Any] | None, clip: PeftModel) -> ProcessorMixin:
    """The processor: a task's checkpoint has its own; another adapter takes the base model's."""
    if info is not None:
        return read_processor(folder, clip.config.text_config.vocab_size)
    return AutoProcessor.from_pretrained(clip.peft_config["default"].base_model_name_or_path)


def _adapter_folder(name: str) -> Path | None:
    """The folder of the adapter that `name` refers to, downloaded if need be; None if it is a whole model."""
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


def _check_arguments(name: str, args: AdapterArguments, config: PeftConfig) -> None:
    """Refuse arguments that ask for an adapter other than the one that is there; defaults ask for nothing."""
    default = AdapterArguments()
    for key, value in adapter_arguments(config).items():
        given = getattr(args, key)
        if key == "adapter_config" and given is not None:  # compare only what was asked for, not what PEFT filled in
            given, value = (configured(each, given) for each in (peft_config(args), config))
        if _sorted(given) not in (_sorted(value), _sorted(getattr(default, key))):
            raise ValueError(
                f"{key}={given!r}: the adapter of model_name_or_path={name!r}, which is trained further, has "
                f"{value!r}; leave {key} out, or give merge_into, which trains a fresh adapter."
            )


def _sorted(value: Any) -> Any:
    return sorted(value) if isinstance(value, (list, tuple, set)) else value


def _merged(adapter: Path, folder: Path, dtype: str) -> Path:
    """The folder of the base model with the adapter merged in; it is made if it is not there."""
    files = [adapter / name for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS) if (adapter / name).is_file()]
    origin = {file.name: fingerprint(file)["sha256"] for file in files}
    if (folder / BASE_CONFIG).is_file():
        # A model merged by an earlier release does not say what it was made from.
        if (folder / MERGED_FROM).is_file() and read_json(folder / MERGED_FROM) != origin:
            raise ValueError(
                f"merge_into={str(folder)!r} holds a model with an adapter other than {adapter} merged in: expected "
                "that adapter, or a new folder."
            )
        return folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"merge_into={str(folder)!r} holds something else: expected a merged model, or a new folder.")
    clip, info = _load_to_go_on(adapter, dtype, is_trainable=False)
    processor = _processor(adapter, info, clip)
    try:
        merged = clip.merge_and_unload()
    except (AttributeError, ValueError, NotImplementedError) as error:
        raise ValueError(f"merge_into: the adapter in {adapter} cannot be merged ({error}).") from error
    unfinished = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    merged.save_pretrained(unfinished)
    processor.save_pretrained(unfinished)
    write_json(unfinished / MERGED_FROM, origin)
    replace_folder(unfinished, folder)
    return folder


def _load_adapted(
    folder: Path,
    info: dict[str, Any] | None,
    dtype: str,
    base_model: str | Path | None = None,
    options: dict[str, Any] | None = None,
    is_trainable: bool = False,
) -> tuple[PeftModel, str | Path]:
    """The adapter in a folder on its base model, and the base model's folder or name."""
    config = _read_adapter_config(folder, info)
    base = _base_model_of(folder, info, config) if base_model is None else base_model
    clip = _load_base_model(folder, base, config, dtype, options or {})
    adapted = PeftModel.from_pretrained(clip, folder, config=config, is_trainable=is_trainable)
    if info is not None:
        _check_base_model(adapted, info, base)
    return adapted, base


def _read_adapter_config(folder: Path, info: dict[str, Any] | None) -> PeftConfig:
    """The configuration of the adapter in a folder; the adapter must be the one that `task.json` names, if given."""
    file = folder / ADAPTER_CONFIG
    content = read_json(file)
    check_adapter_config(content, str(file))
    with refusing(f"{file} is damaged: it is not the configuration of an adapter"):
        config = PeftConfig.from_peft_type(**content)
        name = adapter_name(config)
    if info is not None and name != info["adapter"]:
        raise ValueError(
            f"{file} does not belong here: its adapter is {name!r}, expected {info['adapter']!r} ({TASK_FILE})."
        )
    return config


def _base_model_of(folder: Path, info: dict[str, Any] | None, config: PeftConfig) -> str | Path:
    """The base model's folder or name: next to the adapter, embedded in this package, or as PEFT recorded it."""
    if (folder / BASE_CONFIG).is_file() and any(folder.glob(BASE_WEIGHTS)):
        return folder
    for known in (None if info is None else info["base_model"], config.base_model_name_or_path):
        if isinstance(known, str) and resolve(known) != known:
            return resolve(known)
    name, file = config.base_model_name_or_path, folder / ADAPTER_CONFIG
    if not isinstance(name, str):
        raise ValueError(f"{file}: it names no base model ({name!r}): give base_model.")
    if is_snapshot(folder):  # a name in a downloaded file must not be taken for a path here
        try:
            check_repository_name(name)
        except ValueError as error:
            raise ValueError(
                f"{file}: the base model {name!r} is not a repository on the Hub: give base_model."
            ) from error
        if Path(name).exists():
            raise ValueError(
                f"{file}: {name!r} may be a repository or the folder of that name here: say which, as base_model."
            )
    return name


def _load_base_model(
    folder: Path, base_model: str | Path, config: PeftConfig, dtype: str, options: dict[str, Any]
) -> CLIPModel:
    """The base model, loaded only after checking that the adapter fits it."""
    options = {**options, "revision": config.revision if not Path(base_model).is_dir() else None}
    clip_config = _read_clip_config(base_model, options)
    check_adapter(folder, clip_config, config)
    # If the folder also holds an adapter, transformers would put it into the model.
    if (Path(base_model) / ADAPTER_CONFIG).is_file():
        shards = [load_file(file) for file in sorted(Path(base_model).glob(BASE_WEIGHTS))]
        options = {"state_dict": dict(ChainMap(*shards))}
    return _load_clip(base_model, clip_config, dtype, {**options, "use_safetensors": True})


def _read_clip_config(base_model: str | Path, options: dict[str, Any]) -> CLIPConfig:
    """The configuration of a CLIP model, checked before a model is made from it."""
    what = f"the base model {str(base_model)!r}"
    with refusing(f"{what} cannot be read"):
        content, _ = CLIPConfig.get_config_dict(base_model, **options)
    check_model_config(content, what)
    with refusing(f"{what} cannot be read"):
        return CLIPConfig.from_pretrained(base_model, **options)


def _load_clip(base_model: str | Path, config: CLIPConfig, dtype: str, options: dict[str, Any]) -> CLIPModel:
    """A CLIP model with all its weights, all finite; transformers would draw missing ones at random."""
    what = f"the base model {str(base_model)!r}"
    name = None if "state_dict" in options else base_model
    with refusing(f"{what} cannot be read"):
        clip, report = CLIPModel.from_pretrained(name, config=config, dtype=dtype, output_loading_info=True, **options)
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(f"{what} has no {first_of(missing)}.")
    check_finite(dict(clip.named_parameters()), what)
    return in_training_dtype(clip, dtype)


def _check_base_model(model: PeftModel, info: dict[str, Any], base_model: str | Path) -> None:
    """Refuse a base model whose weights are not those that the checkpoint's adapter was trained on."""
    expected = info.get("base_model_sha256")
    if expected is not None and base_digest(model) != expected:
        raise ValueError(
            f"the base model {str(base_model)!r} has changed: its weights are not those on which the adapter was "
            f"trained ({TASK_FILE}, base_model_sha256). Give the right one as base_model."
        )


@contextmanager
def _hinting_at_download(folder: Path) -> Iterator[None]:
    """Add to errors how to download again, since a file damaged on its way from the Hub stays in the cache."""
    try:
        yield
    except ValueError as error:
        if is_snapshot(folder):
            raise ValueError(f"{error} It was downloaded: force_download=True fetches it again.") from error
        raise
