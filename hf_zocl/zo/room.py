"""Reuses memory: fresh pages cost more than writing to them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch


# Tensors in one buffer start at multiples of this many bytes.
ALIGNMENT = 64


class Room:
    """Lends buffers, and keeps those that come back for the next request, until `clear`.

    It keeps as many as were lent at once, each as large as the largest request it has served.

    Args:
        keeps: Whether buffers are kept.
    """

    def __init__(self, keeps: bool = False):
        self._keeps = keeps
        self._free: list[torch.Tensor] = []

    @contextmanager
    def like(self, tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
        """Lend, for the block, contiguous tensors of the same shapes, dtypes and devices, with arbitrary content."""
        sizes: dict[torch.device, int] = {}
        places = []
        for tensor in tensors:
            start = sizes.get(tensor.device, 0)
            places.append((tensor.device, start))
            sizes[tensor.device] = start + -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        buffers = {device: self._take(device, size) for device, size in sizes.items()}
        try:
            yield [
                buffers[device][start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
                for tensor, (device, start) in zip(tensors, places, strict=True)
            ]
        finally:
            self._free += buffers.values() if self._keeps else ()

    def clear(self) -> None:
        self._free.clear()

    def _take(self, device: torch.device, size: int) -> torch.Tensor:
        """The smallest free buffer that is large enough; else a new one, which replaces the largest."""
        mine = sorted((buffer for buffer in self._free if buffer.device == device), key=len)
        chosen = next((buffer for buffer in mine if len(buffer) >= size), mine[-1] if mine else None)
        if chosen is not None:
            self._free = [buffer for buffer in self._free if buffer is not chosen]
            if len(chosen) >= size:
                return chosen
            del chosen, mine
        return torch.empty(size, dtype=torch.uint8, device=device)
