"""What is said on standard error while somebody waits: messages, bars, and a line for what takes over a second."""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

Progress = Callable[[int, int], None]

LONG = 1.0  # seconds after which somebody who waits wants to know what for
# JAX's events: a program is about to be compiled, or read from the cache; and it is ready.
LOWERED, READY = "/jax/core/compile/jaxpr_to_mlir_module_duration", "/jax/core/compile/backend_compile_duration"
COMPILING, READING = "compiling", "reading compiled programs"


def say(args: argparse.Namespace, text: str = "") -> None:
    """A message on standard error."""
    if args.quiet:
        return
    if "tqdm" in sys.modules:  # there may be a bar in the line
        sys.modules["tqdm"].tqdm.write(text, file=sys.stderr)
        sys.stderr.flush()
    else:
        print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def said_if_slow(args: argparse.Namespace, text: str) -> Iterator[None]:
    """Says a text when the block takes longer than a second."""
    timer = _timer(LONG, functools.partial(say, args, text))
    try:
        yield
    finally:
        timer.cancel()


@contextlib.contextmanager
def progress_bar(args: argparse.Namespace, what: str, slow: str | None = None, **options: Any) -> Iterator[Progress]:
    """A function of (done, total) that draws a bar on a terminal.

    Elsewhere it does nothing, and the text `slow` is said when the block takes longer than a second.
    """
    if args.quiet or not sys.stderr.isatty():
        with contextlib.nullcontext() if slow is None else said_if_slow(args, slow):
            yield lambda done, total: None
        return
    from tqdm import tqdm

    with tqdm(desc=what, leave=False, file=sys.stderr, **options) as bar:

        def update(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield update


class Compilation:
    """Adds up the time that programs take to compile, or to read, and has it said once when it exceeds a second.

    Attributes:
      say: called with `COMPILING` or `READING` then.
    """

    def __init__(self) -> None:
        self.say: Callable[[str], None] = lambda what: None
        self._seconds = {COMPILING: 0.0, READING: 0.0}
        self._said: set[str] = set()
        self._lock = threading.Lock()
        self._running: dict[int, tuple[str, float, threading.Timer]] = {}  # by the thread that waits for it

    def event(self, event: str, duration_secs: float, **_: str | int) -> None:
        """What JAX calls when something has taken time."""
        if event == LOWERED:
            self._begin(COMPILING)
        elif event == READY:
            self._end()

    def found(self) -> None:
        """What is about to be compiled was found in the cache."""
        self._end()
        self._begin(READING)

    def _begin(self, what: str) -> None:
        self._end()  # what was lowered needn't have been compiled
        with self._lock:
            timer = _timer(max(0.0, LONG - self._seconds[what]), functools.partial(self._say_once, what))
            self._running[threading.get_ident()] = what, time.perf_counter(), timer

    def _end(self) -> None:
        with self._lock:
            if (running := self._running.pop(threading.get_ident(), None)) is not None:
                what, begin, timer = running
                timer.cancel()
                self._seconds[what] += time.perf_counter() - begin

    def _say_once(self, what: str) -> None:
        with self._lock:
            first = what not in self._said
            self._said.add(what)
        if first:
            self.say(what)


@functools.cache
def compilation() -> Compilation:
    """That of this process, which JAX tells its events."""
    import jax.monitoring

    watch = Compilation()
    jax.monitoring.register_event_duration_secs_listener(watch.event)
    return watch


def say_no_more() -> None:
    """Has nothing said of programs that are compiled after the command."""
    if compilation.cache_info().currsize:
        compilation().say = lambda what: None


def _timer(seconds: float, call: Callable[[], None]) -> threading.Timer:
    timer = threading.Timer(seconds, call)
    timer.daemon = True  # nobody waits for it at the end of the process
    timer.start()
    return timer
