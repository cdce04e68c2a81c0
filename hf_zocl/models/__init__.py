"""Models that the Trainer learns: a CLIP classifier, and the adapters it carries."""

from .adapters import ADAPTERS, AdapterArguments, add_adapter
from .clip_classifier import CLIPClassifier, CLIPClassifierOutput


__all__ = ["ADAPTERS", "AdapterArguments", "CLIPClassifier", "CLIPClassifierOutput", "add_adapter"]
