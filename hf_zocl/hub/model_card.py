"""The model card (README.md) of one task's checkpoint, from the dictionary of its `task.json` alone."""

import re
from functools import partial
from importlib import resources
from itertools import islice
from pathlib import Path
from pprint import pformat
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, StrictUndefined


TEMPLATE = "task_checkpoint.md"
# An allow-list: a recipe also holds tokens, folders and host names, which are nobody else's business.
SHOWN_ARGUMENTS = re.compile(
    "(zo|lora|moe)_.*|adapter|benchmark|dataset_(name|path)|(initial_)?increment|class_order_seed"
    "|max_(train|test)_images_per_class|optim|learning_rate|weight_decay|lr_scheduler_type|warmup_steps|max_steps"
    "|num_train_epochs|per_device_train_batch_size|gradient_accumulation_steps|max_grad_norm|bf16|fp16"
)
LOCAL_PATH = re.compile(r"[\\/~]|\.\.?[\\/]|[A-Za-z]:[\\/]|file:")
REPO_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
ADAPTERS = ("lora", "moe")
MARKS = {"zo": "ZO", "fo": "fo", "fo+zo": "mix", "frozen": "--"}


def render_task_card(task: dict[str, Any]) -> ModelCard:
    """Fill `model_cards/task_checkpoint.md` for one task's checkpoint.

    Args:
        task: the content of the checkpoint's `task.json`; accuracies are fractions in [0, 1], `seconds` in seconds,
            `peak_memory_bytes` in bytes.

    Returns:
        The card; `str(card)` is the README.md. It holds no local path: such values keep their last component.
    """
    recipe = {name: _without_local_paths(value) for name, value in task["recipe"].items()}
    dataset = _without_local_paths(task["dataset"])
    base_model = _last_component(task["base_model"]) if task["base_model_is_local"] else task["base_model"]
    titles = (_without_local_paths(task["benchmark"]), dataset, recipe.get("dataset_name"), recipe.get("dataset_path"))
    title = next((name for name in titles if name and name != "none"), "a local dataset")
    towers = {
        tower: {layer: mode for layer, mode in layers.items() if layer.isdigit()}
        for tower, layers in task["assignment"]["towers"].items()
    }
    modes = [mode for layers in towers.values() for mode in layers.values()]
    context = {
        **task,
        **task["metrics"],
        "base_model": base_model,
        "dataset_title": title,
        "num_layers": len(modes),
        "num_zo": modes.count("zo"),
        "classes_by_task": _classes_by_task(task),
        # The stream may have more tasks than this checkpoint has seen: compare over the same classes.
        "zero_shot": task["zero_shot"]["seen_accuracy"][: task["task"]],
        "picture": _layer_picture(towers),
        "recipe": {name: v for name, v in recipe.items() if v is not None and _is_shown(name, task["adapter"])},
        "card_data": _metadata(task, base_model, dataset, title).to_yaml(),
    }
    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined
    )
    environment.filters.update(
        md=_markdown, percent=_percent, python=partial(pformat, width=100, compact=True), size=_size
    )
    return ModelCard(environment.from_string(_template()).render(context))


def _template() -> str:
    """The template's text: package data in an installed wheel, the top-level folder in a checkout."""
    packaged = resources.files("hf_zocl") / "model_cards" / TEMPLATE
    checkout = Path(__file__).resolve().parents[2] / "model_cards" / TEMPLATE
    return (packaged if packaged.is_file() else checkout).read_text(encoding="utf-8")


def _metadata(task: dict[str, Any], base_model: str, dataset: str | None, title: str) -> ModelCardData:
    on_hub = not task["base_model_is_local"] and bool(REPO_ID.fullmatch(base_model))
    datasets = [dataset] if dataset and REPO_ID.fullmatch(dataset) else None
    method = ["zeroth-order-optimization"] if task["assignment"]["branch"] != "none" else []
    metric_names = {"last": "Last (accuracy on all classes seen)", "avg": "Avg (mean of that over the tasks)"}
    results = [
        EvalResult(
            task_type="zero-shot-image-classification",
            dataset_type=datasets[0] if datasets else title,
            dataset_name=f"{title}, tasks 1 to {task['task']} of {task['num_tasks']}",
            metric_type="accuracy",
            metric_name=name,
            metric_value=task["metrics"][key],
        )
        for key, name in metric_names.items()
    ]
    return ModelCardData(
        license="apache-2.0",
        library_name="peft",
        pipeline_tag="zero-shot-image-classification",
        base_model=base_model if on_hub else None,
        base_model_relation="adapter" if on_hub else None,
        datasets=datasets,
        tags=["hf_zocl", "continual-learning", *method, "clip", task["adapter"]],
        model_name=f"{_last_component(base_model)}-{task['adapter']}-{_last_component(title)}-task-{task['task']:02d}",
        eval_results=results,
    )


def _classes_by_task(task: dict[str, Any]) -> dict[str, list[str]]:
    if task.get("scenario") == "domain":  # all tasks share the classes
        return {f"{number}: {title}": task["classes"] for number, title in enumerate(task["task_titles"], start=1)}
    names = iter(task["classes"])
    titles = [f": {title}" if title else "" for title in task.get("task_titles", [None] * len(task["task_sizes"]))]
    numbered = enumerate(zip(task["task_sizes"], titles, strict=True), start=1)
    return {f"{number}{title}": list(islice(names, size)) for number, (size, title) in numbered}


def _layer_picture(towers: dict[str, dict[str, str]]) -> str:
    """One line per tower, one column per layer, below a line of layer numbers."""
    width = max(map(len, [*towers, "layer"]))
    depth = max(int(layer) for layers in towers.values() for layer in layers)
    rows = {"layer": [str(layer) for layer in range(1, depth + 1)]}
    for tower, layers in towers.items():
        rows[tower] = [MARKS[layers[layer]] if layer in layers else "" for layer in rows["layer"]]
    return "\n".join(
        (name.ljust(width) + "".join(f"{cell:>4}" for cell in row)).rstrip() for name, row in rows.items()
    )


def _is_shown(argument: str, adapter: str) -> bool:
    """The arguments of adapters that this checkpoint does not have say nothing of it."""
    owner = argument.split("_")[0]
    return bool(SHOWN_ARGUMENTS.fullmatch(argument)) and (owner not in ADAPTERS or owner == adapter)


def _last_component(path: str) -> str:
    return re.split(r"[\\/]+", path.rstrip("\\/"))[-1]


def _without_local_paths(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_local_paths(item) for item in value]
    return _last_component(value) if isinstance(value, str) and LOCAL_PATH.match(value) else value


def _markdown(value: Any) -> str:
    """Text for a table cell: one line, and nothing in it read as Markdown or HTML."""
    return re.sub(r"([\\`*_<|\[\]])", r"\\\1", " ".join(str(value).split()))


def _percent(fraction: float | None) -> str:
    return "–" if fraction is None else f"{100 * fraction:.1f}"


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
