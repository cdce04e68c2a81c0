"""One task's checkpoint: saved whole or not at all, loaded in one line, refused where it is not what was saved."""

from __future__ import annotations

import copy
import shutil
from collections import ChainMap
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import CLIPConfig, CLIPModel, ProcessorMixin

from ..checks import WrongTypeError, check_count
from ..files import replace_folder
from ..models import ADAPTERS, CLIPClassifier, adapter_name, base_digest, in_training_dtype, trained_adapter
from ..models.clip_classifier import check_templates, prompt_tokens, same_prompts
from ..report import RESULTS_FILE, plot_accuracy_matrix
from ..sample import resolve
from .client import download
from .known import check_adapter_config, check_model_config, read_processor
from .model_card import EVAL_RESULTS_FOLDER, render_eval_results, render_task_card
from .seal import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    BASE_CONFIG,
    BASE_WEIGHTS,
    SEALED_FILES,
    check_seal,
    seal_task_checkpoint,
)
from .task_file import FORMAT_VERSION, TASK_FILE, is_snapshot, read_json, read_task, task_folder, write_json


FIGURE = "accuracy_matrix.png"
# What a checkpoint is made of besides the files that are sealed.
_OTHER_FILES = (TASK_FILE, FIGURE, "README.md")
_DOWNLOAD_OPTIONS = ("token", "cache_dir", "local_files_only", "force_download")


def save_task_checkpoint(
    output_dir: str | Path,
    model: CLIPClassifier,
    processor: ProcessorMixin,
    task: dict[str, Any],
    results: dict[str, Any] | None = None,
) -> Path:
    """Save a task's checkpoint into `output_dir/task-NN`: adapter, processor, `task.json`, model card and figure.

    Args:
        output_dir: The run's folder.
        model: A classifier whose CLIP is wrapped by PEFT.
        processor: The CLIP model's processor.
        task: The content of `task.json`, see `hf_zocl.hub.model_card.render_task_card`.
        results: The run's `results.json` so far; default: the checkpoint has none.

    Returns:
        The checkpoint's folder; one of that name is replaced once the new one is complete.
    """
    folder = Path(output_dir) / task_folder(task["task"])
    unfinished = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    _save_adapter(model.clip, unfinished)
    processor.save_pretrained(unfinished)
    write_json(unfinished / TASK_FILE, {"format_version": FORMAT_VERSION, **task})
    if results is not None:
        write_json(unfinished / RESULTS_FILE, results)
    plot_accuracy_matrix({**task, **task["metrics"]}, unfinished / FIGURE)
    write_task_card(unfinished, task)
    seal_task_checkpoint(unfinished)
    place_task_checkpoint(unfinished, folder)
    return folder


def _save_adapter(clip: PeftModel, folder: Path) -> None:
    """Save the active adapter; PEFT would give one that is not called `default` a folder of its own."""
    name = trained_adapter(clip)
    clip.save_pretrained(folder, selected_adapters=[name])
    own = folder / name
    if name != "default" and own.is_dir():
        for file in own.iterdir():
            file.replace(folder / file.name)
        own.rmdir()


def is_of_checkpoint(path: str) -> bool:
    """Whether a file of this path in a checkpoint's folder, or in a repository, is a part of a checkpoint."""
    folder, _, name = path.rpartition("/")
    if folder:
        return folder == EVAL_RESULTS_FOLDER and name.endswith(".yaml")
    return name in _OTHER_FILES or any(fnmatch(name, pattern) for pattern in SEALED_FILES)


def checkpoint_parts(folder: Path) -> list[Path]:
    """The files in a checkpoint's folder that are parts of it, `task.json` last: with it there is a checkpoint."""
    files = [*folder.glob("*"), *(folder / EVAL_RESULTS_FOLDER).glob("*")]
    parts = [
        f for f in files if is_of_checkpoint(f.relative_to(folder).as_posix()) and (f.is_file() or f.is_symlink())
    ]
    return sorted(parts, key=lambda file: (file.name == TASK_FILE, file))


