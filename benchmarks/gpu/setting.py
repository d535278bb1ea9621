"""What a stage runs on, and for what: a GPU, or a rehearsal at toy sizes in interpret mode."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from gpu.record import read_json

import pallas_kernels as pk
from pallas_kernels import tune

# Bytes of the L2 cache by the GPU's name, from NVIDIA's data sheets; of others, more than any of these has.
L2_BYTES = {"H200": 60 << 20, "H100": 50 << 20, "A100": 40 << 20, "4090": 72 << 20}
OTHER_L2_BYTES = 128 << 20


@dataclass(frozen=True)
class Setting:
    """A stage's arguments.

    Attributes:
      out: folder of this run's results, of which later stages read those of earlier ones.
      rehearse: toy sizes and interpreted kernels.
    """

    out: Path
    rehearse: bool = False

    @property
    def chip(self) -> pk.Chip:
        """The chip whose tiles are taken."""
        return pk.current_chip()

    @property
    def backends(self) -> tuple[str, ...]:
        """Kernels for many rows that run here."""
        return ("mosaic", "triton") if self.chip.mosaic and not self.rehearse else ("triton",)

    @property
    def implementation(self) -> str | None:
        """`jint8.matmul`'s: its default; in a rehearsal that of an interpreted kernel, where the default is XLA."""
        return "triton" if self.rehearse else None

    @property
    def cache_bytes(self) -> int:
        """The L2 cache, of which weights that a model reads once per token find nothing."""
        kind = jax.devices()[0].device_kind
        return 1 if self.rehearse else next((b for name, b in L2_BYTES.items() if name in kind), OTHER_L2_BYTES)

    @property
    def clock(self) -> str:
        """`"cupti"` where the stage "about" found that it works, else `"host"`."""
        return read_json(self.out / "about.json").get("clock", "host")

    def use_tuned(self) -> dict[str, dict]:
        """Takes the winners of this run's tuning for the tiles of this process; gives them, by entry of the table."""
        result = read_json(self.out / "tune.json")
        return tune.use_winners(result) if result.get("chip") == self.chip.name else {}


def compile_all(programs: dict[Any, tuple[Callable[..., Any], tuple]]) -> dict[Any, Any]:
    """key -> (function, arguments) becomes key -> compiled, or the error as text; side by side on the host's cores."""
    return compile_lowered({key: lower(fn, args) for key, (fn, args) in programs.items()})


def lower(fn: Callable[..., Any], args: tuple) -> Any:
    """The traced and lowered program, or the error as text: a tile that doesn't compile must not end a stage."""
    try:
        return jax.jit(fn).lower(*args)
    except Exception as error:
        return text_of(error)


def compile_lowered(programs: dict[Any, Any]) -> dict[Any, Any]:
    """The same keys, with what `lower` gave compiled."""

    def one(lowered: Any) -> Any:
        try:
            return lowered if isinstance(lowered, str) else lowered.compile()
        except Exception as error:
            return text_of(error)

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        return dict(zip(programs, pool.map(one, programs.values()), strict=True))


def text_of(error: Exception) -> str:
    """An error in a line of a result."""
    return f"{type(error).__name__}: {error}"[:500]
