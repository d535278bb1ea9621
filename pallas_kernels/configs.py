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

from pallas_kernels._numerics import DIGITS, K_EXACT
from pallas_kernels.chips import Chip

Backend = Literal["triton", "mosaic"]

# Up to this many rows of x are few. Their four planes are 128 stacked rows.
FEW_ROWS = 32

# How a product for many rows takes the outlier columns: as int8 digits (`_numerics.py`), or as the 16-bit floats that
# they are.
OutlierForm = Literal["digits", "floats"]

# A thread has at most 255 registers. Accumulators may take all but these, which are left for addresses, masks and
# operands; an estimate, which tests/kernels/test_compile.py holds against what the compiler does.
_REGISTERS = 255
_OTHER_REGISTERS = 56

# What a channel costs in a tile of 128 channels, relative to one of 256: such tiles read more and end more often. A
# prediction from the instructions' latencies, not a measurement.
_SMALL_TILE_COST = 1.1


@dataclass(frozen=True, kw_only=True)
class FewRowsConfig:
    """Tile of `int8_matmul_few_rows`. All rows are one tile; it varies over channels and k.

    Attributes:
      rows: for up to how many stacked rows, those of all planes of x, it has registers and shared memory.
      bn: output channels per program. Small, so that there are programs for every multiprocessor to read its share of
        the weights.
      bk: bytes of a weight row per step. 256 are 16 threads of a coalesced 16-byte load each.
      splits: parts of k, for n too small to fill the chip; more than 1 costs a second kernel that adds them.
        `pick_config` sets it by shape.
      num_warps: warps (of 32 threads) per program, which share a tile.
      num_stages: steps whose loads are in flight at the same time, to hide the memory's latency.
    """

    kind: ClassVar[str] = "few_rows"
    rows: int = 64
    bn: int = 32
    bk: int = 256
    splits: int = 1
    num_warps: int = 4
    num_stages: int = 4

    def shared_bytes(self) -> int:
        """An upper bound of the shared memory: both operands of every stage."""
        return (self.rows + self.bn) * self.bk * self.num_stages

    def accumulators(self) -> int:
        """Registers per thread: the int32 sums, and the float32 values that they become."""
        return 2 * self.rows * self.bn // (32 * self.num_warps)

    def sizes(self) -> tuple[int, ...]:
        """Dimensions of the blocks that are multiplied."""
        return self.rows, self.bn, self.bk


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
    height: ClassVar[int] = 1  # rows are allocated for a multiple of it

    def outlier_form(self, dtype: DTypeLike, *, per_token: bool) -> OutlierForm:
        """In which form the kernel takes the outlier columns of an x of this dtype: always as digits."""
        return "digits"

    def outlier_block(self, form: OutlierForm) -> int:
        """Gathered columns per step: what a tensor core contracts in one instruction, 32 bytes of int8."""
        return 32

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
      bn: output channels per block. One wgmma has up to 256; wider ones read less of x per multiplication.
      bk: depth of a step in bytes. 128 is the widest row that TMA can swizzle.
      group: tiles of rows whose blocks run together, so that they share weights in the L2 cache.
      num_stages: slots in the ring of shared memory: so many steps are copied ahead, less the one that is multiplied
        while the next one starts.
      cluster: blocks below each other that receive each tile of weights by one copy.
    """

    kind: ClassVar[str] = "mosaic"
    bm: int = 128
    bn: int = 256
    bk: int = 128
    group: int = 8
    num_stages: int = 4
    cluster: int = 1

    @property
    def height(self) -> int:
        """Rows are allocated for a multiple of it."""
        return self.bm * self.cluster

    def outlier_form(self, dtype: DTypeLike, *, per_token: bool) -> OutlierForm:
        """In which form the kernel takes the outlier columns of an x of this dtype.

        Digits where a row's result must not depend on the other rows, or where x has 32 bits.
        """
        return "digits" if per_token or jnp.dtype(dtype).itemsize != 2 else "floats"

    def outlier_block(self, form: OutlierForm) -> int:
        """Gathered columns per step: as many as fill a slot of the ring."""
        return self.bk if form == "digits" else self.bk // 2

    def shared_bytes(self) -> int:
        """An upper bound of the shared memory: the ring, 16-bit results on their way out, and barriers."""
        results = 2 * self.bm * 64 * 2  # two buffers of 64 channels
        return (self.bm + self.bn) * self.bk * self.num_stages + results + 1024

    def accumulators(self) -> int:
        """Registers per thread of a warpgroup, for 64 rows: the float32 totals, and a digit's sums for half of bn."""
        return 64 * (self.bn + self.bn // 2) // 128

    def sizes(self) -> tuple[int, ...]:
        """Dimensions of the blocks that are multiplied."""
        return self.bm, self.bn // 2, self.bk


TileConfig = FewRowsConfig | TritonConfig | MosaicConfig
_CLASSES: dict[str, type[TileConfig]] = {c.kind: c for c in (FewRowsConfig, TritonConfig, MosaicConfig)}


def mosaic_supports(m: int, n: int, k: int, dtype: DTypeLike, config: MosaicConfig) -> bool:
    """Whether the Mosaic kernel computes a product.

    It wants at least one tile of channels and one step of k, n and k that are multiples of 64 (the tiles of TMA), a k
    for which int32 sums are exact, and a 16-bit result, for which `MosaicConfig.shared_bytes` has room. Otherwise the
    sizes needn't be multiples of the tile's.
    """
    enough = m > 0 and n >= config.bn and config.bk <= k <= K_EXACT
    return enough and n % 64 == 0 and k % 64 == 0 and jnp.dtype(dtype).itemsize == 2


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
        if config.bn not in (128, 256):
            raise ValueError(f"Expected bn to be 128 or 256, got {config}")
    if any(value < 1 for value in asdict(config).values()):
        raise ValueError(f"Expected every parameter to be at least 1, got {config}")
    if isinstance(config, TritonConfig) and config.bn % config.panels:
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


def shape_class(m: int, n: int, *, chip: Chip, backend: Backend, planes: int = 1 + DIGITS) -> str:
    """Which entry of a chip's table serves a product.

    Up to `FEW_ROWS` rows it is "few_16", "few_64" or "few_128", by how many stacked rows the planes of x have, which
    are one tile. Above, "<backend>_small" is up to 64 rows; "<backend>_large" has tiles of 128 by 256 and
    "<backend>_medium" of 128 by 128. Which of the two takes less time depends on how full the rounds are in which the
    multiprocessors work them off: in the last one, some have nothing to do.

    Args:
      m: rows.
      n: output channels.
      chip: what it runs on.
      backend: "triton" or "mosaic".
      planes: into how many int8 planes few rows are split; 1 without outliers.

    Returns:
      The name of a shape class.

    Examples:
      >>> from pallas_kernels.chips import CHIPS
      >>> shape_class(2048, 8192, chip=CHIPS["sm_80"], backend="triton")
      'triton_large'
      >>> [shape_class(m, 8192, chip=CHIPS["sm_90"], backend="mosaic") for m in (1, 16, 17, 33)]
      ['few_16', 'few_64', 'few_128', 'mosaic_small']
    """
    if m <= FEW_ROWS:
        return next(f"few_{rows}" for rows in (16, 64, 128) if planes * m <= rows)
    if m <= 64:
        return f"{backend}_small"

    def time(width: int, cost: float) -> float:
        return -(-(-(-m // 128) * -(-n // width)) // chip.cores) * width * cost

    return f"{backend}_large" if time(256, 1.0) <= time(128, _SMALL_TILE_COST) else f"{backend}_medium"
