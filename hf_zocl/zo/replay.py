"""A log of zeroth-order steps, from which a training's weights can be rebuilt: a few bytes per step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from .assignment import ZOGroup
from .directions import Combination
from .estimator import ZOEstimator
from .estimators import Estimate
from .optimizer import build_zo_optimizer


@dataclass(frozen=True)
class ReplaySettings:
    """The settings that all steps of a log share.

    Args:
        queries: The number of directions of every branch, in the order of the branches.
        seed, sign: As for `ZOEstimator`.
        optimizer, momentum, weight_decay: As for `build_zo_optimizer`.
        max_norm: Clips the estimate; 0 does not clip.
        streamed: Whether the parameters were streamed, layer by layer.
    """

    queries: tuple[tuple[str | None, int], ...]
    seed: int
    sign: bool
    optimizer: str
    momentum: float = 0.0
    weight_decay: float = 0.0
    max_norm: float = 0.0
    streamed: bool = False


@dataclass(frozen=True)
class _Step:
    number: int
    learning_rates: tuple[float, ...]  # in the order of the branches
    scale: float
    weights: torch.Tensor  # the projected gradients, `(micro-steps, queries of all branches)`


@dataclass
class ReplayLog:
    """The steps of a training in which every parameter is zeroth-order.

    A step is the projected gradient of every query, the learning rates and the scale of a micro-batch. The directions
    follow from the seed and the step's number, so they are not stored.
    """

    settings: ReplaySettings
    steps: list[_Step] = field(default_factory=list)

    def record(
        self, number: int, estimates: Sequence[tuple[Estimate, float]], learning_rates: Sequence[float]
    ) -> None:
        """Add the step that is about to be made of `estimates`.

        Args:
            number: The number of the step, which keyed the directions.
            estimates: The estimates of the step's micro-batches, each with its scale, which is the same for all.
            learning_rates: One per branch, in the order of the branches.
        """
        rows = [
            torch.cat([estimate.gradient[branch].weights for branch, _ in self.settings.queries])
            for estimate, _ in estimates
        ]
        self.steps.append(_Step(number, tuple(learning_rates), estimates[0][1], torch.stack(rows)))

    @torch.no_grad()
    def replay(self, groups: Sequence[ZOGroup], model: nn.Module | None = None) -> None:
        """Take all steps again: parameters as they were before the first step become those after the last.

        On the same device they agree to the last bit, because every step goes through the training's estimator and
        optimizer.

        Args:
            groups: The groups of the training, in their order.
            model: The model that holds the parameters; needed if they were streamed.

        Raises:
            ValueError: If the model is needed and not given.
        """
        settings = self.settings
        if settings.streamed and model is None:
            raise ValueError("The parameters of this log were streamed: its replay needs the model as well.")
        estimator = ZOEstimator(
            groups,
            queries=dict(settings.queries),
            sign=settings.sign,
            seed=settings.seed,
            model=model if settings.streamed else None,
        )
        optimizer = build_zo_optimizer(
            groups, settings.optimizer, momentum=settings.momentum, weight_decay=settings.weight_decay
        )
        parameters = [parameter for group in groups for parameter in group.parameters]
        sizes = [count for _, count in settings.queries]
        for step in self.steps:
            estimates = []
            for micro_step, row in enumerate(step.weights.to(parameters[0].device)):
                seeds = estimator.direction_seeds(step.number, micro_step)
                weights = dict(zip(seeds, row.split(sizes), strict=True))
                gradient = {branch: Combination(seeds[branch], weights[branch]) for branch in seeds}
                estimates.append((Estimate(gradient), step.scale))
            for group, learning_rate in zip(optimizer.param_groups, step.learning_rates, strict=True):
                group["lr"] = learning_rate
            if settings.streamed:
                for _ in estimator.stream(estimates, settings.max_norm):
                    optimizer.step()
                continue
            estimator.write(estimates)
            if settings.max_norm > 0:
                nn.utils.clip_grad_norm_(parameters, settings.max_norm)
            optimizer.step()
            optimizer.zero_grad()

    def tensors(self) -> dict[str, torch.Tensor]:
        """The steps as a few tensors; a value that is the same in all steps is stored once."""
        columns = {
            "step": torch.tensor([step.number for step in self.steps], dtype=torch.int32),
            "learning_rate": torch.tensor([step.learning_rates for step in self.steps], dtype=torch.float64),
            "scale": torch.tensor([step.scale for step in self.steps], dtype=torch.float64),
            "micro_steps": torch.tensor([len(step.weights) for step in self.steps], dtype=torch.int32),
        }
        columns = {name: column[:1] if (column == column[:1]).all() else column for name, column in columns.items()}
        weights = [step.weights.flatten().cpu() for step in self.steps]
        return {**columns, "projected_gradients": torch.cat(weights) if weights else torch.empty(0)}

    @classmethod
    def from_tensors(cls, settings: ReplaySettings, tensors: Mapping[str, torch.Tensor]) -> ReplayLog:
        """The log that `tensors` were made from.

        Raises:
            KeyError, RuntimeError: If they are not a log's tensors, or those of a log with other settings.
        """
        queries = sum(count for _, count in settings.queries)
        gradients = tensors["projected_gradients"].view(-1, queries)
        steps = len(tensors["step"])
        number, scale, micro_steps = (
            tensors[name].expand(steps).tolist() for name in ("step", "scale", "micro_steps")
        )
        # Earlier logs have one rate for all branches.
        rates = tensors["learning_rate"].unsqueeze(-1).flatten(1).expand(steps, len(settings.queries)).tolist()
        rows = zip(number, map(tuple, rates), scale, gradients.split(micro_steps), strict=True)
        return cls(settings, [_Step(*row) for row in rows])
