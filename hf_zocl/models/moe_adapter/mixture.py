"""The maths of the MoE adapters, over weight tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ...passes import stacked_linear as linear


class ExpertWeights(NamedTuple):
    """The weights of one expert: `(bottleneck, in)`, `(bottleneck,)`, `(out, bottleneck)`, `(out,)`.

    With a leading dimension n on each, they are n variants of the expert; see `stacked_linear`.
    """

    down: torch.Tensor
    down_bias: torch.Tensor
    up: torch.Tensor
    up_bias: torch.Tensor


class Routing(NamedTuple):
    """The router's output for every example.

    Attributes:
        gates: `(batch, experts)`; zero for the experts that are not chosen; they add up to one.
        weights, indices: The gates of the chosen experts and their numbers, `(batch, k)`.
        load: How likely each expert is to be chosen, given the noise of the others, `(batch, experts)`.
    """

    gates: torch.Tensor
    weights: torch.Tensor
    indices: torch.Tensor
    load: torch.Tensor


def mix_all(
    x: torch.Tensor, gates: torch.Tensor, experts: Sequence[ExpertWeights], dropout: float = 0.0
) -> torch.Tensor:
    """Σ_e g_e · A_e(x) if every expert is chosen: two matrix products over all experts' hidden units.

    Args:
        x: `(batch, length, in)`.
        gates: `(batch, experts)`, with the scale in them.
        experts: The weights.
        dropout: Probability of dropping a hidden unit.

    Returns:
        `(batch, length, out)`.
    """
    down = torch.cat([expert.down for expert in experts], dim=-2)
    down_bias = torch.cat([expert.down_bias for expert in experts], dim=-1)
    up = torch.cat([expert.up for expert in experts], dim=-1)
    up_bias = torch.stack([expert.up_bias for expert in experts], dim=-1)
    hidden = _hidden(x, down, down_bias, gates, dropout)
    return linear(hidden, up) + linear(gates, up_bias).unsqueeze(1)


def mix_chosen(
    x: torch.Tensor,
    gates: torch.Tensor,
    indices: torch.Tensor,
    experts: Sequence[ExpertWeights],
    dropout: float = 0.0,
) -> torch.Tensor:
    """Σ g_e · A_e(x) over the experts chosen for each example; the others are not computed.

    The weights of the chosen experts are gathered, rather than the examples of an expert. No shape depends on data, so
    nothing waits for an accelerator and `torch.compile` sees one graph.

    Args:
        x: `(batch, length, in)`.
        gates: Of the chosen experts, `(batch, k)`, with the scale in them.
        indices: The numbers of the chosen experts, `(batch, k)`.
        experts, dropout: As in `mix_all`.

    Returns:
        `(batch, length, out)`.
    """
    down = _gather([expert.down for expert in experts], indices).flatten(1, 2)
    down_bias = _gather([expert.down_bias for expert in experts], indices).flatten(1)
    # Transposed, so that the units of the chosen experts lie side by side without another copy.
    up = _gather([expert.up.mT for expert in experts], indices).flatten(1, 2)
    up_bias = _gather([expert.up_bias for expert in experts], indices)
    hidden = _hidden(x, down, down_bias, gates, dropout)
    return linear(hidden, up.mT, (gates.unsqueeze(-1) * up_bias).sum(dim=1))


def _gather(weights: Sequence[torch.Tensor], indices: torch.Tensor) -> torch.Tensor:
    """The weights of the experts with these numbers, `(*indices, *weight)`."""
    stacked = torch.stack(list(weights))
    # Indexing would do, but its backward pass is four times slower than an embedding's.
    return F.embedding(indices, stacked.flatten(1)).unflatten(-1, stacked.shape[1:])


def _hidden(
    x: torch.Tensor, down: torch.Tensor, down_bias: torch.Tensor, gates: torch.Tensor, dropout: float
) -> torch.Tensor:
    """The hidden units of several experts side by side, each times its expert's gate, `(batch, length, units)`."""
    hidden = F.dropout(F.relu(linear(x, down, down_bias)), dropout, training=dropout > 0)
    by_expert = hidden.unflatten(-1, (gates.shape[-1], -1))
    return (by_expert * gates.to(hidden.dtype)[:, None, :, None]).flatten(-2)


def noisy_top_k(clean: torch.Tensor, std: torch.Tensor | None, k: int) -> Routing:
    """Noisy top-k gating (Shazeer et al. 2017, equations 3 to 5).

    Args:
        clean: Logits, `(batch, experts)`.
        std: Standard deviation of the noise, of the same shape; None adds none.
        k: The number of experts to keep.
    """
    logits = clean if std is None else clean + torch.randn_like(clean) * std
    top, indices = logits.topk(k, dim=-1)
    weights = top.softmax(dim=-1)
    gates = torch.zeros_like(logits).scatter(-1, indices, weights)
    if std is None or k == clean.shape[-1]:
        return Routing(gates, weights, indices, (gates > 0).to(gates.dtype))
    return Routing(gates, weights, indices, _chance_of_top_k(clean, std, logits, k))


def _chance_of_top_k(clean: torch.Tensor, std: torch.Tensor, logits: torch.Tensor, k: int) -> torch.Tensor:
    """P(x, e): the chance that expert e is kept when only its noise is drawn again (same paper, equation 9)."""
    top = logits.topk(k + 1, dim=-1).values
    kept = logits >= top[:, k - 1 : k]
    # The threshold for an expert: the k-th greatest of the others.
    threshold = torch.where(kept, top[:, k:], top[:, k - 1 : k])
    return torch.special.ndtr((clean - threshold) / std)


def squared_variation(x: torch.Tensor) -> torch.Tensor:
    """CV²: the variance over the squared mean of `x`, `(experts,)`; 0 for a single expert."""
    if x.numel() == 1:
        return x.new_zeros(())
    return x.var() / (x.mean() ** 2 + 1e-10)
