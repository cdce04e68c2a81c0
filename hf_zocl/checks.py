"""Checks of values given from outside, before any work is done with them."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Collection, Sequence
from enum import Enum
from functools import cache
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints


class WrongTypeError(TypeError, ValueError):
    """An argument has a type that it cannot have; the message names the argument, its value and what was expected.

    It is also a `ValueError`, for callers that catch any fault of an argument.
    """


def check_type(name: str, value: Any, types: type | tuple[type, ...], expected: str) -> None:
    """Check the type of an argument; a bool does not count as a number.

    Raises:
        WrongTypeError: If it is not one of `types`.
    """
    is_flag = isinstance(value, bool) and bool not in (types if isinstance(types, tuple) else (types,))
    if is_flag or not isinstance(value, types):
        raise WrongTypeError(f"{name}={shown(value)}: expected {expected}, got {type(value).__name__}.")


def check_count(name: str, value: Any, least: int = 1, most: int | None = None) -> None:
    """Check that an argument is a whole number in a range.

    Raises:
        WrongTypeError: If it is not a whole number.
        ValueError: If it is out of the range.
    """
    span = f"a whole number from {least}" + ("" if most is None else f" to {most}")
    check_type(name, value, numbers.Integral, span)
    if value < least or (most is not None and value > most):
        raise ValueError(f"{name}={shown(value)}: expected {span}.")


def check_texts(name: str, values: Any) -> None:
    """Check that an argument is a sequence of texts, each of which can be written to a file.

    Raises:
        WrongTypeError: If it is itself a text, or holds anything but texts.
        ValueError: If a text holds half a character (a lone surrogate), which no file can hold.
    """
    is_list = hasattr(values, "__len__") and hasattr(values, "__getitem__")  # an array counts as one
    if isinstance(values, (str, bytes, dict)) or not is_list:
        raise WrongTypeError(f"{name}={shown(values)}: expected a list of texts, got {type(values).__name__}.")
    for position, value in enumerate(values):
        check_type(f"{name}[{position}]", value, str, "text")
        check_writable(f"{name}[{position}]", value)


def check_writable(name: str, text: str) -> None:
    """Check that a file can hold a text.

    Raises:
        ValueError: If it holds half a character (a lone surrogate).
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name}={shown(text)}: it contains half a character, which cannot be written to a file."
        ) from error


def first_of(names: Sequence[str]) -> str:
    """The first of some names, and how many there are besides: `a (and 2 more)`."""
    return names[0] + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")


def shown(value: Any, limit: int = 80) -> str:
    """A value as errors show it: on one line, in ASCII if it is not text, and at most `limit` characters long."""
    try:
        text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    except Exception as error:  # for example, a number with more digits than Python prints
        text = f"<{type(value).__name__}: {error}>"
    text = " ".join(text.split())
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def check_fields(arguments: Any, names: Collection[str] | None = None, but: Sequence[str] = ()) -> None:
    """Check the values of a dataclass of arguments by its annotations: texts, numbers, flags, and lists of them.

    Fields of other types are checked where they are used.

    Args:
        arguments: The dataclass.
        names: The fields to check; default: all.
        but: Fields to leave out.

    Raises:
        WrongTypeError: If a value has another type than its field.
        ValueError: If a number is not finite or too large, or no file can hold a text.
    """
    hints = _hints(type(arguments))  # type: ignore[arg-type]
    for field in dataclasses.fields(arguments):
        types = alternatives(hints[field.name])
        is_asked = field.init and field.name not in but and (names is None or field.name in names)
        if is_asked and all(_is_plain(each) for each in types):
            _check_value(field.name, getattr(arguments, field.name), types)


def alternatives(hint: Any) -> tuple[Any, ...]:
    """The types that an annotation allows: `int | None` → `(int, NoneType)`."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def expected(types: Sequence[Any]) -> str:
    """These types in words, for an error message."""
    words = [_describe(each) for each in types if each is not type(None)]
    return " or ".join([*dict.fromkeys(words), *(["null"] if type(None) in types else [])])


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _is_plain(kind: Any) -> bool:
    if get_origin(kind) is list:
        return all(_is_plain(each) for each in alternatives(get_args(kind)[0]))
    return isinstance(kind, type) and (kind in (bool, int, float, str, type(None)) or issubclass(kind, Enum))


def _describe(kind: Any) -> str:
    if get_origin(kind) is list:
        return f"a list, each {expected(alternatives(get_args(kind)[0]))}"
    if isinstance(kind, type) and issubclass(kind, Enum):
        return "one of " + ", ".join(str(each.value) for each in kind)
    return {bool: "true or false", int: "a whole number", float: "a number", str: "text", dict: "a mapping"}.get(
        kind, getattr(kind, "__name__", str(kind))
    )


def _check_value(name: str, value: Any, types: Sequence[Any]) -> None:
    is_enum = [each for each in types if isinstance(each, type) and issubclass(each, Enum)]
    fits = (
        (value is None and type(None) in types)
        or (isinstance(value, bool) and bool in types)
        or (isinstance(value, numbers.Integral) and not isinstance(value, bool) and {int, float} & {*types})
        or (isinstance(value, numbers.Real) and not isinstance(value, bool) and float in types)
        or (isinstance(value, str) and (str in types or is_enum))
        or (is_enum and isinstance(value, tuple(is_enum)))
    )
    items = next((get_args(each)[0] for each in types if get_origin(each) is list), None)
    if items is not None and isinstance(value, (list, tuple)):
        for position, item in enumerate(value):
            _check_value(f"{name}[{position}]", item, alternatives(items))
    elif not fits:
        raise WrongTypeError(f"{name}={shown(value)}: expected {expected(types)}, got {type(value).__name__}.")
    elif isinstance(value, str):
        check_writable(name, value)
    elif isinstance(value, numbers.Real) and not isinstance(value, bool):
        check_finite(name, value)


def check_finite(name: str, value: Any) -> None:
    """Check that a number is finite and not too large.

    Raises:
        ValueError: If it is infinite, NaN, or a whole number that needs more than 64 bits.
    """
    if isinstance(value, numbers.Integral):
        if abs(int(value)) >= 2**63:
            raise ValueError(f"{name}={shown(value)}: expected a whole number of at most 64 bits.")
    elif not math.isfinite(value):
        raise ValueError(f"{name}={value}: expected a finite number.")
