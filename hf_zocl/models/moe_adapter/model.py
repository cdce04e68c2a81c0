"""`MoEAdapterModel`: injects the MoE adapters, and registers them with PEFT."""

from __future__ import annotations

import torch
from aenum import extend_enum
from peft import PeftConfig, PeftType
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method
from torch import nn
from transformers import CLIPTextModel, CLIPVisionModel
from transformers.pytorch_utils import Conv1D

from ...passes.task_aware import TaskAware
from ...zo.assignment import locate
from .config import PEFT_TYPE, MoEAdapterConfig
from .layer import MoEAdapterLayer


_MODELS_WITH_MLP = """
clip clip_text_model clip_vision_model siglip siglip_text_model siglip_vision_model vit dinov2 gpt2 gemma gemma2 llama
mistral phi3 qwen2 qwen3
"""


class MoEAdapterModel(TaskAware, BaseTuner):
    """Adds MoE adapters to the MLPs of a pretrained model; see `MoEAdapterConfig`.

    Args:
        model: The model to adapt.
        config: A `MoEAdapterConfig`.
        adapter_name: The adapter's name.

    Example:
        ```python
        model = get_peft_model(CLIPModel.from_pretrained("openai/clip-vit-base-patch16"), MoEAdapterConfig())
        ```
    """

    prefix = "moe_adapter_"
    tuner_layer_cls = MoEAdapterLayer
    target_module_mapping = {name: ["mlp"] for name in _MODELS_WITH_MLP.split()}

    def begin_task(self, task: int) -> None:
        """Begin a task, counted from 1: switch to its router, and reset the counts of the experts' use.

        Raises:
            ValueError: If every task has its own router and there is none for this one.
        """
        for adapter in self._active_mixtures():
            adapter.begin_task(task)

    def end_task(self, task: int) -> None:
        """End a task: freeze the experts that it used most, if `freeze_experts` says so."""
        for adapter in self._active_mixtures():
            adapter.end_task()

    def extra_logs(self) -> dict[str, float]:
        """The share of every expert in the gates since the last call, averaged over the blocks of a tower.

        Returns:
            `router_usage_vision_1`, … and `router_usage_language_1`, …; `router_usage_1`, … in a single tower. Experts
            are counted from 1.
        """
        towers: dict[str, list[torch.Tensor]] = {}
        for name, layer in self._layers():
            tower = locate(name)[0]
            for adapter in self._active_in(layer):
                towers.setdefault(f"router_usage_{tower}" if tower else "router_usage", []).append(
                    adapter.take_usage()
                )
        return {
            f"{tower}_{expert}": share
            for tower, usage in towers.items()
            for expert, share in enumerate(torch.stack(usage).mean(dim=0).tolist(), start=1)
        }

    def training_state(self) -> dict[str, torch.Tensor]:
        """The use of every block's experts in the task so far: the total, and the total when it was last logged."""
        return {
            f"{number}.{name}": value
            for number, adapter in enumerate(self._active_mixtures())
            for name, value in adapter.training_state().items()
        }

    def load_training_state(self, state: dict[str, torch.Tensor]) -> None:
        """Continue from the counts of `training_state`."""
        for number, adapter in enumerate(self._active_mixtures()):
            adapter.load_training_state({name: state[f"{number}.{name}"] for name in adapter.training_state()})

    def _layers(self) -> list[tuple[str, MoEAdapterLayer]]:
        return [(name, m) for name, m in self.model.named_modules() if isinstance(m, MoEAdapterLayer)]

    def _active_in(self, layer: MoEAdapterLayer) -> list[nn.Module]:
        mixtures = layer.moe_adapter_mixtures
        return [mixtures[name] for name in layer.active_adapters if name in mixtures]

    def _active_mixtures(self) -> list[nn.Module]:
        return [adapter for _, layer in self._layers() for adapter in self._active_in(layer)]

    @staticmethod
    def _check_target_module_exists(peft_config: MoEAdapterConfig, key: str):
        if peft_config.towers != "both" and locate(key + ".")[0] != peft_config.towers:
            return False
        return BaseTuner._check_target_module_exists(peft_config, key)

    def _create_and_replace(
        self,
        peft_config: MoEAdapterConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **optional_kwargs,
    ) -> None:
        names = [name for name in peft_config.state_norms if name in dict(parent.named_children())]
        norm = parent.get_submodule(names[0]) if names else None
        # Everything that may fail comes before the layer hooks itself into the model.
        widths = _widths(getattr(target, "base_layer", target), norm, current_key)
        tower = self._pooling_tower(current_key) if peft_config.router_token == "pooled" else None
        layer = target if isinstance(target, MoEAdapterLayer) else MoEAdapterLayer(target, norm)
        layer.update_layer(adapter_name, peft_config, *widths)
        # A CLIP vision tower pools its first token.
        if isinstance(tower, CLIPTextModel):
            layer.route_by_position(parent, tower)
        if adapter_name not in self.active_adapters:
            layer.moe_adapter_mixtures[adapter_name].requires_grad_(False)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's method copies the weight of a linear layer; an MLP has none, and its adapters are in place already.
        setattr(parent, child_name, new_module)

    def _pooling_tower(self, key: str) -> CLIPTextModel | CLIPVisionModel:
        above = [self.model, *(self.model.get_submodule(key[:i]) for i, c in enumerate(key) if c == ".")]
        tower = next((m for m in above if isinstance(m, (CLIPTextModel, CLIPVisionModel))), None)
        if tower is None:
            raise ValueError(
                f"router_token='pooled': {key} is in no CLIP tower, and it is not known which token another model "
                "pools. Use router_token='first'."
            )
        return tower

    def _check_merge_allowed(self) -> None:
        raise ValueError("MoE adapters are not linear in their input and cannot be merged into the weights.")

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # The adapter's name comes right after the layer's dictionary, far from the end of the key.
        container = f".{MoEAdapterLayer.adapter_layer_names[0]}."
        return key.replace(f"{container}{adapter_name}.", container, 1)


