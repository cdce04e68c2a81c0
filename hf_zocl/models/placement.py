"""Puts an adapter where its base layer runs, even if accelerate keeps the base's weights elsewhere.

PEFT puts an adapter on the device of its base layer's weight. For an offloaded layer that is the meta device, where
the adapter would lose its values.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from ..passes.structure import shadowed
from ..private_names import loaded


def place_adapters_where_layers_run() -> None:
    """Have PEFT add an adapter while the layer's weights are loaded (`BaseTuner._create_and_replace`)."""
    inject = BaseTuner.inject_adapter
    if hasattr(inject, "__wrapped__"):
        return

    @wraps(inject)
    def inject_adapter(self, *args: Any, **kwargs: Any) -> Any:
        create_and_replace = self._create_and_replace

        def with_weights(peft_config: Any, adapter_name: str, target: nn.Module, *args: Any, **kwargs: Any) -> None:
            with loaded(target) as parameters:
                before = [parameter.data_ptr() for parameter in parameters]
                create_and_replace(peft_config, adapter_name, target, *args, **kwargs)
                if [parameter.data_ptr() for parameter in parameters] != before:
                    raise ValueError(
                        f"{type(peft_config).__name__}: its initialisation changes the base's weights, which are "
                        "offloaded and stay as they are. Choose another one, or keep the layers in memory."
                    )

        with shadowed(self, _create_and_replace=with_weights):
            return inject(self, *args, **kwargs)

    BaseTuner.inject_adapter = inject_adapter


place_adapters_where_layers_run()
