"""Random directions, drawn from seeds, and sums of them."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch


def direction_seed(seed: int, step: int, micro_step: int, query: int) -> int:
    """The seed of one direction: a 63-bit hash of its key, so that the seeds of neighbours are unrelated."""
    digest = hashlib.blake2b(struct.pack("<4q", seed, step, micro_step, query), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def draw_direction(count: int, seed: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Draw Δ, whose n coordinates are ±1 with equal chance (Rademacher; of all with unit variance, the least noisy).

    From a generator of its own: the global random state is neither read nor changed.

    Args:
        count: n.
        seed: See `direction_seed`.

    Returns:
        Float32, shape `(n,)`.
    """
    generator = torch.Generator(device=device).manual_seed(seed)
    return torch.randint(0, 2, (count,), generator=generator, device=device, dtype=torch.float32).mul_(2).sub_(1)


@dataclass(frozen=True, eq=False)
class Combination:
    """Σᵢ wᵢ·Δᵢ, or its sign, times a scale: directions by their seeds alone, so that a step is a few numbers.

    Attributes:
        seeds: The seed of every Δᵢ.
        weights: wᵢ, shape `(q,)`.
        scale: Multiplies the sum, or its sign.
        sign: Whether to take the sign.
        is_tangent: Whether parameters stay at θ and carry this as their tangent, in forward-mode differentiation.
        moved: (a, b), where the weights are from losses at θ+a·Δᵢ and θ+b·Δᵢ. Where θ is kept in half precision, both
            are rounded, and Δᵢ stands for their difference over a − b: the move that was made.
    """

    seeds: tuple[int, ...]
    weights: torch.Tensor | Sequence[float]
    scale: float = 1.0
    sign: bool = False
    is_tangent: bool = False
    moved: tuple[float, float] | None = None

    def scaled(self, factor: float) -> Combination:
        return replace(self, scale=self.scale * factor)
