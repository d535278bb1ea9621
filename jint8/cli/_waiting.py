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
# JAX's events of a program: it is about to be compiled (or read from the cache), was read, is ready.
BEGIN, READ, READY = (
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "/jax/compilation_cache/cache_retrieval_time_sec",
    "/jax/core/compile/backend_compile_duration",
)


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


def watch_compilation(args: argparse.Namespace, text: str) -> None:
    """Has a text said, once per process, when programs have taken a second to compile, one after another."""
    watch = _compilation()
    watch.say = functools.partial(say, args, text)


class Compilation:
    """Adds up the time that programs take to compile, and calls `say` once when it exceeds a second.

    Attributes:
      say: what is called then.
    """

    def __init__(self) -> None:
        self.say: Callable[[], None] = lambda: None
        self._said = False
        self._seconds = 0.0
        self._lock = threading.Lock()
        self._running: dict[int, tuple[float, threading.Timer]] = {}  # by the thread that compiles

    def event(self, event: str, duration_secs: float, **_: str | int) -> None:
        """What JAX calls with the end of each event that takes time."""
        if event not in (BEGIN, READ, READY):
            return
        thread = threading.get_ident()
        with self._lock:
            begin, timer = self._running.pop(thread, (None, None))
            if timer is not None:
                timer.cancel()
            if self._said:
                return
            if event == READY and begin is not None:
                self._seconds += time.perf_counter() - begin
            if event == BEGIN:
                timer = _timer(max(0.0, LONG - self._seconds), self._say_once)
                self._running[thread] = time.perf_counter(), timer

    def _say_once(self) -> None:
        with self._lock:
            first, self._said = not self._said, True
        if first:
            self.say()


@functools.cache
def _compilation() -> Compilation:
    import jax.monitoring

    watch = Compilation()
    jax.monitoring.register_event_duration_secs_listener(watch.event)
    return watch


def _timer(seconds: float, call: Callable[[], None]) -> threading.Timer:
    timer = threading.Timer(seconds, call)
    timer.daemon = True  # nobody waits for it at the end of the process
    timer.start()
    return timer
