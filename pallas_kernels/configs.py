"""Tiles: what they mean, which of them fit a chip, and the table of defaults per chip and shape class."""

import functools
import json
from dataclasses import asdict, dataclass
from importlib import resources
from typing import Any, ClassVar

import jax.numpy as jnp

from pallas_kernels._numerics import K_EXACT
from pallas_kernels.chips import Chip

# A thread has 255 registers; addresses, masks and what the pipeline keeps take about this many.
_OTHER_REGISTERS = 56


@dataclass(frozen=True, kw_only=True)
class FewRowsConfig:
    """Tile of `int8_matmul_few_rows`.

    bn: output channels per program. Small, so that every multiprocessor reads its share of the weights.
    bk: bytes of one weight row per step. 256 are 16 threads of a coalesced 16-byte load each.
    splits: parts of k, for n too small to fill the chip; more than 1 costs a second kernel. `pick_config` sets it by
      shape.
    num_warps, num_stages: stages are the loads in flight that hide the memory's latency.
    """

    kind: ClassVar[str] = "few_rows"
    bn: int = 32
    bk: int = 256
    splits: int = 1
    num_warps: int = 4
    num_stages: int = 4

    def shared_bytes(self) -> int:
        """Both operands of every stage in flight, for 64 stacked rows."""
        return (64 + self.bn) * self.bk * self.num_stages

    def accumulators(self) -> int:
        """Registers per thread: int32 sums and the float32 that they become."""
        return 2 * 64 * self.bn // (32 * self.num_warps)

    def sizes(self) -> tuple[int, ...]:
        """Dimensions of blocks: powers of two of at least 16, as tensor cores take them."""
        return self.bn, self.bk


