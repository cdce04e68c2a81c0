"""Lets a host Trainer record only one forward pass per micro-batch."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from ..passes.random_state import SMALL_BYTES
from ..private_names import version


# They hold no counts, and a list of examples is long.
DATASETS = ("train_dataset", "eval_dataset")


@contextmanager
def leaving_no_trace(host: Any) -> Iterator[None]:
    """Inside, attributes of `host`, its containers, small tensors and arrays may change; afterwards they are put back.

    A `compute_loss` may count tokens and collect metrics in its Trainer. New attributes are kept.
    """
    attributes, contents = dict(vars(host)), _contents(vars(host))
    try:
        yield
    finally:
        vars(host).update(attributes)
        for container, content in contents:
            _put_back(container, content)


def _contents(attributes: dict[str, Any]) -> list[tuple[Any, Any]]:
    """Every container, small tensor and small array below some attributes, and what it holds."""
    waiting = [value for name, value in attributes.items() if name not in DATASETS]
    found: list[tuple[Any, Any]] = []
    seen: set[int] = set()
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, (dict, list, deque, set)):
            found.append((value, value.copy()))
            waiting += value.values() if isinstance(value, dict) else value
        elif type(value) is torch.Tensor and value.layout == torch.strided:
            if value.nbytes <= SMALL_BYTES and not value.is_meta:
                found.append((value, (version(value), value.detach().clone())))
        elif isinstance(value, np.ndarray) and value.nbytes <= SMALL_BYTES:
            found.append((value, value.copy()))
    return found


def _put_back(container: Any, content: Any) -> None:
    if isinstance(container, torch.Tensor):
        before, values = content
        if version(container) != before:  # a graph may hold it: write only if needed
            container.detach().copy_(values)
    elif isinstance(container, np.ndarray):
        container[...] = content
    elif isinstance(container, (dict, set)):
        container.clear()
        container.update(content)
    elif len(container) != len(content) or any(map(lambda one, other: one is not other, container, content)):
        container.clear()
        container.extend(content)
