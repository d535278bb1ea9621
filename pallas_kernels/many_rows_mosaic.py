"""The product for many rows on Hopper in Mosaic GPU: a persistent, warp-specialized kernel with TMA and wgmma.

One block per multiprocessor stays for the whole product and works off tiles of the result. Of its three warpgroups (128
threads each) the last is the producer: it only issues TMA copies, from device memory into a ring of buffers in shared
memory. The other two are consumers: they multiply with wgmma out of that ring, 64 rows of the tile each. Barriers pass
the buffers to and fro, and the producer runs ahead of the consumers, also from one tile into the next.

Producer and consumers walk through the same steps of a tile: first the int8 product over all of k, in steps of `bk`;
then, for each panel of channels and each outlier digit, the gathered outlier columns in steps of `OUTLIER_BLOCK`. How
many outlier columns there are is read from device memory.

int8 wgmma takes both operands with k contiguous (other orders exist for 16-bit types only): so weights are stored
[n, k]. Nothing here has run on a GPU yet; it was compiled for sm_90a and interpreted.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import sequential_vmap
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from pallas_kernels import _mosaic
from pallas_kernels._numerics import DIGITS
from pallas_kernels.chips import CHIPS
from pallas_kernels.configs import MosaicConfig
from pallas_kernels.quantize_rows import OUTLIER_BLOCK, QuantizedRows

_CONSUMERS = 2  # warpgroups that multiply; warpgroup number 2 is the producer
_ROWS = 64  # of the tile per consumer: the height of a wgmma
_DIGIT_STAGES = 2  # buffers in the ring for outlier columns

# Registers per thread. The register file of a multiprocessor has 65536, and 128 * (2 * 232 + 40) = 64512. The
# accumulators are the consumers', so the producer hands over what it doesn't need.
_CONSUMER_REGISTERS, _PRODUCER_REGISTERS = 232, 40


def _tiled(width: int, dtype: DTypeLike) -> tuple[Any, Any]:
    """The layout of a buffer in shared memory that TMA fills or empties and wgmma reads.

    Rows are cut to at most 128 bytes, eight of them are a tile, and within a tile the 16-byte pieces are permuted
    ("swizzled") so that reading a column of them touches each bank of shared memory once.
    """
    size = jnp.dtype(dtype).itemsize
    swizzle = min(128, width * size)
    return plgpu.TilingTransform((8, swizzle // size)), plgpu.SwizzleTransform(swizzle)


def _ring(width: int, rows: int, stages: int):
    """`stages` int8 buffers of [rows, width] in shared memory."""
    return plgpu.SMEM((stages, rows, width), jnp.int8, transforms=_tiled(width, jnp.int8))


def _body(
    *refs: Any,  # the operands, the result and the scratch memory of `int8_matmul_mixed_mosaic`, in its order
    config: MosaicConfig,
    tiles: tuple[int, int],
    steps: int,
    blocks: int,
    outliers: bool,
    bias: bool,
):
    """What one warpgroup of one block does; `tiles` of rows and channels, `steps` over k per tile."""
    (q, w, factors, scale), rest = refs[:4], refs[4:]  # [m, k], [n, k], [1 or 4, m], [n]
    # Outlier digits [3, m, k], the same columns of the weights [n, k], their number [1]
    (digits, columns, number), rest = (rest[:3], rest[3:]) if outliers else ((None,) * 3, rest)
    bias_ref, rest = (rest[0], rest[1:]) if bias else (None, rest)  # [n]
    y, a_ring, b_ring, y_smem, full, empty, *digit_scratch = rest  # y: [m, n]
    bm, bn, bk, panels, width = config.bm, config.bn, config.bk, config.panels, config.bn // config.panels
    m_tiles, n_tiles = tiles
    warpgroup, block = lax.axis_index("warpgroup"), lax.axis_index("block")
    digit_steps = lax.div(number[0] + (OUTLIER_BLOCK - 1), OUTLIER_BLOCK) if outliers else 0
    layout = plgpu.Layout.WGMMA

    def over_tiles(per_tile, counters):
        """Runs per_tile(row, column, counters) for this block's tiles: every `blocks`-th one.

        Tiles are numbered in groups of `group` tiles of rows, the rows fastest, so that blocks that run at the same
        time share the same weights and a few tiles of x in the L2 cache.
        """

        def one(i, counters):
            tile = block + i * blocks
            per_group = config.group * n_tiles
            first = lax.div(tile, per_group) * config.group
            height = jnp.minimum(m_tiles - first, config.group)
            within = lax.rem(tile, per_group)
            return per_tile((first + lax.rem(within, height)) * bm, lax.div(within, height) * bn, counters)

        count = lax.div(m_tiles * n_tiles - block + (blocks - 1), blocks)
        return lax.fori_loop(0, count, one, counters)

    # Both sides count the steps they have taken, over all tiles: step `at` uses buffer at % stages of the ring. One
    # counter for the ring of k, one for the ring of outlier columns.
    counters = (jnp.int32(0),) * (2 if outliers else 1)

    @pl.when(warpgroup == _CONSUMERS)
    def _producer():
        plgpu.set_max_registers(_PRODUCER_REGISTERS, action="decrease")

        def fill(ring, barriers, stages, at, sources):
            slot = lax.rem(at, stages)
            ready, free = barriers

            # Wait until the consumers are done with the buffer. The first round finds all of them empty.
            @pl.when(at >= stages)
            def _wait():
                plgpu.barrier_wait(free.at[slot])

            # Start the copies of both operands. Each arrives at the barrier when its bytes are there.
            for source, buffer in zip(sources, ring, strict=True):
                plgpu.copy_gmem_to_smem(source, buffer.at[slot], ready.at[slot])
            return at + 1

        def per_tile(row, column, counters):
            # Copy the tiles of q and w, over all of k.
            def step(t, at):
                depth = pl.ds(t * bk, bk)
                sources = q.at[pl.ds(row, bm), depth], w.at[pl.ds(column, bn), depth]
                return fill((a_ring, b_ring), (full, empty), config.num_stages, at, sources)

            at = lax.fori_loop(0, steps, step, counters[0])
            if not outliers:
                return (at,)
            # Copy the outlier columns: for each panel, all blocks of the first digit, then of the next.
            digits_at = counters[1]
            for panel in range(panels):

                def digit_step(t, at, panel=panel):
                    cols = pl.ds(column + panel * width, width)
                    digit, outlier_block = lax.div(t, digit_steps), lax.rem(t, digit_steps)
                    depth = pl.ds(outlier_block * OUTLIER_BLOCK, OUTLIER_BLOCK)
                    sources = digits.at[digit, pl.ds(row, bm), depth], columns.at[cols, depth]
                    return fill(digit_scratch[:2], digit_scratch[2:], _DIGIT_STAGES, at, sources)

                digits_at = lax.fori_loop(0, DIGITS * digit_steps, digit_step, digits_at)
            return at, digits_at

        over_tiles(per_tile, counters)

    @pl.when(warpgroup < _CONSUMERS)
    def _consumer():
        plgpu.set_max_registers(_CONSUMER_REGISTERS, action="increase")
        own = pl.ds(warpgroup * _ROWS, _ROWS)  # this warpgroup's rows of a tile

        def multiply(ring, barriers, stages, at, accs):
            slot = lax.rem(at, stages)
            ready, free = barriers
            a, b = ring
            # Wait for the copies, then accumulate in int32: [64, bk] times the transpose of [width, bk], per panel.
            plgpu.barrier_wait(ready.at[slot])
            for panel, acc in enumerate(accs):
                plgpu.wgmma(acc, a.at[slot, own], _mosaic.transposed(b.at[slot, pl.ds(panel * width, width)]))
            # wgmma is asynchronous and reads shared memory: only once it is done may the buffer be filled again.
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(free.at[slot])
            return at + 1

        def per_tile(row, column, counters):
            rows = pl.ds(row + warpgroup * _ROWS, _ROWS)

            def scaled(acc, plane):
                # The int32 sums of a plane (0: kept values, 1 to 3: digits) times the rows' factors.
                factor = _mosaic.load(factors.at[plane, rows], layout.reduce(1))  # [64]
                return acc.astype(jnp.float32) * lax.broadcast_in_dim(factor, acc.shape, (0,))

            # The kept values, over all of k, with one int32 accumulator per panel. `run_scoped` ends the accumulators'
            # lifetime, so that the registers are free for the digits' one.
            def int8_part(*accs):
                def step(_, at):
                    return multiply((a_ring, b_ring), (full, empty), config.num_stages, at, accs)

                at = lax.fori_loop(0, steps, step, counters[0])
                return at, [scaled(acc[...], 0) for acc in accs]

            at, totals = pl.run_scoped(int8_part, *[plgpu.ACC((_ROWS, width), jnp.int32)] * panels)

            # One digit of the outlier columns, for one panel: again int32 sums, scaled and added to the panel's total.
            def add_digit(digit, carry):
                def part(acc):
                    def step(_, at):
                        return multiply(digit_scratch[:2], digit_scratch[2:], _DIGIT_STAGES, at, [acc])

                    at = lax.fori_loop(0, digit_steps, step, carry[0])
                    return at, scaled(acc[...], 1 + digit)

                at, value = pl.run_scoped(part, plgpu.ACC((_ROWS, width), jnp.int32))
                return at, carry[1] + value

            # The buffer of the results is about to be overwritten: wait until the copies of the tile before, which
            # run in the background, have read it.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            digits_at = counters[1:]
            for panel, total in enumerate(totals):
                cols = pl.ds(column + panel * width, width)

                def per_column(ref, cols=cols, shape=total.shape):
                    return lax.broadcast_in_dim(_mosaic.load(ref.at[cols], layout.reduce(0)), shape, (1,))

                if outliers:
                    *digits_at, total = lax.fori_loop(0, DIGITS, add_digit, (*digits_at, total))
                # Epilogue: scale and bias per channel, then one rounding to the dtype of the result.
                total = total * per_column(scale)
                if bias_ref is not None:
                    total = total + per_column(bias_ref)
                # Out by TMA. The fence (commit_smem) makes what the threads wrote visible to the copy engine.
                y_smem[warpgroup, panel] = total.astype(y_smem.dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(y_smem.at[warpgroup, panel], y.at[rows, cols])
            return (at, *digits_at)

        over_tiles(per_tile, counters)
        plgpu.wait_smem_to_gmem(0)


def int8_matmul_mixed_mosaic(
    x: QuantizedRows,
    w: jax.Array,
    w_scale: jax.Array,
    *,
    outlier_w: jax.Array | None,
    number: jax.Array | None,
    bias: jax.Array | None,
    dtype: DTypeLike,
    config: MosaicConfig,
    interpret: bool,
) -> jax.Array:
    """`int8_matmul_mixed` of the same arguments, on Hopper; their shapes must be ones that `mosaic_supports`."""
    m, k = x.q.shape
    n = w.shape[0]
    outliers = x.digits is not None
    # Pad the rows to whole tiles; the result's are cut off again.
    pad = -m % config.bm
    q, factors, digits = x
    if pad:
        q, factors = jnp.pad(q, ((0, pad), (0, 0))), jnp.pad(factors, ((0, 0), (0, pad)))
        digits = jnp.pad(digits, ((0, 0), (0, pad), (0, 0))) if digits is not None else None
    tiles = (m + pad) // config.bm, n // config.bn
    # One block per multiprocessor: its registers hold no second one. The number is that of the H100 SXM and H200;
    # on a Hopper with fewer (H100 PCIe, H20) the blocks left over start when others end.
    blocks = min(CHIPS["sm_90"].cores, tiles[0] * tiles[1])
    width = config.bn // config.panels
    stages = config.num_stages

    scratch = [
        _ring(config.bk, config.bm, stages),
        _ring(config.bk, config.bn, stages),
        plgpu.SMEM((_CONSUMERS, config.panels, _ROWS, width), dtype, transforms=_tiled(width, dtype)),
        plgpu.Barrier(num_arrivals=2, num_barriers=stages),  # full: the copies of both operands have arrived
        plgpu.Barrier(num_arrivals=_CONSUMERS, num_barriers=stages),  # empty: every consumer is done
    ]
    if outliers:  # the same for the outlier columns
        scratch += [
            _ring(OUTLIER_BLOCK, config.bm, _DIGIT_STAGES),
            _ring(OUTLIER_BLOCK, width, _DIGIT_STAGES),
            plgpu.Barrier(num_arrivals=2, num_barriers=_DIGIT_STAGES),
            plgpu.Barrier(num_arrivals=_CONSUMERS, num_barriers=_DIGIT_STAGES),
        ]

    def int8_matmul(*refs):  # not a functools.partial: the machine code gets this function's name
        steps = k // config.bk
        _body(*refs, config=config, tiles=tiles, steps=steps, blocks=blocks, outliers=outliers, bias=bias is not None)

    @sequential_vmap  # plgpu.kernel has no batching rule: under jax.vmap the products run one after the other
    def run(*args):
        return plgpu.kernel(
            int8_matmul,
            out_type=jax.ShapeDtypeStruct((m + pad, n), dtype),
            scratch_types=scratch,
            grid=(blocks,),
            grid_names=("block",),
            num_threads=_CONSUMERS + 1,
            thread_name="warpgroup",
            compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
            **_mosaic.interpret_arguments(interpret),
        )(*args)

    args = [q, w, factors, w_scale]
    args += [a for a in (digits, outlier_w, number) if a is not None] if outliers else []
    args += [] if bias is None else [bias.astype(jnp.float32)]
    return run(*args)[:m]