@dataclass(frozen=True, kw_only=True)
class TritonConfig:
    """Tile of the mixed product in Triton.

    bm, bn: rows and output channels per program: each operand byte is used bn or bm times.
    bk: depth of a step in bytes; 128 is a full line of the memory and four int8 tensor-core steps.
    panels: parts of bn with accumulators of their own. The outlier part holds one panel beside the sum, so that two
      panels let a tile of 128 by 256 fit the registers.
    group: tiles of rows that run together, for reuse of weights in the L2.
    """

    kind: ClassVar[str] = "triton"
    bm: int = 128
    bn: int = 128
    bk: int = 128
    panels: int = 1
    group: int = 8
    num_warps: int = 8
    num_stages: int = 3

    def shared_bytes(self) -> int:
        """Both operands of every stage in flight."""
        return (self.bm + self.bn) * self.bk * self.num_stages

    def accumulators(self) -> int:
        """Registers per thread: the float32 sum, and int32 for one panel."""
        return self.bm * (self.bn + self.bn // self.panels) // (32 * self.num_warps)

    def sizes(self) -> tuple[int, ...]:
        """Dimensions of blocks: powers of two of at least 16, as tensor cores take them."""
        return self.bm, self.bn // self.panels, self.bk


@dataclass(frozen=True, kw_only=True)
class MosaicConfig:
    """Tile of the mixed product in Mosaic GPU on Hopper.

    bm, bn: rows and output channels per block; bm is 128, 64 rows for each of the two warpgroups that multiply.
    bk: depth of a step in bytes; 128 is the widest swizzle of a copy by TMA.
    panels: as in `TritonConfig`.
    group: tiles of rows that run together, for reuse of weights in the L2.
    num_stages: steps whose copies are in flight.
    """

    kind: ClassVar[str] = "mosaic"
    bm: int = 128
    bn: int = 128
    bk: int = 128
    panels: int = 1
    group: int = 8
    num_stages: int = 4

    def shared_bytes(self) -> int:
        """Operands of every stage, two stages of outlier columns, the 16-bit tile on its way out, and barriers."""
        digits = 2 * (self.bm + self.bn // self.panels) * 32
        return (self.bm + self.bn) * self.bk * self.num_stages + digits + self.bm * self.bn * 2 + 1024

    def accumulators(self) -> int:
        """Registers per thread of a warpgroup: the float32 sum of 64 rows, and int32 for one panel."""
        return 64 * (self.bn + self.bn // self.panels) // 128

    def sizes(self) -> tuple[int, ...]:
        """Dimensions of blocks."""
        return self.bm, self.bn // self.panels, self.bk


def mosaic_supports(m: int, n: int, k: int, dtype, config: MosaicConfig) -> bool:
    """Whether the Mosaic kernel computes a product: whole tiles of n and k (rows are padded), a 16-bit result."""
    return m > 0 and n % config.bn == 0 and k % config.bk == 0 and k <= K_EXACT and jnp.dtype(dtype).itemsize == 2


Config = FewRowsConfig | TritonConfig | MosaicConfig
_KINDS: dict[str, Any] = {c.kind: c for c in (FewRowsConfig, TritonConfig, MosaicConfig)}


def check_config(config: Config, chip: Chip) -> None:
    """Refuses a tile that can't work on a chip, before a compiler has to.

    Args:
      config: the tile.
      chip: an entry of `CHIPS`.

    Raises:
      ValueError: block dimensions that aren't powers of two of at least 16, more shared memory than a block of the chip
        may use, or accumulators that leave no registers for anything else.
      NotImplementedError: a Mosaic tile for a chip without wgmma.

    Example:
      >>> from pallas_kernels.chips import CHIPS
      >>> check_config(TritonConfig(bm=128, bn=256, num_stages=4), CHIPS["sm_89"])
      Traceback (most recent call last):
        ...
      ValueError: Expected at most 101376 bytes of shared memory on sm_89, got 196608 for ...
    """
    if config.kind == "mosaic" and not chip.mosaic:
        raise NotImplementedError(f"Expected a chip with wgmma (sm_90) for {config}, got {chip.name}")
    if isinstance(config, MosaicConfig) and config.bm != 128:
        raise ValueError(f"Expected bm to be 128, got {config}")
    if any(size < 16 or size & (size - 1) for size in config.sizes()):
        raise ValueError(f"Expected block dimensions that are powers of two of at least 16, got {config}")
    if config.shared_bytes() > chip.shared_bytes:
        raise ValueError(
            f"Expected at most {chip.shared_bytes} bytes of shared memory on {chip.name}, "
            f"got {config.shared_bytes()} for {config}"
        )
    if config.accumulators() > 255 - _OTHER_REGISTERS:
        raise ValueError(
            f"Expected at most {255 - _OTHER_REGISTERS} registers of accumulators per thread, "
            f"got {config.accumulators()} for {config}"
        )


@functools.cache
def default_configs() -> dict[tuple[str, str], Config]:
    """The table in `configs.json`: (chip, shape class) -> config."""
    table = json.loads((resources.files("pallas_kernels") / "configs.json").read_text())
    return {
        (chip, shape): from_json(entry) for chip, shapes in table["configs"].items() for shape, entry in shapes.items()
    }


def to_json(config: Config) -> dict:
    """A config as an entry of a JSON table."""
    return {"kind": config.kind, **asdict(config)}


def from_json(entry: dict) -> Config:
    """The config that `to_json` wrote."""
    return _KINDS[entry["kind"]](**{key: value for key, value in entry.items() if key != "kind"})


def shape_class(m: int, n: int, *, chip: Chip, backend: str, few_rows: int) -> str:
    """Which row of the table serves a product: "few", or "<backend>_small", "_medium", "_large".

    small: at most 64 rows. large: enough large tiles (128 by 256) to occupy every multiprocessor at least twice, so
      that the last, partial round of tiles weighs little. medium: the rest.

    Args:
      m: rows.
      n: output channels.
      chip: what it runs on.
      backend: "triton" or "mosaic".
      few_rows: up to how many rows count as few.

    Returns:
      The name of a shape class.

    Example:
      >>> from pallas_kernels.chips import CHIPS
      >>> shape_class(2048, 8192, chip=CHIPS["sm_80"], backend="triton", few_rows=16)
      'triton_large'
    """
    if m <= few_rows:
        return "few"
    if m <= 64:
        return f"{backend}_small"
    tiles = -(-m // 128) * -(-n // 256)
    return f"{backend}_large" if tiles >= 2 * chip.cores else f"{backend}_medium"
