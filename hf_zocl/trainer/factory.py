"""`zeroth_order`: adds zeroth-order layers to any project's Trainer and arguments."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

from transformers import Trainer, TrainingArguments

from .arguments import ZeroOrderArguments
from .mixin import ZeroOrderMixin


PREFIX = "ZO"


def zeroth_order(trainer: type[Trainer], arguments: type[TrainingArguments]) -> tuple[type, type]:
    """Add zeroth-order layers to a Trainer and its arguments: each gets a mixin as its first base.

        ZOSFTTrainer, ZOSFTConfig = zeroth_order(SFTTrainer, SFTConfig)

    That is `class ZOSFTTrainer(ZeroOrderMixin, SFTTrainer)` and `@dataclass class ZOSFTConfig(ZeroOrderArguments,
    SFTConfig)`. Called again, it returns the same classes. They can be pickled, so checkpoints hold their arguments,
    and can be read in a process that has not called this.

    Args:
        trainer: A `Trainer` class.
        arguments: The `TrainingArguments` class that goes with it.

    Returns:
        The Trainer's class and the arguments' class; one that has its mixin already is returned as it is.

    Raises:
        TypeError: If either is not such a class.
        ValueError: If one of them is defined within a function, where no other process would find it.
    """
    for name, given, base in (("trainer", trainer, Trainer), ("arguments", arguments, TrainingArguments)):
        if not (isinstance(given, type) and issubclass(given, base)):
            raise TypeError(f"{name}={given!r}: expected a subclass of {base.__name__}.")
        if "<locals>" in given.__qualname__:
            raise ValueError(
                f"{name}={given.__qualname__}: it is defined within a function, so a checkpoint could not be read "
                "elsewhere; expected a class defined in a module."
            )
    return _with_mixin(trainer), _with_mixin(arguments)  # type: ignore[arg-type]


@cache
def _with_mixin(base: type) -> type:
    mixin: type = ZeroOrderMixin if issubclass(base, Trainer) else ZeroOrderArguments
    if issubclass(base, mixin):
        return base
    made: Any = type(PREFIX + base.__name__, (mixin, base), {"__module__": __name__, "__doc__": base.__doc__})
    # Pickle looks a class up by module and name, so the name says where the base is: `__getattr__` makes it again.
    made.__qualname__ = _pickled_name(base)
    return dataclass(made) if mixin is ZeroOrderArguments else made


def _pickled_name(base: type) -> str:
    # A dot would be read as an attribute of an attribute.
    return f"{PREFIX}:{base.__module__}:{base.__qualname__}".replace(".", "/")


def __getattr__(name: str) -> type:
    if not name.startswith(f"{PREFIX}:"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _, module, path = name.replace("/", ".").split(":")
    # A script's own classes are in `__main__`, which is not imported again.
    found: Any = sys.modules.get(module) or import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    return _with_mixin(found)
