"""The product for many rows on Hopper in Mosaic GPU: a persistent, warp-specialized kernel with TMA and wgmma.

One block per multiprocessor stays for the whole product and works off tiles of the result. Of its three warpgroups (128
threads each) the last is the producer: it only issues TMA copies, from device memory into a ring of slots in shared
memory. The other two are consumers: they multiply with wgmma out of that ring, 64 rows of the tile each. Barriers pass
the slots to and fro, and the producer runs ahead of the consumers, also from one tile into the next.

Producer and consumers walk through the same steps of a tile: first the int8 product over all of k, in steps of `bk`;
then the gathered outlier columns, in steps that fill the same slots. How many outlier columns there are is read from
device memory. Their product takes one of two forms:

- "floats": a 16-bit product that goes on in the accumulator of the kept values, once that is float32. Both operands are
  exact, bfloat16 or float16 as x is, and int8 weights as such floats. It is the paper's own form.
- "digits": three int8 products with int32 sums, of half the tile's channels at a time, since registers hold no more
  beside the totals. Sums of integers don't depend on their order, so a row's result doesn't depend on other rows.

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

from pallas_kernels._numerics import DIGITS
from pallas_kernels.configs import MosaicConfig, OutlierForm
from pallas_kernels.mosaic import _pallas
from pallas_kernels.triton.quantize_rows import QuantizedRows

_CONSUMERS = 2  # warpgroups that multiply; warpgroup number 2 is the producer
_ROWS = 64  # of the tile per consumer: the height of a wgmma
_CHUNK = 64  # channels of the result that leave at once

# Registers per thread. The register file of a multiprocessor has 65536, and 128 * (2 * 232 + 40) = 64512. The
# accumulators are the consumers', so the producer hands over what it doesn't need.
_CONSUMER_REGISTERS, _PRODUCER_REGISTERS = 232, 40


def _buffer(*shape: int, dtype: DTypeLike, swizzle: int = 128):
    """Shared memory of a shape whose last two dimensions TMA fills or empties and wgmma reads.

    Rows are cut to pieces of `swizzle` bytes, eight of which are a tile, and within a tile the 16-byte pieces are
    permuted ("swizzled") so that reading a column of them touches each bank of shared memory once. In device memory,
    TMA takes whole tiles only: so k is a multiple of 64 and n is, and the result has a multiple of 8 rows.
    """
    size = jnp.dtype(dtype).itemsize
    transforms = plgpu.TilingTransform((8, swizzle // size)), plgpu.SwizzleTransform(swizzle)
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def _ring(rows: int, k: int, config: MosaicConfig, floats: DTypeLike | None):
    """`num_stages` slots of [rows, bk] int8, or one that can also be seen as slots of [rows, bk // 2] floats.

    Both views have slots of the same bytes, so a slot's number means the same memory in either.
    """
    ring = _buffer(config.num_stages, rows, config.bk, dtype=jnp.int8, swizzle=64 if k % 128 else 128)
    if floats is None:
        return ring
    return plgpu.RefUnion(ring, _buffer(config.num_stages, rows, config.bk // 2, dtype=floats))


def _body(
    *refs: Any,  # the operands, the result and the scratch memory of `int8_matmul_mixed_mosaic`, in its order
    config: MosaicConfig,
    steps: int,
    blocks: int,
    form: OutlierForm | None,
    bias: bool,
    interpret: bool,
):
    """What one warpgroup of one block does; `steps` over k per tile."""
    (q, w, factors, scale), rest = refs[:4], refs[4:]  # [rows, k], [n, k], [1 or 4, rows], [n]
    # Outlier columns [rows, size] or [3, rows, size], the same columns of the weights [n, size], their number [1]
    (columns, column_w, number), rest = (rest[:3], rest[3:]) if form else ((None,) * 3, rest)
    bias_ref, rest = (rest[0], rest[1:]) if bias else (None, rest)  # [n]
    y, a_ring, b_ring, y_smem, full, empty = rest  # y: [m, n]
    (a_ring, a_floats), (b_ring, b_floats) = (a_ring, b_ring) if form == "floats" else ((a_ring, None), (b_ring, None))
    (m, n), bm, bn, bk, stages = y.shape, config.bm, config.bn, config.bk, config.num_stages
    half = bn // 2  # channels of a tile whose digits are summed at once
    m_tiles, n_tiles = pl.cdiv(m, bm * config.cluster), pl.cdiv(n, bn)
    warpgroup, block = lax.axis_index("warpgroup"), lax.axis_index("block")
    # The blocks of a cluster work on tiles below each other, which share their weights.
    in_cluster = lax.axis_index("cluster") if config.cluster > 1 else 0
    multicast: dict[str, Any] = {"collective_axes": "cluster"} if config.cluster > 1 else {}
    width = config.outlier_block(form) if form else 1  # gathered columns per step
    outlier_steps = lax.div(number[0] + (width - 1), width) if form else 0
    layout = plgpu.Layout.WGMMA

    def over_tiles(per_tile, at):
        """Runs at = per_tile(row, column, at) for this block's tiles: every `blocks`-th one.

        Tiles are numbered in groups of `group` tiles of rows, the rows fastest, so that blocks that run at the same
        time share the same weights and a few tiles of x in the L2 cache. The last tile of channels begins where it
        ends with them: what it shares with the tile before it is computed twice, to the same bits.
        """

        def one(i, at):
            tile = block + i * blocks
            per_group = config.group * n_tiles
            first = lax.div(tile, per_group) * config.group
            height = jnp.minimum(m_tiles - first, config.group)
            within = lax.rem(tile, per_group)
            row = ((first + lax.rem(within, height)) * config.cluster + in_cluster) * bm
            return per_tile(row, jnp.minimum(lax.div(within, height) * bn, n - bn), at)

        count = lax.div(m_tiles * n_tiles - block + (blocks - 1), blocks)
        return lax.fori_loop(0, count, one, at)

    @pl.when(warpgroup == _CONSUMERS)
    def _producer():
        plgpu.set_max_registers(_PRODUCER_REGISTERS, action="decrease")

        def fill(at, a, b, a_source, b_source):
            slot = lax.rem(at, stages)

            # Wait until the consumers are done with the slot. The first round finds all of them empty.
            @pl.when(at >= stages)
            def _wait():
                plgpu.barrier_wait(empty.at[slot])

            # Start the copies of both operands. Each arrives at the barrier when its bytes are there; what lies
            # beyond the last column of an operand arrives as zeros.
            plgpu.copy_gmem_to_smem(a_source, a.at[slot], full.at[slot])
            b = b.at[slot] if b_source.shape[0] == bn else b.at[slot, pl.ds(0, half)]
            plgpu.copy_gmem_to_smem(b_source, b, full.at[slot], **multicast)
            return at + 1

        def per_tile(row, column, at):
            rows, cols = pl.ds(row, bm), pl.ds(column, bn)

            # Copy the tiles of q and w, over all of k.
            def step(t, at):
                depth = pl.ds(t * bk, bk)
                return fill(at, a_ring, b_ring, q.at[rows, depth], w.at[cols, depth])

            at = lax.fori_loop(0, steps, step, at)

            # Copy the outlier columns.
            def floats_step(t, at):
                depth = pl.ds(t * width, width)
                return fill(at, a_floats, b_floats, columns.at[rows, depth], column_w.at[cols, depth])

            if form == "floats":
                return lax.fori_loop(0, outlier_steps, floats_step, at)
            # As digits: for each half of the channels, all columns of the first digit, then of the next.
            for start in (0, half) if form else ():

                def digits_step(t, at, start=start):
                    depth = pl.ds(lax.rem(t, outlier_steps) * width, width)
                    digit = columns.at[lax.div(t, outlier_steps), rows, depth]
                    return fill(at, a_ring, b_ring, digit, column_w.at[pl.ds(column + start, half), depth])

                at = lax.fori_loop(0, DIGITS * outlier_steps, digits_step, at)
            return at

        at = over_tiles(per_tile, jnp.int32(0))

        # Wait for the last slots too: no barrier may end in a phase that nobody waited for.
        def drain(t, carry):
            plgpu.barrier_wait(empty.at[lax.rem(t, stages)])
            return carry

        lax.fori_loop(jnp.maximum(at - stages, 0), at, drain, 0)

    @pl.when(warpgroup < _CONSUMERS)
    def _consumer():
        plgpu.set_max_registers(_CONSUMER_REGISTERS, action="increase")
        own = pl.ds(warpgroup * _ROWS, _ROWS)  # this warpgroup's rows of a tile

        def multiply(acc, a, b, at, count):
            """Adds to acc the products of the next `count` slots, each [64, depth] times [channels, depth]."""

            def step(t, at):
                slot = lax.rem(at, stages)
                # Wait for the copies, then start a product. It is asynchronous and reads shared memory.
                plgpu.barrier_wait(full.at[slot])
                b_slot = b.at[slot] if acc.shape[1] == bn else b.at[slot, pl.ds(0, half)]
                plgpu.wgmma(acc, a.at[slot, own], _pallas.transposed(b_slot))
                # Wait until at most this product is unfinished: so the tensor cores always have one to work on. Then
                # the slot of the product before may be filled again.
                plgpu.wgmma_wait(1)

                @pl.when(t > 0)
                def _release():
                    plgpu.barrier_arrive(empty.at[lax.rem(at + (stages - 1), stages)])

                return at + 1

            at = lax.fori_loop(0, count, step, at)
            plgpu.wgmma_wait(0)

            @pl.when(count > 0)
            def _release_last():
                plgpu.barrier_arrive(empty.at[lax.rem(at + (stages - 1), stages)])

            return at

        def products(shape, dtype, a, b, at, count):
            """The sums of the next `count` slots' products, in an accumulator of their own."""

            # `run_scoped` ends the accumulator's lifetime, so that its registers are free for others.
            def scope(acc):
                end = multiply(acc, a, b, at, count)
                return end, acc[...]

            return pl.run_scoped(scope, plgpu.ACC(shape, dtype))

        def add_floats(total, at):
            if interpret:  # the interpreter has no accumulator that starts at a value
                at, sums = products((_ROWS, bn), jnp.float32, a_floats, b_floats, at, outlier_steps)
                return at, total + sums

            def add(acc):
                multiply(acc, a_floats, b_floats, at, outlier_steps)

            return at + outlier_steps, pl.run_state(add)(plgpu.ACC.init(total))

        def per_tile(row, column, at):
            rows = pl.ds(row + warpgroup * _ROWS, _ROWS)
            chunks = [pl.ds(column + start, _CHUNK) for start in range(0, bn, _CHUNK)]

            def per_column(j):
                """Scale and bias of a chunk of channels."""
                refs = (scale,) if bias_ref is None else (scale, bias_ref)
                return [_pallas.load(ref.at[chunks[j]], layout.reduce(0)) for ref in refs]

            def row_factor(plane):
                return _pallas.load(factors.at[plane, rows], layout.reduce(1))  # [64]

            def scaled(sums, factor):
                return sums.astype(jnp.float32) * lax.broadcast_in_dim(factor, sums.shape, (0,))

            # Fetch the rows' factors and the first channels' scales while the products run.
            factor, following = row_factor(0), per_column(0)
            # The kept values, over all of k.
            at, sums = products((_ROWS, bn), jnp.int32, a_ring, b_ring, at, steps)
            total = scaled(sums, factor)
            # The outlier columns: as floats, or digit by digit for half of the channels and then for the others.
            if form == "floats":
                at, total = add_floats(total, at)
            halves = [total[:, :half], total[:, half:]]
            for h in range(2) if form == "digits" else ():

                def add_digit(digit, carry):
                    at, sums = products((_ROWS, half), jnp.int32, a_ring, b_ring, carry[0], outlier_steps)
                    return at, carry[1] + scaled(sums, row_factor(1 + digit))

                at, halves[h] = lax.fori_loop(0, DIGITS, add_digit, (at, halves[h]))

            # Epilogue, in chunks of channels: scale and bias, then one rounding to the dtype of the result.
            for j, cols in enumerate(chunks):
                vectors = following
                following = per_column(j + 1) if j + 1 < len(chunks) else []
                start = j * _CHUNK % half
                chunk = halves[j * _CHUNK // half][:, start : start + _CHUNK]
                chunk = chunk * lax.broadcast_in_dim(vectors[0], chunk.shape, (1,))
                if bias_ref is not None:
                    chunk = chunk + lax.broadcast_in_dim(vectors[1], chunk.shape, (1,))
                # Two buffers take turns: wait until the copy of the chunk before the last has read its own.
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                y_smem[warpgroup, j % 2] = chunk.astype(y_smem.dtype)
                # Out by TMA, which drops rows beyond the last one. The fence (commit_smem) makes what the threads wrote
                # visible to the copy engine.
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(y_smem.at[warpgroup, j % 2], y.at[rows, cols])
            return at

        over_tiles(per_tile, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)


def int8_matmul_mixed_mosaic(
    x: QuantizedRows,
    w: jax.Array,
    w_scale: jax.Array,
    *,
    m: int,
    bias: jax.Array | None,
    dtype: DTypeLike,
    config: MosaicConfig,
    cores: int,
    interpret: bool,
) -> jax.Array:
    """`int8_matmul_mixed` of the same arguments, on Hopper; their shapes must be ones that `mosaic_supports`."""
    (rows, k), n = x.q.shape, w.shape[0]
    if rows % (config.bm * config.cluster) or x.factors.shape[1] != rows:
        raise ValueError(f"Expected rows for whole tiles, quantize_rows(..., height={config.height}), got {rows}")
    form: OutlierForm | None = None
    if x.outliers is not None:
        form = "digits" if x.outliers.dtype == jnp.int8 else "floats"
    # One block per multiprocessor: its registers hold no second one.
    tiles = rows // (config.bm * config.cluster) * pl.cdiv(n, config.bn)
    blocks = min(cores // config.cluster, tiles)
    stages = config.num_stages
    floats = x.outliers.dtype if x.outliers is not None and form == "floats" else None
    barriers: Any = plgpu.Barrier(num_arrivals=_CONSUMERS, num_barriers=stages)
    clusters: dict[str, Any] = {}
    if config.cluster > 1:  # a slot is empty when the consumers of every block that its copy goes to are done with it
        clusters = {"cluster": (config.cluster,), "cluster_names": ("cluster",)}
        barriers = plgpu.ClusterBarrier(collective_axes=("cluster",), num_arrivals=_CONSUMERS, num_barriers=stages)

    def int8_matmul(*refs):  # not a functools.partial: the machine code gets this function's name
        _body(
            *refs,
            config=config,
            steps=pl.cdiv(k, config.bk),
            blocks=blocks,
            form=form,
            bias=bias is not None,
            interpret=interpret,
        )

    @sequential_vmap  # plgpu.kernel has no batching rule: under jax.vmap the products run one after the other
    def run(*args):
        return plgpu.kernel(
            int8_matmul,
            # At least what one warpgroup writes, and whole tiles of 8 rows.
            out_type=jax.ShapeDtypeStruct((max(_ROWS, pl.cdiv(m, 8) * 8), n), dtype),
            scratch_types=[
                _ring(config.bm, k, config, floats),
                _ring(config.bn, k, config, floats),
                _buffer(_CONSUMERS, 2, _ROWS, _CHUNK, dtype=dtype),
                plgpu.Barrier(num_arrivals=2, num_barriers=stages),  # full: the copies of both operands have arrived
                barriers,  # empty: every consumer is done
            ],
            grid=(blocks,),
            grid_names=("block",),
            num_threads=_CONSUMERS + 1,
            thread_name="warpgroup",
            compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
            **clusters,
            **_pallas.interpret_arguments(interpret),
        )(*args)

    args = [x.q, w, x.factors, w_scale]
    args += [a for a in (x.outliers, x.outlier_w, x.number) if a is not None]
    args += [] if bias is None else [bias.astype(jnp.float32)]
    return run(*args)[:m]
