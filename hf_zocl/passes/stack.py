"""Computes a loss from the first perturbed layer on, in any model that runs a stack of layers one after another.

The layers below return what they returned in the step's first pass, and leave the random state as they did then. What
the model does around its layers (embeddings, masks, positions, caches, a head) runs as usual, so nothing needs to be
known about it. If a pass does not call the layers below once each, in order and before any perturbed one, full passes
follow: gradient checkpointing runs layers again, LayerDrop leaves some out, and experts are not a stack.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from ..private_names import tree_map
from ..zo.estimators import Point
from ..zo.perturbation import Perturbation
from .plain import PlainEvaluation, at, was_missed, watch
from .random_state import ForwardState
from .structure import forward_of


@dataclass(frozen=True)
class Stack:
    """A stack of layers, split at the first one that a perturbation moves.

    Attributes:
        below: The layers before it, in order; at least one.
        above: That layer and those after it.
    """

    below: tuple[nn.Module, ...]
    above: tuple[nn.Module, ...]


def find_stack(model: nn.Module, perturbations: Collection[Perturbation]) -> Stack | None:
    """The stack that holds all perturbed parameters, with the most parameters below them; None if there is none."""
    moved = {id(parameter) for perturbation in perturbations for parameter in perturbation.parameters}
    best, most = None, 0
    for holder in model.modules():
        if not isinstance(holder, (nn.ModuleList, nn.Sequential)) or len(holder) < 2:
            continue
        layers = list(holder)  # slicing an `nn.Sequential` would make another module
        inside = [{id(parameter) for parameter in layer.parameters()} for layer in layers]
        if not moved <= set().union(*inside):
            continue
        first = next(index for index, own in enumerate(inside) if own & moved)
        saved = sum(parameter.numel() for layer in layers[:first] for parameter in layer.parameters())
        if saved > most and len(set(layers)) == len(layers):  # a layer listed twice runs twice
            best, most = Stack(tuple(layers[:first]), tuple(layers[first:])), saved
    return best


class StackEvaluation:
    """The losses of one micro-batch: the first by a full pass, the others from the first perturbed layer on.

    Args:
        plan: A `TowerPlan` that has a stack.
        forward, before: As for `PlainEvaluation`.
        used: The shortcuts to take; default: those of the plan, which are checked before any is taken.
    """

    def __init__(
        self,
        plan: Any,
        forward: Callable[[], torch.Tensor],
        before: ForwardState,
        used: Collection[Any] | None = None,
    ):
        self.plan, self.forward, self.before, self._own_used = plan, forward, before, used
        self.after: ForwardState | None = None
        self.plain: PlainEvaluation | None = None
        self._output: Any = None
        self._exits: dict[nn.Module, ForwardState] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Watch a whole forward pass, such as the first-order one."""
        order: list[nn.Module] = []
        below, above = self.plan.stack.below, self.plan.stack.above
        with ExitStack() as stack:
            for layer in (*below, *above):
                stack.enter_context(forward_of(layer, self._watched(layer, order)))
            yield
        self.after = self.before.now()
        is_stack = tuple(order[: len(below)]) == below and not set(order[len(below) :]) & set(below)
        if not is_stack or not self.before.same_buffers(self.after):
            self._take_full_passes()

    def _watched(self, layer: nn.Module, order: list[nn.Module]) -> Callable:
        original = layer.forward

        def watched(*args, **kwargs):
            order.append(layer)
            output = original(*args, **kwargs)
            if layer in self.plan.stack.below:
                self._exits[layer] = ForwardState(self.before.devices)
            if layer is self.plan.stack.below[-1]:
                self._output = tree_map(lambda v: v.detach() if isinstance(v, torch.Tensor) else v, output)
            return output

        return watched

    def _take_full_passes(self) -> None:
        self.plain = PlainEvaluation(self.forward, self.before, self.after)
        self._forget()

    def finer(self, forward: Callable[[], torch.Tensor], *_: Any) -> PlainEvaluation | StackEvaluation:
        """The evaluation of the same micro-batch by another, finer forward pass."""
        if self.plain is not None:
            return self.plain.finer(forward)
        return StackEvaluation(self.plan, forward, self.before, self._own_used)

    def losses(self, points: Sequence[Point]) -> list[torch.Tensor]:
        """The loss at every point; scalars."""
        watch(points, lambda: PlainEvaluation(self.forward, self.before, self.after).losses([{}]))
        points, losses = list(points), []
        if points and self.after is None:
            self.before.restore()
            with at(points[0]), self.recording():
                losses.append(self.forward())
            if was_missed(points[0]):
                losses.clear()  # it may have read parameters at θ
            else:
                points.pop(0)
        if self.plain is None and self._used is None:
            self.plan.check(self.forward, self.before, lambda used: self._by(used).losses)
            if not self._used:
                self._take_full_passes()
        if self.plain is not None:
            return losses + self.plain.losses(points)
        return losses + PlainEvaluation(self._from_the_first_perturbed_layer, self.before, self.after).losses(points)

    @property
    def _used(self) -> Collection[Any] | None:
        return self.plan.used if self._own_used is None else self._own_used

    def _by(self, used: Collection[Any]) -> StackEvaluation:
        return StackEvaluation(self.plan, self.forward, self.before, used)

    def _from_the_first_perturbed_layer(self) -> torch.Tensor:
        with ExitStack() as stack:
            for layer in self.plan.stack.below:
                stack.enter_context(forward_of(layer, partial(self._replay, self._exits[layer])))
            return self.forward()

    def _replay(self, state: ForwardState, /, *args: Any, **kwargs: Any) -> Any:
        state.restore()  # the layer's own: a model with LayerDrop draws between its layers
        return tree_map(lambda value: value, self._output)  # in new containers

    def close(self) -> None:
        if self.plain is not None:
            self.plain.close()
        elif self.after is not None:
            self.after.restore()
        self._forget()

    def _forget(self) -> None:
        self._output = None
        self._exits.clear()
