"""The model card (README.md) of one task's checkpoint, from the dictionary of its `task.json` alone."""

from __future__ import annotations

import json
import re
from collections import Counter
from functools import cache, partial
from importlib import resources
from itertools import islice
from pathlib import Path
from pprint import pformat
from typing import Any

from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml
from huggingface_hub.constants import EVAL_RESULTS_FOLDER
from huggingface_hub.utils import yaml_dump
from jinja2 import Environment, StrictUndefined

from ..report.escape import markdown, markdown_code, one_line
from .task_info import last_component, public_argument, task_folder, without_local_paths


TEMPLATE = "task_checkpoint.md"
PIPELINE_TAG = "zero-shot-image-classification"
# An allow-list: a recipe also holds tokens, folders and host names, which must not be published.
SHOWN_ARGUMENTS = re.compile(
    "(zo|lora|moe)_.*|adapter(_config)?|benchmark|dataset_(name|path)|(initial_)?increment|class_order_seed"
    "|max_(train|test)_images_per_class|optim|learning_rate|weight_decay|lr_scheduler_type|warmup_steps|max_steps"
    "|num_train_epochs|per_device_train_batch_size|gradient_accumulation_steps|max_grad_norm|bf16|fp16"
    "|classifier_alignment(_learning_rate)?|frozen_parameters"
)
REPO_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
ADAPTERS = ("lora", "moe")
AMONG = {
    "class": "all classes seen by then",
    "task": "the classes of its own task",
    "domain": "all classes",
    "cross-dataset": "the classes of its own dataset",
}
MARKS = {"zo": "ZO", "fo": "fo", "fo+zo": "mix"}


