"""Read a recipe's file: YAML whose values get the types of the arguments, not those that YAML guesses."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml

from ..checks import alternatives, expected, shown
from .library import preset_file, recipe_file


NULL = frozenset({"", "~", "null", "Null", "NULL"})
FLAGS = {
    **dict.fromkeys(("true", "yes", "on", "y", "t", "1"), True),
    **dict.fromkeys(("false", "no", "off", "n", "f", "0"), False),
}
MOST_NODES = 100_000
_WORD = re.compile(r"\w+")


class _Loader(yaml.SafeLoader):
    """Reads `1e-5` as a number, as YAML 1.2 does; for YAML 1.1 it needs a point, and is text otherwise."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


@dataclass(frozen=True)
class Entry:
    """One argument in a recipe.

    Args:
        value: The value, of the argument's type.
        place: Where it is, as `file.yaml, line 3`.
    """

    value: Any
    place: str


def read_recipe(
    path: Path, hints: Mapping[str, Any], including: tuple[Path, ...] = (), with_preset: bool = True
) -> dict[str, Entry]:
    """The arguments of a recipe. They override those of its preset, which override those of an included recipe.

    A value's text is read by the argument's annotation: `class_names: [yes, no]` gives two names, and `lora_rank: 8.0`
    a whole number. `null` is allowed for arguments that may be None.

    Args:
        path: The file.
        hints: Argument → annotation.
        including: The recipes whose `include` led here.
        with_preset: Whether its preset counts; False if another preset replaces it.

    Raises:
        ValueError: If the file is not a mapping, names an argument twice or an unknown one, holds a value of the wrong
            type, includes itself, or names a preset or another recipe that does not exist; the message names the file,
            the line and the argument.
    """
    entries: dict[str, Entry] = {}
    for key, node in _mapping(path):
        line = node.start_mark.line + 1
        place = f"{path}, line {line}"
        name = key.value
        if name in entries:
            raise ValueError(
                f"{path}, line {key.start_mark.line + 1}: {name} is given twice, first in {entries[name].place}."
            )
        if name == "include":
            hint: Any = str
        elif name in hints:
            hint = hints[name]
        else:
            close = difflib.get_close_matches(name, hints, n=1)
            did_you_mean = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"{path}, line {key.start_mark.line + 1}: unknown argument {shown(name)}.{did_you_mean}")
        entries[name] = Entry(_value(node, hint, f"{place}: {name}"), place)
    included, preset = entries.pop("include", None), entries.get("preset")
    has_preset = preset is not None and preset.value is not None
    below = {}
    if included is not None:  # a preset replaces the included recipe's preset as a whole
        below = _include(included, path, hints, including, with_preset and not has_preset)
    if has_preset:
        own = read_preset(preset.value, f"{preset.place}: preset={shown(preset.value)}", hints)
        if with_preset:
            below |= own
    return below | entries


def read_preset(name: str, where: str, hints: Mapping[str, Any]) -> dict[str, Entry]:
    """The arguments that a preset sets; errors begin with `where`, the place that asks for it.

    Raises:
        ValueError: If there is no such preset.
    """
    try:
        return read_recipe(preset_file(name), hints)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _include(
    included: Entry, path: Path, hints: Mapping[str, Any], including: tuple[Path, ...], with_preset: bool
) -> dict[str, Entry]:
    where = f"{included.place}: include={included.value!r}"
    try:
        base = recipe_file(included.value, beside=path.parent)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if base.resolve() in (path.resolve(), *(one.resolve() for one in including)):
        raise ValueError(f"{where} includes itself.")
    return read_recipe(base, hints, (*including, path), with_preset)


def with_place(error: ValueError, entries: Mapping[str, Entry]) -> ValueError:
    """The same error, with the places of the recipe arguments that it names."""
    text = str(error)
    named = [name for name in dict.fromkeys(_WORD.findall(text)) if name in entries]
    places = [f"{name}: {entries[name].place}" for name in named if entries[name].place not in text]
    return ValueError(f"{text} ({'; '.join(places)})") if places else error


def _mapping(path: Path) -> list[tuple[yaml.ScalarNode, yaml.Node]]:
    """The keys and values of a file as YAML nodes, which keep their text."""
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise ValueError(f"{path}{line}: this is not valid YAML: {error.problem or error.context}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: this is not valid YAML: {error}.") from error
    except RecursionError as error:
        raise ValueError(f"{path}: this is not a recipe: it is nested too deeply.") from error
    if not isinstance(root, yaml.MappingNode):
        kind = "nothing" if root is None else {"seq": "a list", "str": "text"}.get(root.tag.split(":")[-1], "a value")
        raise ValueError(f"--recipe {path}: expected a mapping of argument: value, got {kind}.")
    for key, _ in root.value:
        if not isinstance(key, yaml.ScalarNode):
            raise ValueError(
                f"{path}, line {key.start_mark.line + 1}: expected the name of an argument, got a {key.id}."
            )
    return root.value


def _value(node: yaml.Node, hint: Any, where: str, is_item: bool = False) -> Any:
    """A value's text, converted as its annotation says; in a list, `null` is ordinary text."""
    types = alternatives(hint)
    if isinstance(node, yaml.ScalarNode):
        found = _scalar(node, types, where, is_item)
        if found is not _NO_VALUE:
            return found
    lists = [get_args(each)[0] if get_args(each) else Any for each in types if (get_origin(each) or each) is list]
    if lists and isinstance(node, yaml.SequenceNode):
        return [_value(item, lists[0], f"{where}[{place}]", is_item=True) for place, item in enumerate(node.value)]
    if lists and isinstance(node, yaml.ScalarNode):
        return [_value(node, lists[0], where)]
    if Any in types or (isinstance(node, yaml.MappingNode) and any((get_origin(t) or t) is dict for t in types)):
        return _guessed(node, where)
    got = (
        shown(node.value) if isinstance(node, yaml.ScalarNode) else {"sequence": "a list"}.get(node.id, f"a {node.id}")
    )
    raise ValueError(f"{where}: expected {expected(types)}, got {got}.")


_NO_VALUE = object()


def _scalar(node: yaml.ScalarNode, types: tuple[Any, ...], where: str, is_item: bool) -> Any:
    text, is_quoted = node.value, node.style is not None
    if type(None) in types and not is_quoted and text in NULL:
        return None
    if bool in types and text.lower() in FLAGS:
        return FLAGS[text.lower()]
    if int in types or float in types:
        number = _number(text, float in types)
        if number is not None:
            return number
    for each in types:
        if isinstance(each, type) and issubclass(each, Enum):
            values = [one.value for one in each]
            if text in values:
                return text
            raise ValueError(f"{where}: expected one of {', '.join(map(str, values))}, got {shown(text)}.")
    if str in types and (is_quoted or text not in NULL or (is_item and text)):
        return text
    return _NO_VALUE


def _number(text: str, may_be_fractional: bool) -> int | float | None:
    try:
        return int(text)
    except ValueError:
        pass
    try:
        number = float(text)
    except ValueError:
        return None
    if may_be_fractional:
        return number
    return int(number) if math.isfinite(number) and number.is_integer() and abs(number) < 2**53 else None


def _guessed(node: yaml.Node, where: str) -> Any:
    """A value of any type, as YAML reads it."""
    loader = yaml.SafeLoader("")
    try:
        return loader.construct_document(node)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{where}: this cannot be read: {' '.join(str(error).split())}") from error
    finally:
        loader.dispose()
