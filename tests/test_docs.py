"""Every code block of the README and of docs/ is run, or compared with the code it calls.

A block of Python is run, or, where it asks a Hub, called with stand-ins that have the signatures of what they stand
for: `PYTHON` says which. The commands of a block of bash are read by their own parsers. The other kinds are parsed.
"""

import argparse
import ast
import json
import re
import runpy
import shlex
import shutil
import string
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import MagicMock, create_autospec

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from PIL import Image

from hf_zocl import CLIPClassifier
from hf_zocl.commands import evaluate
from hf_zocl.commands.recipe import build_scheduler, parse_recipe
from tests.helpers import small_clip


ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^ *```(.*)\n((?s:.*?))^ *```$", re.MULTILINE)
COMMAND = re.compile(r"^ *(\$ )?(\w+=\S* )*(accelerate|python3?|pip|make|torchrun|hf) ", re.MULTILINE)
PLACEHOLDERS = {"RECIPE": "quickstart", "…": None}


@dataclass(frozen=True)
class Block:
    page: str
    number: int
    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}-{self.number}-{self.kind or 'text'}"


BLOCKS = [
    Block(page.name, number, found[1].strip(), found[2])
    for page in PAGES
    for number, found in enumerate(BLOCK.finditer(page.read_text(encoding="utf-8")))
]


def blocks(*kinds: str) -> list[Block]:
    return [block for block in BLOCKS if block.kind in kinds]


# Python


@dataclass(frozen=True)
class Way:
    """How a block is checked.

    Args:
        why: Why it is not run as it stands; or, of a run, what is special about it.
        is_run: Whether it is run; else what it imports is stood in for.
        replaced: Texts that are replaced before.
        is_slow: Whether it takes long.
        check: Looks at the names that it leaves.
    """

    why: str
    is_run: bool = True
    replaced: tuple[tuple[str, str], ...] = ()
    is_slow: bool = False
    check: Callable[[dict[str, Any]], object] = lambda names: None


def check_stream(names: dict[str, Any]) -> None:
    assert 0 <= names["results"]["last"] <= 1
    assert Path("runs/mine/task-02/README.md").is_file()


def check_factory(names: dict[str, Any]) -> None:
    assert names["ZOSeq2SeqTrainingArguments"]("unused", zo_layers="all").zo_layers == "all"


def check_prediction(names: dict[str, Any]) -> None:
    assert len(names["names"]) == len(names["probabilities"]) == 2


AS_IT_STANDS = Way("in a folder with a finished run and two pictures")
ASKS_THE_HUB = Way("asks the Hub for a repository that there is not", is_run=False)
PYTHON = {
    ("README.md", "ContinualTaskScheduler"): Way(
        "the whole stream, one step a task", replaced=(('"runs/mine",', '"runs/mine", max_steps=1,'),), is_slow=True,
        check=check_stream,
    ),
    ("README.md", "zeroth_order("): Way("as it stands", check=check_factory),
    ("README.md", "load_task_checkpoint"): Way(AS_IT_STANDS.why, check=check_prediction),
    ("README.md", "CLIPModel.from_pretrained("): AS_IT_STANDS,
    ("arguments.md", "MoEAdapterConfig"): Way(
        "a small model stands in for the Hub's", replaced=(('"openai/clip-vit-base-patch16"', "small_clip()"),)
    ),
    ("own_project.md", "zeroth_order("): Way("as it stands", check=check_factory),
    ("own_project.md", "zo_objective="): Way("as it stands"),
    ("hub.md", "load_task_checkpoint"): ASKS_THE_HUB,
    ("hub.md", "pipeline("): ASKS_THE_HUB,
    ("hub.md", "adapter_kwargs"): ASKS_THE_HUB,
    ("hub.md", "fetch_run"): ASKS_THE_HUB,
    ("loading.md", "load_task_checkpoint"): ASKS_THE_HUB,
    ("loading.md", "pipeline("): ASKS_THE_HUB,
    ("loading.md", "adapter_kwargs"): ASKS_THE_HUB,
    ("scaling.md", "fully_shard"): Way("needs several processes", is_run=False),
    ("loading.md", "seal_task_checkpoint"): AS_IT_STANDS,
}  # fmt: skip


def way_of(block: Block) -> Way:
    """The first of the table whose page and words are the block's."""
    ways = [way for (page, words), way in PYTHON.items() if page == block.page and words in block.text]
    assert ways, f"{block}: say in PYTHON how this block is checked"
    return ways[0]


