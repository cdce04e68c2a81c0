"""Keeps a host Trainer's records of forward passes to one pass a micro-batch."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def leaving_no_trace(host: Any) -> Iterator[None]:
    """Inside, attributes of `host` may be set, and its lists and dictionaries changed; afterwards all is as before.

    A `compute_loss` counts tokens and collects metrics in its Trainer. Attributes that are new are kept.
    """
    attributes, contents = dict(vars(host)), _contents(vars(host))
    try:
        yield
    finally:
        vars(host).update(attributes)
        for container, content in contents:
            _put_back(container, content)


def _contents(container: Any) -> list[tuple[Any, Any]]:
    """Every container below one, and what it holds."""
    found, waiting, seen = [], list(container.values()), set()
    while waiting:
        value = waiting.pop()
        if not isinstance(value, (dict, list, deque, set)) or id(value) in seen:
            continue
        seen.add(id(value))
        found.append((value, value.copy()))
        waiting += value.values() if isinstance(value, dict) else value
    return found


def _put_back(container: Any, content: Any) -> None:
    if isinstance(container, (dict, set)):
        container.clear()
        container.update(content)
    elif len(container) != len(content) or any(map(lambda one, other: one is not other, container, content)):
        container.clear()
        container.extend(content)
