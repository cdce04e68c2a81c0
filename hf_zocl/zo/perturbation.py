"""Moves parameters along random directions, and restores them exactly."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch.autograd import forward_ad

from ..private_names import add_to_each, copy_to_each
from .assignment import ZOGroup
from .directions import BLOCK, Combination, Direction, room_for
from .room import Room


@dataclass(frozen=True)
class Moments:
    """The moments of a gradient estimate: the number of its coordinates, their sum and their sum of squares."""

    count: int
    total: torch.Tensor
    squares: torch.Tensor

    def __add__(self, other: Moments) -> Moments:
        total, squares = (value.to(self.total.device) for value in (other.total, other.squares))
        return Moments(self.count + other.count, self.total + total, self.squares + squares)

    @property
    def variance(self) -> torch.Tensor:
        return self.squares / self.count - (self.total / self.count).square()


def add_moments(total: dict[Any, Moments], more: Mapping[Any, Moments]) -> None:
    """Add `more` to `total`, place by place."""
    for place, moments in more.items():
        total[place] = total[place] + moments if place in total else moments


@dataclass(frozen=True)
class _Part:
    """The part of a parameter in one block: `start` to `stop` of the block, from `first` on in the parameter."""

    index: int
    label: int | str | None
    start: int
    stop: int
    first: int

    def of(self, tensors: Sequence[torch.Tensor] | Mapping[int, torch.Tensor]) -> torch.Tensor:
        """This part of the parameter's tensor among `tensors`; a copy if that tensor is not contiguous."""
        return tensors[self.index].reshape(-1)[self.first : self.first + self.stop - self.start]


