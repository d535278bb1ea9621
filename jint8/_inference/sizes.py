"""Sizes of the programs that `by_layers` runs, from short lists, and whether there is memory for them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jint8.models._cache import empty_layer
from jint8.models._config import ModelConfig

PIECES = (64, 128, 256, 512)  # tokens of a prompt that go through the layers at once
SLOTS = 384


def rows_for(count: int) -> int:
    """How many rows a call of `count` has: the next power of two."""
    return 1 << (count - 1).bit_length()


def slots_for(length: int) -> int:
    """How many slots a cache for `length` tokens has: `SLOTS` times a power of two."""
    slots = SLOTS
    while slots < length:
        slots *= 2
    return slots


def sizes(longest: int, max_tokens: int, *, alone: bool) -> tuple[int, int]:
    """The column where the longest prompt ends, and the slots of a cache with room for `max_tokens` more.

    A prompt that is alone stays where it is, behind its padding; rows of several are moved, and have none in common.
    """
    padded = padded_length(longest)
    if alone:
        return padded, slots_for(padded + max_tokens)
    return longest, slots_for(max(padded, longest + max_tokens))


class Reached(NamedTuple):
    """A prompt that runs the same programs as others of its padded length, with a cache of some size."""

    slots: int
    length: int  # the shortest of those prompts
    alone: bool  # whether a request of one prompt has such a cache; one of several may have it for a longer prompt


def reachable(prompt: int, max_tokens: int) -> list[Reached]:
    """What stands for all requests whose prompts have up to `prompt` tokens, and answers up to `max_tokens`."""
    most, found = PIECES[-1], []
    starts = [(more + before, more + piece) for more in (0, most) for before, piece in pairwise((0, *PIECES))]
    slots = SLOTS
    while slots <= sizes(prompt, max_tokens, alone=True)[1]:
        for before, padded in starts:  # prompts of before + 1 to padded tokens
            if before < prompt and padded <= slots:
                longest = padded if padded <= most else padded_length(prompt)
                alone = slots_for(padded + 1) <= slots <= slots_for(longest + max_tokens)
                found.append(Reached(slots, before + 1, alone))
        slots *= 2
    return found


def is_long(prompts: Sequence[Sequence[int]]) -> bool:
    """Whether prompts go through the model in more than one piece."""
    return max(map(len, prompts), default=0) > PIECES[-1]


def check_memory(config: ModelConfig, rows: int, slots: int, dtype: Any, max_tokens: int) -> None:
    """Refuse a cache that the machine has no memory for, before anything is computed.

    Raises:
      MemoryError: it says what is needed, and how many slots would fit.
    """
    free = free_memory()
    bytes_per_slot = sum(
        leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(_abstract_layer(config, 1, 1, dtype))
    )
    bytes_per_slot *= config.num_layers * rows
    if free is None or bytes_per_slot * slots <= free:
        return
    raise MemoryError(
        f"Expected a cache that fits into the {free / 1e9:,.1f} GB of memory that are free, got "
        f"max_tokens={max_tokens}, for which {rows} rows of {slots} tokens need "
        f"{bytes_per_slot * slots / 1e9:,.1f} GB; {free // bytes_per_slot:,} tokens would fit, "
        "prompt and answer together (more with cache='int8')."
    )


def free_memory() -> int | None:
    """Bytes that the system has for a process, without swapping; None where it doesn't say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None


def _abstract_layer(config: ModelConfig, rows: int, slots: int, dtype: Any) -> Any:
    return jax.eval_shape(lambda: empty_layer(config, rows, slots, dtype))


def empty_arrays(config: ModelConfig, rows: int, slots: int, dtype: Any) -> Any:
    """A layer's empty cache in NumPy, which needs no program, and no memory of its own."""
    zeros = lambda leaf: np.zeros(leaf.shape, leaf.dtype)  # pages that nothing is written to are all the same one
    return jax.tree.map(zeros, _abstract_layer(config, rows, slots, dtype))


def padded_length(length: int) -> int:
    """The length that a prompt is padded to: that of the `pieces` that it goes through the layers in."""
    whole, rest = divmod(length, PIECES[-1])
    return whole * PIECES[-1] + next(piece for piece in (0, *PIECES) if piece >= rest)


def pieces(padded: int) -> Iterator[tuple[int, int]]:
    """Begin and end of each piece of a prompt; only the first may be shorter than the largest of `PIECES`."""
    begin, end = 0, padded % PIECES[-1] or PIECES[-1]
    while begin < padded:
        yield begin, end
        begin, end = end, end + PIECES[-1]
