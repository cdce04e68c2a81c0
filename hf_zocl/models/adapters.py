"""The adapters that a frozen CLIP carries in its layers, each a PEFT method."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn
from transformers import PreTrainedModel

from ..checks import first_of
from ..private_names import plain_tensors
from ..zo.assignment import locate
from .adapter_arguments import AdapterArguments, peft_config


# Fields that say where an adapter came from or how it began, not what it computes. AdaLoRA changes `rank_pattern`.
_OF_ITS_ORIGIN = (
    "inference_mode",
    "base_model_name_or_path",
    "auto_mapping",
    "revision",
    "peft_version",
    "rank_pattern",
)


def add_adapter(model: PreTrainedModel, args: AdapterArguments, num_tasks: int = 1) -> PeftModel:
    """Freeze `model` and add the adapter that `args` describes; only the adapter's parameters are trainable.

    Args:
        model: The model.
        args: The adapter.
        num_tasks: The length of the stream, for an adapter with parts for every task.

    Raises:
        ValueError: If the model has none of the layers named, or a pattern freezes no parameter, or all of them.
    """
    config = peft_config(args, num_tasks)
    _check_depth(model, config)
    try:
        adapted = get_peft_model(model, config)
    except (TypeError, ValueError, NotImplementedError, AttributeError) as error:
        raise ValueError(f"adapter={args.adapter!r} does not fit {type(model).__name__}: {error}") from error
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
                f"frozen_parameters={list(patterns)}: {pattern!r} freezes {'all' if names else 'no'} parameters of "
                f"the adapter ({', '.join(list(trainable)[:2])}, …); expected some."
            )


def _check_depth(model: PreTrainedModel, config: PeftConfig) -> None:
    layers = getattr(config, "layers_to_transform", None)
    layers = [layers] if isinstance(layers, int) else layers or []
    towers = getattr(config, "towers", "both")
    located = [locate(name) for name, _ in model.named_parameters()]
    depth = max((layer or 0 for tower, layer in located if towers in ("both", tower)), default=0)
    if layers and not all(0 <= each < depth for each in layers):
        raise ValueError(
            f"adapter_config: layers_to_transform={layers} reaches beyond the model, which has {depth} layers in a "
            "tower, counted from 0."
        )


def trained_adapter(model: nn.Module) -> str:
    """The name of the adapter that is trained and saved: the active one.

    Raises:
        ValueError: If the model has no PEFT adapter, or several are active.
    """
    if not isinstance(model, PeftModel):
        raise ValueError(
            f"the model ({type(model).__name__}) has no adapter, so a task's checkpoint would hold nothing: expected "
            "a model from peft.get_peft_model or hf_zocl.models.add_adapter."
        )
    names = list(model.active_adapters)
    if len(names) != 1:
        raise ValueError(
            f"the model's active adapters are {', '.join(names) or 'none'}: expected exactly one, to train and save "
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
            f"{first_of(lost)} would be trained but not saved: it is not part of the active "
            f"adapter, {name!r}. Freeze it (requires_grad_(False))."
        )
    if not trained:
        raise ValueError(f"no parameter of the active adapter, {name!r}, requires a gradient: nothing can be trained.")


def adapter_weights(model: PeftModel) -> dict[str, torch.Tensor]:
    """The tensors of the active adapter, as its checkpoint names them."""
    return get_peft_model_state_dict(model, adapter_name=trained_adapter(model))


def unsaved_parameters(model: PeftModel, trained: dict[str, nn.Parameter]) -> list[str]:
    """The names in `trained` that PEFT would not give back from a checkpoint of all adapters.

    If an encoder makes the prompts, as in p-tuning or with a projected prefix, PEFT saves only the finished prompts.
    """
    encoders = getattr(model, "prompt_encoder", {})
    given_back = [encoder.embedding.weight for encoder in encoders.values() if len(list(encoder.parameters())) == 1]
    for name, config in model.peft_config.items():
        if not config.is_prompt_learning:
            given_back += get_peft_model_state_dict(model, adapter_name=name).values()
    pointers = {tensor.data_ptr() for tensor in given_back}
    return [name for name, parameter in trained.items() if parameter.data_ptr() not in pointers]


def gives_base_back(config: PeftConfig) -> bool:
    """Whether a model whose adapter is switched off is the base model again: not if biases of the base are trained, or
    if a part of its weights went into the adapter's initial values, as with PiSSA."""
    begins_apart = getattr(config, "init_lora_weights", True) in (True, False, "gaussian", "eva")
    return getattr(config, "bias", "none") == "none" and begins_apart


def base_digest(model: PeftModel) -> str:
    """SHA-256 of the weights under the active adapter: all parameters except those that its checkpoint holds.

    Half-precision weights are hashed as float32, quantised ones as the tensors they are made of.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(_base_parameters(model).items()):
        for part, tensor in plain_tensors(name, parameter.detach()):
            tensor = tensor.cpu()
            tensor = tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
            digest.update(f"{part} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def base_dtype(model: PeftModel) -> str | None:
    """The dtype of the weights under the active adapter, such as `bfloat16`; None if they have several."""
    found = {p.dtype for p in _base_parameters(model).values() if p.is_floating_point()}
    return str(found.pop()).removeprefix("torch.") if len(found) == 1 else None


def _base_parameters(model: PeftModel) -> dict[str, nn.Parameter]:
    """All parameters except those that the active adapter's checkpoint holds, as the base model names them."""
    saved = {tensor.data_ptr() for tensor in adapter_weights(model).values()}
    prefix = getattr(model.base_model, "prefix", None)
    return {
        name.replace(".base_layer.", ".").replace(".original_module.", "."): parameter
        for name, parameter in model.get_base_model().named_parameters()
        if parameter.data_ptr() not in saved and ".modules_to_save." not in name and (not prefix or prefix not in name)
    }


def adapter_digest(model: PeftModel) -> str:
    """SHA-256 of the shape of the active adapter: its tensors' names and shapes, and what its configuration sets."""
    name = trained_adapter(model)
    config = model.peft_config[name]
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    given = {
        key: _plain(value)
        for key, value in config.to_dict().items()
        # The tensors' names tell the modules; another release may choose the same modules by other words.
        if key not in _OF_ITS_ORIGIN and not key.startswith("init_") and not key.endswith("modules")
        if value != defaults.get(key) and value not in (None, {}, [])
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in sorted(adapter_weights(model).items())}
    return hashlib.sha256(json.dumps([given, shapes], sort_keys=True).encode()).hexdigest()


def _plain(value: Any) -> Any:
    """A value of a configuration as JSON can hold it; for any other value, only the name of its type."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        each = [_plain(each) for each in value]
        return sorted(each, key=str) if isinstance(value, (set, frozenset)) else each
    return value if isinstance(value, (str, int, float, bool)) or value is None else type(value).__name__
