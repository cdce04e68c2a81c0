"""Passes in full precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def without_autocast(device_type: str) -> Iterator[None]:
    """Inside, no autocast is on: neither one around this block, nor one that is entered within it."""
    enter = torch.autocast.__enter__

    def enter_disabled(context: torch.autocast):
        enabled, context._enabled = context._enabled, False
        try:
            return enter(context)
        finally:
            context._enabled = enabled

    with torch.autocast(device_type, enabled=False):
        torch.autocast.__enter__ = enter_disabled
        try:
            yield
        finally:
            torch.autocast.__enter__ = enter