def _widths(target: nn.Module, norm: nn.Module | None, key: str) -> tuple[int, int]:
    """The widths of the adapters' input and output: the norm's, or the first and the last of the target's layers."""
    if norm is not None:
        return norm.weight.shape[-1], norm.weight.shape[-1]
    linears = [m for m in target.modules() if isinstance(m, (nn.Linear, Conv1D))]
    if not linears:
        raise ValueError(
            f"target_modules: {key} ({type(target).__name__}) has no linear layer and no norm next to it."
        )
    first, last = linears[0], linears[-1]
    return getattr(first, "in_features", getattr(first, "nx", None)), getattr(
        last, "out_features", getattr(last, "nf", None)
    )


def register_with_peft() -> None:
    """Make `MoEAdapterConfig` and `MoEAdapterModel` a method of PEFT.

    PEFT offers `register_peft_method` for this, but takes the names of its methods from a closed enum, so the name is
    added to it first. This is the one place that changes PEFT's list of methods.

    Raises:
        RuntimeError: If this release of PEFT does not accept it.
    """
    if PEFT_TYPE in PeftType.__members__:
        return
    try:
        extend_enum(PeftType, PEFT_TYPE, PEFT_TYPE)
        register_peft_method(
            name=PEFT_TYPE.lower(),
            config_cls=MoEAdapterConfig,
            model_cls=MoEAdapterModel,
            prefix=MoEAdapterModel.prefix,
        )
        config = PeftConfig.from_peft_type(peft_type=PEFT_TYPE)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise RuntimeError(_refusal()) from error
    if not isinstance(config, MoEAdapterConfig):
        raise RuntimeError(_refusal())


def _refusal() -> str:
    from peft import __version__

    return (
        f"peft {__version__} does not accept MoE adapters as a method: PeftType or register_peft_method has changed "
        "since 0.21. Install peft>=0.21,<0.22, or report this to hf_zocl."
    )
