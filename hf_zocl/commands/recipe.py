"""Read a recipe (YAML) and the command line into arguments, and build a run from them."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

import torch
from transformers import HfArgumentParser

from ..checks import shown
from ..continual.plugins import ClassifierAlignment, TaskPlugin
from ..continual.run_arguments import RunArguments, build_held_out, build_stream
from ..continual.scheduler import ContinualTaskScheduler
from ..data.stream import TaskStream
from ..hub.load import load_pretrained
from ..models import AdapterArguments, CLIPClassifier
from ..trainer.arguments import PER_TOWER, ZOCLTrainingArguments
from .library import recipe_file
from .recipe_file import Entry, read_preset, read_recipe, with_place


@dataclass(frozen=True)
class Recipe:
    """The arguments of one run, or of one run for each of several seeds.

    Args:
        run, adapter, training: The arguments.
        entries: The arguments that come from the recipe's files, with their places.
    """

    run: RunArguments
    adapter: AdapterArguments
    training: ZOCLTrainingArguments
    entries: Mapping[str, Entry] = field(default_factory=dict, repr=False)

    def __post_init__(self):
        if not self.learns and self.training.push_to_hub:
            raise ValueError("push_to_hub=True: learning=none trains nothing, so no checkpoint would be pushed.")

    @property
    def learns(self) -> bool:
        """Whether anything is trained."""
        return self.run.learning != "none"

    def placing(self) -> AbstractContextManager[None]:
        """A context in which an error that names an argument of the recipe also says where that is."""
        return _placing(self.entries)

    def to_dict(self) -> dict[str, Any]:
        """All arguments by name, with tokens masked."""
        return {**asdict(self.run), **asdict(self.adapter), **self.training.to_dict()}

    @property
    def resume(self) -> bool | str:
        """The value of `resume` or `resume_from_checkpoint`: True to go on, or the checkpoint's folder."""
        given = str(self.training.resume_from_checkpoint or self.run.resume)
        return {"true": True, "false": False}.get(given.lower(), given)

    def per_seed(self) -> list[Recipe]:
        """A recipe for every seed, each with its own folder; without `seeds`, this recipe."""
        seeds = self.run.seed_list(self.training.seed)
        if self.run.vary_class_order and seeds is None:
            raise ValueError(
                "vary_class_order=True needs seeds or num_seeds; for a single run, give class_order_seed."
            )
        if self.run.vary_class_order and self.run.class_order is not None:
            raise ValueError("vary_class_order=True and class_order were both given: pass one.")
        if seeds is None:
            return [self]
        recipes = []
        for seed in seeds:
            folder = str(Path(self.training.output_dir) / f"seed-{seed}")
            own = {"class_order_seed": seed} if self.run.vary_class_order else {}
            run = replace(self.run, seeds=None, num_seeds=None, **own)
            hub = {}
            if self.training.push_to_hub:
                repository = self.training.hub_model_id or Path(self.training.output_dir).absolute().name
                hub = {"hub_model_id": f"{repository}-seed-{seed}"}
            training = replace(self.training, seed=seed, output_dir=folder, **hub)
            recipes.append(replace(self, run=run, training=training))
        return recipes


