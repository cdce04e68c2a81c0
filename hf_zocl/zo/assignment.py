"""Which parameters are zeroth-order and which are first-order: branch × layer scheme (arXiv 2506.12409, section 3)."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from torch import nn


Number = TypeVar("Number", int, float)

BRANCHES = ("none", "vision", "language", "dual")
LAYER_SCHEMES = ("all", "hop-odd", "hop-even", "prefix-N", "suffix-N")

# The names that transformers and timm give to a two-tower model's halves, and to a stack of layers.
_TOWERS = {
    "vision": re.compile(r"(?:^|\.)(?:vision_model|visual|vision_tower|visual_projection|image_encoder)(?:\.|$)"),
    "language": re.compile(r"(?:^|\.)(?:text_model|language_model|text_projection|text_encoder)(?:\.|$)"),
}
# The first match in a name is the outermost stack: in a model of stages a stage, not the blocks within it.
_LAYER = re.compile(r"(?:^|\.)(?:(?:layers?|h|blocks?|resblocks|stages|levels)\.(\d+)|layer([1-9]\d*))\.")


class Location(NamedTuple):
    """Where a parameter is: its tower, the path of its stack of layers, and its layer, counted from 1."""

    branch: str | None
    stack: str | None
    layer: int | None


def locate(name: str) -> tuple[str | None, int | None]:
    """Read the tower (`vision`, `language` or None) and the layer (from 1, or None) off a parameter's name."""
    branch, _, layer = _location(name)
    return branch, layer


def _location(name: str) -> Location:
    branch = next((tower for tower, pattern in _TOWERS.items() if pattern.search(name)), None)
    found = _LAYER.search(name)
    if found is None:
        return Location(branch, None, None)
    index, number = found.groups()  # layers.0 is the first layer, and so is layer1
    stack = name[: found.start(1) - 1] if number is None else name[: found.start(2)]
    return Location(branch, stack, int(index) + 1 if number is None else int(number))


def _locations(names: Iterable[str]) -> dict[str, Location]:
    """The location of every parameter; the stack is None in a tower that has only one."""
    locations = {name: _location(name) for name in names}
    stacks: dict[str | None, set[str]] = {}
    for location in locations.values():
        if location.stack is not None:
            stacks.setdefault(location.branch, set()).add(location.stack)
    return {
        name: location if len(stacks.get(location.branch, ())) > 1 else location._replace(stack=None)
        for name, location in locations.items()
    }


def in_branch(value: Number | Mapping[str | None, Number], branch: str | None) -> Number:
    """A branch's value of a setting that is given as one number, or as one per branch."""
    return value[branch] if isinstance(value, Mapping) else value


@dataclass(frozen=True)
class ZOGroup:
    """The zeroth-order parameters of one layer of one tower.

    Attributes:
        branch: `vision`, `language`, or None in a model with a single tower.
        layer: The layer's number in its stack, counted from 1, or None outside the numbered layers.
        eps: The size of the perturbation of these parameters.
        names, parameters: The perturbed parameters, in the model's order.
        stack: The path of the layer's stack, where the tower has several (an encoder and a decoder).
    """

    branch: str | None
    layer: int | None
    eps: float
    names: tuple[str, ...]
    parameters: tuple[nn.Parameter, ...]
    stack: str | None = None

    @property
    def label(self) -> int | str | None:
        """The layer's name in the log: its number, after the path of its stack if the tower has several."""
        return self.layer if self.stack is None else f"{self.stack}.{self.layer}"


@dataclass(frozen=True)
class ParameterSplit:
    """A model's trainable parameters, split: `fo` by name, `zo` as one group per layer and tower."""

    fo: dict[str, nn.Parameter]
    zo: tuple[ZOGroup, ...]

    @property
    def zo_parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.zo for parameter in group.parameters]

    def describe(self) -> dict[str, dict[str, str]]:
        """Show the split layer by layer: `{"vision": {"1": "fo", "2": "zo", …}, …}`; a single tower is `model`.

        If a tower has several stacks of layers, each has an entry under its path.
        """
        kinds = dict.fromkeys(self.fo, "fo") | {name: "zo" for group in self.zo for name in group.names}
        locations = _locations(kinds)
        towers: dict[str, dict[str, str]] = {}
        for name in sorted(locations, key=lambda name: _order(locations[name])):
            branch, stack, layer = locations[name]
            tower = towers.setdefault(stack or branch or "model", {})
            key, kind = "other" if layer is None else str(layer), kinds[name]
            # Regular expressions may split one layer in two.
            tower[key] = kind if tower.get(key, kind) == kind else "fo+zo"
        return towers


