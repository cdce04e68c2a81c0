"""What the scripts have in common."""

from .door import Parser, command


__all__ = ["Parser", "command"]
