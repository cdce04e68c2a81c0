"""Registers MoE adapters, and the placement of offloaded layers' adapters, with PEFT.

This happens once both `hf_zocl` and `peft` are imported, in either order.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


# Each module registers itself when it is imported.
MODULES = ("hf_zocl.models.moe_adapter", "hf_zocl.models.placement")


def register_with_peft() -> None:
    """Import the modules now if PEFT is already imported, otherwise right after PEFT."""
    if "peft" in sys.modules:
        _import()
    else:
        sys.meta_path.insert(0, _AfterPeft())


def _import() -> None:
    for name in MODULES:
        import_module(name)


class _AfterPeft(MetaPathFinder):
    """Finds `peft` by the other finders, and imports the modules once PEFT's own code has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "peft":
            return None
        found = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            run(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            _import()

        spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec
