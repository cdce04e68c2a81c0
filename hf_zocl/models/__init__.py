"""Models to train: a CLIP classifier, and the adapters it carries."""

from .adapter_arguments import AdapterArguments, adapter_arguments, adapter_name, configured, peft_config
from .adapters import (
    adapter_digest,
    adapter_weights,
    add_adapter,
    base_digest,
    base_dtype,
    check_trained_parameters,
    freeze,
    gives_base_back,
    trained_adapter,
    unsaved_parameters,
)
from .clip_classifier import CLIPClassifier, CLIPClassifierOutput, check_templates, in_training_dtype
from .moe_adapter import MoEAdapterConfig, MoEAdapterModel


__all__ = [
    "AdapterArguments",
    "CLIPClassifier",
    "CLIPClassifierOutput",
    "MoEAdapterConfig",
    "MoEAdapterModel",
    "adapter_arguments",
    "adapter_digest",
    "adapter_name",
    "adapter_weights",
    "add_adapter",
    "base_digest",
    "base_dtype",
    "check_templates",
    "check_trained_parameters",
    "configured",
    "freeze",
    "gives_base_back",
    "in_training_dtype",
    "peft_config",
    "trained_adapter",
    "unsaved_parameters",
]
