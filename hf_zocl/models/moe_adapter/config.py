"""`MoEAdapterConfig`: the shape of the MoE adapters, and their places in a model."""

from __future__ import annotations

from dataclasses import dataclass, field

from peft import PeftConfig, PeftType

from ...checks import check_fields


PEFT_TYPE = "MOE_ADAPTER"
ROUTER_TOKENS = ("first", "pooled")
TOWERS = ("vision", "language", "both")
# The norm between attention and MLP: Gemma 2, CLIP and SigLIP, ViT, DINOv2, GPT-2, Llama and its relatives. Gemma 2's
# `post_attention_layernorm` is another norm: its own name comes first.
STATE_NORMS = (
    "pre_feedforward_layernorm",
    "layer_norm2",
    "layernorm_after",
    "norm2",
    "ln_2",
    "post_attention_layernorm",
)


@dataclass
class MoEAdapterConfig(PeftConfig):
    """Configures a `MoEAdapterModel`; without arguments it is the baseline on every block of both CLIP towers.

    A mixture of small experts runs in parallel to the MLP of a block, on the block's state after attention, x:

        x ← x + MLP(norm(x)) + Σ_e g_e(x) · A_e(x),    A_e(x) = scale · (up_e · dropout(ReLU(down_e · x)))

    with gates g from a noisy top-k router (Shazeer et al. 2017) that reads one token of x. The defaults are those
    of MoE-Adapters4CL (Yu et al., CVPR 2024) for class-incremental learning: 2 experts of 64 hidden units, both
    chosen, one router for all tasks. Its multi-task variant is `num_experts=22, num_routers=<tasks>,
    freeze_experts=2`.

    Args:
        num_experts: E, the experts of a block.
        top_k: k, the experts that an example is sent to. Only these are computed.
        bottleneck: The hidden units of an expert.
        scale: A factor on the experts' output.
        dropout: Dropout on an expert's hidden units.
        noise: Whether the router adds its learned noise in training.
        router_token: The token that the router reads. `first` is the baseline's: the class token in vision, but in
            CLIP's causal text tower the start token, which sees nothing of the prompt, so that all prompts get the
            same gates there. `pooled` is the token that CLIP pools: the class token, and in text the end of the text.
            In a causal language model, which `generate` feeds token by token from a cache, `first` would be the newest
            token: generate with `use_cache=False` and padding on the right.
        num_routers: 1, one router for all tasks; or one per task: `begin_task(t)` switches to the t-th.
        freeze_experts: How many experts `end_task` freezes in every block: those that the task used most.
        balance_loss: Weight of the load-balancing loss, CV²(importance) + CV²(load) (Shazeer et al. 2017, equations 6
            to 11), summed over the blocks; 0 leaves it out.
        towers: `vision`, `language` or `both`; other two-tower models are recognised if their towers have CLIP's
            names.
        target_modules: Names of the modules that the adapters run in parallel to, or a regular expression over full
            names; by default `mlp` for the models of `MoEAdapterModel.target_module_mapping`.
        exclude_modules: Names, or a regular expression, of modules to leave out.
        state_norms: Names of the norm between attention and MLP, a sibling of the target module; x is the input of
            this norm. Without such a norm, x is the target module's own input, and the experts map its
            width to that of the module's output.
        layers_to_transform: Indices of the blocks to adapt, counted from 0 as PEFT does; default: all.
        layers_pattern: The name of the list of blocks, if `layers_to_transform` cannot guess it.
        modules_to_save: Other modules to train and save, for example a head.

    Raises:
        ValueError: If a value is out of its range.
    """

    num_experts: int = field(default=2, metadata={"help": "Experts of a block."})
    top_k: int = field(default=2, metadata={"help": "Experts that an example is sent to."})
    bottleneck: int = field(default=64, metadata={"help": "Hidden units of an expert."})
    scale: float = field(default=0.1, metadata={"help": "Factor on the experts' output."})
    dropout: float = field(default=0.1, metadata={"help": "Dropout on an expert's hidden units."})
    noise: bool = field(default=True, metadata={"help": "Whether the router is noisy in training."})
    router_token: str = field(default="first", metadata={"help": "Token that the router reads: first or pooled."})
    num_routers: int = field(default=1, metadata={"help": "1 for all tasks, or one per task."})
    freeze_experts: int = field(default=0, metadata={"help": "Most used experts to freeze after a task."})
    balance_loss: float = field(default=0.0, metadata={"help": "Weight of the load-balancing loss."})
    towers: str = field(default="both", metadata={"help": "vision, language or both."})
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Modules that the adapters are placed next to."}
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Modules to leave out."})
    state_norms: list[str] = field(
        default_factory=lambda: list(STATE_NORMS), metadata={"help": "Names of the norm between attention and MLP."}
    )
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Blocks, counted from 0."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the list of blocks."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Other modules to train and save."})

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType(PEFT_TYPE)
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError(
                f"layers_to_transform={self.layers_to_transform!r} cannot be used with a regular expression "
                f"(target_modules={self.target_modules!r}): name the layers in it."
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(f"layers_pattern={self.layers_pattern!r} has no effect without layers_to_transform.")
        self._check_ranges()

    def _check_ranges(self) -> None:
        numbers = ("num_experts", "top_k", "bottleneck", "scale", "dropout", "num_routers", "freeze_experts")
        check_fields(self, (*numbers, "balance_loss", "noise"))
        for name in ("num_experts", "bottleneck", "num_routers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected at least 1.")
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"top_k={self.top_k!r}: expected 1 to num_experts={self.num_experts}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout!r}: expected a probability, 0 or more and less than 1.")
        if not 0 <= self.freeze_experts <= self.num_experts:
            raise ValueError(f"freeze_experts={self.freeze_experts!r}: expected 0 to num_experts={self.num_experts}.")
        if self.balance_loss < 0:
            raise ValueError(f"balance_loss={self.balance_loss!r}: expected 0 or more.")
        if self.router_token not in ROUTER_TOKENS:
            raise ValueError(f"router_token={self.router_token!r}: expected one of {', '.join(ROUTER_TOKENS)}.")
        if self.towers not in TOWERS:
            raise ValueError(f"towers={self.towers!r}: expected one of {', '.join(TOWERS)}.")
