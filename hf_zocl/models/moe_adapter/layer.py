"""The experts and routers of a block, and the layer that adds them to the block's MLP."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ...passes import stacked_linear as linear
from .config import MoEAdapterConfig
from .mixture import ExpertWeights, Routing, mix_all, mix_chosen, noisy_top_k, squared_variation


NOISE_FLOOR = 0.01
# The key under which a text tower's blocks get the positions of the pooled tokens.
POSITIONS = "moe_adapter_positions"


class Expert(nn.Module):
    """An expert: down-projection, ReLU, dropout, up-projection. Its output starts as zero."""

    def __init__(self, in_features: int, bottleneck: int, out_features: int):
        super().__init__()
        self.down = nn.Linear(in_features, bottleneck)
        self.up = nn.Linear(bottleneck, out_features)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        for tensor in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(tensor)

    def weights(self) -> ExpertWeights:
        return ExpertWeights(self.down.weight, self.down.bias, self.up.weight, self.up.bias)


class Router(nn.Module):
    """A router: logits x · W_g, and the noise's deviation softplus(x · W_noise) + 0.01; both weights start as zero."""

    stackable = True

    def __init__(self, in_features: int, num_experts: int, noise: bool):
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(num_experts, in_features))
        self.noise = nn.Parameter(torch.zeros(num_experts, in_features)) if noise else None

    def forward(self, token: torch.Tensor, k: int) -> Routing:
        """
        Args:
            token: The state of one token of every example, `(batch, in)`.
            k: The number of experts to keep.
        """
        # A router decides by differences that half precision does not resolve.
        with torch.autocast(token.device.type, enabled=False):
            token = token.to(self.gate.dtype)
            clean, std = linear(token, self.gate), None
            if self.noise is not None and self.training:
                std = F.softplus(linear(token, self.noise)) + NOISE_FLOOR
            return noisy_top_k(clean, std, k)


