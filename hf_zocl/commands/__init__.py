"""The commands of `python -m hf_zocl`, and the code that they share."""

from .door import Parser, command, require


__all__ = ["Parser", "command", "require"]
