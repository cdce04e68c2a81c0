"""The inputs of a micro-batch, the same for all of its passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
from typing import Any

import torch
from accelerate.utils import honor_type

from ..private_names import version


class Inputs:
    """The inputs that a host gives to its loss, given again to every further pass in containers of its own.

    A loss may write into the tensors, for example to mask tokens in place (`torch_mask_tokens`), and the next pass
    must not see that. Tensors are copied unless the first pass of the training has shown that the loss does not write.

    Args:
        given: The inputs as the host gives them; its own pass reads them, and may write to them.
        is_written: Whether passes write to them; None if that is not known.
    """

    def __init__(self, given: Any, is_written: bool | None):
        self.given = given
        self._leaf = _same if is_written is False else _cloned
        self._kept = self._copy(given)
        self._seen = [(given, _versions(given))]

    def again(self) -> Any:
        """The inputs for one further pass."""
        made = self._copy(self._kept)
        if self._leaf is _cloned:  # else they are the given tensors
            self._seen[1:] = [(made, _versions(made))]
        return made

    def _copy(self, inputs: Any) -> Any:
        made = _again(inputs, self._leaf)
        return copy(made) if made is inputs else made  # some other kind of object

    @property
    def written(self) -> list[str]:
        """The names of the tensors that the host's own pass or the latest pass has written to."""
        found = []
        for inputs, seen in self._seen:
            now = _versions(inputs)
            found += [name for name, number in seen.items() if now.get(name, number) != number]
        return list(dict.fromkeys(found))


def _again(value: Any, leaf: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        return leaf(value)
    if isinstance(value, Mapping):
        made = copy(value)
        for name, own in value.items():
            made[name] = _again(own, leaf)  # type: ignore[index]
        return made
    if isinstance(value, (list, tuple)):
        return honor_type(value, (_again(own, leaf) for own in value))
    return value


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _cloned(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def _versions(value: Any, name: str = "") -> dict[str, int]:
    if isinstance(value, torch.Tensor):
        return {} if value.is_inference() else {name: version(value)}
    if isinstance(value, Mapping):
        parts = value.items()
    elif isinstance(value, (list, tuple)):
        parts = enumerate(value)  # type: ignore[assignment]
    else:
        return {}
    found: dict[str, int] = {}
    for key, own in parts:
        found |= _versions(own, f"{name}.{key}" if name else str(key))
    return found
