"""Zeroth-order optimisation of more parameters than can be copied, such as a whole model's."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch
from torch import nn

from ..private_names import TorchDispatchMode, is_compile_wrapper, is_compiled, storage_id, tree_leaves
from .assignment import ZOGroup
from .directions import Combination, direction_seed
from .perturbation import Moments, Perturbation, add_moments
from .room import Room


logger = logging.getLogger(__name__)

# A layer within a layer (a block of a stage, an expert) moves on its own if it has at least this many parameters.
UNIT_PARAMETERS = 1 << 20


class StreamedPerturbation(Perturbation):
    """Moves a layer just before it runs, and back just after: this takes the memory of the model plus one layer.

    Parameters move in units, each with directions of its own. A unit is a numbered layer: a child of an
    `nn.ModuleList` or an `nn.Sequential`. It moves while its layer runs, if no pass reads it at any other time; else
    while a layer around it runs; else for the whole pass, like everything outside the layers (embeddings, heads,
    prompts), and is copied for that long. A pass at θ (`watching`) shows which of these applies; before it, every unit
    moves for the whole pass. In every case a pass reads the same values.

    Args:
        groups: All the groups of the branch.
        model: The model whose modules hold the parameters.
    """

    def __init__(self, groups: Sequence[ZOGroup], model: nn.Module):
        super().__init__(groups)
        self.model, self.is_watched = model, False
        self._room = Room(keeps=True)
        units = enumerate(_units(groups, model, self._room))
        self.units = [_Unit(number, members, scopes) for number, (members, scopes) in units]
        self._has_stepped = False

    @contextmanager
    def at(self, offset: Combination) -> Iterator[None]:
        """Inside, the model's forward pass reads every unit at θ + offset; afterwards it reads θ again."""
        if self._has_stepped:
            self._has_stepped = False
            for unit in self.units:
                unit.was_moved = False
        with ExitStack() as stack:
            for unit in self.units:
                stack.enter_context(unit.at(offset))
            yield

    def move_for_whole_passes(self) -> None:
        for unit in self.units:
            unit.level = len(unit.scopes)
        self.is_watched = True

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Find out in a full pass at θ, run inside, which modules are running when each unit is read."""
        for unit in self.units:
            unit.level = 0
        try:
            with _watched_calls(self.model, self.units) as calls, _Reads(self.units, calls):
                yield
            for unit in self.units:
                unit.widen(lambda modules: calls.compiled or not calls.seen.intersection(modules))
        except BaseException:
            for unit in self.units:
                unit.level = len(unit.scopes)
            raise
        self.is_watched = True
        self._say_what_is_copied()

    def widen(self) -> bool:
        """Check that the last pass called the modules of every unit, and widen the scope of a unit where it did not.

        Returns:
            Whether there was such a unit. It may have been read at θ, so the pass must be taken again.
        """
        missed = [unit for unit in self.units if unit.modules and not unit.was_called]
        for unit in missed:
            unit.level += 1
        return bool(missed)

    def stack(self, offsets: Sequence[Combination]) -> list[torch.Tensor]:
        raise NotImplementedError("Streamed parameters are evaluated one candidate at a time.")

    def write(
        self, gradient: Sequence[Combination], sign: bool = False, factor: float | torch.Tensor = 1.0
    ) -> dict[int | str | None, Moments]:
        raise NotImplementedError("A streamed gradient is never in .grad as a whole: use `stream`.")

    def moments(self, gradient: Sequence[Combination]) -> dict[int | str | None, Moments]:
        total: dict[int | str | None, Moments] = {}
        for unit in self.units:
            add_moments(total, unit.perturbation.moments([unit.own(term) for term in gradient]))
        return total

    def stream(
        self, gradient: Sequence[Combination], sign: bool = False, factor: float | torch.Tensor = 1.0
    ) -> Iterator[None]:
        """Like `write`, for one unit after another; a unit's gradient is gone when the next unit's turn comes.

        Raises:
            RuntimeError: If the passes since the last step moved some units, but not others.
        """
        still = [unit for unit in self.units if not unit.was_moved]
        if still and len(still) < len(self.units):
            names = [name for unit in still for group in unit.perturbation.groups for name in group.names]
            raise RuntimeError(
                f"{len(names)} zeroth-order parameters were not perturbed in any pass of this step, so nothing is "
                f"known of their gradient: {_some(names)}. Their layers were called in an earlier pass, but in none "
                "of these; leave them out with zo_layers."
            )
        for unit in self.units:
            with unit.perturbation.written([unit.own(term) for term in gradient], sign, factor):
                yield
        self._has_stepped = True
        self._room.clear()

    def _say_what_is_copied(self) -> None:
        whole = [unit for unit in self.units if unit.scopes and not unit.modules]
        if whole:
            count, layers = (
                sum(len(unit.perturbation) for unit in whole),
                sum(bool(unit.scopes) for unit in self.units),
            )
            logger.warning(
                f"{len(whole)} of {layers} layers cannot be perturbed only while they run (compiled, not called, or "
                f"read elsewhere): {_some([unit.perturbation.groups[0].names[0] for unit in whole])}. They are "
                f"perturbed for the whole pass, which takes memory for another {count:,} parameters."
            )


class _Unit:
    """The parameters that move together.

    Attributes:
        scopes: Modules during whose calls the parameters may move, from the smallest to the largest; a scope has
            several modules if they share the parameters.
        level: The index of the scope in use; past the last one, the parameters move for the whole pass.
        was_called, was_moved: Whether the last pass called a module of the scope, and whether the parameters were
            moved in a pass since the last step.
    """

    def __init__(self, number: int, perturbation: Perturbation, scopes: Sequence[tuple[nn.Module, ...]]):
        self.number, self.perturbation, self.scopes = number, perturbation, scopes
        self.level = len(scopes)
        self.was_called = self.was_moved = False

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """The modules during whose calls the parameters move; none if they move for the whole pass."""
        return self.scopes[self.level] if self.level < len(self.scopes) else ()

    def own(self, combination: Combination) -> Combination:
        """The combination with this unit's own directions."""
        return replace(combination, seeds=tuple(direction_seed(seed, self.number, 0, 0) for seed in combination.seeds))

    def widen(self, is_too_small: Callable[[tuple[nn.Module, ...]], bool]) -> None:
        while self.modules and is_too_small(self.modules):
            self.level += 1

    @contextmanager
    def at(self, offset: Combination) -> Iterator[None]:
        if not self.modules:
            self.was_moved = True
            with self.perturbation.at(self.own(offset)):
                yield
            return
        with self._moved_in_calls(self.own(offset)):
            yield

    @contextmanager
    def _moved_in_calls(self, offset: Combination) -> Iterator[None]:
        depth, moved, is_open = 0, ExitStack(), True
        self.was_called = False

        # Compiled code may hold on to a hook of an earlier pass, and must not trace this one.
        @torch.compiler.disable
        def enter(*_):
            nonlocal depth
            depth += 1
            if depth == 1 and is_open:
                self.was_called = self.was_moved = True
                moved.enter_context(self.perturbation.at(offset))

        @torch.compiler.disable
        def leave(*_):
            nonlocal depth
            depth -= 1
            if depth == 0:
                moved.close()

        try:
            with _hooked(self.modules, enter, leave):
                yield
        finally:
            is_open = False
            moved.close()


