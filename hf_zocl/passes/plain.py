"""A loss by one full forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from ..zo.estimators import Point
from ..zo.streaming import StreamedPerturbation
from .random_state import ForwardState


class PlainEvaluation:
    """Computes every loss by one full forward pass, all from the same state, so that dropout masks do not differ.

    Args:
        forward: Returns the loss, a scalar, at the current parameters.
        before: The state in which the step's first forward pass started: every evaluation starts there too.
        after: The state that a single pass leaves behind, to which `close` returns, so that the number of queries does
            not change what the next step draws; by default, the state after the first evaluation.
    """

    def __init__(
        self,
        forward: Callable[[], torch.Tensor],
        before: ForwardState | None = None,
        after: ForwardState | None = None,
    ):
        self.forward, self.before, self.after = forward, before, after

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Watch a whole forward pass at θ, such as the first-order one."""
        yield
        self.after = self.before.now()

    def finer(self, forward: Callable[[], torch.Tensor], *_: Any) -> PlainEvaluation:
        """The evaluation of the same micro-batch by another, finer forward pass."""
        return PlainEvaluation(forward, self.before, self.after)

    def losses(self, points: Sequence[Point]) -> list[torch.Tensor]:
        """The loss at every point; scalars."""
        watch(points, lambda: self._loss({}))
        losses = []
        for point in points:
            loss = self._loss(point)
            while was_missed(point):
                loss = self._loss(point)
            losses.append(loss)
        return losses

    def _loss(self, point: Point) -> torch.Tensor:
        if self.before is not None:
            self.before.restore()
        with at(point):
            loss = self.forward()
        if self.after is None and self.before is not None:
            self.after = self.before.now()
        return loss

    def close(self) -> None:
        if self.after is not None:
            self.after.restore()


@contextmanager
def at(point: Point) -> Iterator[None]:
    """Inside, all perturbations of the point are in place."""
    with ExitStack() as stack:
        for perturbation, offset in point.items():
            stack.enter_context(perturbation.at(offset))
        yield


def watch(points: Iterable[Point], full_pass: Callable[[], Any]) -> None:
    """Find out once, in a full pass at θ, when streamed parameters are read (`StreamedPerturbation.watching`)."""
    unseen = {perturbation for point in points for perturbation in _streamed(point) if not perturbation.is_watched}
    if unseen:
        with ExitStack() as stack:
            for perturbation in unseen:
                stack.enter_context(perturbation.watching())
            full_pass()


def _streamed(point: Point) -> list[StreamedPerturbation]:
    return [perturbation for perturbation in point if isinstance(perturbation, StreamedPerturbation)]


def was_missed(point: Point) -> bool:
    """True if the last pass may have read streamed parameters at θ: then the next one moves them for longer."""
    missed = [perturbation for perturbation in _streamed(point) if perturbation.widen()]
    return bool(missed)
