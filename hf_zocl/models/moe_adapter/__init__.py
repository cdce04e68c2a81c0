"""MoE adapters (MoE-Adapters4CL, CVPR 2024) as a PEFT method; importing this package registers it with PEFT."""

from .config import MoEAdapterConfig
from .layer import MoEAdapterLayer, collect_balance_losses
from .model import MoEAdapterModel, register_with_peft


__all__ = ["MoEAdapterConfig", "MoEAdapterLayer", "MoEAdapterModel", "collect_balance_losses"]

register_with_peft()