@contextmanager
def _hooked(modules: Iterable[nn.Module], enter: Callable, leave: Callable) -> Iterator[None]:
    """Call `enter` and `leave` around every call of the modules and of their hooks, which may read parameters too."""
    handles = []
    for module in modules:
        handles.append(module.register_forward_pre_hook(enter, prepend=True))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Calls:
    """The modules that are running now, and those that were called."""

    def __init__(self):
        self.running: Counter[nn.Module] = Counter()
        self.seen: set[nn.Module] = set()
        self.compiled = False

    def enter(self, module: nn.Module, *_: Any) -> None:
        self.running[module] += 1
        self.seen.add(module)

    def leave(self, module: nn.Module, *_: Any) -> None:
        self.running[module] -= 1

    def look(self, module: nn.Module, *_: Any) -> None:
        # Code that `torch.compile` has compiled ignores hooks that come and go.
        self.compiled |= is_compile_wrapper(module)


@contextmanager
def _watched_calls(model: nn.Module, units: Iterable[_Unit]) -> Iterator[_Calls]:
    calls = _Calls()
    calls.compiled = any(map(is_compiled, model.modules()))
    modules = dict.fromkeys(module for unit in units for scope in unit.scopes for module in scope)
    handle = nn.modules.module.register_module_forward_pre_hook(calls.look)
    try:
        with warnings.catch_warnings(), _hooked(modules, calls.enter, calls.leave):
            warnings.filterwarnings("ignore", ".*global hooks on modules")  # torch.compile's: a hook may run twice
            yield calls
    finally:
        handle.remove()


