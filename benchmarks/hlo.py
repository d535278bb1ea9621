"""What is in the program that XLA compiled."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax


@dataclass(frozen=True)
class Products:
    """Matrix products in a compiled program: `s8` of two int8 arrays into int32, `other` all else."""

    s8: int
    other: int


def compiled_products(function: Callable[..., Any], *args: Any) -> Products:
    """Counts the dots in the program that XLA compiled for this device; a loop's body counts once."""
    options = {"xla_backend_optimization_level": 0}  # of machine code: the program is the same
    text = jax.jit(function, compiler_options=options).lower(*args).compile().as_text()
    dtypes = dict(re.findall(r"(%[\w.-]+) = (\w+)\[", text))
    dots = re.findall(r"= (\w+)\[[^=]*? dot\((%[\w.-]+), (%[\w.-]+)\)", text)
    s8 = sum(result == "s32" and dtypes[a] == dtypes[b] == "s8" for result, a, b in dots)
    return Products(s8, len(dots) - s8)
