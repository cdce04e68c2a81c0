"""The trainable units that a frozen CLIP carries in every layer, each a PEFT method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel


@dataclass
class AdapterArguments:
    """The adapter and its shape.

    Args:
        adapter: The PEFT method: `lora`.
        target_modules: Names of the linear layers that carry LoRA, in both towers.
        lora_rank: r.
        lora_alpha: The scale is α/r.
        lora_dropout: Dropout on LoRA's input.
    """

    adapter: str = field(default="lora", metadata={"help": "PEFT method of the trainable units: lora."})
    target_modules: list[str] = field(
        default_factory=lambda: ["q_proj", "v_proj"], metadata={"help": "Linear layers that carry LoRA."}
    )
    lora_rank: int = field(default=8, metadata={"help": "Rank of LoRA."})
    lora_alpha: float = field(default=16.0, metadata={"help": "LoRA's scale is lora_alpha / lora_rank."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on LoRA's input."})

    def __post_init__(self):
        if self.adapter not in ADAPTERS:
            raise ValueError(f"adapter={self.adapter!r} is unknown: expected one of {', '.join(ADAPTERS)}.")
        if isinstance(self.target_modules, str):
            self.target_modules = [self.target_modules]
        if self.lora_rank < 1:
            raise ValueError(f"lora_rank={self.lora_rank}: expected at least 1.")


def _lora_config(args: AdapterArguments) -> PeftConfig:
    return LoraConfig(
        r=args.lora_rank,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=list(args.target_modules),
    )


ADAPTERS: dict[str, Callable[[AdapterArguments], PeftConfig]] = {"lora": _lora_config}


def add_adapter(model: PreTrainedModel, args: AdapterArguments) -> PeftModel:
    """Freeze `model` and give it the adapter that `args` describes; its parameters alone are trainable."""
    return get_peft_model(model, ADAPTERS[args.adapter](args))
