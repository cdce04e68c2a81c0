"""Processes that work on one estimate together."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .estimator import Evaluation, Point, Rows


class SharedQueries:
    """An evaluation whose points are shared out among processes that have the same batch.

    Every process evaluates L(θ) and its own part of the other points. It gives these losses n-fold, for n processes,
    and zero for the points of the others: the mean over the processes, which `ZOEstimator` takes anyway, is the loss
    at every point.

    Args:
        evaluation: Gives this process's losses.
        part, parts: Which of how many parts of the points is evaluated here, counted from 0.
    """

    def __init__(self, evaluation: Evaluation, part: int, parts: int):
        self.evaluation, self.part, self.parts = evaluation, part, parts
        self.batch_rows = evaluation.batch_rows

    def losses(self, points: Sequence[Point], rows: Sequence[Rows] | None = None) -> list[torch.Tensor]:
        """The loss at every point, scalars, before their mean over the processes."""
        moved = [number for number, point in enumerate(points) if point]
        mine = {*moved[self.part :: self.parts], *(number for number, point in enumerate(points) if not point)}
        # A process without a point runs one all the same: its random state must not fall behind.
        numbers = sorted(mine) or [0]
        own = None if rows is None else [rows[number] for number in numbers]
        losses = self.evaluation.losses([points[number] for number in numbers], own)
        found = dict(zip(numbers, losses, strict=True))
        nothing = torch.zeros_like(found[numbers[0]])
        scaled = {number: found[number] * (self.parts if points[number] else 1) for number in mine}
        return [scaled.get(number, nothing) for number in range(len(points))]
