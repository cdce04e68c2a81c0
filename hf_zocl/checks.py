"""What is given from outside, checked before work is done with it."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any


class WrongTypeError(TypeError, ValueError):
    """An argument has a type that it cannot have; the message names the argument, its value and what was expected.

    A `ValueError` too, for those who catch whatever is wrong with an argument.
    """


def check_type(name: str, value: Any, types: type | tuple[type, ...], expected: str) -> None:
    """Check the type of an argument; a bool is no number.

    Raises:
        WrongTypeError: If it is none of `types`.
    """
    is_flag = isinstance(value, bool) and bool not in (types if isinstance(types, tuple) else (types,))
    if is_flag or not isinstance(value, types):
        raise WrongTypeError(f"{name}={shown(value)}: expected {expected}, got {type(value).__name__}.")


def check_count(name: str, value: Any, least: int = 1, most: int | None = None) -> None:
    """Check that an argument is a whole number in a range.

    Raises:
        WrongTypeError: If it is no whole number.
        ValueError: If it is out of the range.
    """
    span = f"a whole number from {least}" + ("" if most is None else f" to {most}")
    check_type(name, value, numbers.Integral, span)
    if value < least or (most is not None and value > most):
        raise ValueError(f"{name}={shown(value)}: expected {span}.")


def check_texts(name: str, values: Any) -> None:
    """Check that an argument is a sequence of texts, each of which can be written down.

    Raises:
        WrongTypeError: If it is a text itself, or holds something else than texts.
        ValueError: If a text holds half a character (a lone surrogate), which no file can hold.
    """
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise WrongTypeError(f"{name}={shown(values)}: expected a list of texts, got {type(values).__name__}.")
    for position, value in enumerate(values):
        check_type(f"{name}[{position}]", value, str, "text")
        check_writable(f"{name}[{position}]", value)


def check_writable(name: str, text: str) -> None:
    """Check that a text is one that a file can hold.

    Raises:
        ValueError: If it holds half a character (a lone surrogate).
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}={shown(text)}: it holds half a character, which no file can hold.") from error


def shown(value: Any, limit: int = 80) -> str:
    """A value as an error shows it: on one line, in ASCII where it is not text, and not longer than `limit`."""
    try:
        text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    except Exception as error:  # a number of more digits than Python prints, for one
        text = f"<{type(value).__name__}: {error}>"
    text = " ".join(text.split())
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
