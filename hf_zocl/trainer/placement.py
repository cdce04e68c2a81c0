"""Where a model's parameters are, and a check that the trained ones can be trained there."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from ..private_names import plain_tensors


def shards_of(model: nn.Module) -> list[str]:
    """The names of the parameters of which this process holds only a part (`fully_shard`)."""
    return [name for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)]


def whole_tensors(model: nn.Module) -> list[torch.Tensor]:
    """The data of all parameters and buffers that this process holds as a whole, each once."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    whole = [t.detach() for t in tensors.values() if not (isinstance(t, DTensor) or t.is_meta)]
    return [part for tensor in whole for _, part in plain_tensors("", tensor)]


def reshard(model: nn.Module) -> None:
    """Release the shards that a pass has gathered and not released yet."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def check_placement(model: nn.Module) -> None:
    """Check that every parameter to be trained is in the memory of this process, and whole.

    Raises:
        ValueError: If one is offloaded or a shard.
    """
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    away = [name for name, parameter in model.named_parameters() if name in trained and parameter.is_meta]
    if away:
        raise ValueError(
            f"{len(away)} parameters to be trained are offloaded (on the meta device), such as {away[0]}: expected "
            "all in memory. Freeze them, or keep their modules in memory with device_map; add an adapter only after "
            "the base is offloaded and hf_zocl imported."
        )
    shards = [name for name in shards_of(model) if name in trained]
    if shards:
        raise ValueError(
            f"{len(shards)} parameters to be trained are shards, such as {shards[0]}: expected them whole in every "
            "process. Leave them out, with fully_shard(…, ignored_params=…) for every layer and the model."
        )
