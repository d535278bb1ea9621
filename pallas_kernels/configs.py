"""Tile configs: what each parameter means, which configs fit a chip, and the table of defaults per chip and shape.

A kernel works off the result in tiles, and a config says how large they are and how the work on one is organised. The
limits below were read from compiled kernels. The defaults in `configs.json` were chosen by them, not by timing.
"""

import functools
import json
from dataclasses import asdict, dataclass
from importlib import resources
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels._numerics import K_EXACT
from pallas_kernels.chips import Chip

Backend = Literal["triton", "mosaic"]

# A thread has at most 255 registers. Accumulators may take all but these, which are left for addresses, masks and
# operands; an estimate, which tests/kernels/test_compile.py holds against what the compiler does.
_REGISTERS = 255
_OTHER_REGISTERS = 56


@dataclass(frozen=True, kw_only=True)
class FewRowsConfig:
    """Tile of `int8_matmul_few_rows`. All rows are one tile; it varies over channels and k.

    Attributes:
      bn: output channels per program. Small, so that there are programs for every multiprocessor to read its share of
        the weights.
      bk: bytes of a weight row per step. 256 are 16 threads of a coalesced 16-byte load each.
      splits: parts of k, for n too small to fill the chip; more than 1 costs a second kernel that adds them.
        `pick_config` sets it by shape.
      num_warps: warps (of 32 threads) per program, which share a tile.
      num_stages: steps whose loads are in flight at the same time, to hide the memory's latency.
    """

    kind: ClassVar[str] = "few_rows"
    bn: int = 32
    bk: int = 256
    splits: int = 1
    num_warps: int = 4
    num_stages: int = 4

    def shared_bytes(self) -> int:
        """An upper bound of the shared memory: both operands of every stage, for 64 stacked rows."""
        return (64 + self.bn) * self.bk * self.num_stages

    def accumulators(self) -> int:
        """Registers per thread for 64 stacked rows: the int32 sums, and the float32 values that they become."""
        return 2 * 64 * self.bn // (32 * self.num_warps)

    def sizes(self) -> tuple[int, ...]:
        """Dimensions of the blocks that are multiplied."""
        return self.bn, self.bk