class MoEAdapter(nn.Module):
    """The experts and routers of one block, under one adapter name.

    Args:
        config: See `MoEAdapterConfig`.
        in_features, out_features: The widths that the experts map between.
    """

    def __init__(self, config: MoEAdapterConfig, in_features: int, out_features: int):
        super().__init__()
        self.config = config
        self.experts = nn.ModuleList(
            Expert(in_features, config.bottleneck, out_features) for _ in range(config.num_experts)
        )
        self.routers = nn.ModuleList(
            Router(in_features, config.num_experts, config.noise) for _ in range(config.num_routers)
        )
        # Saved with the weights, and only if there is something to remember.
        self.register_buffer("task", torch.tensor(1) if config.num_routers > 1 else None)
        frozen = torch.zeros(config.num_experts, dtype=torch.bool) if config.freeze_experts else None
        self.register_buffer("frozen", frozen)
        self._router = 0
        self.register_load_state_dict_post_hook(_read_buffers)
        self.balance_losses: list[torch.Tensor] | None = None
        self.reset_usage()

    @property
    def stackable(self) -> bool:
        """True if candidates' experts may be evaluated side by side (see `hf_zocl.passes.TowerPlan`)."""
        return self.config.top_k == self.config.num_experts

    @property
    def packable(self) -> bool:
        """True if a row may hold several prompts, because the first token is the same in all of them."""
        return self.config.router_token == "first"

    def forward(self, x: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        """
        Args:
            x: The block's state after attention, `(batch, length, in)`.
            positions: The token that the router reads, for every example; default: the first.

        Returns:
            Σ_e g_e · A_e(x), `(batch, length, out)`.
        """
        config = self.config
        token = x[:, 0] if positions is None else x[torch.arange(x.shape[0], device=x.device), positions]
        routing = self.routers[self._router](token, config.top_k)
        if self.training:
            self._watch(routing)
        x = x.to(self.experts[0].down.weight.dtype)
        experts = [expert.weights() for expert in self.experts]
        dropout = config.dropout if self.training else 0.0
        if config.top_k == config.num_experts:
            return mix_all(x, config.scale * routing.gates, experts, dropout)
        return mix_chosen(x, config.scale * routing.weights, routing.indices, experts, dropout)

    def _watch(self, routing: Routing) -> None:
        """Count what the router does, and hand over the balance loss where one is collected."""
        gates = routing.gates.detach()
        # Not a buffer: it is not a state of the forward pass.
        self.usage = self.usage.to(gates.device) + torch.stack([(gates > 0).sum(dim=0), gates.sum(dim=0)])
        # Computed whether or not it is collected: a block that is run again must do the same as the first time.
        if self.config.balance_loss > 0:
            importance, load = routing.gates.sum(dim=0), routing.load.sum(dim=0)
            loss = self.config.balance_loss * (squared_variation(importance) + squared_variation(load))
            if self.balance_losses is not None:
                self.balance_losses.append(loss)

    def reset_usage(self) -> None:
        """Reset the counts: how often each expert was chosen, and the sum of its gates, `(2, experts)`."""
        self.usage = torch.zeros(2, self.config.num_experts, device="cpu")
        self._logged = self.usage

    def take_usage(self) -> torch.Tensor:
        """The share of every expert in the gates since the last call, `(experts,)`; zeros if nothing was routed."""
        recent = (self.usage - self._logged.to(self.usage.device))[1]
        self._logged = self.usage
        return recent / recent.sum().clamp(min=1.0)

    def training_state(self) -> dict[str, torch.Tensor]:
        """The counts, for a checkpoint within a task."""
        return {"usage": self.usage.cpu(), "logged": self._logged.cpu().clone()}

    def load_training_state(self, state: dict[str, torch.Tensor]) -> None:
        """Continue from the counts of `training_state`."""
        self.usage, self._logged = state["usage"], state["logged"]

    def begin_task(self, task: int) -> None:
        """Switch to the router of a task, counted from 1, where every task has its own."""
        self.reset_usage()
        if self.task is not None:
            if not 1 <= task <= self.config.num_routers:
                raise ValueError(
                    f"task={task}: there are num_routers={self.config.num_routers} routers, one per task."
                )
            self.task.fill_(task)
            self._select_router()

    def end_task(self) -> None:
        """Freeze the experts that were used most since `begin_task`, by all processes together."""
        if self.frozen is not None:
            usage = self.usage.clone()
            if dist.is_available() and dist.is_initialized():
                dist.all_reduce(usage)
            chosen, gates = usage.tolist()
            by_use = sorted(range(len(chosen)), key=lambda e: (chosen[e], gates[e]), reverse=True)
            self.frozen[by_use[: self.config.freeze_experts]] = True
            self.freeze()

    def freeze(self) -> None:
        """Set `requires_grad` to False again for frozen experts and for the routers of other tasks."""
        for index, router in enumerate(self.routers):
            if index != self._router:
                router.requires_grad_(False)
        if self.frozen is not None and not self.frozen.is_meta:  # a meta tensor has no values yet
            for expert, frozen in zip(self.experts, self.frozen.tolist(), strict=True):
                if frozen:
                    expert.requires_grad_(False)

    def _select_router(self) -> None:
        trainable = any(parameter.requires_grad for parameter in self.routers.parameters())
        self._router = int(self.task) - 1
        self.routers[self._router].requires_grad_(trainable)
        self.freeze()


def _read_buffers(adapter: MoEAdapter, incompatible_keys: Any) -> None:
    """Take the router and the frozen experts from the buffers that a checkpoint has loaded."""
    if adapter.task is not None:
        adapter._select_router()
    adapter.freeze()


class MoEAdapterLayer(nn.Module, BaseTunerLayer):
    """A block's MLP with MoE adapters in parallel to it.

    The MLP receives the normalised state, the adapters the state itself: a hook on the norm before the MLP keeps it
    until the MLP is called. A backward pass that runs the block again (gradient checkpointing) runs the norm again,
    too.

    Args:
        base_layer: The MLP.
        norm: The norm that the block's state after attention goes through before the MLP; None: the MLP's own input is
            the state.
    """

    adapter_layer_names = ("moe_adapter_mixtures",)

    def __init__(self, base_layer: nn.Module, norm: nn.Module | None = None):
        super().__init__()
        self.base_layer = base_layer
        self.moe_adapter_mixtures = nn.ModuleDict()
        self._active_adapter, self._disable_adapters, self.merged_adapters = [], False, []
        self._state: torch.Tensor | None = None
        self._positions: torch.Tensor | None = None
        self._reads_norm = norm is not None
        self._hooks = [norm.register_forward_pre_hook(self._keep_state, with_kwargs=True)] if norm is not None else []

    def update_layer(self, adapter_name: str, config: MoEAdapterConfig, in_features: int, out_features: int) -> None:
        """Add an adapter with this name, on the device and in the precision of the MLP."""
        adapter = MoEAdapter(config, in_features, out_features)
        like = next(self.get_base_layer().parameters())
        if not any(parameter.is_meta for parameter in adapter.parameters()):
            adapter.to(like.device, like.dtype if like.is_floating_point() else None)
        self.moe_adapter_mixtures[adapter_name] = adapter

    def route_by_position(self, block: nn.Module, tower: nn.Module) -> None:
        """Let the router read the token that a CLIP text tower pools, whose position the tower hands to its blocks."""
        self._hooks.append(tower.register_forward_pre_hook(_add_positions, with_kwargs=True))
        self._hooks.append(block.register_forward_pre_hook(self._keep_positions, with_kwargs=True))

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        state = self._take_state(hidden_states)
        result = self.base_layer(hidden_states, *args, **kwargs)
        if self.disable_adapters:
            return result
        for name in self.active_adapters:
            if name in self.moe_adapter_mixtures:
                adapter = self.moe_adapter_mixtures[name]
                positions = self._positions if adapter.config.router_token == "pooled" else None
                result = result + adapter(state, positions).to(result.dtype)
        return result

    def _take_state(self, hidden_states: torch.Tensor) -> torch.Tensor:
        state, self._state = self._state, None
        if not self._reads_norm:
            return hidden_states
        if state is None:
            raise RuntimeError(
                f"The norm next to {type(self.get_base_layer()).__name__} was not called before it, so the adapters "
                "have no state to read: name the norm between attention and MLP in state_norms."
            )
        return state

    def _keep_state(self, norm: nn.Module, args: tuple, kwargs: dict) -> None:
        self._state = args[0] if args else next(iter(kwargs.values()))

    def _keep_positions(self, block: nn.Module, args: tuple, kwargs: dict) -> None:
        # As an argument of the block, they are still there when gradient checkpointing runs it again.
        if POSITIONS not in kwargs:
            raise RuntimeError(
                f"router_token='pooled': the text tower hands its blocks {POSITIONS!r}, the positions of the tokens "
                "that it pools; this block was called without them."
            )
        self._positions = kwargs[POSITIONS]

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode)
        self._freeze()

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        super().set_requires_grad(adapter_names, requires_grad)
        self._freeze()

    def _freeze(self) -> None:
        for adapter in self.moe_adapter_mixtures.values():
            adapter.freeze()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise NotImplementedError("MoE adapters are not linear in their input and cannot be merged into the weights.")

    def unmerge(self) -> None:
        raise NotImplementedError("MoE adapters are never merged.")

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Return the MLP, with nothing of the adapters left in its block."""
        if merge:
            self.merge(safe_merge, adapter_names)
        for hook in self._hooks:
            hook.remove()
        return self.get_base_layer()

    def __getstate__(self) -> dict[str, Any]:
        # A copy keeps nothing from a forward pass.
        return {**self.__dict__, "_state": None, "_positions": None}


def _add_positions(tower: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """Hand a CLIP text tower's blocks the positions of its pooled tokens, found as the tower finds them itself."""
    if POSITIONS in kwargs:
        return None
    input_ids = args[0] if args else kwargs["input_ids"]
    input_ids = input_ids.reshape(-1, input_ids.shape[-1]).int()
    # Old configurations have 2; the end of the text is then the greatest id.
    is_end = input_ids if tower.eos_token_id == 2 else (input_ids == tower.eos_token_id).int()
    return args, {**kwargs, POSITIONS: is_end.argmax(dim=-1)}


@contextmanager
def collect_balance_losses(model: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Collect the load-balancing losses of the forward passes inside: one scalar per block, weight included.

    Raises:
        RuntimeError: If reentrant gradient checkpointing has cut them off from the routers.
    """
    adapters = [m for m in model.modules() if isinstance(m, MoEAdapter) and m.config.balance_loss > 0]
    losses: list[torch.Tensor] = []
    for adapter in adapters:
        adapter.balance_losses = losses
    try:
        yield losses
    finally:
        for adapter in adapters:
            adapter.balance_losses = None
    wanted = any(p.requires_grad for adapter in adapters for p in adapter.routers.parameters())
    if torch.is_grad_enabled() and wanted and losses and not any(loss.requires_grad for loss in losses):
        raise RuntimeError(
            "balance_loss > 0 does not reach the routers through reentrant gradient checkpointing: "
            'pass gradient_checkpointing_kwargs={"use_reentrant": False}.'
        )
