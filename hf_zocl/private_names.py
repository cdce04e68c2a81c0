"""Private names of torch, and one each of accelerate and of transformers' configurations, each behind a function.

They are here because the floors below the Trainer need them (`zo`, `passes`, `models`). The private names of the
Trainer, of datasets and the rest of accelerate's are in `trainer/compat.py`, those of PEFT in
`models/moe_adapter/model.py` and `models/placement.py`. All hold for torch 2.13, accelerate 1.15 and transformers 5.20
to 5.24; if a release drops one, `tests/test_private_names.py` fails and names it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

# A mode that sees every operation of a block, with its tensors; and the leaves of nested lists, tuples and dicts.
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_map as tree_map


# The attributes of a module on which `module.compile()` was not called: calling it runs `forward`.
UNCOMPILED = {"_compiled_call_impl": None}


def add_to_each(tensors: list[torch.Tensor], others: list[torch.Tensor]) -> None:
    """Add many tensors to many others, in one launch on an accelerator (`torch._foreach_add_`)."""
    torch._foreach_add_(tensors, others)


def copy_to_each(tensors: list[torch.Tensor], values: list[torch.Tensor]) -> None:
    """Copy many tensors into many others, in one launch on an accelerator (`torch._foreach_copy_`)."""
    torch._foreach_copy_(tensors, values)


def version(tensor: torch.Tensor) -> int:
    """The number of in-place changes of a tensor, except those through `.data` (`Tensor._version`).

    Comparing values instead would wait for the accelerator.
    """
    return tensor._version


def storage_id(tensor: torch.Tensor) -> int:
    """A number that a tensor and all views of it share (`UntypedStorage._cdata`).

    The address of the data, which is public, is 0 for every storage without bytes.

    Raises:
        NotImplementedError, RuntimeError: If the tensor has no storage, like a sparse one.
    """
    return tensor.untyped_storage()._cdata


def plain_tensors(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """A tensor with its name; for a wrapper, such as torchao's quantised tensors, the tensors that it is made of."""
    if not is_traceable_wrapper_subclass(tensor):
        yield name, tensor
        return
    for part in tensor.__tensor_flatten__()[0]:
        yield from plain_tensors(f"{name}.{part}", getattr(tensor, part))


def own_buffers(module: nn.Module) -> dict[str, torch.Tensor | None]:
    """A module's own buffers by name, including those that are None; the dictionary is live (`Module._buffers`)."""
    return module._buffers


def is_compiled(module: nn.Module) -> bool:
    """True if `module.compile()` was called (`Module._compiled_call_impl`)."""
    return module._compiled_call_impl is not None


def is_compile_wrapper(module: nn.Module) -> bool:
    """True if a module is what `torch.compile(module)` returns (its only child is called `_orig_mod`)."""
    return any(name == "_orig_mod" for name, _ in module.named_children())


def is_mutable(operation: Any) -> bool:
    """True if an operation of a `TorchDispatchMode` writes to an argument (`OpOverload._schema`)."""
    return operation._schema.is_mutable


def named_arguments(operation: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of an operation in a `TorchDispatchMode` by name, defaults included (`OpOverload._schema`)."""
    return {
        argument.name: args[number] if number < len(args) else kwargs.get(argument.name, argument.default_value)
        for number, argument in enumerate(operation._schema.arguments)
    }


def written_tensors(operation: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Any]:
    """The arguments that an operation in a `TorchDispatchMode` writes to (`OpOverload._schema`)."""
    schema = getattr(operation, "_schema", None)
    for number, argument in enumerate(schema.arguments if schema is not None else ()):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[number] if number < len(args) else kwargs.get(argument.name)
            yield from given if isinstance(given, (list, tuple)) else [given]


@contextmanager
def without_autocast(device_type: str) -> Iterator[None]:
    """Inside, autocast is off, whether it was entered around this block or within it (`autocast._enabled`)."""
    enter = torch.autocast.__enter__

    def enter_disabled(context: torch.autocast) -> Any:
        enabled, context._enabled = context._enabled, False
        try:
            return enter(context)
        finally:
            context._enabled = enabled

    with torch.autocast(device_type, enabled=False):
        torch.autocast.__enter__ = enter_disabled  # type: ignore[method-assign]
        try:
            yield
        finally:
            torch.autocast.__enter__ = enter  # type: ignore[method-assign]


def attention_kernel(module: nn.Module) -> str | None:
    """The attention that a transformers model runs, such as `sdpa`; None for any other model.

    The configuration takes `attn_implementation`, but only `_attn_implementation` says which one is in use.
    """
    return getattr(getattr(module, "config", None), "_attn_implementation", None)


def execution_device(module: nn.Module) -> torch.device | None:
    """Where accelerate runs a module that it has spread or offloaded; None for any other (`Module._hf_hook`)."""
    devices = [getattr(hook, "execution_device", None) for hook in _dispatch_hooks(module)]
    return next((torch.device(device) for device in devices if device is not None), None)


def is_offloaded(module: nn.Module) -> bool:
    """True if accelerate loads a module's own parameters when it runs, and unloads them afterwards."""
    return any(getattr(hook, "offload", False) for hook in _dispatch_hooks(module))


@contextmanager
def loaded(module: nn.Module) -> Iterator[list[nn.Parameter]]:
    """Inside, the offloaded parameters of a module and its submodules are where they run (`Module._hf_hook`).

    Writes to them are lost.
    """
    parts = [part for part in module.modules() if is_offloaded(part)]
    hooks: list[tuple[nn.Module, Any]] = [(part, vars(part)["_hf_hook"]) for part in parts]
    for part, hook in hooks:
        hook.pre_forward(part)
    try:
        yield [parameter for part in parts for parameter in part.parameters(recurse=False)]
    finally:
        for part, hook in hooks:
            hook.post_forward(part, None)


def _dispatch_hooks(module: nn.Module) -> Sequence[Any]:
    """Accelerate's hooks around a module's forward pass: one, or a chain of them (`SequentialHook.hooks`)."""
    hook = getattr(module, "_hf_hook", None)
    return getattr(hook, "hooks", () if hook is None else (hook,))