class TaskCardData(ModelCardData):
    """The metadata of a task's model card and the values in its text, from the dictionary of `task.json` alone.

    Args:
        task: The content of the checkpoint's `task.json`; accuracies are fractions in [0, 1], `seconds` in seconds,
            `peak_memory_bytes` in bytes. Only the last component of a local path is ever shown.
        repo_id: The repository on the Hub that the card is for; None: a local folder.
        revision: The checkpoint's revision there; default: the task's tag.
    """

    def __init__(self, task: dict[str, Any], repo_id: str | None = None, revision: str | None = None):
        self.task, self.repo_id = task, repo_id
        self.revision = revision or task_folder(task["task"])
        on_hub = not self.base_is_local and not self.base_is_here and bool(REPO_ID.fullmatch(self.base_model_name))
        method = ["zeroth-order-optimization"] if task["assignment"]["branch"] != "none" else []
        short = f"{last_component(self.base_model_name)}-{task['adapter']}-{last_component(self.title)}"
        super().__init__(
            license="apache-2.0",
            library_name="peft",
            pipeline_tag=PIPELINE_TAG,
            base_model=self.base_model_name if on_hub else None,
            base_model_relation="adapter" if on_hub else None,
            datasets=[self.dataset_id] if self.dataset_id else None,
            metrics=["accuracy"],
            tags=["hf_zocl", "continual-learning", *method, "clip", task["adapter"]],
            model_name=f"{short}-{task_folder(task['task'])}",
            eval_results=self._eval_results(),
        )

    def to_dict(self) -> dict[str, Any]:
        own = ("task", "repo_id", "revision")  # not metadata
        return {name: value for name, value in super().to_dict().items() if name not in own}

    def _eval_results(self) -> list[EvalResult]:
        """Last, Avg and the accuracy on each task, in the form that older readers of Hub metadata know."""
        task, metrics = self.task, self.task["metrics"]
        values = {
            f"Last ({self.last})": metrics["last"],
            "Avg (mean of that over the tasks)": metrics["avg"],
        }
        values |= {f"Task {label}": value for label, value in zip(self.classes_by_task, self.accuracies, strict=True)}
        return [
            EvalResult(
                task_type=PIPELINE_TAG,
                dataset_type=self.dataset_id or self.title,
                dataset_name=f"{self.title}, tasks 1 to {task['task']} of {task['num_tasks']}",
                metric_type="accuracy",
                metric_name=name,
                metric_value=value,
            )
            for name, value in values.items()
        ]

    def entries(self) -> list[EvalResultEntry]:
        """The same figures for `.eval_results/*.yaml`; none for a dataset that is not on the Hub."""
        task, metrics = self.task, self.task["metrics"]
        if not self.dataset_id:
            return []
        notes = f"hf_zocl, after task {task['task']} of {task['num_tasks']}, among {self.among}"
        if cap := task["recipe"].get("max_test_images_per_class"):
            notes += f", at most {cap} test images of a class"
        values = {"all-seen": metrics["last"], "average": metrics["avg"]}
        values |= {task_folder(number): value for number, value in enumerate(self.accuracies, start=1)}
        return [
            EvalResultEntry(dataset_id=self.dataset_id, task_id=name, value=value, notes=notes)
            for name, value in values.items()
        ]

    @property
    def base_is_local(self) -> bool:
        return self.task["base_model_is_local"]

    @property
    def base_is_here(self) -> bool:
        """True if the base model is in the card's own repository."""
        return self.repo_id is not None and (self.base_is_local or self.task["base_model"] == self.repo_id)

    @property
    def base_model_name(self) -> str:
        return last_component(self.task["base_model"]) if self.base_is_local else self.task["base_model"]

    @property
    def dataset_id(self) -> str | None:
        """The dataset's Hub id; None if it is not on the Hub."""
        dataset = self.task["dataset"]
        return dataset if dataset and REPO_ID.fullmatch(dataset) else None

    @property
    def title(self) -> str:
        """The dataset's name, as the text gives it."""
        recipe = self.task["recipe"]
        names = (self.task["benchmark"], self.task["dataset"], recipe.get("dataset_name"), recipe.get("dataset_path"))
        return next((without_local_paths(name) for name in names if name and name != "none"), "a local dataset")

    @property
    def among(self) -> str:
        """The classes that a test image is predicted among, in words."""
        scenario = self.task.get("scenario", "class")
        known = len(self.task.get("known_classes", ())) if scenario == "class" else 0
        return AMONG.get(scenario, AMONG["class"]) + (f" and {known} that were known before" if known else "")

    @property
    def last(self) -> str:
        """Which accuracy Last is, in words."""
        is_mean = self.task.get("scenario") == "cross-dataset"  # each dataset weighs the same
        return "mean accuracy on the datasets seen" if is_mean else "accuracy on all classes seen"

    @property
    def went_on_from(self) -> str | None:
        """The adapter that the run trained further, and measured as zero-shot; None if it was a fresh one."""
        recipe = self.task["recipe"]
        name = recipe.get("model_name_or_path")
        if name not in (None, self.task["base_model"]) and not recipe.get("merge_into"):
            return without_local_paths(name)
        return "another run" if self.task.get("known_classes") else None

    @property
    def merged(self) -> str | None:
        """The adapter that was merged into the base model before the run; None if there was none."""
        recipe = self.task["recipe"]
        return without_local_paths(recipe.get("model_name_or_path")) if recipe.get("merge_into") else None

    @property
    def classes_by_task(self) -> dict[str, list[str]]:
        """The names of each task's classes, by the task's number and title."""
        task = self.task
        if task.get("scenario") == "domain":  # all tasks share the classes
            return {f"{number}: {title}": task["classes"] for number, title in enumerate(task["task_titles"], start=1)}
        names = iter(task["classes"])
        titles = [f": {title}" if title else "" for title in task.get("task_titles", [None] * len(task["task_sizes"]))]
        numbered = enumerate(zip(task["task_sizes"], titles, strict=True), start=1)
        return {f"{number}{title}": list(islice(names, size)) for number, (size, title) in numbered}

    @property
    def is_apart(self) -> bool:
        """True if a test image is predicted among the classes of its own task alone, and there are several tasks."""
        return self.task.get("scenario") in ("task", "cross-dataset") and self.task["task"] > 1

    @property
    def candidates(self) -> list[str]:
        """The classes to choose among, each once: several datasets may have one, which would share its score."""
        return list(dict.fromkeys(self.task["classes"]))

    @property
    def accuracies(self) -> list[float]:
        """The present accuracy on the test images of each task."""
        return self.task["metrics"]["accuracy_matrix"][-1]

    @property
    def most_forgotten(self) -> tuple[int, float, float] | None:
        """The task that has lost the most accuracy, with its best and its present one; None if no task lost any."""
        rows = self.task["metrics"]["accuracy_matrix"]
        best = [max(row[number] for row in rows[number:]) for number in range(len(rows))]
        losses = [top - now for top, now in zip(best, rows[-1], strict=True)]
        task = losses.index(max(losses))
        return (task + 1, best[task], rows[-1][task]) if losses[task] > 0 else None

    @property
    def plugins(self) -> list[str]:
        """The plug-ins of the run, without what its recipe says."""
        said = {"ClassifierAlignment"} if self.task["recipe"].get("classifier_alignment") else set()
        return [name for name in self.task.get("plugins", ()) if name not in said]

    @property
    def zero_shot(self) -> list[float]:
        """Zero-shot accuracy after each task seen; later tasks are left out, to compare over the same classes."""
        return self.task["zero_shot"]["seen_accuracy"][: self.task["task"]]

    @property
    def towers(self) -> dict[str, dict[str, str]]:
        """The mode in which each layer was trained, by tower; `other` is all outside the numbered layers."""
        towers: dict[str, dict[str, str]] = self.task["assignment"]["towers"]
        return towers

    @property
    def modes(self) -> list[str]:
        return [mode for layers in self.towers.values() for mode in layers.values()]

    @property
    def training(self) -> str:
        """How many layers were trained how, in words."""
        zeroth = "zeroth-order (ZO) optimisation, that is by forward passes alone,"
        counts = Counter(self.modes)
        total, whole, part, rest = len(self.modes), counts["zo"], counts["fo+zo"], counts["fo"]
        if rest == total:
            return "The layers drawn below were trained by first-order optimisation, that is by backpropagation,"
        if whole == total:
            return f"All {total} layers drawn below were trained by {zeroth}"
        if part == total:
            return f"All {total} layers drawn below were trained in part by {zeroth} and in part by backpropagation,"
        first = whole or part
        said = f"Of the {total} layers drawn below, {first} {'was' if first == 1 else 'were'} trained "
        said += f"{'' if whole else 'in part '}by {zeroth}"
        if whole and part:
            said += f" {part} in part," if rest else " and the others in part,"
        return f"{said} and the others by backpropagation," if rest else said

    @property
    def picture(self) -> str:
        """The layers' modes as text: a line per tower and a column per layer, below a line of layer numbers."""
        towers = {one_line(tower).replace("`", "'"): layers for tower, layers in self.towers.items()}
        width = max(map(len, [*towers, "layer"]))
        names = {layer for layers in towers.values() for layer in layers}
        depth = max((int(layer) for layer in names if layer.isdigit()), default=0)
        columns = [*(str(number) for number in range(1, depth + 1)), *(["other"] if "other" in names else [])]
        rows = {"layer": {column: column for column in columns}}
        rows |= {tower: {layer: MARKS[mode] for layer, mode in layers.items()} for tower, layers in towers.items()}
        return "\n".join(
            (name.ljust(width) + "".join(row.get(c, "").rjust(max(4, len(c) + 2)) for c in columns)).rstrip()
            for name, row in rows.items()
        )

    @property
    def recipe(self) -> dict[str, Any]:
        """The arguments that say how the checkpoint was made, but not where, as on the command line."""
        return {
            name: _as_given(public_argument(name, value))
            for name, value in self.task["recipe"].items()
            if value is not None and _is_shown(name, self.task["adapter"])
        }