def place_task_checkpoint(unfinished: Path, folder: Path) -> None:
    """Let a complete checkpoint take the place of an earlier one; files that are no part of one stay."""
    remove_task_checkpoint(folder)
    if not folder.exists():
        return replace_folder(unfinished, folder)
    for file in checkpoint_parts(unfinished):
        target = folder / file.relative_to(unfinished)
        target.parent.mkdir(exist_ok=True)
        shutil.move(file, target)
    shutil.rmtree(unfinished)


def remove_task_checkpoint(folder: Path) -> None:
    """Remove the files of a checkpoint, and its folder if nothing else is in it."""
    for file in checkpoint_parts(folder):
        file.unlink()
    for path in (folder / EVAL_RESULTS_FOLDER, folder):
        with suppress(OSError):  # something else is in it, or it is not there
            path.rmdir()


def write_task_card(
    folder: Path, task: dict[str, Any], repo_id: str | None = None, revision: str | None = None
) -> None:
    """Write a checkpoint's `README.md`, and its results as the Hub has them (`.eval_results/*.yaml`), if it can.

    Args:
        folder: The checkpoint's folder.
        task, repo_id, revision: As for `hf_zocl.hub.model_card.render_task_card`.
    """
    (folder / "README.md").write_text(str(render_task_card(task, repo_id, revision)), encoding="utf-8")
    for name, content in render_eval_results(task).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8")


def find_task_checkpoint(
    path: str | Path, task: int | Literal["best"] | None = None, revision: str | None = None, **hub_kwargs: Any
) -> Path:
    """The folder of one task's checkpoint, downloaded if it lies on the Hub; arguments as `load_task_checkpoint`'s.

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
    """The task after which the model stood highest above its own zero-shot accuracy.

    Accuracy on all classes seen falls as classes are added, so that alone would always name the first task; zero-shot
    accuracy over the same classes falls with it, and what is left is what training has won. Of equals, the later task:
    it knows more classes.

    Args:
        info: The newest checkpoint's `task.json`.
    """
    pairs = zip(info["metrics"]["seen_accuracy"], info["zero_shot"]["seen_accuracy"], strict=False)
    return max((seen - zero_shot, number) for number, (seen, zero_shot) in enumerate(pairs, start=1))[1]


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
        base_model: The base model's folder or name, where it is no longer where the checkpoint says.
        hub_kwargs: `token`, `cache_dir` and the like, for `huggingface_hub.snapshot_download`.

    Returns:
        The classifier with the classes of all tasks seen so far, and those that the run knew already, in evaluation
        mode; and the processor. Where tasks are whole datasets, a class that several of them have is there once.

    Raises:
        ValueError: If there is no such folder, it holds no task checkpoint, `task` and `revision` are both given, or a
            file of the checkpoint is damaged, missing, or belongs to another one.
        huggingface_hub.errors.HfHubHTTPError: If the Hub has no such repository or revision.
    """
    folder = find_task_checkpoint(path, task, revision, **hub_kwargs)
    with _hinting_at_download(folder):
        info = read_task(folder)
        check_seal(folder, info)
    config = read_adapter_config(folder, info)
    options = {name: hub_kwargs[name] for name in _DOWNLOAD_OPTIONS if name in hub_kwargs}
    if base_model is None:
        base_model = base_model_of(folder, info, config)
    # In the run's own dtype, so that it predicts as it did there.
    dtype = info["recipe"].get("dtype", "auto")
    clip = load_base_model(folder, base_model, config, dtype, options)
    processor = read_processor(folder, clip.config.text_config.vocab_size)
    adapted = PeftModel.from_pretrained(clip, folder, config=config)
    check_base_model(adapted, info, base_model)
    classes = (*_classes(info, clip, processor), *info.get("known_classes", ()))
    model = CLIPClassifier(adapted, processor.tokenizer, classes, info["prompt_template"])
    model.image_processor = processor.image_processor
    return model.eval(), processor


