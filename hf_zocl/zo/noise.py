"""The resolution of a difference of losses: the rounding noise of a loss, and an ε whose differences exceed it.

A difference quotient has two errors, truncation and rounding. Along a direction Δ, with L', L'', L''' the derivatives
of the loss and σ the noise of one loss, their mean squares add up to

    one-sided:  (ε·L''/2)² + 2·(σ/ε)²,       least at ε = 8^¼·√(σ/|L''|)    (Moré & Wild 2012, equation 3.3)
    two-sided:  (ε²·L'''/6)² + (σ/ε)²/2,     least at ε = (3·σ/|L'''|)^⅓

and the relative error is the root of this sum over |L'|. The derivatives are root mean squares over a few random
directions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


# Gives the losses along a direction, chosen by its number, at the given multiples of it.
Line = Callable[[int, Sequence[float]], torch.Tensor]

NOISE_POINTS = 7
DIRECTIONS = 4
EPS_RANGE = (1e-5, 1e-1)
# An error of a third still means a correlation of 0.95 with the derivatives. It is known only within a factor of two,
# so half of that is required.
GOOD_ERROR = 0.15


@dataclass(frozen=True)
class Resolution:
    """The resolution of a branch's differences of losses.

    Attributes:
        eps: ε.
        noise: σ, the standard deviation of the rounding errors of one loss.
        error: The expected error of a difference quotient over the derivative, root mean square.
        slope: |L'|, root mean square.
        finer: Whether the losses come from finer passes than the training's own.
        training_noise: σ of the training's own passes.
        curvature: |L''|, root mean square; 0 where it was not measured.
    """

    eps: float
    noise: float
    error: float
    slope: float
    finer: bool = False
    training_noise: float = 0.0
    curvature: float = 0.0

    @property
    def is_seen(self) -> bool:
        """True if a difference is greater than its rounding noise."""
        return self.eps * self.slope > math.sqrt(2) * self.noise


@dataclass(frozen=True)
class Shape:
    """Derivatives of a loss along random directions, root mean squares.

    Attributes:
        slope: The first derivative.
        bend: The derivative behind the truncation error: the second, or the third for two-sided differences.
        curvature: The second derivative.
    """

    slope: float
    bend: float
    curvature: float = 0.0


def rounding_noise(losses: torch.Tensor) -> float | None:
    """ECNoise (Moré & Wild, SIAM J. Sci. Comput. 33, 2011): the noise of a function from a few of its values.

    Differences of high order remove what is smooth, and leave the noise.

    Args:
        losses: At equally spaced points of a line, shape `(m+1,)`.

    Returns:
        σ; None if the points are too far apart to tell noise from function, or so close that most values are equal.
    """
    values = losses.double().cpu()
    if _is_flat(values):
        return None
    levels = _levels(values)
    for first in range(len(levels) - 2):
        values = values.diff()
        near, changes_sign = levels[first : first + 3], bool((values[:-1] * values[1:] < 0).any())
        if changes_sign and max(near) <= 4 * min(near):
            return near[0]
    return None


def _levels(values: torch.Tensor) -> list[float]:
    """The noise according to the differences of each order k = 1, 2, …: √((k!)²/(2k)! · mean square)."""
    levels, factor = [], 1.0
    for order in range(1, len(values)):
        values = values.diff()
        factor *= order / (2 * (2 * order - 1))
        levels.append(math.sqrt(factor * float(values.square().mean())))
    return levels


def _is_flat(losses: torch.Tensor) -> bool:
    """Whether most neighbours are equal."""
    return int((losses.diff() == 0).sum()) > len(losses) // 2


def measure_noise(line: Line, spacing: float = 1e-3) -> float:
    """σ along direction 0, from points as close together as the noise allows; 0 if the loss does not change at all."""
    for _ in range(4):
        losses = line(0, [number * spacing for number in range(NOISE_POINTS)]).double().cpu()
        noise = rounding_noise(losses)
        if noise is not None:
            return noise
        spacing *= 10 if _is_flat(losses) else 0.1
        if spacing > EPS_RANGE[1]:
            break
    # The noise never shows: the differences of the highest order are a bound.
    return _levels(losses)[-1]


def measure_shape(line: Line, noise: float, is_two_sided: bool, size: float = 1e-2) -> Shape:
    """Measure the derivatives along a few directions, so close to θ that the loss is like a low-degree polynomial.

    Args:
        line: The losses.
        noise: The noise of the losses, as far as it is known.
        is_two_sided: Whether the bend is the third derivative, rather than the second.
        size: The distance to try first.
    """
    offsets = (-1, 1, -2, 2) if is_two_sided else (-1, 1)
    base = line(0, [0.0]).double().cpu()
    for _ in range(4):
        points = [line(number, [size * offset for offset in offsets]).double().cpu() for number in range(DIRECTIONS)]
        back, ahead, *far = torch.stack(points, dim=1)
        odd, curvature = (ahead - back) / 2, _rms(ahead + back - 2 * base) / size**2
        if is_two_sided:
            far_odd = (far[1] - far[0]) / 2
            shape = Shape(_rms((8 * odd - far_odd) / 6) / size, _rms(far_odd - 2 * odd) / size**3, curvature)
            truncation = size**3 * shape.bend / 6
        else:
            shape = Shape(_rms(odd) / size, curvature, curvature)
            truncation = size**2 * shape.bend / 2
        drowns = size * shape.slope < 10 * noise
        if truncation > size * shape.slope and not drowns and size > 10 * EPS_RANGE[0]:
            size /= 10
        elif drowns and truncation <= size * shape.slope and size < EPS_RANGE[1]:
            size *= math.sqrt(10)
        else:
            break
    return shape


def best_eps(noise: float, shape: Shape, is_two_sided: bool) -> float:
    """The ε that minimises truncation and rounding together, to two digits."""
    ratio = noise / shape.bend if shape.bend > 0 else math.inf
    eps = (3 * ratio) ** (1 / 3) if is_two_sided else 8**0.25 * math.sqrt(ratio)
    return float(f"{min(max(eps, EPS_RANGE[0]), EPS_RANGE[1]):.1e}")


def relative_error(eps: float, noise: float, shape: Shape, is_two_sided: bool) -> float:
    """The error of a difference quotient over the derivative, root mean squares of both."""
    if is_two_sided:
        truncation, rounding = eps**2 * shape.bend / 6, noise / eps / math.sqrt(2)
    else:
        truncation, rounding = eps * shape.bend / 2, math.sqrt(2) * noise / eps
    return math.hypot(truncation, rounding) / shape.slope if shape.slope > 0 else math.inf


def measure(line: Line, finer: Line | None, is_two_sided: bool, eps: float | None = None) -> Resolution:
    """Choose ε, or judge a given one, and say whether it needs finer passes.

    Args:
        line: The losses of the training's own passes.
        finer: The losses of finer passes, if there are any.
        is_two_sided: Whether the estimator compares both sides of θ, rather than one with θ.
        eps: ε; None chooses it.
    """
    training_noise = noise = measure_noise(line)
    shape = measure_shape(finer or line, 0.0 if finer else noise, is_two_sided)

    def resolution(noise: float, finer: bool) -> Resolution:
        size = best_eps(noise, shape, is_two_sided) if eps is None else eps
        error = relative_error(size, noise, shape, is_two_sided)
        return Resolution(size, noise, error, shape.slope, finer, training_noise, shape.curvature)

    own = resolution(noise, finer=False)
    if finer is None or own.error <= GOOD_ERROR:
        return own
    fine = resolution(measure_noise(finer), finer=True)
    return fine if fine.error < own.error / 2 else own


def two_sided_would_do(noise: float, finer: Line) -> bool:
    """True if two-sided differences would be good enough, with losses of this noise.

    Args:
        noise: The noise of the training's own passes.
        finer: The losses of finer passes.
    """
    shape = measure_shape(finer, 0.0, is_two_sided=True)
    return relative_error(best_eps(noise, shape, True), noise, shape, True) <= GOOD_ERROR


def _rms(values: torch.Tensor) -> float:
    finite = values[values.isfinite()]
    return float(finite.square().mean().sqrt()) if len(finite) else 0.0
