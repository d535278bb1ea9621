"""Compiled programs that a process keeps: at most so many, the latest used ones.

`jax.jit` keeps every program that it ever compiled. Each holds a few megabytes and memory maps, of which a process has
a limited number, so one that answers for hours with other shapes in each request would end by running out of them.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import functools
import sys
import threading
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import jax

SPARE = 16  # programs that may come on top of those compiled ahead
LIMIT = 64  # more than one model's requests reach, whose shapes come from short lists


class Programs:
    """Functions compiled for the shapes of their arguments, of which the least recently used are dropped.

    A dropped program's memory is free when nothing runs it any more; the next call with its shapes compiles it again.
    """

    def __init__(self, limit: int = LIMIT):
        self.limit = limit
        self.made = 0  # how many there have been, with those that were dropped
        self._kept: collections.OrderedDict[Hashable, Callable[..., Any]] = collections.OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    @contextlib.contextmanager
    def keeping(self) -> Iterator[None]:
        """A context in which none is dropped; what was made in it is within the limit from then on, with some more."""
        before, self.limit = self.limit, sys.maxsize
        try:
            yield
        finally:
            self.limit = max(before, len(self) + SPARE)

    def get(
        self, function: Callable[..., Any], static: tuple[Hashable, ...], args: tuple[Any, ...], donate: tuple[int, ...]
    ) -> Callable[..., Any]:
        """A jitted `function(*static, *args)` for arguments of these shapes, to be called with `args` alone.

        Args:
          function: defined in a module, so that it is the same one each time.
          static: its first arguments, part of the program.
          args: the others: pytrees of arrays.
          donate: which of `args`, by their numbers, the program may overwrite.

        Returns:
          The program. Whoever calls it many times keeps it meanwhile.
        """
        key = _key(function, static, args, donate)
        with self._lock:
            program = self._kept.pop(key, None)
            if program is None:
                # A partial of its own, because JAX keeps programs by function: they go when the function does.
                self.made += 1
                program = jax.jit(functools.partial(function, *static), donate_argnums=donate)
            self._kept[key] = program  # the latest used is the last
            while len(self._kept) > self.limit:
                self._kept.popitem(last=False)
        return program

    def find(
        self, function: Callable[..., Any], static: tuple[Hashable, ...], args: tuple[Any, ...], donate: tuple[int, ...]
    ) -> Callable[..., Any] | None:
        """What `get` returns, if it is kept already."""
        key = _key(function, static, args, donate)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def run(
        self,
        function: Callable[..., Any],
        static: tuple[Hashable, ...],
        args: tuple[Any, ...],
        donate: tuple[int, ...] = (),
    ) -> Any:
        """The result of `get` called with `args`."""
        return self.get(function, static, args, donate)(*args)


def _key(function: Any, static: tuple[Hashable, ...], args: tuple[Any, ...], donate: tuple[int, ...]) -> Hashable:
    leaves, structure = jax.tree.flatten(args)
    return function, static, donate, structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves)


PROGRAMS = Programs()  # of all models of the process


def give_back() -> None:
    """Returns memory that was freed to the system, where the C library is one that keeps it.

    Compiling a program and a cache's arrays leave hundreds of megabytes free in the middle of the heap.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
