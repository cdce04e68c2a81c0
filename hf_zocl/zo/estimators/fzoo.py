"""FZOO (ICLR 2026): one-sided differences over the deviation σ of the q losses, so ε and the loss's scale cancel:

    g = 1/q · Σᵢ [L(θ+εΔᵢ) − L(θ)] / σ · Δᵢ

Zero where σ is no greater than the rounding of a loss: the quotients would be nothing but rounding.
"""

from __future__ import annotations

import torch

from .one_sided import OneSided


# Rounding moves a loss by up to this many spacings of its number format.
ROUNDING = 4


class FZOO(OneSided):
    name = "fzoo"
    least_queries = 2
    has_scale = False

    def quotients(self, losses: torch.Tensor, base_loss: torch.Tensor, eps: float, noise: float) -> torch.Tensor:
        least = (ROUNDING * torch.finfo(losses.dtype).eps * base_loss.abs()).clamp_min(noise)
        deviation = finite_std(losses)
        return torch.where(deviation > least, (losses - base_loss) / deviation, 0.0)


def finite_std(losses: torch.Tensor) -> torch.Tensor:
    """The standard deviation of the finite losses, without waiting for the device to count them."""
    is_finite = losses.isfinite()
    count, known = is_finite.sum(), losses.nan_to_num(0.0, 0.0, 0.0) * is_finite
    squares = ((known - known.sum() / count) * is_finite).square().sum()
    return (squares / (count - 1)).sqrt().nan_to_num(0.0, 0.0)
