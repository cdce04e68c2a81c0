"""Zeroth-order optimisation of parameters that are too many to copy, such as a whole model's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
from torch import nn

from .assignment import ZOGroup
from .perturbation import Combination, Moments, Perturbation, direction_seed


class StreamedPerturbation(Perturbation):
    """A layer is moved just before it runs, and put back just after: the memory of the model plus one layer.

    A unit, of which there is one copy and one direction at a time, is a numbered layer; outside of those, the largest
    module that holds none. Parameters that modules share (tied weights) move wherever one of these modules runs. A
    parameter that is read while none of the modules that own it runs stays at θ.

    Args:
        groups: All the groups of the branch.
        model: The model whose modules hold the parameters.
    """

    def __init__(self, groups: Sequence[ZOGroup], model: nn.Module):
        super().__init__(groups)
        self.units = [
            _Unit(number, members, modules) for number, (members, modules) in enumerate(_units(groups, model))
        ]

    @contextmanager
    def at(self, offset: Combination) -> Iterator[None]:
        """Inside, a unit is at θ + offset while its module runs, and at θ otherwise, bit by bit."""
        with ExitStack() as stack:
            for unit in self.units:
                stack.enter_context(unit.hooked(offset))
            yield

    def stack(self, offsets: Sequence[Combination]) -> list[torch.Tensor]:
        raise NotImplementedError("Streamed parameters are evaluated one candidate at a time.")

    def write(
        self, gradient: Sequence[Combination], sign: bool = False, factor: float | torch.Tensor = 1.0
    ) -> dict[int | None, Moments]:
        raise NotImplementedError("A streamed gradient never stands in .grad as a whole: use `stream`.")

    def stream(
        self, gradient: Sequence[Combination], sign: bool = False, factor: float | torch.Tensor = 1.0
    ) -> Iterator[dict[int | None, Moments]]:
        """`write` for one unit after another; a unit's gradient is freed when the next one's is asked for."""
        for unit in self.units:
            yield unit.perturbation.write([unit.own(term) for term in gradient], sign, factor)
            for parameter in unit.perturbation.parameters:
                parameter.grad = None


class _Unit:
    """The parameters that move together, and the modules in whose calls they do."""

    def __init__(self, number: int, perturbation: Perturbation, modules: Sequence[nn.Module]):
        self.number, self.perturbation, self.modules = number, perturbation, modules

    def own(self, combination: Combination) -> Combination:
        """The combination with this unit's own directions."""
        return replace(combination, seeds=tuple(direction_seed(seed, self.number, 0, 0) for seed in combination.seeds))

    @contextmanager
    def hooked(self, offset: Combination) -> Iterator[None]:
        offset, depth, moved = self.own(offset), 0, ExitStack()

        def enter(*_):
            nonlocal depth
            depth += 1
            if depth == 1:
                moved.enter_context(self.perturbation.at(offset))

        def leave(*_):
            nonlocal depth
            depth -= 1
            if depth == 0:
                moved.close()

        handles = [module.register_forward_pre_hook(enter) for module in self.modules]
        handles += [module.register_forward_hook(leave, always_call=True) for module in self.modules]
        try:
            yield
        finally:
            moved.close()
            for handle in handles:
                handle.remove()


def _units(groups: Sequence[ZOGroup], model: nn.Module) -> Iterator[tuple[Perturbation, list[nn.Module]]]:
    """The parameters by unit, in the groups' order, with the modules to watch."""
    paths: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for parameter in module.parameters(recurse=False):
            paths.setdefault(id(parameter), []).append(path)
    stacks = {path for path, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    units: dict[tuple[str, ...], list[tuple[ZOGroup, str, nn.Parameter]]] = {}
    for group in groups:
        for name, parameter in zip(group.names, group.parameters, strict=True):
            key = tuple(dict.fromkeys(_unit_path(path, stacks) for path in paths[id(parameter)]))
            units.setdefault(key, []).append((group, name, parameter))
    for key, members in units.items():
        group = members[0][0]
        _, names, parameters = zip(*members, strict=True)
        own = ZOGroup(group.branch, group.layer, group.eps, tuple(names), tuple(parameters))
        yield Perturbation([own]), [model.get_submodule(path) for path in key]


def _unit_path(owner: str, stacks: set[str]) -> str:
    """The numbered layer that holds a module, or else the largest module around it that holds no stack of layers."""
    parts = owner.split(".")
    prefixes = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
    for prefix in prefixes:
        if prefix.rpartition(".")[0] in stacks:
            return prefix
    return next((p for p in prefixes if not any(s == p or s.startswith(p + ".") for s in stacks)), owner)
