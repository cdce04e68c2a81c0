"""`zo_objective`: what zeroth-order layers learn from instead of the loss; it needs no gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers.trainer_pt_utils import nested_detach
from transformers.utils import logging

from ..passes.random_state import modes_of, restore_modes
from ..zo import Estimate, Evaluation, Resolution
from ..zo.noise import Line
from .differences import ENOUGH, DifferenceWatch, MakeFiner, of_branch


logger = logging.get_logger(__name__)

# (model, inputs, outputs) → a number, or one for every example; the lower the better.
Objective = Callable[[nn.Module, dict[str, Any], Any], Any]

# The values of ε to choose from, and the number of directions along which each is tried.
SIZES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
DIRECTIONS = 4


def check_objective(objective: Any, estimator: str, has_eps: bool, has_zo_parameters: bool) -> None:
    """Refuse settings that cannot learn from an objective.

    Raises:
        TypeError: If the objective cannot be called.
        ValueError: If the estimator differentiates, or nothing is zeroth-order.
    """
    if not callable(objective):
        raise TypeError(f"zo_objective={objective!r}: expected a function of (model, inputs, outputs).")
    if not has_eps:
        raise ValueError(
            f"zo_estimator={estimator!r} takes derivatives, which zo_objective may not have: choose one-sided, "
            "two-sided, conservative or fzoo."
        )
    if not has_zo_parameters:
        raise ValueError(
            "zo_objective: no trained parameter is zeroth-order, so nothing would learn from it; choose zo_branch "
            "and zo_layers, or leave it out."
        )


@torch.no_grad()
def value_of(objective: Objective, model: nn.Module, inputs: dict[str, Any], outputs: Any) -> torch.Tensor:
    """The objective as one number, in float32 at least: the mean, if it returns one for every example.

    Raises:
        TypeError: If it does not return a number.
        ValueError: If it returns an empty tensor.
    """
    modes = modes_of(model.modules())
    try:
        found = objective(model, inputs, nested_detach(outputs))
    finally:
        restore_modes(modes)  # an objective that generates may have called `eval()`
    try:
        value = torch.as_tensor(found)
    except (TypeError, ValueError, RuntimeError):
        value = None
    if value is None or value.is_complex():
        raise TypeError(
            f"zo_objective returned {type(found).__name__}: expected a number, or a tensor with one number per "
            "example."
        )
    if value.numel() == 0:
        raise ValueError(f"zo_objective returned an empty tensor, of shape {tuple(value.shape)}.")
    device = next(model.parameters()).device
    return value.to(device, torch.promote_types(value.dtype, torch.float32)).mean()


class ObjectiveWatch(DifferenceWatch):
    """Chooses an ε that changes the objective, and warns if none does.

    An objective may be a step function, such as an accuracy: it has no rounding noise and no derivatives from which ε
    would follow. `zo_eps="auto"` takes, of a few sizes, the one at which its changes are most like those of a slope.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._values: list[torch.Tensor] = []

    def settle(
        self, evaluation: Evaluation, make_finer: MakeFiner | None, why_flat: Callable[[str | None], str]
    ) -> None:
        """Measure every branch on a micro-batch."""
        found = {}
        for branch, eps in self.eps.items():
            line = self._line(evaluation, branch)
            base = line(0, [0.0])
            own = best_size(line, base, SIZES) if eps is None else best_size(line, base, (eps,), least_seen=1)
            found[branch] = own or Resolution(eps or SIZES[-1], 0.0, 0.0, 0.0)
            if own is not None:
                continue
            logger.warning_once(f"{of_branch(branch)} {_why_unseen(line, base, found[branch].eps)}")
        self.tries = 0 if all(own.is_seen for own in found.values()) else self.tries - 1
        self.estimator.settle(found)

    def see(self, estimate: Estimate) -> None:
        super().see(estimate)
        self._values.append(estimate.loss)

    def logs(self) -> dict[str, float]:
        """The mean of the objective since the last log, and ε; warns if all differences were zero."""
        logs = {}
        if self._values:
            logs["zo_objective"] = float(torch.stack(self._values).mean())
            self._values.clear()
        for branch, resolution in self.estimator.resolutions.items():
            logs["zo_eps" + (f"_{branch}" if branch else "")] = resolution.eps
            total, count = self._seen.get(branch, (0.0, 0))
            if count >= ENOUGH:
                del self._seen[branch]
                if float(total) == 0:
                    logger.warning_once(
                        f"{of_branch(branch)}: zo_objective did not change in any of {count} perturbations by "
                        f"zo_eps={resolution.eps:g}, so nothing was learned. Unless it is already at its lowest, "
                        "raise zo_eps, take larger batches or more zo_queries, or an objective with more values."
                    )
        return logs


def _why_unseen(line: Line, base: torch.Tensor, eps: float) -> str:
    what = f"learns nothing from zo_objective, which is {float(base):.4g} on the first batch and "
    larger = best_size(line, base, [size for size in SIZES if size > eps])
    if larger is not None:
        return what + f"stays so at zo_eps={eps:g}: no prediction changes. At zo_eps={larger.eps:g} it does."
    return what + (
        f"stays so at any zo_eps up to {max(eps, SIZES[-1]):g}: it gives no direction where the training begins. "
        "Train with the loss first, take larger batches, or an objective with more values."
    )


def best_size(line: Line, base: torch.Tensor, sizes: Sequence[float], least_seen: int = 2) -> Resolution | None:
    """Of the sizes that change the objective in `least_seen` directions, the one at which it is most like a slope.

    A slope changes the objective by opposite amounts on both sides of θ (odd); a bend, or the jumps of a step
    function, also by equal amounts (even). So the ratio of odd to even falls where a move is so large that the
    objective bends, and where it is so small that only a few jumps are seen. The least change is added to the even
    part.

    Returns:
        Its resolution; None if no size changes the objective in as many directions.
    """
    seen = []
    for size in sizes:
        sides = torch.stack([line(number, [size, -size]) for number in range(DIRECTIONS)]) - base
        sides = sides.double().nan_to_num(0.0, 0.0, 0.0)
        if int((sides != 0).any(dim=1).sum()) >= least_seen:
            seen.append((size, sides))
    if not seen:
        return None
    least = min(float(sides[sides != 0].abs().min()) for _, sides in seen)

    def likeness(sides: torch.Tensor) -> float:
        odd, even = (sides[:, 0] - sides[:, 1]) / 2, (sides[:, 0] + sides[:, 1]) / 2
        return float(odd.square().mean().sqrt() / (even.square().mean().sqrt() + least))

    size, sides = max(seen, key=lambda found: likeness(found[1]))
    return Resolution(size, 0.0, 0.0, float(sides.square().mean().sqrt()) / size)