def marked(block: Block) -> Any:
    is_slow = any(way.is_slow and page == block.page and words in block.text for (page, words), way in PYTHON.items())
    return pytest.param(block, id=str(block), marks=[pytest.mark.slow] if is_slow else [])


def imports_before(block: Block) -> list[ast.stmt]:
    """A page's blocks go on with what those before have imported."""
    before = [other for other in blocks("python") if other.page == block.page and other.number < block.number]
    statements = [statement for other in before for statement in ast.parse(other.text).body]
    return [statement for statement in statements if isinstance(statement, (ast.Import, ast.ImportFrom))]


def execute(statements: list[ast.stmt], names: dict[str, Any], what: str) -> dict[str, Any]:
    exec(compile(ast.Module(statements, type_ignores=[]), what, "exec"), names)
    return names


def stand_in(real: object) -> object:
    """Takes the same arguments, and no others; gives whatever is asked of it."""
    double = create_autospec(real)
    if getattr(real, "__name__", "") == "load_task_checkpoint":
        model = create_autospec(CLIPClassifier, instance=True)
        model.predict.return_value = ["cat", "dog"], MagicMock()
        double.return_value = model, MagicMock()
    return double


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A folder with a run of five tasks and two pictures, as the pages speak of."""
    folder = tmp_path_factory.mktemp("finished")
    options = "--increment 2 --max_steps 1 --max_train_images_per_class 2 --max_test_images_per_class 1"
    options += " --zo_branch none --report_to none --save_strategy no --disable_tqdm true"
    run = ["--output_dir", str(folder / "runs" / "quickstart"), "--model_name_or_path", small_clip()]
    build_scheduler(parse_recipe([*run, *options.split()])).run()
    for name in ("cat", "dog"):
        Image.new("RGB", (40, 30), "brown").save(folder / f"{name}.png")
    return folder


@pytest.mark.usefixtures("quick_pictures")
@pytest.mark.parametrize("block", [marked(block) for block in blocks("python")])
def test_python(block, request, tmp_path, monkeypatch):
    way, text = way_of(block), block.text
    for old, new in way.replaced:
        assert old in text, f"{block}: {old} is not there"
        text = text.replace(old, new)
    statements = ast.parse(text).body
    is_import = [isinstance(statement, (ast.Import, ast.ImportFrom)) for statement in statements]
    if not way.is_run:
        known = execute(imports_before(block), {}, str(block))
        known = execute([each for each, own in zip(statements, is_import, strict=True) if own], known, str(block))
        names = {name: stand_in(real) for name, real in known.items() if name != "__builtins__"}
        execute([each for each, own in zip(statements, is_import, strict=True) if not own], names, str(block))
        return
    if "runs/quickstart" in text:
        shutil.copytree(request.getfixturevalue("finished"), tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    module = f"block_{block.number}"
    names = execute(imports_before(block), {"small_clip": small_clip, "__name__": module}, str(block))
    way.check(execute(statements, names, str(block)))


# Commands


class Read(BaseException):
    """The arguments of a command were read: what it knows, and what it leaves to the recipe."""

    def __init__(self, known: argparse.Namespace, further: list[str]):
        self.known, self.further = known, further


def read_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """No command gets further than its arguments."""
    parse = argparse.ArgumentParser.parse_known_args

    def parse_known_args(self, args=None, namespace=None) -> NoReturn:
        raise Read(*parse(self, args, namespace))

    def parse_args(self, args=None, namespace=None) -> NoReturn:
        known, further = parse(self, args, namespace)
        if further:
            raise ValueError(f"unknown arguments: {' '.join(further)}")
        raise Read(known, [])

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_known_args)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)


def commands(text: str) -> list[list[str]]:
    """The words of every command; variables that the block sets are put in."""
    found, variables = [], {}
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(string.Template(line).safe_substitute(variables), comments=True)
        while words and re.match(r"\w+=", words[0]):
            name, _, value = words.pop(0).partition("=")
            variables[name] = value
        if words:
            found.append([new for word in words if (new := PLACEHOLDERS.get(word, word)) is not None])
    return found


def read_recipe_arguments(arguments: list[str]) -> None:
    parse_recipe(arguments if "--output_dir" in arguments else [*arguments, "--output_dir", "unused"])


def read_module(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """`python -m hf_zocl COMMAND …`"""
    name = arguments[0] if arguments else ""
    if name == "train":
        return read_recipe_arguments(arguments[1:])
    if name == "recipes":
        assert len(arguments) == 1
        return None
    read_script(lambda: runpy.run_module("hf_zocl", run_name="__main__"), ["hf_zocl", *arguments], monkeypatch)
    return None


def read_script(start: Callable[[], object], arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", arguments)
        read_only(patch)
        with pytest.raises(Read) as read:
            start()
    known, further = vars(read.value.known), read.value.further
    if "checkpoint" in known:
        evaluate.recipe_arguments(further)
    elif further:
        recipe = known.get("recipe")
        read_recipe_arguments([*(["--recipe", recipe] if recipe else []), *further])


def read_launch(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    given = launch_command_parser().parse_args(arguments)
    if given.config_file is not None:
        load_config_from_file(given.config_file)
    if given.module:
        assert given.training_script == "hf_zocl"
        read_module(given.training_script_args, monkeypatch)
    else:
        assert Path(given.training_script) == Path("scripts/train.py")
        read_recipe_arguments(given.training_script_args)


def read_command(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    match words:
        case ["accelerate", "launch", *arguments]:
            read_launch(arguments, monkeypatch)
        case ["python", "-m", "hf_zocl", *arguments]:
            read_module(arguments, monkeypatch)
        case ["python", file, *arguments] if file.endswith(".py"):
            monkeypatch.syspath_prepend(str((ROOT / file).parent))
            read_script(lambda: runpy.run_path(str(ROOT / file), run_name="__main__"), [file, *arguments], monkeypatch)
        case ["make", target, *_]:
            assert re.search(rf"^{re.escape(target)}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        case [".ci/run"]:
            assert (ROOT / ".ci" / "run").is_file()
        case _:
            pytest.fail(f"{shlex.join(words)}: no test knows this command")


@pytest.mark.parametrize("block", blocks("bash"), ids=str)
def test_bash(block, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    found = commands(block.text)
    assert found
    for words in found:
        read_command(words, monkeypatch)


@pytest.mark.parametrize(
    "command",
    [
        "accelerate launch -m hf_zocl train --recipe quickstart --zo_leyers all",
        "accelerate launch -m hf_zocl train --recipe quickstrat",
        "accelerate launch -m hf_zocl train --zo_queries many",
        "accelerate launch --num_proceses 2 -m hf_zocl train --recipe quickstart",
        "accelerate launch --config_file scripts/launch/nowhere.yaml -m hf_zocl train --recipe quickstart",
        "python -m hf_zocl trian --recipe quickstart",
        "python -m hf_zocl evaluate run --benchmrak cifar10",
        "python -m hf_zocl report --compair run",
        "python -m hf_zocl replay run --task two",
        "python scripts/studies/reproduce.py layers --recipe quickstart --max_stepz 3",
        "python scripts/benchmarks/chaos.py --run many",
        "make tset",
        "rm -rf runs",
    ],
)
def test_a_command_that_is_wrong_is_seen(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    ((*words,),) = commands(command)
    with pytest.raises((ValueError, AssertionError, SystemExit, OSError, pytest.fail.Exception)):
        read_command(words, monkeypatch)


# The other kinds


A_RECIPE = Block(
    "of this test", 0, "yaml", "include: quickstart\npreset: mezo\nzo_queries: {vision: 2, language: 8}\n"
)


@pytest.mark.parametrize("block", [A_RECIPE, *blocks("yaml")], ids=str)
def test_yaml_is_a_recipe(block, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(block.text, encoding="utf-8")
    parse_recipe(["--recipe", str(file), "--output_dir", str(tmp_path / "run")])


@pytest.mark.parametrize("block", blocks("json"), ids=str)
def test_json(block):
    assert json.loads(block.text)


@pytest.mark.parametrize("block", blocks("bibtex"), ids=str)
def test_bibtex(block):
    assert re.fullmatch(r"@\w+\{\w+,\n(  \w+ += \{.+\},?\n)+\}\n", block.text)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_every_block_is_of_a_kind_that_is_checked(block):
    assert block.kind in ("", "bash", "bibtex", "json", "python", "yaml")
    # What has no kind is a drawing, or what a command prints.
    assert block.kind or not COMMAND.search(block.text)


def test_no_block_is_passed_over():
    for page in PAGES:
        fences = re.findall(r"^\s*(?:```|~~~)", page.read_text(encoding="utf-8"), re.MULTILINE)
        assert len(fences) == 2 * sum(block.page == page.name for block in BLOCKS), page