@dataclass(frozen=True)
class LayerAssignment:
    """The zeroth-order part of a model: a branch, and layers within it.

    Args:
        branch: `none` (all first-order), `vision`, `language`, or `dual` (every tower; the one to use for a model
            with a single tower).
        layers: `all`, `hop-odd`, `hop-even`, `prefix-N`, `suffix-N`, a list of layer numbers counted from 1, or, for
            models whose layers are named otherwise, a list of regular expressions over parameter names.

    Layers are counted stack by stack: the encoder and the decoder of a T5 have their own first and last layer each,
    and `suffix-2` is the last two of both. In a model of stages (Swin, ConvNeXt, ResNet, SegFormer) the layers are the
    stages, whatever blocks a stage is made of; regular expressions choose blocks.

    A trainable parameter outside the numbered layers (a projection, a prompt, a head) is zeroth-order under
    `layers="all"` only, or where a regular expression names it.

    Raises:
        ValueError: If the branch or the scheme is unknown, or a layer number is not a positive integer.
    """

    branch: str = "dual"
    layers: str | Sequence[int] | Sequence[str] = "all"

    def __post_init__(self):
        if self.branch not in BRANCHES:
            raise ValueError(f"zo_branch={self.branch!r} is unknown: expected one of {', '.join(BRANCHES)}.")
        if not isinstance(self.layers, Sequence):
            raise ValueError(
                f"zo_layers={self.layers!r}: expected a scheme or a list, not {type(self.layers).__name__}."
            )
        if isinstance(self.layers, str):
            self._check_scheme()
        else:
            self._check_list()

    def split(self, model: nn.Module, eps: float | Mapping[str | None, float] = 1e-3) -> ParameterSplit:
        """Split the parameters of `model` that require a gradient.

        Args:
            model: Any module; towers and layers are read off its parameters' names.
            eps: The perturbation's size (the paper's 0.001); one number, or one per branch (the paper: ε_v < ε_l).

        Raises:
            ValueError: If a size is not positive, a layer lies beyond the model, or nothing matches.
        """
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if self.branch == "none":
            return ParameterSplit(fo=trainable, zo=())

        locations = _locations(trainable)
        is_zo = self._selector(locations, _depths(name for name, _ in model.named_parameters()))
        groups: dict[Location, list[str]] = {}
        for name, location in locations.items():
            if is_zo(name):
                groups.setdefault(location, []).append(name)
        if not groups:
            raise ValueError(f"{self} matches no trainable parameter. {_inventory(trainable)}")
        zo = tuple(
            ZOGroup(
                branch,
                layer,
                _positive(in_branch(eps, branch), branch),
                tuple(names),
                tuple(trainable[name] for name in names),
                stack,
            )
            for (branch, stack, layer), names in groups.items()
        )
        chosen = {name for group in zo for name in group.names}
        if is_complex := [name for name in trainable if name in chosen and trainable[name].is_complex()]:
            raise ValueError(
                f"{is_complex[0]} is complex, and directions are real, so that its imaginary part would not be "
                "trained. Leave it out by zo_layers, or keep it as real numbers (torch.view_as_complex)."
            )
        return ParameterSplit(fo={name: p for name, p in trainable.items() if name not in chosen}, zo=zo)

    def _selector(self, locations: Mapping[str, Location], depths: Mapping[str, int]) -> Callable[[str], bool]:
        """A predicate over parameter names: is it zeroth-order?

        Args:
            locations: The locations of the trainable parameters.
            depths: The number of layers of every stack, by its path.
        """
        in_branch = {"dual": ("vision", "language", None)}.get(self.branch, (self.branch,))
        if self._is_regex_list:
            patterns = [re.compile(pattern) for pattern in self.layers]
            for pattern in patterns:
                if not any(map(pattern.search, locations)):
                    raise ValueError(
                        f"zo_layers: {pattern.pattern!r} matches no trainable parameter. Of tied weights the model "
                        f"knows one name. {_inventory(locations)}"
                    )
            return lambda name: locations[name].branch in in_branch and any(p.search(name) for p in patterns)
        if self.layers == "all":
            return lambda name: locations[name].branch in in_branch

        stacks = {_location(name).stack: locations[name] for name in locations if locations[name].branch in in_branch}
        chosen = {
            (location.branch, location.stack, layer)
            for stack, location in stacks.items()
            if stack is not None
            for layer in self._numbers(location, depths[stack])
        }
        return lambda name: locations[name] in chosen

    def _numbers(self, location: Location, depth: int) -> list[int]:
        """The layers chosen in a stack of `depth` layers, counted from 1."""
        if not isinstance(self.layers, str):
            numbers = list(self.layers)
        elif self.layers == "hop-odd":
            return list(range(1, depth + 1, 2))
        elif self.layers == "hop-even":
            return list(range(2, depth + 1, 2))
        else:
            kind, count = self.layers.split("-")
            first = 1 if kind == "prefix" else depth - int(count) + 1
            numbers = list(range(first, first + int(count)))
        if min(numbers) < 1 or max(numbers) > depth:
            tower = f"the {location.branch} tower" if location.branch else "the model"
            where = f"{location.stack} in {tower}" if location.stack else tower
            raise ValueError(f"zo_layers={self.layers!r} reaches beyond {where}, which has {depth} layers.")
        return numbers

    @property
    def _is_regex_list(self) -> bool:
        return not isinstance(self.layers, str) and isinstance(self.layers[0], str)

    def _check_scheme(self) -> None:
        if self.layers in ("all", "hop-odd", "hop-even") or re.fullmatch(r"(?:prefix|suffix)-[1-9]\d*", self.layers):
            return
        raise ValueError(
            f"zo_layers={self.layers!r} is unknown: expected one of {', '.join(LAYER_SCHEMES)}, a list of layer "
            "numbers counted from 1, or a list of regular expressions over parameter names."
        )

    def _check_list(self) -> None:
        if not self.layers:
            raise ValueError("zo_layers is an empty list: expected layer numbers or regular expressions.")
        if all(isinstance(layer, str) for layer in self.layers):
            for pattern in self.layers:
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise ValueError(f"zo_layers: {pattern!r} is not a regular expression: {error}.") from error
        elif not all(isinstance(layer, int) and layer >= 1 for layer in self.layers):
            raise ValueError(f"zo_layers={list(self.layers)!r}: expected layer numbers counted from 1.")