@dataclass(frozen=True, kw_only=True)
class TritonConfig:
    """Tile of the product for many rows in Triton.

    Attributes:
      bm: rows per program; a weight that was loaded is used for so many.
      bn: output channels per program; a value of x that was loaded is used for so many.
      bk: depth of a step in bytes. 128 are a cache line, and four tensor-core instructions of 32.
      panels: parts of bn that are accumulated one after the other in the outlier part, which needs int32 sums beside
        the float32 totals. With two, a tile of 128 by 256 fits the registers.
      group: tiles of rows whose programs run together, so that they share weights in the L2 cache.
      num_warps: warps (of 32 threads) per program, which share a tile.
      num_stages: steps whose loads are in flight at the same time, to hide the memory's latency.
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
        """An upper bound of the shared memory: both operands of every stage."""
        return (self.bm + self.bn) * self.bk * self.num_stages

    def accumulators(self) -> int:
        """Registers per thread: the float32 totals, and int32 sums for one panel."""
        return self.bm * (self.bn + self.bn // self.panels) // (32 * self.num_warps)

    def sizes(self) -> tuple[int, ...]:
        """Dimensions of the blocks that are multiplied."""
        return self.bm, self.bn // self.panels, self.bk


@dataclass(frozen=True, kw_only=True)
class MosaicConfig:
    """Tile of the product for many rows in Mosaic GPU, on Hopper.

    Attributes:
      bm: rows per block; always 128, the 64 of a wgmma for each of the two warpgroups that multiply.
      bn: output channels per block.
      bk: depth of a step in bytes. 128 is the widest row that TMA can swizzle.
      panels: as in `TritonConfig`.
      group: tiles of rows whose blocks run together, so that they share weights in the L2 cache.
      num_stages: buffers in the ring of shared memory: so many steps are copied ahead.
    """

    kind: ClassVar[str] = "mosaic"
    bm: int = 128
    bn: int = 128
    bk: int = 128
    panels: int = 1
    group: int = 8
    num_stages: int = 4

    def shared_bytes(self) -> int:
        """An upper bound of the shared memory: both rings, the 16-bit result on its way out, and barriers."""
        outliers = 2 * (self.bm + self.bn // self.panels) * 32  # two stages of 32 outlier columns
        return (self.bm + self.bn) * self.bk * self.num_stages + outliers + self.bm * self.bn * 2 + 1024

    def accumulators(self) -> int:
        """Registers per thread of a warpgroup, for 64 rows: the float32 totals, and int32 sums for one panel."""
        return 64 * (self.bn + self.bn // self.panels) // 128

    def sizes(self) -> tuple[int, ...]:
        """Dimensions of the blocks that are multiplied."""
        return self.bm, self.bn // self.panels, self.bk


TileConfig = FewRowsConfig | TritonConfig | MosaicConfig
_CLASSES: dict[str, type[TileConfig]] = {c.kind: c for c in (FewRowsConfig, TritonConfig, MosaicConfig)}


def mosaic_supports(m: int, n: int, k: int, dtype: DTypeLike, config: MosaicConfig) -> bool:
    """Whether the Mosaic kernel computes a product.

    It wants whole tiles of n and k (rows are padded), a k for which int32 sums are exact, and a 16-bit result, for
    which `MosaicConfig.shared_bytes` has room.
    """
    return m > 0 and n % config.bn == 0 and k % config.bk == 0 and k <= K_EXACT and jnp.dtype(dtype).itemsize == 2


def check_config(config: TileConfig, chip: Chip) -> None:
    """Refuses a tile that can't work on a chip, before a compiler has to.

    Args:
      config: the tile.
      chip: an entry of `CHIPS`.

    Raises:
      ValueError: a parameter below 1, panels that don't divide bn, warps that aren't a power of two, block dimensions
        that aren't powers of two of at least 16 (what tensor cores take), more shared memory than a block of the chip
        may use, or accumulators that leave too few registers for anything else.
      NotImplementedError: a Mosaic tile for a chip without wgmma.

    Examples:
      >>> from pallas_kernels.chips import CHIPS
      >>> check_config(TritonConfig(bm=128, bn=256, num_stages=4), CHIPS["sm_89"])
      Traceback (most recent call last):
        ...
      ValueError: Expected at most 101376 bytes of shared memory on sm_89, got 196608 for ...
    """
    if isinstance(config, MosaicConfig):
        if not chip.mosaic:
            raise NotImplementedError(f"Expected a chip with wgmma (sm_90) for {config}, got {chip.name}")
        if config.bm != 128:
            raise ValueError(f"Expected bm to be 128, got {config}")
    if any(value < 1 for value in asdict(config).values()):
        raise ValueError(f"Expected every parameter to be at least 1, got {config}")
    if not isinstance(config, FewRowsConfig) and config.bn % config.panels:
        raise ValueError(f"Expected panels to divide bn, got {config}")
    if not isinstance(config, MosaicConfig) and config.num_warps & (config.num_warps - 1):
        raise ValueError(f"Expected num_warps to be a power of two, got {config}")
    if any(size < 16 or size & (size - 1) for size in config.sizes()):
        raise ValueError(f"Expected block dimensions that are powers of two of at least 16, got {config}")
    if config.shared_bytes() > chip.shared_bytes:
        raise ValueError(
            f"Expected at most {chip.shared_bytes} bytes of shared memory on {chip.name}, "
            f"got {config.shared_bytes()} for {config}"
        )
    if config.accumulators() > _REGISTERS - _OTHER_REGISTERS:
        raise ValueError(
            f"Expected at most {_REGISTERS - _OTHER_REGISTERS} registers of accumulators per thread, "
            f"got {config.accumulators()} for {config}"
        )


@functools.cache
def default_configs() -> dict[tuple[str, str], TileConfig]:
    """The table in `configs.json`: (chip, shape class) -> config."""
    table = json.loads((resources.files("pallas_kernels") / "configs.json").read_text())
    return {
        (chip, shape): from_json(entry) for chip, shapes in table["configs"].items() for shape, entry in shapes.items()
    }


def to_json(config: TileConfig) -> dict[str, Any]:
    """A config as an entry of a JSON table."""
    return {"kind": config.kind, **asdict(config)}


def from_json(entry: dict[str, Any]) -> TileConfig:
    """The config that `to_json` wrote."""
    return _CLASSES[entry["kind"]](**{key: value for key, value in entry.items() if key != "kind"})


def shape_class(m: int, n: int, *, chip: Chip, backend: Backend, few_rows: int) -> str:
    """Which entry of a chip's table serves a product: "few", or "<backend>_small", "_medium" or "_large".

    "small" is up to 64 rows. "large" has enough tiles of 128 by 256 to occupy every multiprocessor at least twice, so
    that the last round of tiles, in which some multiprocessors have nothing to do, is at most a third of the work.
    "medium" is what lies between.

    Args:
      m: rows.
      n: output channels.
      chip: what it runs on.
      backend: "triton" or "mosaic".
      few_rows: up to how many rows count as few.

    Returns:
      The name of a shape class.

    Examples:
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