def _classes(info: dict[str, Any], clip: CLIPModel, processor: ProcessorMixin) -> list[str]:
    """The classes to predict among; of whole datasets, each class once, though several have it."""
    names, templates = info["classes"], check_templates(info["prompt_template"])
    if info.get("scenario") != "cross-dataset":
        return names
    length = clip.config.text_config.max_position_embeddings
    tokens = prompt_tokens(processor.tokenizer, names, templates, length)
    repeated = {number for _, number, _ in same_prompts(tokens, len(names), templates)}
    return [name for number, name in enumerate(names) if number not in repeated]


def read_sealed_task(folder: Path) -> dict[str, Any]:
    """The `task.json` of a run's folder `task-NN`.

    Raises:
        ValueError: If the folder is not, as it was saved, the checkpoint of that task.
    """
    info = read_task(folder)
    check_seal(folder, info)
    if task_folder(info["task"]) != folder.name:
        raise ValueError(f"{folder / TASK_FILE} is foreign: it is of task {info['task']}.")
    return info


def read_adapter_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The adapter's weights in a run's folder `task-NN`, on the CPU.

    Raises:
        ValueError: If the folder is not, as it was saved, the checkpoint of that task.
    """
    read_sealed_task(folder)
    file = folder / ADAPTER_WEIGHTS
    with _refusing(f"{file} is damaged: it cannot be read as safetensors"):
        return load_file(file)


def check_base_model(model: PeftModel, info: dict[str, Any], base_model: str | Path) -> None:
    """Check that the base model has the weights on which a checkpoint's adapter was trained.

    Raises:
        ValueError: If it has others.
    """
    expected = info.get("base_model_sha256")
    if expected is not None and base_digest(model) != expected:
        raise ValueError(
            f"the base model {str(base_model)!r} has changed: its weights are not those on which the adapter was "
            f"trained ({TASK_FILE}, base_model_sha256). Give the right one as base_model."
        )


def _newest(folder: Path) -> Path:
    folders = [file.parent for file in folder.glob(f"task-[0-9]*/{TASK_FILE}")]
    if not folders:
        raise ValueError(f"task='best': {folder} holds no task checkpoints (task-01, …).")
    return max(folders, key=lambda each: (len(each.name), each.name))


def check_repository_name(name: str) -> None:
    """Check that a name that is no folder may be a repository's.

    Raises:
        ValueError: If it may not.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"{name} is neither a folder nor the name of a repository on the Hub.") from error


def read_adapter_config(folder: Path, info: dict[str, Any] | None) -> PeftConfig:
    """The configuration of the adapter in a folder, which is that of `task.json`, if there is one.

    Raises:
        ValueError: If it is damaged or foreign, or would have something else read.
    """
    file = folder / ADAPTER_CONFIG
    content = read_json(file)
    check_adapter_config(content, str(file))
    with _refusing(f"{file} is damaged: it is no configuration of an adapter"):
        config = PeftConfig.from_peft_type(**content)
        name = adapter_name(config)
    if info is not None and info["adapter"] in ADAPTERS and name != info["adapter"]:
        raise ValueError(f"{file} is foreign: its adapter is {name!r}, expected {info['adapter']!r} ({TASK_FILE}).")
    return config


def base_model_of(folder: Path, info: dict[str, Any] | None, config: PeftConfig) -> str | Path:
    """The base model's folder or name: beside the adapter, embedded in this package, or as PEFT recorded it.

    Raises:
        ValueError: If the configuration names none.
    """
    if (folder / BASE_CONFIG).is_file() and any(folder.glob(BASE_WEIGHTS)):
        return folder
    for known in (None if info is None else info["base_model"], config.base_model_name_or_path):
        if isinstance(known, str) and resolve(known) != known:
            return resolve(known)
    name, file = config.base_model_name_or_path, folder / ADAPTER_CONFIG
    if not isinstance(name, str):
        raise ValueError(f"{file}: it names no base model ({name!r}): give base_model.")
    if is_snapshot(folder):  # a name from the Hub must not become a path here
        try:
            validate_repo_id(name)
        except HFValidationError as error:
            raise ValueError(
                f"{file}: the base model {name!r} is no repository on the Hub: give base_model."
            ) from error
        if Path(name).exists():
            raise ValueError(f"{file}: {name!r} is a repository and a folder here: say which, as base_model.")
    return name


