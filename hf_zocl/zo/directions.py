"""Random directions, drawn from seeds, and sums of them."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch


# Coordinates drawn at once: a block stays in the processor's cache between drawing and adding.
BLOCK = 1 << 20
# Signs in a word, and in a number from the generator.
WORD, DRAWN = 32, 64
_SIGN_BIT = -(1 << (WORD - 1))


def direction_seed(seed: int, step: int, micro_step: int, query: int) -> int:
    """The seed of one direction: a 63-bit hash of its key, so that neighbouring keys give unrelated seeds."""
    digest = hashlib.blake2b(struct.pack("<4q", seed, step, micro_step, query), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class Direction:
    """A direction Δ: n coordinates, each ±1 with equal chance (Rademacher, the least noisy choice of unit variance).

    It is drawn block by block, 64 signs from one random number, by a generator of its own: the global random state is
    neither read nor changed.

    Args:
        count: n.
        seed: See `direction_seed`.
    """

    def __init__(self, count: int, seed: int, device: torch.device | str = "cpu"):
        self._left, self._device = count, torch.device(device)
        self._generator = torch.Generator(device=device).manual_seed(seed)
        self._shifts = torch.arange(WORD, dtype=torch.int32, device=device).view(-1, 1)

    def next(self, weight: float | torch.Tensor = 1.0, room: torch.Tensor | None = None) -> torch.Tensor:
        """The next block of weight·Δ, of `BLOCK` coordinates or as many as are left.

        Args:
            weight: The factor.
            room: A tensor from `room_for`, to write the block to.

        Returns:
            Float32.
        """
        size = min(self._left, BLOCK)
        self._left -= size
        width = -(-size // WORD)
        numbers = torch.empty(-(-size // DRAWN), dtype=torch.int64, device=self._device)
        words = numbers.random_(-(1 << (DRAWN - 1)), None, generator=self._generator).view(torch.int32)[:width]
        room = room_for(size, self._device) if room is None else room[: width * WORD]
        # Bit k of every word becomes the sign bit of a float, and the xor adds the weight's bits.
        bits = torch.as_tensor(weight, dtype=torch.float32, device=self._device).view(torch.int32)
        signs = torch.bitwise_left_shift(words, self._shifts, out=room.view(torch.int32).view(WORD, width))
        signs.bitwise_and_(_SIGN_BIT).bitwise_xor_(bits)
        return room[:size]


def room_for(count: int, device: torch.device | str) -> torch.Tensor:
    """An empty tensor with room for a block of a direction of `count` coordinates."""
    return torch.empty(-(-min(count, BLOCK) // WORD) * WORD, dtype=torch.float32, device=device)


def draw_direction(count: int, seed: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Draw a whole `Direction`.

    Returns:
        Float32, shape `(n,)`.
    """
    direction = Direction(count, seed, device)
    blocks = [direction.next() for _ in range(0, count, BLOCK)]
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks or [torch.empty(0, device=device)])


@dataclass(frozen=True, eq=False)
class Combination:
    """Σᵢ wᵢ·Δᵢ, or its sign, times a scale. Directions are kept as seeds, so a step is a few numbers.

    Attributes:
        seeds: The seed of every Δᵢ.
        weights: wᵢ, shape `(q,)`.
        scale: Multiplies the sum, or its sign.
        sign: Whether to take the sign.
        is_tangent: Whether parameters stay at θ and carry this as their tangent, in forward-mode differentiation.
        moved: (a, b), if the weights come from losses at θ+a·Δᵢ and θ+b·Δᵢ. In half precision both points are rounded,
            and Δᵢ stands for their difference over a − b, the move that was really made.
    """

    seeds: tuple[int, ...]
    weights: torch.Tensor | Sequence[float]
    scale: float = 1.0
    sign: bool = False
    is_tangent: bool = False
    moved: tuple[float, float] | None = None

    def scaled(self, factor: float) -> Combination:
        return replace(self, scale=self.scale * factor)