class _Reads(TorchDispatchMode):
    """Widens the scope of a unit that is read, directly or through a view, while no module of its scope runs."""

    def __init__(self, units: Iterable[_Unit], calls: _Calls):
        super().__init__()
        self.calls = calls
        self.units: dict[int, list[_Unit]] = {}
        for unit in units:
            for parameter in unit.perturbation.parameters:
                self.units.setdefault(_storage(parameter), []).append(unit)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, torch.Tensor):
                for unit in self.units.get(_storage(value), ()):
                    unit.widen(lambda modules: not any(self.calls.running[module] for module in modules))
        return func(*args, **(kwargs or {}))


def _storage(tensor: torch.Tensor) -> int:
    try:
        return storage_id(tensor)
    except (NotImplementedError, RuntimeError):  # a sparse tensor has none
        return id(tensor)


def _units(
    groups: Sequence[ZOGroup], model: nn.Module, room: Room
) -> Iterator[tuple[Perturbation, list[tuple[nn.Module, ...]]]]:
    """The parameters by unit, in the groups' order, with the scopes in which they may move."""
    modules = dict(model.named_modules(remove_duplicate=False))
    owners: dict[int, list[str]] = {}
    for path, module in modules.items():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(path)
    layers = {path: _layers_around(path, modules) for path in modules}
    units: dict[tuple[str, ...], list[tuple[ZOGroup, str, nn.Parameter]]] = {}
    for group in groups:
        for name, parameter in zip(group.names, group.parameters, strict=True):
            paths = owners.get(id(parameter), [name])
            key = tuple(dict.fromkeys([*layers.get(path, ()), path][0] for path in paths))
            units.setdefault(key, []).append((group, name, parameter))
    for key, members in units.items():
        parts = []
        for _, own in groupby(members, key=lambda member: id(member[0])):
            (group, *_), names, parameters = zip(*own, strict=True)
            parts.append(replace(group, names=names, parameters=parameters))
        yield Perturbation(parts, room), _scopes(key, layers, modules)


def _layers_around(path: str, modules: Mapping[str, nn.Module]) -> list[str]:
    """The numbered layers around a module, from the smallest that is large enough for a unit to the largest."""
    parts = path.split(".")
    prefixes = [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
    layers = [
        prefix
        for prefix in prefixes
        if prefix
        and isinstance(modules[prefix.rpartition(".")[0]], (nn.ModuleList, nn.Sequential))
        and not isinstance(modules[prefix], (nn.ModuleList, nn.ModuleDict))  # never called
    ]
    while len(layers) > 1 and sum(p.numel() for p in modules[layers[0]].parameters()) < UNIT_PARAMETERS:
        layers.pop(0)
    return layers


def _scopes(
    paths: Sequence[str], layers: Mapping[str, Sequence[str]], modules: Mapping[str, nn.Module]
) -> list[tuple[nn.Module, ...]]:
    """Modules that run whenever the parameters are read: the layer, then the layers around it.

    If several modules share the parameters, a scope has a layer for each; no scopes if one lies outside the layers.
    """
    around = [layers.get(path, ()) for path in paths]
    if not all(around):
        return []
    count = max(map(len, around))
    levels = [[own[min(level, len(own) - 1)] for own in around] for level in range(count)]
    return [tuple(dict.fromkeys(modules[path] for path in level)) for level in levels]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
