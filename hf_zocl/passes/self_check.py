"""Checks that a cheaper way to compute losses gives the differences of plain passes, before it is used."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from ..zo.directions import Combination, direction_seed
from ..zo.estimators import Point
from ..zo.estimators.base import wide
from ..zo.perturbation import Perturbation


# The size of a perturbation in ε: the first of these at which the loss changes by SEEN_PART of itself, and by
# SEEN_NOISES times its noise. The smallest are seldom needed.
SIZES = (16.0, 64.0, 256.0, 1024.0, 4096.0, 4.0, 1.0)
SEEN_PART, SEEN_NOISES = 5e-3, 3e4
# A shortcut is at fault if its loss is off by more than this part of the change, and this many times the noise.
FAULT_PART, FAULT_NOISES = 3e-4, 10
# The check is valid only if faults of this part of the change would be noticed.
NOTICED_PART = 0.1

Losses = Callable[[Sequence[Point]], Sequence[torch.Tensor]]
Key = TypeVar("Key")


@dataclass
class SelfCheck:
    """Compares a shortcut's losses with those of plain passes, at perturbations large enough to be seen.

    A fault of a shortcut grows with the perturbation, as differences of losses do; rounding noise does not. So a part
    of the loss that a shortcut misses is noticed if it makes up more than 0.03 % of a difference.

    Attributes:
        plain: Computes the losses at points by plain passes.
        precision: The relative spacing of the coarsest number format of the model's weights.
        reduce: Averages a tensor of losses over data-parallel ranks, so that all ranks find the same.
        points: Where losses are compared.
        is_seen: Whether every perturbation changes the loss enough for the check to be valid.
    """

    plain: Losses
    precision: float
    reduce: Callable[[torch.Tensor], torch.Tensor]
    points: list[Point] = field(default_factory=list)
    is_seen: bool = True
    _expected: list[float] = field(default_factory=list)
    _tolerance: list[float] = field(default_factory=list)

    def look(self, perturbations: Collection[Perturbation]) -> None:
        """Find a size at which each perturbation is seen, and compute the plain losses there."""
        base = self._losses(self.plain, [{}])[0]
        noises, halves = [], {}
        for perturbation in perturbations:
            size, loss, noise = self._seen(perturbation, base)
            tolerance = max(FAULT_PART * abs(loss - base), FAULT_NOISES * noise)
            if not tolerance < NOTICED_PART * abs(loss - base):
                self.is_seen = False
                return
            noises.append(noise)
            halves[perturbation] = _offset(perturbation, size / 2)
            self._add([{perturbation: _offset(perturbation, size)}], [loss], tolerance)
            self._add([{perturbation: halves[perturbation]}], None, tolerance)
        if len(halves) > 1:
            self._add([halves], None, max(self._tolerance))
        # Twice, because a shortcut runs its first pass in full.
        self.points[:0], self._expected[:0] = [{}, {}], [base, base]
        self._tolerance[:0] = [FAULT_NOISES * max(noises)] * 2

    def fault(self, evaluate: Losses) -> str | None:
        """What is wrong with the losses that `evaluate` computes; None if nothing is."""
        try:
            found = self._losses(evaluate, self.points)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        for mine, expected, tolerance in zip(found, self._expected, self._tolerance, strict=True):
            if not abs(mine - expected) <= tolerance:
                base = self._expected[0]
                return f"a loss changes by {mine - base:.5g} where a plain pass has {expected - base:.5g}"
        return None

    def _add(self, points: list[Point], losses: list[float] | None, tolerance: float) -> None:
        self.points += points
        self._expected += self._losses(self.plain, points) if losses is None else losses
        self._tolerance += [tolerance] * len(points)

    def _losses(self, evaluate: Losses, points: Sequence[Point]) -> list[float]:
        losses = torch.stack(list(evaluate(points)))
        self._rounding = torch.finfo(losses.dtype).eps
        return self.reduce(wide(losses)).tolist()

    def _seen(self, perturbation: Perturbation, base: float) -> tuple[float, float, float]:
        """The size at which the perturbation is seen best, else the largest with a finite loss; its loss and noise."""
        size, loss, limit, seen = 0.0, base, math.inf, []
        for step in SIZES:
            if step > limit:
                continue
            try:
                (found,) = self._losses(self.plain, [{perturbation: _offset(perturbation, step)}])
                change = abs(found - base)
                if not math.isfinite(change):
                    limit = step
                    continue
                if step > size:
                    size, loss = step, found
                if change > SEEN_PART * abs(base):
                    seen.append((step, found, self._noise(perturbation, step, found)))
            except Exception:
                if step == SIZES[-1] and not size:
                    raise
                limit = step  # a loss may refuse weights that make no sense
                continue
            if seen and change > SEEN_NOISES * seen[-1][2]:
                break
        if not seen:
            return size, loss, self._noise(perturbation, size, loss) if loss != base else 0.0
        return max(seen, key=lambda found: abs(found[1] - base) / (found[2] or math.inf))

    def _noise(self, perturbation: Perturbation, size: float, loss: float) -> float:
        """How far rounding throws the loss off: its changes over tiny steps, less their trend."""
        steps = [size * (1 + 8 * self.precision * number) for number in (1, 2, 3)]
        near = self._losses(self.plain, [{perturbation: _offset(perturbation, step)} for step in steps])
        bends = torch.tensor([loss, *near], dtype=torch.float64).diff(n=2).abs() / math.sqrt(6)
        return max(float(bends.max()), self._rounding * abs(loss))


def _offset(perturbation: Perturbation, size: float) -> Combination:
    return perturbation.query(direction_seed(0, 0, 0, 0)).scaled(size)


def holding(keys: Sequence[Key], fault: Callable[[Collection[Key]], str | None]) -> tuple[set[Key], Mapping[Key, str]]:
    """The shortcuts that hold, and what is wrong with each of the others.

    Args:
        keys: The shortcuts; the others build on the first.
        fault: Says what is wrong with the losses if some of them are taken together; None if nothing is.
    """
    if fault(keys) is None:
        return set(keys), {}
    used: list[Key] = []
    faults: dict[Key, str] = {}
    for key in keys:
        found = fault([*used, key])
        if found is None:
            used.append(key)
            continue
        faults[key] = found
        if not used:
            break
    return set(used), faults
