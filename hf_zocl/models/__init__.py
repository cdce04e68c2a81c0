"""Models that the Trainer learns: a CLIP classifier, and the adapters it carries."""

from .adapters import ADAPTERS, AdapterArguments, adapter_name, add_adapter
from .clip_classifier import CLIPClassifier, CLIPClassifierOutput, in_training_dtype
from .moe_adapter import MoEAdapterConfig, MoEAdapterModel


__all__ = [
    "ADAPTERS",
    "AdapterArguments",
    "CLIPClassifier",
    "CLIPClassifierOutput",
    "MoEAdapterConfig",
    "MoEAdapterModel",
    "adapter_name",
    "add_adapter",
    "in_training_dtype",
]
