"""The product for many rows as one Triton kernel, for Ampere and later: int8 over all of k, then the outlier columns.

"Mixed" as in the paper's mixed-precision decomposition: `quantize_rows` gives the kept values as int8 and the outlier
columns, gathered, as three int8 digits. One kernel multiplies both and adds the parts in registers.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.typing import DTypeLike

from pallas_kernels._numerics import DIGITS, K_EXACT
from pallas_kernels.configs import TritonConfig
from pallas_kernels.triton import _pallas
from pallas_kernels.triton.quantize_rows import QuantizedRows


def _tile_of(program, m_tiles: int, n_tiles: int, group: int):
    """Program -> tile (i, j), in groups of `group` tiles of rows, the rows fastest.

    So programs that run at the same time share the same weights and a few tiles of x in the L2 cache.
    """
    per_group = group * n_tiles
    first = program // per_group * group
    height = jnp.minimum(m_tiles - first, group)
    return first + program % per_group % height, program % per_group // height


def _int8_matmul_mixed_kernel(
    q_ref,  # [m, k]
    factors_ref,  # [1 or 4, m]
    w_ref,  # [n, k]
    scale_ref,  # [n]
    *rest,  # with outliers: digits [3, m, size], outlier weights [n, size], number [1]; bias [n]; the result [m, n]
    bm: int,
    bn: int,
    bk: int,
    panels: int,
    group: int,
    outliers: bool,
    outlier_block: int,
    bias: bool,
):
    """One program per tile of bm rows and bn channels."""
    digits_ref, outlier_w_ref, number_ref = rest[:3] if outliers else (None, None, None)
    y_ref = rest[-1]
    (m, k), n = q_ref.shape, w_ref.shape[0]
    i, j = _tile_of(pl.program_id(0), pl.cdiv(m, bm), pl.cdiv(n, bn), group)
    rows = _pallas.clamped_rows(i, bm, m)  # [bm]
    # The tile's channels are panels side by side. The digits need int32 sums beside the float32 totals: for one panel
    # at a time, so that a tile of 128 by 256 leaves registers for the rest.
    width = bn // panels
    starts = [j * bn + p * width for p in range(panels)]
    cols = [jnp.minimum(_pallas.span(start, width), n - 1) for start in starts]  # panels times [width]

    def products(a_ref, a_index, b_ref, b_cols, first, last, block, limit):
        """int32 products of a's rows with panels of b over the steps first..last along their last axes."""

        def step(t, accs):
            # Load a tile of rows and the panels' channels; a mask only where the last step reaches beyond the end.
            depth = _pallas.span(t * block, block)  # [block]
            mask = (depth < limit)[None, :] if limit % block else None
            a = _pallas.load(a_ref, (*a_index, depth[None, :]), mask=mask)  # [bm, block]
            bs = (_pallas.load(b_ref, (c[:, None], depth[None, :]), mask=mask) for c in b_cols)  # [width, block]
            # Accumulate in int32. It must be asked for: ptxas rejects what a result of the operands' type compiles to.
            return tuple(
                acc + lax.dot_general(a, b, _pallas.CONTRACT_LAST, preferred_element_type=jnp.int32)
                for acc, b in zip(accs, bs, strict=True)
            )

        return lax.fori_loop(first, last, step, (jnp.zeros((bm, width), jnp.int32),) * len(b_cols))

    def factor(p):
        return _pallas.load(factors_ref, (jnp.full((bm,), p, jnp.int32), rows))[:, None]  # [bm, 1]

    # The kept values, over all of k. int32 is exact for K_EXACT products; longer sums go to float32 in between.
    chunk = K_EXACT // bk
    totals = [jnp.zeros((bm, width), jnp.float32)] * panels
    for first in range(0, pl.cdiv(k, bk), chunk):
        last = min(first + chunk, pl.cdiv(k, bk))
        accs = products(q_ref, (rows[:, None],), w_ref, cols, first, last, bk, k)
        totals = [total + acc.astype(jnp.float32) * factor(0) for total, acc in zip(totals, accs, strict=True)]

    # The outlier columns, as int8 digits. Their number is read from device memory, so any number is one program.
    if outliers:
        size = digits_ref.shape[2]
        steps = pl.cdiv(_pallas.scalar(number_ref), outlier_block)
        chunk = K_EXACT // outlier_block

        def add_digits(panel, total):
            def digit(p, total):
                plane = jnp.full((1, 1), p, jnp.int32)
                for first in range(0, size // outlier_block, chunk):
                    last = jnp.minimum(steps, first + chunk)
                    index = (plane, rows[:, None])
                    (acc,) = products(digits_ref, index, outlier_w_ref, [cols[panel]], first, last, outlier_block, size)
                    total = total + acc.astype(jnp.float32) * factor(1 + p)
                return total

            return lax.fori_loop(0, DIGITS, digit, total)

        totals = [add_digits(panel, total) for panel, total in enumerate(totals)]

    # Epilogue: scale and bias per channel, then one rounding to the dtype of the result.
    out_rows = _pallas.span(i * bm, bm)
    for start, c, total in zip(starts, cols, totals, strict=True):
        y = total * _pallas.load(scale_ref, (c,))[None, :]
        if bias:
            y = y + _pallas.load(rest[-2], (c,)).astype(jnp.float32)[None, :]
        out_cols = _pallas.span(start, width)
        _pallas.store(
            y_ref, (out_rows[:, None], out_cols[None, :]), y, mask=(out_rows < m)[:, None] & (out_cols < n)[None, :]
        )


def int8_matmul_mixed_triton(
    x: QuantizedRows,
    w: jax.Array,
    w_scale: jax.Array,
    *,
    bias: jax.Array | None,
    dtype: DTypeLike,
    config: TritonConfig,
    interpret: bool,
) -> jax.Array:
    """`int8_matmul_mixed` of the same arguments, by Triton."""
    m, n = x.q.shape[0], w.shape[0]
    args = [x.q, x.factors, w, w_scale]
    args += [a for a in (x.outliers, x.outlier_w, x.number) if a is not None]
    args += [] if bias is None else [bias]
    (y,) = _pallas.call(
        functools.partial(
            _int8_matmul_mixed_kernel,
            bm=config.bm,
            bn=config.bn,
            bk=config.bk,
            panels=config.panels,
            group=config.group,
            outliers=x.outliers is not None,
            outlier_block=config.outlier_block("digits"),
            bias=bias is not None,
        ),
        (pl.cdiv(m, config.bm) * pl.cdiv(n, config.bn),),
        args,
        [jax.ShapeDtypeStruct((m, n), dtype)],
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        interpret=interpret,
    )
    return y
