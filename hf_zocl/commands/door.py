"""The door to every command: a refusal is one line, and a traceback is for bugs."""

from __future__ import annotations

import argparse
import functools
import os
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import NoReturn

import hf_zocl


# Faults of a value, a file, the Hub, or the installed packages; anything else is a bug.
REFUSALS = (ValueError, OSError, ImportError, MemoryError)
INTERRUPTED = 130  # the exit status of shells: 128 + SIGINT
# Seconds that a process other than its machine's first waits before it reports a refusal: usually the first process
# reports the same, and its end ends them all.
PATIENCE = 10


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, like all others, without the usage."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def command(main: Callable[[], None]) -> Callable[[], None]:
    """Decorate a script's `main`: a refusal ends it with one line, `error: …`, and exit status 1.

    With `--debug` on the command line, without a value, it ends with the traceback. Bugs always do. The first of
    the processes that a launcher has started reports for all; an error that only another one meets is reported by that
    one, a little later.
    """

    @functools.wraps(main)
    def guarded() -> None:
        if _asks_for_tracebacks():
            return main()
        try:
            main()
        except KeyboardInterrupt:
            if _is_first():
                print("error: interrupted", file=sys.stderr)
            sys.exit(INTERRUPTED)
        except BrokenPipeError:  # who reads the output has enough
            sys.stderr.close()
            sys.exit(1)
        except Exception as error:
            if not is_refusal(error):
                raise
            if not _is_first():
                time.sleep(PATIENCE)
            sys.exit(f"error: {one_line(error)}")

    return guarded


def _is_first() -> bool:
    """Tell whether this is the first process of a launch on its machine, or the only one."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def require(module: str, extra: str) -> None:
    """Look for a module that the package does not always install, before any work that would need it.

    Raises:
        ImportError: If it cannot be imported; the message says what to install.
    """
    try:
        import_module(module)
    except ImportError as error:
        raise ImportError(
            f'{module} is missing: pip install {module}, or the package with its extra "{extra}".'
        ) from error


def is_refusal(error: BaseException) -> bool:
    """Tell whether an error is a fault of the command's input."""
    return isinstance(error, REFUSALS) or type(error).__name__ == "OutOfMemoryError"


def one_line(error: BaseException) -> str:
    """An error's message on one line, with its type if the error is not from this package."""
    text = " ".join(str(error).split()) or "no message"
    return text if _is_worded_here(error) else f"{text} ({type(error).__name__}; --debug shows where)"


def _is_worded_here(error: BaseException) -> bool:
    trace = error.__traceback__
    if trace is None:
        return True
    while trace.tb_next is not None:
        trace = trace.tb_next
    file = Path(trace.tb_frame.f_code.co_filename)
    return any(file.is_relative_to(folder) for folder in (Path(hf_zocl.__file__).parent, Path(sys.argv[0]).parent))


def _asks_for_tracebacks() -> bool:
    """Take a bare `--debug` from the command line; with a value it is the Trainer's own."""
    argv = sys.argv
    for place, argument in enumerate(argv):
        if argument == "--debug" and (place + 1 == len(argv) or argv[place + 1].startswith("--")):
            del argv[place]
            return True
    return False
