"""Runs the candidates of one step through a tower as one batch: weights stacked, rows repeated."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from ..private_names import TorchDispatchMode, is_mutable, named_arguments
from ..zo.perturbation import Perturbation
from ..zo.streaming import StreamedPerturbation
from .structure import shadowed


# A module that holds a parameter, the parameter's name there, and its number among the perturbed ones.
Holder = tuple[nn.Module, str, int]


def stackable(
    perturbation: Perturbation, tower: nn.Module, owners: dict[int, list[tuple[nn.Module, str]]]
) -> list[Holder] | None:
    """The holder of each perturbed parameter; None if one cannot hold the candidates' weights side by side."""
    if isinstance(perturbation, StreamedPerturbation):
        return None
    mine = {id(parameter) for parameter in perturbation.parameters}
    for module in tower.modules():
        inside = [id(parameter) in mine for parameter in module.parameters()]
        if hasattr(module, "stackable") and any(inside) and not (module.stackable and all(inside)):
            return None
    holders = [owners[id(parameter)] for parameter in perturbation.parameters]
    if any(len(holder) > 1 for holder in holders):  # tied weights
        return None
    found = [(*holder[0], index) for index, holder in enumerate(holders)]
    is_able = all(_stacked_forward(module) or hasattr(module, "stackable") for module, _, _ in found)
    return found if is_able else None


@contextmanager
def stacked(holders: Sequence[Holder], stacks: Sequence[torch.Tensor]) -> Iterator[None]:
    """Inside, every perturbed module holds the weights of all candidates, and applies each to its own rows."""
    with ExitStack() as stack:
        for module, parameter, index in holders:
            stack.enter_context(shadowed(module, **{parameter: stacks[index]}))
        for module in {module for module, _, _ in holders}:
            if (forward := _stacked_forward(module)) is not None:
                stack.enter_context(shadowed(module, forward=partial(forward, module)))
        yield


def _stacked_forward(module: nn.Module) -> Callable[[Any, torch.Tensor], torch.Tensor] | None:
    """The forward pass of a module while its weights are stacked, if it is of a kind that has one."""
    # Not subclasses: another module may read their weight, as `nn.MultiheadAttention` does.
    if type(module) is nn.Linear:
        return lambda module, inputs: stacked_linear(inputs, module.weight, module.bias)
    if type(module) is nn.LayerNorm and len(module.normalized_shape) == 1:
        return _stacked_layer_norm
    return None


def _stacked_layer_norm(module: nn.LayerNorm, inputs: torch.Tensor) -> torch.Tensor:
    """A layer norm whose weight, bias or both are stacked: `(candidates, width)`."""
    outputs = nn.functional.layer_norm(inputs, module.normalized_shape, None, None, module.eps)
    for values, combine in ((module.weight, torch.mul), (module.bias, torch.add)):
        if values is not None:
            candidates = len(values) if values.dim() == 2 else 1
            rows = outputs.view(candidates, -1, outputs.shape[-1])
            outputs = combine(rows, values.view(candidates, 1, -1)).view_as(inputs)
    return outputs


def stacked_linear(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`torch.nn.functional.linear`, also for stacked weights.

    Args:
        inputs: `(rows, …, in)`; for stacked weights the rows are those of candidate 1, then of candidate 2, ….
        weight: `(out, in)`, or `(candidates, out, in)`.
        bias: `(out,)`, or `(candidates, out)`.

    Returns:
        `(rows, …, out)`.
    """
    if weight.dim() == 2:
        if bias is None or bias.dim() == 1:
            return nn.functional.linear(inputs, weight, bias)
        weight = weight.expand(len(bias), -1, -1)  # one bias per candidate, one weight for all
    rows = inputs.reshape(len(weight), -1, inputs.shape[-1])
    if bias is None:
        outputs = torch.bmm(rows, weight.mT)
    else:
        outputs = torch.baddbmm(bias.view(-1, 1, bias.shape[-1]), rows, weight.mT)
    return outputs.view(*inputs.shape[:-1], weight.shape[1])


def rows_of(value: Any) -> int | None:
    """The number of rows of the first tensor in a tower's inputs."""
    if isinstance(value, torch.Tensor):
        return len(value) if value.dim() else None
    items = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else ()
    return next((rows for rows in map(rows_of, items) if rows is not None), None)


def repeat(value: Any, copies: int, rows: int | None) -> Any:
    """Repeat the rows of a batch once per candidate, in candidate order; anything else stays as it is."""
    if copies == 1:
        return value
    if isinstance(value, torch.Tensor):
        return value.repeat(copies, *[1] * (value.dim() - 1)) if value.dim() and len(value) == rows else value
    if isinstance(value, tuple):
        return tuple(repeat(item, copies, rows) for item in value)
    if isinstance(value, dict):
        return {name: repeat(item, copies, rows) for name, item in value.items()}
    return value


class SharedDraws(TorchDispatchMode):
    """Inside, every candidate's rows get the same random numbers, those that a single candidate would get.

    Args:
        copies: The number of candidates.
        rows: The number of rows of each.
    """

    def __init__(self, copies: int, rows: int):
        super().__init__()
        self._copies, self._rows = copies, rows

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags or _draws_nothing(func, args, kwargs):
            return func(*args, **kwargs)
        like = args[0] if args else None
        if func.overloadpacket not in _DRAWN_LIKE or not isinstance(like, torch.Tensor):
            raise NotImplementedError(f"{func} draws random numbers in a way that candidates cannot share")
        if not like.dim() or len(like) % (self._copies * self._rows):
            return func(*args, **kwargs)  # not drawn per row: one draw for all
        own = like[: len(like) // self._copies]
        if is_mutable(func):
            own = own.clone()
            func(own, *args[1:], **kwargs)
            return like.copy_(own.repeat(self._copies, *[1] * (own.dim() - 1)))
        drawn = func(own, *args[1:], **kwargs)
        return drawn.repeat(self._copies, *[1] * (own.dim() - 1))


# Operations that draw a tensor of their first argument's shape, and use nothing else of it.
_DRAWN_LIKE = {
    torch.ops.aten.bernoulli_,
    torch.ops.aten.normal_,
    torch.ops.aten.uniform_,
    torch.ops.aten.rand_like,
    torch.ops.aten.randn_like,
}


def _draws_nothing(func: Any, args: tuple, kwargs: dict[str, Any]) -> bool:
    """True for an attention kernel that could draw random numbers, but has nothing to drop."""
    if "attention" not in func.name():
        return False
    given = named_arguments(func, args, kwargs)
    return given.get("dropout_p", given.get("p")) == 0
