"""The door to every command: a refusal prints one line, and only a bug prints a traceback."""

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


# Faults in a value, a file, the Hub or the installed packages; anything else is a bug.
REFUSALS = (ValueError, OSError, ImportError, MemoryError)
INTERRUPTED = 130  # the exit status as in shells: 128 + SIGINT
# Seconds that a process other than the first of its machine waits before it reports a refusal: usually the first
# reports the same one, and ends them all.
PATIENCE = 10


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, like all refusals, without the usage."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def command(main: Callable[[], None]) -> Callable[[], None]:
    """Decorate a script's `main`: a refusal ends it with one line, `error: …`, and exit status 1.

    With a bare `--debug` on the command line, it ends with a traceback, as a bug always does. Of the processes that a
    launcher started, the first reports for all; an error that only another process meets is reported by that process,
    a little later.
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
        except BrokenPipeError:  # the reader of the output has closed it
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
    """Check for an optional module before any work that would need it.

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
    """Tell whether an error is a refusal, not a bug."""
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
    """Take a bare `--debug` off the command line; with a value, it is the Trainer's own argument."""
    argv = sys.argv
    for place, argument in enumerate(argv):
        if argument == "--debug" and (place + 1 == len(argv) or argv[place + 1].startswith("--")):
            del argv[place]
            return True
    return False