class Perturbation:
    """The zeroth-order parameters of one branch as one vector θ of n coordinates: moved to θ + d and back.

    Moving back copies the saved values, because subtracting d would drift in floating point. A direction is drawn and
    added block by block, so a whole one is never in memory.

    Args:
        groups: All the groups of the branch; their order fixes the order of the coordinates.
        room: The memory to save values in; by default, memory that is freed after each use.

    Raises:
        ValueError: If the groups belong to several branches, or differ in ε.
    """

    def __init__(self, groups: Sequence[ZOGroup], room: Room | None = None):
        kinds = {(group.branch, group.eps) for group in groups}
        if len(kinds) != 1:
            raise ValueError(f"The groups of one perturbation share their branch and ε; these have {sorted(kinds)}.")
        self.branch, self.eps = kinds.pop()
        self.groups = tuple(groups)
        self.parameters = [parameter for group in groups for parameter in group.parameters]
        self._sizes = [parameter.numel() for parameter in self.parameters]
        self._room = Room() if room is None else room
        self.is_rounded = any(parameter.dtype.itemsize < 4 for parameter in self.parameters)
        labels = [group.label for group in groups for _ in group.parameters]
        self._parts = list(_parts(self._sizes, labels))

    def __len__(self) -> int:
        return sum(self._sizes)

    @property
    def _data(self) -> list[torch.Tensor]:
        return [parameter.data for parameter in self.parameters]

    @property
    def _dtype(self) -> torch.dtype:
        return torch.promote_types(self.parameters[0].dtype, torch.float32)

    def query(self, seed: int, sign: int = 1) -> Combination:
        """The offset of a query, ±ε·Δ."""
        return Combination((seed,), (1.0,), sign * self.eps)

    def tangent(self, seed: int) -> Combination:
        """The direction Δ as a tangent."""
        return Combination((seed,), (1.0,), is_tangent=True)

    def vector(self, *gradient: Combination) -> torch.Tensor:
        """The sum of the combinations, shape `(n,)`, float32 or wider."""
        vector = torch.empty(len(self), dtype=self._dtype, device=self.parameters[0].device)
        for own, block in zip(vector.split(BLOCK), self._blocks(gradient), strict=True):
            own.copy_(block)
        return vector

    def write(
        self, gradient: Sequence[Combination], sign: bool = False, factor: float | torch.Tensor = 1.0
    ) -> dict[int | str | None, Moments]:
        """Set `.grad` of every parameter to the sum of the combinations, or to its sign, times a factor.

        Returns:
            The moments of the sum by layer (`ZOGroup.label`), before sign and factor are applied.
        """
        gradients = [torch.empty_like(data, memory_format=torch.contiguous_format) for data in self._data]
        moments: dict[int | str | None, Moments] = {}
        for parts, block in zip(self._parts, self._blocks(gradient), strict=True):
            _add_moments(moments, parts, block)
            _copy(gradients, parts, _stepped(block, sign, factor))
        self._set(gradients)
        return moments

    @contextmanager
    def written(
        self, gradient: Sequence[Combination], sign: bool = False, factor: float | torch.Tensor = 1.0
    ) -> Iterator[None]:
        """Inside, `.grad` is set as by `write`; afterwards it is None."""
        with self._room.like(self._data) as gradients:
            for parts, block in zip(self._parts, self._blocks(gradient), strict=True):
                _copy(gradients, parts, _stepped(block, sign, factor))
            self._set(gradients)
            try:
                yield
            finally:
                self._set([None] * len(gradients))

    def moments(self, gradient: Sequence[Combination]) -> dict[int | str | None, Moments]:
        """The moments that `write` returns, without writing anything."""
        moments: dict[int | str | None, Moments] = {}
        for parts, block in zip(self._parts, self._blocks(gradient), strict=True):
            _add_moments(moments, parts, block)
        return moments

    def pieces(self, vector: torch.Tensor) -> list[torch.Tensor]:
        """Split a vector into one tensor per parameter, with the parameter's shape, dtype and device."""
        split = zip(vector.split(self._sizes), self.parameters, strict=True)
        return [piece.view_as(p).to(p.device, p.dtype) for piece, p in split]

    def move_for_whole_passes(self) -> None:
        """Keep the parameters moved for the whole of every pass; without streaming they always are."""

    @contextmanager
    def at(self, offset: Combination) -> Iterator[None]:
        """Inside, the parameters are θ + offset; afterwards they are exactly θ again, even if the block raises."""
        data = self._data
        with self._room.like(data) as saved:
            copy_to_each(saved, data)
            try:
                self._move(data, saved, offset)
                torch.clear_autocast_cache()  # autocast caches casts of parameters that require a gradient
                yield
            finally:
                if offset.is_tangent:
                    self._assign(saved)
                else:
                    copy_to_each(data, saved)
                torch.clear_autocast_cache()

    def _move(self, data: list[torch.Tensor], saved: list[torch.Tensor], offset: Combination) -> None:
        if offset.is_tangent:
            # Into the parameters themselves: a write to `.data` would leave them without a tangent.
            self._assign(map(forward_ad.make_dual, saved, self.pieces(self.vector(offset))))
            return
        flat = [tensor.reshape(-1) for tensor in data]
        for parts, block in zip(self._parts, self._blocks([offset]), strict=True):
            own = [part.of(flat) for part in parts]
            moves = [
                block[part.start : part.stop].to(there.device, there.dtype)
                for part, there in zip(parts, own, strict=True)
            ]
            add_to_each(own, moves)
        for tensor, moved in zip(data, flat, strict=True):
            if not tensor.is_contiguous():  # its coordinates were moved in a copy
                tensor.copy_(moved.view_as(tensor))

    @torch.no_grad()
    def _assign(self, values: Iterable[torch.Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)

    def _set(self, gradients: Iterable[torch.Tensor | None]) -> None:
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient

    def stack(self, offsets: Sequence[Combination]) -> list[torch.Tensor]:
        """θ + offset for every offset: one tensor of shape `(len(offsets), *shape)` per parameter."""
        vectors = torch.stack([self.vector(offset) for offset in offsets])
        split = zip(vectors.split(self._sizes, dim=1), self._data, strict=True)
        pieces = [(data, piece.view(len(offsets), *data.shape).to(data.device, data.dtype)) for piece, data in split]
        if offsets[0].is_tangent:
            return [forward_ad.make_dual(data.expand_as(piece).clone(), piece) for data, piece in pieces]
        return [data + piece for data, piece in pieces]

    def _blocks(self, gradient: Sequence[Combination]) -> Iterator[torch.Tensor]:
        """The sum of the combinations, block by block; each block overwrites the one before.

        Directions are not kept: they are drawn again whenever they are needed.
        """
        device = self.parameters[0].device
        drawn = [[Direction(len(self), seed, device) for seed in term.seeds] for term in gradient]
        count = 1 + (len(gradient) > 1) + any(len(term.seeds) > 1 for term in gradient)
        rooms = [room_for(len(self), device) for _ in range(count)]
        for parts in self._parts:
            total = None
            for term, directions in zip(gradient, drawn, strict=True):
                own = self._block(term, directions, parts, rooms if total is None else rooms[1:])
                total = own if total is None else total.add_(own)
            yield total

    def _block(
        self, term: Combination, directions: Sequence[Direction], parts: Sequence[_Part], rooms: list[torch.Tensor]
    ) -> torch.Tensor:
        """The next block of one combination."""
        rounds = self.is_rounded and term.moved is not None
        folds = self._dtype == torch.float32 and not rounds  # draw weight·Δ at once
        total = None
        weights = term.weights
        if isinstance(weights, torch.Tensor):
            weights = weights.to(rooms[0].device)  # losses may come from another device
        for direction, weight in zip(directions, weights, strict=True):
            block = direction.next(weight if folds else 1.0, rooms[0 if total is None else 1]).to(self._dtype)
            if rounds:
                block = self._as_moved(block, parts, term.moved)
            if not folds:
                block = block.mul_(weight)
            total = block if total is None else total.add_(block)
        total = total.sign_() if term.sign else total
        return total if term.scale == 1 else total.mul_(term.scale)

    def _as_moved(self, block: torch.Tensor, parts: Sequence[_Part], ends: tuple[float, float]) -> torch.Tensor:
        """A block of Δ as the parameters really move between two ends: rounded as in `at`, over the ends' distance."""
        found = torch.empty_like(block)
        for part in parts:
            own = part.of(self._data)
            drawn = block[part.start : part.stop]
            first, second = (own + (drawn * size).to(own.device, own.dtype) for size in ends)
            found[part.start : part.stop] = first.to(found.dtype) - second.to(found.dtype)
        return found.div_(ends[0] - ends[1])


def _parts(sizes: Sequence[int], labels: Sequence[int | str | None]) -> Iterator[list[_Part]]:
    """The parts of the parameters in each block, block by block."""
    parts, filled = [], 0
    for index, (size, label) in enumerate(zip(sizes, labels, strict=True)):
        first = 0
        while first < size:
            count = min(size - first, BLOCK - filled)
            parts.append(_Part(index, label, filled, filled + count, first))
            first, filled = first + count, filled + count
            if filled == BLOCK:
                yield parts
                parts, filled = [], 0
    if parts:
        yield parts


def _stepped(block: torch.Tensor, sign: bool, factor: float | torch.Tensor) -> torch.Tensor:
    block = block.sign_() if sign else block
    if isinstance(factor, torch.Tensor):
        return block.mul_(factor.to(block.device))
    return block if factor == 1 else block.mul_(factor)


def _copy(tensors: Sequence[torch.Tensor], parts: Sequence[_Part], block: torch.Tensor) -> None:
    # `view` raises where it would have to copy; a write to a copy would be lost.
    flat = {part.index: tensors[part.index].view(-1) for part in parts}
    copy_to_each([part.of(flat) for part in parts], [block[part.start : part.stop] for part in parts])


def _add_moments(moments: dict[int | str | None, Moments], parts: Sequence[_Part], block: torch.Tensor) -> None:
    for label, group in groupby(parts, key=lambda part: part.label):
        mine = list(group)
        piece = block[mine[0].start : mine[-1].stop]
        add_moments(moments, {label: Moments(len(piece), piece.sum(), piece.square().sum())})
