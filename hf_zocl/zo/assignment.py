"""Which parameters are zeroth-order and which are first-order: branch × layer scheme (arXiv 2506.12409, section 3)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import nn


Number = TypeVar("Number", int, float)

BRANCHES = ("none", "vision", "language", "dual")
LAYER_SCHEMES = ("all", "hop-odd", "hop-even", "prefix-N", "suffix-N")

# The names that transformers gives to a two-tower model's halves, and to a stack of layers.
_TOWERS = {
    "vision": re.compile(r"(?:^|\.)(?:vision_model|visual|vision_tower|visual_projection|image_encoder)(?:\.|$)"),
    "language": re.compile(r"(?:^|\.)(?:text_model|language_model|text_projection|text_encoder)(?:\.|$)"),
}
_LAYER = re.compile(r"(?:^|\.)(?:layers?|h|blocks?|resblocks)\.(\d+)\.")


def locate(name: str) -> tuple[str | None, int | None]:
    """Read the tower (`vision`, `language` or None) and the layer (from 1, or None) off a parameter's name."""
    branch = next((tower for tower, pattern in _TOWERS.items() if pattern.search(name)), None)
    layer = _LAYER.search(name)
    return branch, int(layer.group(1)) + 1 if layer else None


def in_branch(value: Number | Mapping[str | None, Number], branch: str | None) -> Number:
    """A tower's own of a setting that is given as one number, or as one per branch."""
    return value[branch] if isinstance(value, Mapping) else value


@dataclass(frozen=True)
class ZOGroup:
    """The zeroth-order parameters of one layer of one tower.

    Attributes:
        branch: `vision`, `language`, or None in a model with a single tower.
        layer: The layer's number, counted from 1, or None outside the numbered layers.
        eps: The size of the perturbation of these parameters.
        names, parameters: What is perturbed, in the model's order.
    """

    branch: str | None
    layer: int | None
    eps: float
    names: tuple[str, ...]
    parameters: tuple[nn.Parameter, ...]


@dataclass(frozen=True)
class ParameterSplit:
    """A model's trainable parameters, split: `fo` by name, `zo` as one group per layer and tower."""

    fo: dict[str, nn.Parameter]
    zo: tuple[ZOGroup, ...]

    @property
    def zo_parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.zo for parameter in group.parameters]

    def describe(self) -> dict[str, dict[str, str]]:
        """Draw the split layer by layer: `{"vision": {"1": "fo", "2": "zo", …}, …}`; a single tower is `model`."""
        towers: dict[str, dict[str, str]] = {}
        located = [(locate(name), "fo") for name in self.fo]
        located += [((group.branch, group.layer), "zo") for group in self.zo]
        for (branch, layer), kind in sorted(located, key=lambda item: (item[0][0] or "", item[0][1] or 0)):
            tower = towers.setdefault(branch or "model", {})
            key = "other" if layer is None else str(layer)
            # Regular expressions may split one layer in two.
            tower[key] = kind if tower.get(key, kind) == kind else "fo+zo"
        return towers


@dataclass(frozen=True)
class LayerAssignment:
    """The zeroth-order part of a model: a branch, and the layers of it.

    Args:
        branch: `none` (all first-order), `vision`, `language`, or `dual` (every tower; the one to use for a model
            with a single tower).
        layers: `all`, `hop-odd`, `hop-even`, `prefix-N`, `suffix-N`, a list of layer numbers counted from 1, or, for
            models whose layers are named otherwise, a list of regular expressions over parameter names.

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

    def split(
        self,
        model: nn.Module,
        eps: float = 1e-3,
        eps_vision: float | None = None,
        eps_language: float | None = None,
    ) -> ParameterSplit:
        """Split the parameters of `model` that require a gradient.

        Args:
            model: Any module; towers and layers are read off its parameters' names.
            eps: The perturbation's size (the paper's 0.001), unless the branch has its own.
            eps_vision, eps_language: The sizes for the two towers (the paper: ε_v < ε_l).

        Raises:
            ValueError: If a size is not positive, a layer lies beyond the model, or nothing matches.
        """
        sizes = {
            None: _positive("zo_eps", eps),
            "vision": _positive("zo_eps_vision", eps if eps_vision is None else eps_vision),
            "language": _positive("zo_eps_language", eps if eps_language is None else eps_language),
        }
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if self.branch == "none":
            return ParameterSplit(fo=trainable, zo=())

        is_zo = self._selector([name for name, _ in model.named_parameters()])
        groups: dict[tuple[str | None, int | None], list[str]] = {}
        for name in trainable:
            if is_zo(name):
                groups.setdefault(locate(name), []).append(name)
        if not groups:
            raise ValueError(f"{self} matches no trainable parameter. {_inventory(trainable)}")
        zo = tuple(
            ZOGroup(branch, layer, sizes[branch], tuple(names), tuple(trainable[name] for name in names))
            for (branch, layer), names in groups.items()
        )
        chosen = {name for group in zo for name in group.names}
        return ParameterSplit(fo={name: p for name, p in trainable.items() if name not in chosen}, zo=zo)

    def _selector(self, names: list[str]) -> Callable[[str], bool]:
        """A predicate over parameter names: is it zeroth-order?"""
        in_branch = {"dual": ("vision", "language", None)}.get(self.branch, (self.branch,))
        if self._is_regex_list:
            patterns = [re.compile(pattern) for pattern in self.layers]
            return lambda name: locate(name)[0] in in_branch and any(p.search(name) for p in patterns)
        if self.layers == "all":
            return lambda name: locate(name)[0] in in_branch

        depth: dict[str | None, int] = {}
        for branch, layer in map(locate, names):
            if layer is not None and branch in in_branch:
                depth[branch] = max(depth.get(branch, 0), layer)
        chosen = {(branch, layer) for branch, count in depth.items() for layer in self._numbers(branch, count)}
        return lambda name: locate(name) in chosen

    def _numbers(self, branch: str | None, depth: int) -> list[int]:
        """The layers chosen in a tower of `depth` layers, counted from 1."""
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
            tower = f"the {branch} tower" if branch else "the model"
            raise ValueError(f"zo_layers={self.layers!r} reaches beyond {tower}, which has {depth} layers.")
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


def _positive(name: str, value: float) -> float:
    if not value > 0:
        raise ValueError(f"{name}={value!r}: the size of the perturbation must be greater than 0.")
    return float(value)


def _inventory(trainable: dict[str, nn.Parameter]) -> str:
    """Say what a model has to offer, for an error message."""
    if not trainable:
        return "The model has no parameter that requires a gradient."
    layers: dict[str, set[int]] = {}
    for branch, layer in map(locate, trainable):
        layers.setdefault(branch or "no tower (use branch='dual')", set()).add(layer or 0)
    there = "; ".join(
        f"{tower}: " + ", ".join("outside the layers" if number == 0 else str(number) for number in sorted(numbers))
        for tower, numbers in layers.items()
    )
    return f"The trainable layers are: {there}. For example {next(iter(trainable))!r}."
