"""What is run from the command line, and what the commands have in common."""

from .door import Parser, command, require


__all__ = ["Parser", "command", "require"]
