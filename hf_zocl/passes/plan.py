"""The parts of a model's passes that may be left out: found once per training."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping

import torch
from torch import nn

from ..private_names import without_autocast
from ..zo.directions import Combination
from ..zo.estimators import Point
from ..zo.perturbation import Perturbation
from ..zo.streaming import StreamedPerturbation
from .candidates import Holder, stackable
from .plain import PlainEvaluation
from .prompts import Packing
from .random_state import Buffers, ForwardState, uncounted
from .self_check import Losses, SelfCheck, holding
from .stack import find_stack
from .structure import devices_of, find_towers
from .task_aware import task_aware


logger = logging.getLogger(__name__)

# A shortcut: what it does, and in which tower.
Shortcut = tuple[str, str | None]
TOWERS, PACKING = ("the reuse of towers", None), ("the packing of prompts", "language")
REST, LAYERS, STACKING = "weights left as they are", "the reuse of layers", "candidates side by side"


class TowerPlan:
    """The plan of all steps: which tower a perturbation runs, from which layer on, and by which shortcuts.

    A model without towers may have a stack; its layers below the first perturbed one are then left out.

    Modules may say by attributes what they support: `stackable` (all parameters together may have a leading dimension
    of candidates; default: those of linear layers and layer norms may) and `packable` (a row may hold several prompts;
    default: it may). The model itself may be `TaskAware`.

    Args:
        model: The model, unwrapped.
        perturbations: One per branch.
        reduce: Averages a tensor of losses over data-parallel ranks.

    Attributes:
        devices: The devices on which the model runs.
        towers: The towers by name; none if the model is not a dual encoder.
        stack: Without towers, the stack whose lower layers are left out; None if there is none.
        used: The shortcuts that were found to hold; None before the check.
        writes_inputs: Whether a pass writes into its inputs; None until that is known.
    """

    def __init__(
        self,
        model: nn.Module,
        perturbations: Iterable[Perturbation],
        reduce: Callable[[torch.Tensor], torch.Tensor] = lambda losses: losses,
    ):
        self.model, self.all_perturbations, self.reduce = model, list(perturbations), reduce
        self.buffers = Buffers(model)
        self.devices = devices_of(model)
        is_coupled = task_aware(model).couples_towers
        self.towers = {} if is_coupled else find_towers(model)
        self.stack = None if is_coupled or self.towers else find_stack(model, self.all_perturbations)
        if is_coupled:
            for perturbation in self.all_perturbations:
                perturbation.move_for_whole_passes()
        self.perturbations: dict[str, Perturbation | None] = dict.fromkeys(self.towers)
        self.packing = Packing(model)
        self.used: set[Shortcut] | None = None
        self.writes_inputs: bool | None = None
        self.is_warned = False
        self.first_layer: dict[str, int | None] = dict.fromkeys(self.towers)
        self.stacked: dict[str, list[Holder] | None] = {}
        self.packable = all(
            getattr(module, "packable", True) for tower in self.towers.values() for module in tower.module.modules()
        )
        self.within_towers: set[Perturbation] = set()
        owners: dict[int, list[tuple[nn.Module, str]]] = {}
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
                owners.setdefault(id(parameter), []).append((module, name))
        for perturbation in self.all_perturbations:
            for name, tower in self.towers.items():
                inside = {id(p) for p in tower.module.parameters()}
                mine = [id(p) in inside for p in perturbation.parameters]
                if not any(mine):
                    continue
                units = perturbation.units if isinstance(perturbation, StreamedPerturbation) else []
                moves_with_tower = any(tower.module in scope for unit in units for scope in unit.scopes)
                if self.perturbations[name] is not None or moves_with_tower:  # shared by branches, or a unit's scope
                    self.towers = {}
                    return
                self.perturbations[name] = perturbation
                self.first_layer[name] = tower.first_layer_of(perturbation)
                if all(mine):
                    self.within_towers.add(perturbation)
                    self.stacked[name] = stackable(perturbation, tower.module, owners)

    @property
    def shortcuts(self) -> list[Shortcut]:
        """The available shortcuts; the others build on the first."""
        if not self.towers:
            return [(LAYERS, None)] if self.stack is not None else []
        moved = [name for name, perturbation in self.perturbations.items() if perturbation is not None]
        return [
            TOWERS,
            *((REST, name) for name in moved if self.perturbations[name] in self.within_towers),
            *((LAYERS, name) for name in moved if self.first_layer[name]),
            *([PACKING] if self.packable and PACKING[1] in moved else []),
            *((STACKING, name) for name in moved if self.stacked.get(name) is not None),
        ]

    @property
    def precision(self) -> float:
        """The relative spacing of the weights' coarsest number format; nothing is computed in 8-bit formats."""
        dtypes = {parameter.dtype for parameter in self.model.parameters() if parameter.is_floating_point()}
        widths = (torch.finfo(dtype).eps for dtype in dtypes if dtype.itemsize > 1)
        return max(widths, default=torch.finfo(torch.bfloat16).eps)

    def offset(self, name: str, point: Point) -> Combination | None:
        """The offset of the tower's parameters at `point`; None at θ."""
        return point.get(self.perturbations[name])

    def check(
        self,
        forward: Callable[[], torch.Tensor],
        before: ForwardState,
        losses_by: Callable[[Collection[Shortcut]], Losses],
    ) -> None:
        """Find out once per training which shortcuts hold (`used`); none for now if the loss is too flat to tell.

        The check runs in float32, where rounding hides the least. It leaves no trace: parameters, buffers, random
        states and the model's counts of its passes are as before.

        Args:
            forward: A full pass: the loss, a scalar, at the current parameters.
            before: The state in which passes start.
            losses_by: Computes losses with the given shortcuts and no others.
        """
        state = before.now()
        with uncounted(self.model), without_autocast(before.devices[0].type):
            check = SelfCheck(PlainEvaluation(forward, before).losses, self.precision, self.reduce)
            check.look(self.all_perturbations)
            faults: Mapping[tuple[str, str | None], str] = {}
            if check.is_seen:
                self.used, faults = holding(self.shortcuts, lambda used: check.fault(losses_by(used)))
        state.restore()
        if not check.is_seen and not self.is_warned:
            self.is_warned = True
            logger.warning(
                "The loss does not change with the weights by more than its rounding, so shortcuts cannot be "
                "compared with full forward passes: full passes are used until it does."
            )
        first = self.shortcuts[0]
        for (what, tower), fault in faults.items():
            logger.warning(
                f"Switched off: {what}{f' ({tower} tower)' if tower else ''}, because {fault}."
                + (" Every loss is a full forward pass." if (what, tower) == first else "")
            )
        if first in faults:
            self.towers, self.stack = {}, None
