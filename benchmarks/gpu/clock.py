"""Times of programs on a GPU: of each kernel, by CUPTI on the device; and of the whole, by the host's clock.

A product's time is the sum of its kernels' times, without the gaps between launches. The host's clock has the gaps,
too. Where CUPTI doesn't work, and in rehearsals, there is only the host's.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
from gpu.setting import text_of
from jax import lax


def repeated(fn: Callable[..., jax.Array]) -> Callable[..., list[jax.Array]]:
    """`fn` over several sets of arguments, one after the other in one program.

    In turn, because one set would stay in the L2 cache, while a model reads each of its weights once per token. One
    after the other, because in a model each product waits for the one before.
    """
    fn = jax.jit(fn)  # traced once for all sets

    def program(sets: Sequence[tuple]) -> list[jax.Array]:
        outs: list[jax.Array] = []
        for first, *rest in sets:
            if outs:
                first, outs[-1] = lax.optimization_barrier((first, outs[-1]))
            outs.append(fn(first, *rest))
        return outs

    return program


def number_of_sets(bytes_each: int, cache_bytes: int, at_least: int = 1) -> int:
    """How many sets take turns, so that each is out of the cache when its turn comes: 3 times the cache together."""
    return max(at_least, min(48, -(-3 * cache_bytes // bytes_each)))


def measure(programs: dict[str, tuple[Any, tuple, int]], clock: str, rounds: int = 4) -> dict[str, dict[str, Any]]:
    """Times of compiled programs, which take turns in each round so that a GPU that slows down slows all.

    Args:
      programs: label -> (compiled, arguments, how many products a call computes).
      clock: "cupti" or "host".
      rounds: of which the medians are taken.

    Returns:
      label -> for one product: `wall_us` by the host's clock; with CUPTI `launches`, `kernels` (name, launches and
      microseconds of each), `us`, their sum, and how many `rounds` count; else `us` is `wall_us`. `spread` is that of
      `us` over the rounds, as a share. `clock` says which it is, `cupti_error` why it isn't the other.
    """
    wall: dict[str, list[float]] = {label: [] for label in programs}
    device: dict[str, list[list[tuple[str, float]]]] = {label: [] for label in programs}
    errors: dict[str, str] = {}
    calls = {label: _calls(compiled, args) for label, (compiled, args, _) in programs.items()}
    for _ in range(rounds):
        for label, (compiled, args, _) in programs.items():
            start = time.perf_counter()
            outs = [compiled(*args) for _ in range(calls[label])]
            jax.block_until_ready(outs)
            wall[label].append((time.perf_counter() - start) / calls[label] * 1e6)
            del outs
    for _ in range(rounds if clock == "cupti" else 0):
        for label, (compiled, args, _) in programs.items():
            if label not in errors:
                try:
                    device[label].append(kernel_times(compiled, args))
                except Exception as error:
                    errors[label] = text_of(error)
    return {
        label: _summary(wall[label], device[label], products, errors.get(label))
        for label, (_, _, products) in programs.items()
    }


def kernel_times(compiled: Any, args: tuple) -> list[tuple[str, float]]:
    """Name and microseconds of each kernel of a call, by CUPTI, after one call that isn't timed.

    Raises:
      RuntimeError: CUPTI doesn't work here, or saw nothing.
    """
    # Part of Mosaic GPU, an unstable interface: imported where it's used. With finalize=True it would detach from
    # CUPTI, and couldn't measure again.
    from jax.experimental.mosaic.gpu import profiler

    _, times = profiler.Cupti(finalize=False).measure(compiled, aggregate=False)(*args)
    if not times:
        raise RuntimeError("CUPTI saw no kernels")
    return [(name, milliseconds * 1e3) for name, milliseconds in times]


def _calls(compiled: Any, args: tuple) -> int:
    """How many calls take about 10 ms; the program has run twice then."""
    jax.block_until_ready(compiled(*args))
    start = time.perf_counter()
    jax.block_until_ready(compiled(*args))
    return max(1, min(50, int(0.01 / max(time.perf_counter() - start, 1e-6))))


def _summary(
    wall: list[float], device: list[list[tuple[str, float]]], products: int, error: str | None
) -> dict[str, Any]:
    result: dict[str, Any] = {"wall_us": statistics.median(wall) / products}
    if error:
        result["cupti_error"] = error
    if not device:
        return result | {"us": result["wall_us"], "spread": _spread(wall), "clock": "host"}
    # CUPTI may lose records. Rounds in which it did count for nothing.
    count = statistics.mode(len(kernels) for kernels in device)
    whole = [kernels for kernels in device if len(kernels) == count]
    totals = [sum(us for _, us in kernels) for kernels in whole]
    result |= {"us": statistics.median(totals) / products, "spread": _spread(totals), "clock": "cupti"}
    result |= {"launches": count / products, "rounds": len(whole)}
    names = dict.fromkeys(
        name for kernels in whole for name, _ in kernels
    )  # records needn't be in the order of launches
    each = {name: [[us for of, us in kernels if of == name] for kernels in whole] for name in names}
    result["kernels"] = [
        [name[:80], statistics.median(map(len, found)) / products, statistics.median(map(sum, found)) / products]
        for name, found in each.items()
    ]
    return result


def _spread(values: list[float]) -> float:
    return (max(values) - min(values)) / statistics.median(values)