def load_base_model(
    folder: Path, base_model: str | Path, config: PeftConfig, dtype: str, options: dict[str, Any]
) -> CLIPModel:
    """The base model, once it is known that the adapter fits it.

    Raises:
        ValueError: If it cannot be read, or the adapter is another model's.
    """
    options = {**options, "revision": config.revision if not Path(base_model).is_dir() else None}
    clip_config = read_clip_config(base_model, options)
    _check_adapter(folder, clip_config, config)
    # Given a folder with an adapter, transformers would put it into the model as well.
    if (Path(base_model) / ADAPTER_CONFIG).is_file():
        shards = [load_file(file) for file in sorted(Path(base_model).glob(BASE_WEIGHTS))]
        options = {"state_dict": dict(ChainMap(*shards))}
    return load_clip(base_model, clip_config, dtype, {**options, "use_safetensors": True})


def read_clip_config(base_model: str | Path, options: dict[str, Any]) -> CLIPConfig:
    """The configuration of a CLIP model, of which one can be made.

    Args:
        base_model: Folder or Hub id.
        options: Of `from_pretrained`.

    Raises:
        ValueError: If it cannot be read, or is that of another kind of model.
    """
    what = f"the base model {str(base_model)!r}"
    with _refusing(f"{what} cannot be read"):
        content, _ = CLIPConfig.get_config_dict(base_model, **options)
    check_model_config(content, what)
    with _refusing(f"{what} cannot be read"):
        return CLIPConfig.from_pretrained(base_model, **options)


def load_clip(base_model: str | Path, config: CLIPConfig, dtype: str, options: dict[str, Any]) -> CLIPModel:
    """A CLIP model, all of whose weights are there and finite; transformers would draw what is missing at random.

    Args:
        base_model: Folder or Hub id; not read where `options` have the weights, a `state_dict`.
        config: From `read_clip_config`.
        dtype: In which it is loaded.
        options: Of `from_pretrained`.

    Raises:
        ValueError: If a weight is missing, infinite or NaN, or the weights cannot be read.
    """
    what = f"the base model {str(base_model)!r}"
    name = None if "state_dict" in options else base_model
    with _refusing(f"{what} cannot be read"):
        clip, report = CLIPModel.from_pretrained(name, config=config, dtype=dtype, output_loading_info=True, **options)
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(f"{what} has no {missing[0]} (and {len(missing) - 1} more).")
    _check_finite(dict(clip.named_parameters()), what)
    return in_training_dtype(clip, dtype)


def _check_finite(tensors: dict[str, torch.Tensor], what: str) -> None:
    """No weight is infinite or NaN: a model of such weights would still name a class."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"{what} is damaged: {name} holds values that are infinite or NaN.")


def _check_adapter(folder: Path, clip_config: CLIPConfig, config: PeftConfig) -> None:
    """Compare the adapter's tensors with those that the base model would be given, before either is loaded."""
    file = folder / ADAPTER_WEIGHTS
    with _refusing(f"{file} is damaged: it cannot be read as safetensors"), safe_open(file, framework="pt") as tensors:
        found = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    with _refusing(f"{folder / ADAPTER_CONFIG} does not fit its base model"), torch.device("meta"):
        model = PeftModel(CLIPModel(clip_config), copy.deepcopy(config))
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    expected = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    if found == expected:
        _check_finite(load_file(file), str(file))
        return
    name = min(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    raise ValueError(
        f"{file} is foreign: {name} has the shape {found.get(name, 'none')}, "
        f"where its base model and {ADAPTER_CONFIG} have {expected.get(name, 'none')}."
    )


@contextmanager
def _hinting_at_download(folder: Path) -> Iterator[None]:
    """A file that was damaged on its way from the Hub stays in the cache until it is asked for anew."""
    try:
        yield
    except ValueError as error:
        if is_snapshot(folder):
            raise ValueError(f"{error} It was downloaded: force_download=True fetches it anew.") from error
        raise


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    """Whatever transformers, PEFT and tokenizers stumble over in a file becomes one error that says where."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{what} ({type(error).__name__}: {' '.join(str(error).split())}).") from error
