"""The structure of a model (its towers and their layers), and temporary replacements for its attributes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..private_names import UNCOMPILED, execution_device
from ..zo.perturbation import Perturbation


@dataclass(frozen=True)
class Tower:
    """One half of a dual encoder, as transformers builds it (`CLIPModel`, `SiglipModel` and their kin).

    Attributes:
        name: `vision` or `language`.
        module: The module that the model calls.
        layers: Its stack of layers, run in order; None if it is built differently.
    """

    name: str
    module: nn.Module
    layers: nn.ModuleList | None

    def first_layer_of(self, perturbation: Perturbation) -> int | None:
        """The index of the first layer with a parameter of `perturbation`; None if one lies in front of the layers.

        Everything behind the layers (the last norm, a head) counts as one more layer.
        """
        mine = {id(parameter) for parameter in perturbation.parameters} & {id(p) for p in self.module.parameters()}
        if self.layers is None:
            return None
        children = list(_children(self.module).values())  # in their order: embeddings, encoder, last norm
        behind = children[children.index(self.module.get_submodule("encoder")) + 1 :]
        of_layer = [{id(p) for p in layer.parameters()} & mine for layer in self.layers]
        of_layer.append({id(p) for module in behind for p in module.parameters()} & mine)
        if len(set().union(*of_layer)) < len(mine):
            return None
        return next(index for index, parameters in enumerate(of_layer) if parameters)


def find_towers(model: nn.Module) -> dict[str, Tower]:
    """The towers of the dual encoder in `model`, by structure; none if there is no dual encoder, or several."""
    attributes = {"vision": "vision_model", "language": "text_model"}
    found = [
        module
        for module in model.modules()
        if set(attributes.values()) <= _children(module).keys()
        and "logit_scale" in dict(module.named_parameters(recurse=False))
    ]
    if len(found) != 1:
        return {}
    towers = {}
    for name, attribute in attributes.items():
        module = found[0].get_submodule(attribute)
        children = _children(module)
        is_known = {"embeddings", "encoder"} <= children.keys()
        layers = _children(children["encoder"]).get("layers") if is_known else None
        towers[name] = Tower(name, module, layers if isinstance(layers, nn.ModuleList) else None)
    return towers


def _children(module: nn.Module) -> dict[str, nn.Module]:
    return dict(module.named_children())


def devices_of(model: nn.Module) -> list[torch.device]:
    """Where a model runs: the devices of its parameters, and those on which accelerate runs offloaded modules."""
    found = dict.fromkeys(parameter.device for parameter in model.parameters() if not parameter.is_meta)
    hooked = map(execution_device, model.modules())
    return list(found | dict.fromkeys(device for device in hooked if device is not None))


@contextmanager
def shadowed(module: nn.Module, **attributes: Any) -> Iterator[None]:
    """Inside, a module has other attributes: an instance's own take precedence over its class's."""
    own = vars(module)
    saved = {name: own[name] for name in attributes if name in own}
    own.update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            del own[name]
        own.update(saved)


def forward_of(module: nn.Module, forward: Callable) -> AbstractContextManager:
    """Let `forward` replace the module's own, even if `module.compile()` was called."""
    return shadowed(module, forward=forward, **UNCOMPILED)
