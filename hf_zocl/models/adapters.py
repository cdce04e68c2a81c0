"""The trainable units that a frozen CLIP carries in every layer, each a PEFT method."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn
from transformers import PreTrainedModel

from ..checks import check_fields
from ..zo.assignment import locate
from .moe_adapter import MoEAdapterConfig


# More would only fill the memory.
SIZES = {"lora_rank": 16384, "moe_num_experts": 4096, "moe_top_k": 4096, "moe_bottleneck": 65536}


@dataclass
class AdapterArguments:
    """The adapter and its shape.

    Args:
        adapter: The PEFT method: `lora` or `moe`.
        target_modules: Names of the linear layers that get LoRA, in both towers.
        lora_rank: The rank r.
        lora_alpha: The scale is α/r.
        lora_dropout: Dropout on LoRA's input.
        moe_num_experts: Experts in parallel to the MLP of every block. The defaults are those of MoE-Adapters4CL,
            which has 2.
        moe_top_k: Experts that an example is sent to.
        moe_bottleneck: Hidden units of an expert.
        moe_scale: Factor on the experts' output.
        moe_dropout: Dropout on an expert's hidden units.
        moe_noise: Whether the router is noisy in training.
        moe_router_token: The token that the router reads: `first`, or `pooled`, the token that CLIP pools. In the text
            tower the first token sees nothing of the prompt, so `first` gives all prompts the same gates.
        moe_router_per_task: A router for every task, instead of one for all.
        moe_freeze_experts: How many of the experts that a task used most are frozen after it, in every block.
        moe_balance_loss: Weight of the load-balancing loss.
        moe_towers: The towers that carry the adapters: `vision`, `language` or `both`.
        moe_layers: The blocks that carry them, counted from 1; default: all.
        frozen_parameters: Regular expressions: the adapter's parameters with such a name stay as they were drawn. With
            `lora_A`, B alone is trained (LoRA-FA, Zhang et al. 2023); with `down` and `routers`, the experts' second
            layers. A factor has no effect while the other one is zero, so it only adds noise to zeroth-order steps.

    Raises:
        TypeError: If a value has the wrong type.
        ValueError: If a value is out of its range.
    """

    adapter: str = field(default="lora", metadata={"help": "PEFT method of the trainable units: lora or moe."})
    target_modules: list[str] = field(
        default_factory=lambda: ["q_proj", "v_proj"], metadata={"help": "Linear layers that carry LoRA."}
    )
    lora_rank: int = field(default=8, metadata={"help": "Rank of LoRA."})
    lora_alpha: float = field(default=16.0, metadata={"help": "LoRA's scale is lora_alpha / lora_rank."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on LoRA's input."})
    moe_num_experts: int = field(default=2, metadata={"help": "Experts of a block."})
    moe_top_k: int = field(default=2, metadata={"help": "Experts that an example is sent to."})
    moe_bottleneck: int = field(default=64, metadata={"help": "Hidden units of an expert."})
    moe_scale: float = field(default=0.1, metadata={"help": "Factor on the experts' output."})
    moe_dropout: float = field(default=0.1, metadata={"help": "Dropout on an expert's hidden units."})
    moe_noise: bool = field(default=True, metadata={"help": "Whether the router is noisy in training."})
    moe_router_token: str = field(default="first", metadata={"help": "Token the router reads: first or pooled."})
    moe_router_per_task: bool = field(default=False, metadata={"help": "A router for every task."})
    moe_freeze_experts: int = field(default=0, metadata={"help": "Most used experts to freeze after a task."})
    moe_balance_loss: float = field(default=0.0, metadata={"help": "Weight of the load-balancing loss."})
    moe_towers: str = field(default="both", metadata={"help": "Towers with adapters: vision, language or both."})
    moe_layers: list[int] | None = field(default=None, metadata={"help": "Blocks with adapters, counted from 1."})
    frozen_parameters: list[str] | None = field(
        default=None, metadata={"help": "Adapter parameters that stay as drawn, by regular expressions: lora_A."}
    )

    def __post_init__(self):
        if isinstance(self.target_modules, str):
            self.target_modules = [self.target_modules]
        if self.adapter not in ADAPTERS:
            raise ValueError(f"adapter={self.adapter!r} is unknown: expected one of {', '.join(ADAPTERS)}.")
        if isinstance(self.frozen_parameters, str):
            self.frozen_parameters = [self.frozen_parameters]
        check_fields(self)
        for name, most in SIZES.items():
            value = getattr(self, name)
            if not 1 <= value <= most:
                raise ValueError(f"{name}={value}: expected at least 1 and at most {most}.")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout={self.lora_dropout}: expected a probability, 0 or more and less than 1.")
        for pattern in self.frozen_parameters or ():
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"frozen_parameters={pattern!r} is no regular expression: {error}.") from error
        if self.moe_layers is not None and (not self.moe_layers or min(self.moe_layers) < 1):
            raise ValueError(f"moe_layers={self.moe_layers}: expected layer numbers counted from 1.")
        try:
            _moe_config(self, num_tasks=1)
        except ValueError as error:
            raise ValueError(f"moe_{error}") from error


def _lora_config(args: AdapterArguments, num_tasks: int) -> PeftConfig:
    return LoraConfig(
        r=args.lora_rank,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=list(args.target_modules),
    )


_MOE_SHAPE = "num_experts top_k bottleneck scale dropout noise router_token freeze_experts balance_loss towers"


def _moe_config(args: AdapterArguments, num_tasks: int) -> PeftConfig:
    return MoEAdapterConfig(
        **{name: getattr(args, f"moe_{name}") for name in _MOE_SHAPE.split()},
        num_routers=num_tasks if args.moe_router_per_task else 1,
        layers_to_transform=[layer - 1 for layer in args.moe_layers] if args.moe_layers else None,
    )


ADAPTERS: dict[str, Callable[[AdapterArguments, int], PeftConfig]] = {"lora": _lora_config, "moe": _moe_config}


def add_adapter(model: PreTrainedModel, args: AdapterArguments, num_tasks: int = 1) -> PeftModel:
    """Freeze `model` and add the adapter that `args` describes; only the adapter's parameters are trainable.

    Args:
        model: The model.
        args: The adapter.
        num_tasks: The length of the stream, for an adapter with parts for every task.

    Raises:
        ValueError: If the model has none of the layers named, or a pattern freezes no parameter, or all of them.
    """
    if args.adapter == "moe" and args.moe_layers:
        _check_depth(model, args)
    adapted = get_peft_model(model, ADAPTERS[args.adapter](args, num_tasks))
    freeze(adapted, args.frozen_parameters or ())
    return adapted


def freeze(model: PeftModel, patterns: Sequence[str]) -> None:
    """Freeze the trainable parameters whose name matches one of `patterns`.

    Raises:
        ValueError: If a pattern freezes no parameter, or all of them.
    """
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for pattern in patterns:
        names = [name for name in trainable if re.search(pattern, name)]
        for name in names:
            trainable[name].requires_grad_(False)
        if not names or not any(parameter.requires_grad for parameter in trainable.values()):
            raise ValueError(
                f"frozen_parameters={list(patterns)}: {pattern!r} leaves {'all' if names else 'no'} parameters of the "
                f"adapter frozen, of {', '.join(list(trainable)[:2])}, …; expected some."
            )


def _check_depth(model: PreTrainedModel, args: AdapterArguments) -> None:
    located = [locate(name) for name, _ in model.named_parameters()]
    depth = max(layer or 0 for tower, layer in located if args.moe_towers in ("both", tower))
    if max(args.moe_layers) > depth:
        raise ValueError(
            f"moe_layers={args.moe_layers} reaches beyond the model, which has {depth} layers in a tower."
        )


def adapter_name(config: PeftConfig) -> str:
    """The name in `AdapterArguments.adapter` of the PEFT method of `config`."""
    return "moe" if isinstance(config, MoEAdapterConfig) else str(config.peft_type.value).lower()


def trained_adapter(model: nn.Module) -> str:
    """The name of the adapter that is trained and saved: the active one.

    Raises:
        ValueError: If the model has no PEFT adapter, or several are active.
    """
    if not isinstance(model, PeftModel):
        raise ValueError(
            f"the model ({type(model).__name__}) has no adapter, so there is nothing that a task's checkpoint would "
            "hold: expected one that peft.get_peft_model or hf_zocl.models.add_adapter has wrapped."
        )
    names = list(model.active_adapters)
    if len(names) != 1:
        raise ValueError(
            f"the model's active adapters are {', '.join(names) or 'none'}: expected one, which is trained and saved "
            "(model.set_adapter)."
        )
    return names[0]


def check_trained_parameters(model: PeftModel) -> None:
    """Check that a checkpoint of the active adapter holds exactly what is trained.

    Raises:
        ValueError: If a parameter is trained and would not be saved, or if none is trained.
    """
    name = trained_adapter(model)
    saved = {tensor.data_ptr() for tensor in adapter_weights(model).values()}
    trained = {each: parameter for each, parameter in model.named_parameters() if parameter.requires_grad}
    lost = [each for each, parameter in trained.items() if parameter.data_ptr() not in saved]
    if lost:
        raise ValueError(
            f"{lost[0]} (and {len(lost) - 1} more) would be trained and not be saved: it is no part of the active "
            f"adapter, {name!r}. Freeze it (requires_grad_(False))."
        )
    if not trained:
        raise ValueError(f"no parameter of the active adapter, {name!r}, requires a gradient: nothing can be trained.")


def adapter_weights(model: PeftModel) -> dict[str, torch.Tensor]:
    """The tensors of the active adapter, as its checkpoint names them."""
    return get_peft_model_state_dict(model, adapter_name=trained_adapter(model))


def base_digest(model: PeftModel) -> str:
    """SHA-256 of the weights under the active adapter: all parameters but those that its checkpoint holds.

    Half-precision weights are hashed as float32.
    """
    saved = {tensor.data_ptr() for tensor in adapter_weights(model).values()}
    prefix = getattr(model.base_model, "prefix", None)
    digest = hashlib.sha256()
    named = {
        name.replace(".base_layer.", ".").replace(".original_module.", "."): parameter
        for name, parameter in model.get_base_model().named_parameters()
        if parameter.data_ptr() not in saved and ".modules_to_save." not in name and (not prefix or prefix not in name)
    }
    for name, parameter in sorted(named.items()):
        tensor = parameter.detach().cpu()
        tensor = tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def adapter_arguments(config: PeftConfig) -> dict[str, Any]:
    """The `AdapterArguments` that would make this adapter's shape, as far as such arguments exist."""
    found: dict[str, Any] = {"adapter": adapter_name(config)}
    if found["adapter"] == "lora":
        modules = config.target_modules
        found["target_modules"] = sorted(modules) if isinstance(modules, (set, list, tuple)) else [modules]
        found |= {f"lora_{name}": value for name, value in (("rank", config.r), ("alpha", config.lora_alpha))}
        found["lora_dropout"] = config.lora_dropout
    elif found["adapter"] == "moe":
        found |= {f"moe_{name}": getattr(config, name) for name in _MOE_SHAPE.split()}
        found["moe_router_per_task"] = config.num_routers > 1
        layers = config.layers_to_transform
        found["moe_layers"] = [layer + 1 for layer in layers] if layers else None
    return found
