"""The mixed product for many rows on Hopper: TMA, wgmma, a warpgroup that only copies, blocks that stay.

Two warpgroups multiply, 64 rows each; the third fills a ring of buffers in shared memory ahead of them, also across
tiles. What a tile is made of is one sequence of steps for all three: int8 over all of k, then for each panel and digit
the gathered columns, whose number is read from the device.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import sequential_vmap
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _mosaic
from pallas_kernels._numerics import DIGITS
from pallas_kernels.chips import CHIPS
from pallas_kernels.configs import MosaicConfig
from pallas_kernels.quantize_rows import OUTLIER_BLOCK, QuantizedRows

_WARPGROUPS = 2  # that multiply; bm is 64 rows for each
_ROWS = 64
_DIGIT_STAGES = 2


def _tiled(width: int, dtype):
    """Layout of a buffer that TMA fills or empties and wgmma reads: rows of at most 128 bytes, swizzled."""
    size = jnp.dtype(dtype).itemsize
    swizzle = min(128, width * size)
    return plgpu.TilingTransform((8, swizzle // size)), plgpu.SwizzleTransform(swizzle)


def _ring(width: int, rows: int, stages: int):
    return plgpu.SMEM((stages, rows, width), jnp.int8, transforms=_tiled(width, jnp.int8))


def _body(
    *refs: Any, config: MosaicConfig, tiles: tuple[int, int], steps: int, blocks: int, outliers: bool, bias: bool
):
    (q, w, factors, scale), rest = refs[:4], refs[4:]
    (digits, columns, number), rest = (rest[:3], rest[3:]) if outliers else ((None,) * 3, rest)
    bias_ref, rest = (rest[0], rest[1:]) if bias else (None, rest)
    y, a_ring, b_ring, y_smem, full, empty, *digit_scratch = rest
    bm, bn, bk, panels, width = config.bm, config.bn, config.bk, config.panels, config.bn // config.panels
    m_tiles, n_tiles = tiles
    warpgroup, block = lax.axis_index("warpgroup"), lax.axis_index("block")
    digit_steps = lax.div(number[0] + (OUTLIER_BLOCK - 1), OUTLIER_BLOCK) if outliers else 0
    layout = plgpu.Layout.WGMMA

    def over_tiles(per_tile, counters):
        """Runs per_tile(row, column, counters) for the tiles of this block, `group` tiles of rows at a time."""

        def one(i, counters):
            tile = block + i * blocks
            per_group = config.group * n_tiles
            first = lax.div(tile, per_group) * config.group
            height = jnp.minimum(m_tiles - first, config.group)
            within = lax.rem(tile, per_group)
            return per_tile((first + lax.rem(within, height)) * bm, lax.div(within, height) * bn, counters)

        count = lax.div(m_tiles * n_tiles - block + (blocks - 1), blocks)
        return lax.fori_loop(0, count, one, counters)

    @pl.when(warpgroup == _WARPGROUPS)
    def _copy():
        plgpu.set_max_registers(40, action="decrease")

        def fill(ring, barriers, stages, at, sources):
            slot = lax.rem(at, stages)
            ready, free = barriers

            @pl.when(at >= stages)
            def _wait():
                plgpu.barrier_wait(free.at[slot])

            for source, buffer in zip(sources, ring, strict=True):
                plgpu.copy_gmem_to_smem(source, buffer.at[slot], ready.at[slot])
            return at + 1

        def per_tile(row, column, counters):
            def step(t, at):
                depth = pl.ds(t * bk, bk)
                sources = q.at[pl.ds(row, bm), depth], w.at[pl.ds(column, bn), depth]
                return fill((a_ring, b_ring), (full, empty), config.num_stages, at, sources)

            at = lax.fori_loop(0, steps, step, counters[0])
            if not outliers:
                return (at,)
            digits_at = counters[1]
            for panel in range(panels):

                def digit_step(t, at, panel=panel):
                    cols = pl.ds(column + panel * width, width)
                    digit, block = lax.div(t, digit_steps), lax.rem(t, digit_steps)
                    depth = pl.ds(block * OUTLIER_BLOCK, OUTLIER_BLOCK)
                    sources = digits.at[digit, pl.ds(row, bm), depth], columns.at[cols, depth]
                    return fill(digit_scratch[:2], digit_scratch[2:], _DIGIT_STAGES, at, sources)

                digits_at = lax.fori_loop(0, DIGITS * digit_steps, digit_step, digits_at)
            return at, digits_at

        over_tiles(per_tile, (jnp.int32(0),) * (2 if outliers else 1))

    @pl.when(warpgroup < _WARPGROUPS)
    def _multiply():
        plgpu.set_max_registers(232, action="increase")
        own = pl.ds(warpgroup * _ROWS, _ROWS)

        def multiply(ring, barriers, stages, at, accs):
            slot = lax.rem(at, stages)
            ready, free = barriers
            a, b = ring
            plgpu.barrier_wait(ready.at[slot])
            for panel, acc in enumerate(accs):
                plgpu.wgmma(acc, a.at[slot, own], _mosaic.transposed(b.at[slot, pl.ds(panel * width, width)]))
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(free.at[slot])
            return at + 1

        def per_tile(row, column, counters):
            rows = pl.ds(row + warpgroup * _ROWS, _ROWS)

            def scaled(acc, plane):
                factor = _mosaic.load(factors.at[plane, rows], layout.reduce(1))
                return acc.astype(jnp.float32) * lax.broadcast_in_dim(factor, acc.shape, (0,))

            def int8_part(*accs):
                def step(_, at):
                    return multiply((a_ring, b_ring), (full, empty), config.num_stages, at, accs)

                at = lax.fori_loop(0, steps, step, counters[0])
                return at, [scaled(acc[...], 0) for acc in accs]

            at, totals = pl.run_scoped(int8_part, *[plgpu.ACC((_ROWS, width), jnp.int32)] * panels)

            def add_digit(digit, carry):
                def part(acc):
                    def step(_, at):
                        return multiply(digit_scratch[:2], digit_scratch[2:], _DIGIT_STAGES, at, [acc])

                    at = lax.fori_loop(0, digit_steps, step, carry[0])
                    return at, scaled(acc[...], 1 + digit)

                at, value = pl.run_scoped(part, plgpu.ACC((_ROWS, width), jnp.int32))
                return at, carry[1] + value

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the tile before
            digits_at = counters[1:]
            for panel, total in enumerate(totals):
                cols = pl.ds(column + panel * width, width)

                def per_column(ref, cols=cols, shape=total.shape):
                    return lax.broadcast_in_dim(_mosaic.load(ref.at[cols], layout.reduce(0)), shape, (1,))

                if outliers:
                    *digits_at, total = lax.fori_loop(0, DIGITS, add_digit, (*digits_at, total))
                total = total * per_column(scale)
                if bias_ref is not None:
                    total = total + per_column(bias_ref)
                y_smem[warpgroup, panel] = total.astype(y_smem.dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(y_smem.at[warpgroup, panel], y.at[rows, cols])
            return (at, *digits_at)

        over_tiles(per_tile, (jnp.int32(0),) * (2 if outliers else 1))
        plgpu.wait_smem_to_gmem(0)


def int8_matmul_mixed_mosaic(
    x: QuantizedRows,
    w: jax.Array,
    w_scale: jax.Array,
    *,
    outlier_w: jax.Array | None,
    number: jax.Array | None,
    bias: jax.Array | None,
    dtype,
    config: MosaicConfig,
    interpret: bool,
) -> jax.Array:
    """See `int8_matmul_mixed`; the shapes must be ones that `mosaic_supports`."""
    m, k = x.q.shape
    n = w.shape[0]
    outliers = x.digits is not None
    # Rows are padded to whole tiles; what comes out of them is cut off again.
    pad = -m % config.bm
    q, factors, digits = x
    if pad:
        q, factors = jnp.pad(q, ((0, pad), (0, 0))), jnp.pad(factors, ((0, 0), (0, pad)))
        digits = jnp.pad(digits, ((0, 0), (0, pad), (0, 0))) if digits is not None else None
    tiles = (m + pad) // config.bm, n // config.bn
    blocks = min(CHIPS["sm_90"].cores, tiles[0] * tiles[1])
    width = config.bn // config.panels
    stages = config.num_stages

    scratch = [
        _ring(config.bk, config.bm, stages),
        _ring(config.bk, config.bn, stages),
        plgpu.SMEM((_WARPGROUPS, config.panels, _ROWS, width), dtype, transforms=_tiled(width, dtype)),
        plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        plgpu.Barrier(num_arrivals=_WARPGROUPS, num_barriers=stages),
    ]
    if outliers:
        scratch += [
            _ring(OUTLIER_BLOCK, config.bm, _DIGIT_STAGES),
            _ring(OUTLIER_BLOCK, width, _DIGIT_STAGES),
            plgpu.Barrier(num_arrivals=2, num_barriers=_DIGIT_STAGES),
            plgpu.Barrier(num_arrivals=_WARPGROUPS, num_barriers=_DIGIT_STAGES),
        ]

    def int8_matmul(*refs):  # a function and no partial, for the name of the machine code
        steps = k // config.bk
        _body(*refs, config=config, tiles=tiles, steps=steps, blocks=blocks, outliers=outliers, bias=bias is not None)

    @sequential_vmap  # Mosaic kernels have no batching rule
    def run(*args):
        return plgpu.kernel(
            int8_matmul,
            out_type=jax.ShapeDtypeStruct((m + pad, n), dtype),
            scratch_types=scratch,
            grid=(blocks,),
            grid_names=("block",),
            num_threads=_WARPGROUPS + 1,
            thread_name="warpgroup",
            compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
            **_mosaic.interpret_arguments(interpret),
        )(*args)

    args = [q, w, factors, w_scale]
    args += [a for a in (digits, outlier_w, number) if a is not None] if outliers else []
    args += [] if bias is None else [bias.astype(jnp.float32)]
    return run(*args)[:m]
