"""What a compiled program sends between devices, read from its HLO text: XLA has no other interface for it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

KINDS = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")

# A module's text is a list of computations. Their instructions name others: a loop its condition and body, a
# conditional its branches, a fusion or a reduction what it applies.
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_COLLECTIVE = re.compile(rf"^\s+(?:ROOT )?%?[\w.-]+ = (.*?) ({'|'.join(KINDS)})\(")
_CALLED = re.compile(r"(?:calls|to_apply|condition|body|\w+_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")


class Collective(NamedTuple):
    """One operation between devices."""

    kind: str  # of `KINDS`
    nbytes: int  # of its result, on each device
    depth: int  # how many loops and conditionals are around it


def collectives(text: str) -> Iterator[Collective]:
    """The collectives in `jax.stages.Compiled.as_text()`.

    Not as often as they run: one in a loop's body comes once, those in a conditional's branches all come.
    """
    lines: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        if found := _COMPUTATION.match(line):
            name = found[2]
            lines[name] = []
            entry = name if found[1] else entry
        elif name:
            lines[name].append(line)

    def walk(name: str, depth: int) -> Iterator[Collective]:
        for line in lines[name]:
            if found := _COLLECTIVE.match(line):
                yield Collective(found[2], _nbytes(found[1]), depth)
                continue
            branches = ",".join(_BRANCHES.findall(line))
            called = _CALLED.findall(line) + re.findall(r"[\w.-]+", branches)
            for other in called:
                yield from walk(other, depth + (" while(" in line or " conditional(" in line))

    yield from walk(entry, 0)


def _nbytes(shape: str) -> int:
    """Bytes of an array such as `f32[2,8]{1,0}`, or of a tuple of them."""
    return sum(
        _itemsize(dtype) * math.prod(int(size) for size in sizes.split(",") if size)
        for dtype, sizes in _ARRAY.findall(shape)
    )


def _itemsize(dtype: str) -> int:
    bits = re.search(r"\d+", dtype)
    return max(1, int(bits[0]) // 8) if bits else 1  # pred has none
