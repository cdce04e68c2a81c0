"""Parameters moved along random directions, and put back bit by bit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.autograd import forward_ad

from ..private_names import add_each, add_to_each, copy_to_each
from .assignment import ZOGroup
from .directions import Combination, draw_direction


@dataclass(frozen=True)
class Moments:
    """What is logged of a gradient estimate: the number of its coordinates, their sum and their sum of squares."""

    count: int
    total: torch.Tensor
    squares: torch.Tensor

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.count + other.count, self.total + other.total, self.squares + other.squares)

    @property
    def variance(self) -> torch.Tensor:
        return self.squares / self.count - (self.total / self.count).square()


class Perturbation:
    """The zeroth-order parameters of one branch as one vector θ of n coordinates: moved to θ + d and back.

    Coming back is a copy of the saved values, not a subtraction, which would drift in floating point.

    Args:
        groups: All the groups of the branch; their order fixes the order of the coordinates.

    Raises:
        ValueError: If the groups are of several branches, or differ in ε.
    """

    def __init__(self, groups: Sequence[ZOGroup]):
        kinds = {(group.branch, group.eps) for group in groups}
        if len(kinds) != 1:
            raise ValueError(f"The groups of one perturbation share their branch and ε; these have {sorted(kinds)}.")
        self.branch, self.eps = kinds.pop()
        self.groups = tuple(groups)
        self.parameters = [parameter for group in groups for parameter in group.parameters]
        self._sizes = [parameter.numel() for parameter in self.parameters]
        self.is_rounded = any(parameter.dtype.itemsize < 4 for parameter in self.parameters)

    def __len__(self) -> int:
        return sum(self._sizes)

    @property
    def _data(self) -> list[torch.Tensor]:
        return [parameter.data for parameter in self.parameters]

    def query(self, seed: int, sign: int = 1) -> Combination:
        """±ε·Δ."""
        return Combination((seed,), (1.0,), sign * self.eps)

    def tangent(self, seed: int) -> Combination:
        """Δ, as a tangent."""
        return Combination((seed,), (1.0,), is_tangent=True)

    def vector(self, combination: Combination) -> torch.Tensor:
        """The combination's value, float32 or wider, shape `(n,)`."""
        total = None
        for seed, weight in zip(combination.seeds, combination.weights, strict=True):
            term = self._direction(seed, combination.moved) * weight
            total = term if total is None else total.add_(term)
        return (total.sign_() if combination.sign else total).mul_(combination.scale)

    def write(
        self, gradient: Sequence[Combination], sign: bool = False, factor: float | torch.Tensor = 1.0
    ) -> dict[int | str | None, Moments]:
        """Set `.grad` of every parameter to the sum of the combinations, or to its sign, times a factor.

        Returns:
            The moments of the sum by layer (`ZOGroup.label`), as it is, without sign and factor.
        """
        total = self.vector(gradient[0])
        for term in gradient[1:]:
            total.add_(self.vector(term))
        moments: dict[int | str | None, Moments] = {}
        sizes = [sum(parameter.numel() for parameter in group.parameters) for group in self.groups]
        for group, piece in zip(self.groups, total.split(sizes), strict=True):
            own = Moments(len(piece), piece.sum(), piece.square().sum())
            moments[group.label] = moments[group.label] + own if group.label in moments else own
        total = (total.sign_() if sign else total).mul_(factor)
        for parameter, piece in zip(self.parameters, self.pieces(total), strict=True):
            parameter.grad = piece
        return moments

    def pieces(self, vector: torch.Tensor) -> list[torch.Tensor]:
        """A vector as one tensor per parameter, of its shape, dtype and device."""
        split = zip(vector.split(self._sizes), self.parameters, strict=True)
        return [piece.view_as(p).to(p.device, p.dtype) for piece, p in split]

    @contextmanager
    def at(self, offset: Combination) -> Iterator[None]:
        """Inside, the parameters are θ + offset; afterwards θ again, bit by bit, also when the block raises."""
        data = self._data
        saved = [tensor.clone() for tensor in data]
        try:
            self._move(data, saved, offset)
            yield
        finally:
            if offset.is_tangent:
                self._assign(saved)
            else:
                copy_to_each(data, saved)

    def _move(self, data: list[torch.Tensor], saved: list[torch.Tensor], offset: Combination) -> None:
        pieces = self.pieces(self.vector(offset))
        if offset.is_tangent:
            # The parameters themselves: what is written to their data leaves them without a tangent.
            self._assign(map(forward_ad.make_dual, saved, pieces))
        else:
            add_to_each(data, pieces)

    @torch.no_grad()
    def _assign(self, values: Iterable[torch.Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)

    def stack(self, offsets: Sequence[Combination]) -> list[torch.Tensor]:
        """θ + offset for every offset: one tensor of shape `(len(offsets), *shape)` per parameter."""
        vectors = torch.stack([self.vector(offset) for offset in offsets])
        split = zip(vectors.split(self._sizes, dim=1), self._data, strict=True)
        pieces = [(data, piece.view(len(offsets), *data.shape).to(data.device, data.dtype)) for piece, data in split]
        if offsets[0].is_tangent:
            return [forward_ad.make_dual(data.expand_as(piece).clone(), piece) for data, piece in pieces]
        return [data + piece for data, piece in pieces]

    def _direction(self, seed: int, moved: tuple[float, float] | None) -> torch.Tensor:
        drawn = self._draw(seed)
        if moved is None or not self.is_rounded:
            return drawn
        # Rounded as in `at`.
        ends = [add_each(self._data, self.pieces(drawn * size)) for size in moved]
        first, second = (torch.cat([tensor.flatten().to(drawn.dtype) for tensor in end]) for end in ends)
        return (first - second).div_(moved[0] - moved[1])

    def _draw(self, seed: int) -> torch.Tensor:
        # Drawn again whenever it is needed: none is in memory while a forward pass runs.
        drawn = draw_direction(len(self), seed, self.parameters[0].device)
        return drawn.to(torch.promote_types(self.parameters[0].dtype, torch.float32))