def render_task_card(task: dict[str, Any], repo_id: str | None = None, revision: str | None = None) -> ModelCard:
    """Fill in `model_cards/task_checkpoint.md` for one task's checkpoint.

    Args:
        task, repo_id, revision: As for `TaskCardData`.

    Returns:
        The card; `str(card)` is the README.md.
    """
    card = TaskCardData(task, repo_id, revision)
    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined
    )
    environment.filters.update(
        md=markdown,
        code=markdown_code,
        line=one_line,
        quoted=_quoted,
        percent=_percent,
        python=partial(pformat, width=100, compact=True),
        size=_size,
    )
    context = {**task, **task["metrics"], "card": card, "card_data": card.to_yaml()}
    return ModelCard(environment.from_string(_template()).render(context))


def render_eval_results(task: dict[str, Any]) -> dict[str, str]:
    """The results of one task's checkpoint in the Hub's form, by file path in the repository.

    Args:
        task: As for `TaskCardData`.

    Returns:
        One YAML file; none for a dataset that is not on the Hub, because every entry names a dataset there.
    """
    card = TaskCardData(task)
    if not card.dataset_id:
        return {}
    content = yaml_dump(eval_result_entries_to_yaml(card.entries()), sort_keys=False)
    return {f"{EVAL_RESULTS_FOLDER}/{last_component(card.dataset_id)}.yaml": content}


@cache  # a run keeps its template even if the package is replaced meanwhile
def _template() -> str:
    """The template's text: package data in an installed wheel, the top-level folder in a checkout."""
    packaged = resources.files("hf_zocl") / "model_cards" / TEMPLATE
    checkout = Path(__file__).resolve().parents[2] / "model_cards" / TEMPLATE
    return (packaged if packaged.is_file() else checkout).read_text(encoding="utf-8")


def _is_shown(argument: str, adapter: str) -> bool:
    """Tell whether the card shows an argument; those of other adapters would say nothing about this checkpoint."""
    owner = argument.split("_")[0]
    return bool(SHOWN_ARGUMENTS.fullmatch(argument)) and (owner not in ADAPTERS or owner == adapter)


def _as_given(value: Any) -> Any:
    """An argument's value as on the command line: a mapping becomes `vision=1, language=8`."""
    return ", ".join(f"{key}={_as_given(item)}" for key, item in value.items()) if isinstance(value, dict) else value


def _quoted(text: str) -> str:
    """Text escaped for the quotes in a line of Python."""
    return json.dumps(one_line(text), ensure_ascii=False)[1:-1]


def _percent(fraction: float | None) -> str:
    return "–" if fraction is None else f"{100 * fraction:.1f}"


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