def _order(location: Location) -> tuple[str, str, int]:
    return location.branch or "", location.stack or "", location.layer or 0


def _depths(names: Iterable[str]) -> dict[str, int]:
    """The number of layers of every stack, by its path."""
    depths: dict[str, int] = {}
    for _, stack, layer in map(_location, names):
        if stack is not None:
            depths[stack] = max(depths.get(stack, 0), layer)
    return depths


def _positive(eps: float, branch: str | None) -> float:
    if not eps > 0:
        name = "zo_eps" + (f" ({branch})" if branch else "")
        raise ValueError(f"{name}={eps!r}: the size of the perturbation must be greater than 0.")
    return float(eps)


def _inventory(trainable: Collection[str]) -> str:
    """Describe a model's trainable layers, for an error message."""
    if not trainable:
        return "The model has no parameter that requires a gradient."
    layers: dict[str, set[int]] = {}
    for branch, stack, layer in _locations(trainable).values():
        tower = branch or "no tower (use branch='dual')"
        layers.setdefault(f"{tower}, {stack}" if stack else tower, set()).add(layer or 0)
    there = "; ".join(
        f"{tower}: " + ", ".join("outside the layers" if number == 0 else str(number) for number in sorted(numbers))
        for tower, numbers in layers.items()
    )
    return f"The trainable layers are: {there}. For example {next(iter(trainable))!r}."
