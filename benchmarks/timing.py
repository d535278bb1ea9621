"""Timing on a device: programs that repeat a product over rotating operands, and medians of their time."""

import statistics
import time
from collections.abc import Callable, Sequence

import jax
from jax import lax


def repeated(fn: Callable) -> Callable:
    """fn over several sets of operands, one after the other in one program.

    One program, because a launch from Python costs more than a product of few rows; one after the other, because in a
    model each product waits for the one before; several sets, because one would stay in the L2 cache.
    """
    fn = jax.jit(fn)  # traced and lowered once for all sets

    def program(sets: Sequence[tuple]):
        outs: list[jax.Array] = []
        for first, *rest in sets:
            if outs:
                first, outs[-1] = lax.optimization_barrier((first, outs[-1]))
            outs.append(fn(first, *rest))
        return outs

    return program


def seconds(program: Callable, *args, repeats: int, rounds: int = 7, budget: float = 0.3) -> dict[str, float]:
    """Median and spread over rounds of the time of one of the program's `repeats` repetitions.

    Args:
      program: compiled; returns arrays.
      *args: its arguments.
      repeats: how many repetitions one call makes.
      rounds: how many medians' worth of calls.
      budget: seconds to spend, about.

    Returns:
      {"seconds": median, "spread": (largest - smallest) / median}.
    """
    jax.block_until_ready(program(*args))
    start = time.perf_counter()
    jax.block_until_ready(program(*args))
    once = time.perf_counter() - start
    calls = max(1, min(50, int(budget / rounds / max(once, 1e-6))))
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        outs = [program(*args) for _ in range(calls)]
        jax.block_until_ready(outs)
        times.append((time.perf_counter() - start) / calls / repeats)
        del outs
    median = statistics.median(times)
    return {"seconds": median, "spread": (max(times) - min(times)) / median}


def sets_for(bytes_each: int, *, at_least: int, cache_bytes: int) -> int:
    """How many sets of operands rotate, so that together they are several times the cache."""
    return max(at_least, min(24, -(-3 * cache_bytes // max(bytes_each, 1))))
