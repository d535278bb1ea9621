"""Greedy generation, token by token and timed, for engines that leave the loop to their caller."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple


class Generated(NamedTuple):
    """What an engine's `generate` returns."""

    first_s: float  # until the first token of each prompt is known
    rest_s: float  # for the steps after it
    tokens: list[list[int]]  # of each prompt: 1 + steps


def generate(start: Callable[[], Sequence[int]], step: Callable[[Sequence[int]], Sequence[int]], steps: int):
    """The first token of each prompt from `start()`, then `steps` times the next from `step(tokens)`."""
    begin = time.perf_counter()
    columns = [start()]
    middle = time.perf_counter()
    for _ in range(steps):
        columns.append(step(columns[-1]))
    end = time.perf_counter()
    return Generated(
        middle - begin, end - middle, [[int(token) for token in row] for row in zip(*columns, strict=True)]
    )