def parse_recipe(argv: Sequence[str] | None = None) -> Recipe:
    """Read `--recipe NAME_OR_FILE` and any further `--argument value`, which override the recipe.

    A recipe may `include` another one, by name or by a path from its own folder or the current one, and override it.
    A `preset` sets several arguments at once. In a recipe, the rest of the recipe overrides it. On the command line,
    it replaces the recipe's preset and overrides the recipe, and the rest of the command line overrides it.

    Args:
        argv: The command line without the program's name; default: `sys.argv`.

    Raises:
        ValueError: If there is no such recipe, or it is not a mapping, names an unknown argument or one argument
            twice, or includes itself; or if a value has the wrong type or is out of its range. The message names the
            value, and for one from a recipe the file and the line.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = RecipeParser(
        (RunArguments, AdapterArguments, ZOCLTrainingArguments),
        description="Learn a stream of tasks. The recipe may set any argument; the command line overrides it.",
    )
    parser.add_argument("--recipe", help="A recipe: its name, or a YAML file of arguments.")
    named = RecipeParser((), add_help=False, allow_abbrev=False)
    named.add_argument("--recipe")
    named.add_argument("--preset")
    given, _ = named.parse_known_args(argv)
    entries: dict[str, Entry] = {}
    if given.recipe is not None:
        try:
            file = recipe_file(given.recipe)
        except ValueError as error:
            raise ValueError(f"--recipe {given.recipe}: {error}") from error
        entries = read_recipe(file, _hints(), with_preset=given.preset is None)
    if given.preset is not None:
        entries |= read_preset(given.preset, f"--preset {given.preset}", _hints())
    given_here = given_names(argv)
    entries = {name: entry for name, entry in entries.items() if name not in given_here}
    parser.set_defaults(**{name: entry.value for name, entry in entries.items()})
    with _placing(entries):
        return Recipe(*_parsed(parser, argv), entries)


def _hints() -> dict[str, Any]:
    """Every argument that a recipe may have, with its annotation."""
    hints = {
        each.name: hint
        for cls in (RunArguments, AdapterArguments, ZOCLTrainingArguments)
        for hints in [get_type_hints(cls)]
        for each in fields(cls)
        if each.init and (hint := hints[each.name])
    }
    return hints | dict.fromkeys(PER_TOWER, Any)  # one value, or a mapping from tower to value


def given_names(argv: list[str]) -> set[str]:
    """The names of the arguments that a command line gives."""
    return {_argument_name(word) for word in argv if word.startswith("--")}


def _argument_name(word: str) -> str:
    return word.partition("=")[0].lstrip("-").replace("-", "_")


def _parsed(parser: RecipeParser, argv: list[str]) -> tuple[RunArguments, AdapterArguments, ZOCLTrainingArguments]:
    _, unknown = parser.parse_known_args(argv)
    if unknown:
        word = _argument_name(unknown[0])
        close = difflib.get_close_matches(word, [*_hints(), "recipe", "preset"], n=1)
        raise ValueError(f"unknown argument {shown(unknown[0])}." + (f" Did you mean --{close[0]}?" if close else ""))
    try:
        run, adapter, training, _ = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    except (ValueError, OSError):
        raise
    except Exception as error:  # bad values fail in transformers and accelerate with many kinds of errors
        raise ValueError(f"the arguments are not valid: {type(error).__name__}: {error}") from error
    return run, adapter, training


@contextmanager
def _placing(entries: Mapping[str, Entry]) -> Iterator[None]:
    """Make an error that names an argument of a recipe also say where that is."""
    try:
        yield
    except ValueError as error:
        placed = with_place(error, entries)
        if placed is error:
            raise
        raise placed from error


class RecipeParser(HfArgumentParser):
    """A parser whose errors are one line, like all refusals, without the usage."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def build_scheduler(recipe: Recipe) -> ContinualTaskScheduler:
    """Load the model and the stream, add the adapter, and make the scheduler; nothing is trained or written yet.

    Raises:
        ValueError: If the arguments do not fit each other, or a launcher asks for a sharded model.
    """
    run, training = recipe.run, recipe.training
    with recipe.placing():
        return _build_scheduler(run, training, recipe)


def _build_scheduler(run: RunArguments, training: ZOCLTrainingArguments, recipe: Recipe) -> ContinualTaskScheduler:
    if training.sharding is not None:
        raise ValueError(
            f"{training.sharding} shards the model, but one process must write a task's checkpoint from the whole "
            "adapter: use data parallelism (docs/scaling.md)."
        )
    stream, template = build_stream(run, seed=training.data_seed or 0)
    with training.main_process_first(desc="merging the adapter") if run.merge_into else nullcontext():
        pretrained = load_pretrained(
            run.model_name_or_path, recipe.adapter, run.dtype, training.seed, len(stream), run.merge_into
        )
    # Two whole datasets may have a class of the same name, so their classes cannot all be set at once.
    names = stream[0].class_names if stream.scenario == "cross-dataset" else stream.class_names
    model = CLIPClassifier(pretrained.clip, pretrained.processor.tokenizer, names, template)
    if not torch.accelerator.is_available():
        training.dataloader_pin_memory = False  # without an accelerator, torch would warn about pinning in every task
    return ContinualTaskScheduler(
        model,
        pretrained.processor,
        stream,
        training,
        recipe={**recipe.to_dict(), **pretrained.adapter},
        callbacks=_plugins(run, pretrained.known_classes, stream),
        base_model=pretrained.base_model,
        known_classes=pretrained.known_classes,
        held_out=build_held_out(run, seed=training.data_seed or 0),
        evaluate_future=run.evaluate_future,
        image_cache_gb=run.image_cache_gb,
        skip_corrupt=run.skip_corrupt,
    )


def _plugins(run: RunArguments, known_classes: Sequence[str], stream: TaskStream) -> list[TaskPlugin]:
    steps, rate = run.classifier_alignment, run.classifier_alignment_learning_rate
    lost = [name for name in known_classes if name not in stream.class_names]
    if steps and lost:
        raise ValueError(
            f"classifier_alignment={steps}: {run.model_name_or_path} knows classes that this stream lacks, such as "
            f"{shown(lost[0])}; they have no statistics, so aligning the text tower would lose them."
        )
    options = {} if rate is None else {"learning_rate": rate}
    return [ClassifierAlignment(steps, **options)] if steps else []
