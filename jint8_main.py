"""The console script `jint8`: `jint8.cli.main` in a process of its own, from its first moment to its last.

Outside of the package, whose import takes a second, most of it JAX's: Ctrl-C in that second ends the process with one
line, too.
"""

import contextlib
import os
import signal
import sys
import warnings
from types import FrameType
from typing import Any

INTERRUPTED = 130


def interrupted(signum: int, frame: FrameType | None) -> None:
    """Ends the process, which has nothing to tidy up yet."""
    os.write(2, b"jint8: interrupted\n")
    os._exit(INTERRUPTED)


def run() -> None:
    """Runs the command line, and ends the process with its status."""
    # A shell that starts a process in the background has it ignore SIGINT, and Python then installs no handler.
    attended = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if attended:
        signal.signal(signal.SIGINT, interrupted)
    from jint8.cli import main

    warnings.formatwarning = one_line
    status = INTERRUPTED
    with contextlib.suppress(KeyboardInterrupt):  # beside what `main` itself does about it
        if attended:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        status = main()
        if attended:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
    leave(status)


def one_line(message: Warning | str, category: type[Warning], *where: Any, **also: Any) -> str:
    """A warning as the command line shows it: what is for users as one line, like an error, without a place in code."""
    if category is UserWarning:
        return f"jint8: warning: {' '.join(str(message).split())}\n"
    return _PYTHONS(message, category, *where, **also)


_PYTHONS = warnings.formatwarning


def leave(status: int) -> None:
    """Ends the process without Python's teardown: threads of XLA that still compile would crash in it."""
    for stream in (sys.stdout, sys.stderr):
        # There may be none, it may be closed, or not take what it's given.
        with contextlib.suppress(AttributeError, OSError, ValueError):
            stream.flush()
    os._exit(status)
