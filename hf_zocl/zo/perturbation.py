"""Seeded random directions, and parameters moved along them and put back bit by bit."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from .assignment import ZOGroup


DIRECTIONS = ("gaussian", "rademacher")


def direction_seed(seed: int, step: int, micro_step: int, query: int) -> int:
    """The seed of one direction: a 63-bit hash of its key, so that the seeds of neighbours are unrelated."""
    digest = hashlib.blake2b(struct.pack("<4q", seed, step, micro_step, query), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def draw_directions(groups: Sequence[ZOGroup], seed: int, kind: str = "gaussian") -> list[torch.Tensor]:
    """Draw Δ for every parameter of `groups`, from a generator of its own.

    Args:
        groups: The parameters; the order of the groups fixes the order of the draws.
        seed: See `direction_seed`. The global random state is neither read nor changed.
        kind: `gaussian` (N(0, 1)) or `rademacher` (±1 with equal chance).

    Returns:
        One tensor per parameter, of its shape, dtype and device.
    """
    parameters = [parameter for group in groups for parameter in group.parameters]
    device = parameters[0].device
    generator = torch.Generator(device=device).manual_seed(seed)
    count = sum(parameter.numel() for parameter in parameters)
    if kind == "gaussian":
        flat = torch.randn(count, generator=generator, device=device)
    elif kind == "rademacher":
        flat = torch.randint(0, 2, (count,), generator=generator, device=device).float().mul_(2).sub_(1)
    else:
        raise ValueError(f"zo_direction={kind!r} is unknown: expected one of {', '.join(DIRECTIONS)}.")
    pieces = flat.split([parameter.numel() for parameter in parameters])
    return [piece.view_as(p).to(p.device, p.dtype) for piece, p in zip(pieces, parameters, strict=True)]


class Perturbation:
    """Moves the parameters of `groups` to θ + scale·Δ and back.

    Coming back is a copy of the saved values, not a subtraction, which would drift in floating point. The copy of the
    parameters is made on entering `saved` and lives as long as that block.
    """

    def __init__(self, groups: Sequence[ZOGroup]):
        self.eps = [group.eps for group in groups for _ in group.parameters]
        self._parameters = [parameter.data for group in groups for parameter in group.parameters]
        self._originals: list[torch.Tensor] | None = None

    @contextmanager
    def saved(self) -> Iterator[Perturbation]:
        """Save the parameters; restore them bit by bit on leaving, also when the block raises."""
        self._originals = [parameter.clone() for parameter in self._parameters]
        try:
            yield self
        finally:
            self.restore()
            self._originals = None

    def restore(self) -> None:
        torch._foreach_copy_(self._parameters, self._originals)

    def move(self, directions: Sequence[torch.Tensor], scale: float | Sequence[float]) -> None:
        """Set θ ← θ₀ + scale·Δ, from the saved θ₀, whatever the parameters are at present.

        Args:
            directions: Δ, one tensor per parameter.
            scale: One factor, or one factor per parameter.
        """
        scales = [scale] * len(directions) if isinstance(scale, (int, float)) else list(scale)
        self.restore()
        torch._foreach_add_(self._parameters, torch._foreach_mul(list(directions), scales))

    def perturb(self, directions: Sequence[torch.Tensor], sign: int = 1) -> None:
        """Set θ ← θ₀ ± εΔ, with the ε of each group."""
        self.move(directions, [sign * eps for eps in self.eps])
