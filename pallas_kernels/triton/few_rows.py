"""The product for few rows (decoding): two kernels, the second of which reads the int8 weights once.

So few rows leave the tensor cores idle; the time goes into reading the weights. x becomes four int8 planes of m rows
each: the kept values, and the outliers as three digits that stay in their columns. Stacked, their 4 * m rows share one
pass over the weights as one int8 product. The smallest tensor-core tile has 16 rows, so up to m = 4 the digits fill
rows of it that would be padding otherwise. Nothing is gathered, and the work doesn't depend on the number of outliers.
Above 16 rows a third kernel, the one that many rows begin with, finds the outlier columns first.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.typing import DTypeLike

from pallas_kernels._numerics import (
    DIGITS,
    DIGITS_MAX,
    INT8_MAX,
    K_EXACT,
    abs_bits,
    digit_factors,
    round_to_int,
    scale_of,
    split_digits,
)
from pallas_kernels.configs import FewRowsConfig
from pallas_kernels.triton import _pallas
from pallas_kernels.triton.outliers import column_flags, outlier_flags

# Up to this many rows each program that quantizes a row looks for outlier columns in all rows by itself.
_SEARCHED_ROWS = 16
# Values of x that a program holds in registers at once, and at most how many columns.
_HELD, _HELD_COLUMNS = 32768, 16384


class Planes(NamedTuple):
    """x as int8: x = sum over p of planes[p] * factors[p][:, None].

    Attributes:
      planes: int8[1 or 4, m, k]; the kept values, then the three digits of the outliers.
      factors: float32[1 or 4, m].
    """

    planes: jax.Array
    factors: jax.Array


def _quantize_few_rows_kernel(
    x_ref,  # [m, k]
    *refs,  # where they were looked for: flags of outlier columns [parts, words]; then the results:
    # planes [1 or 4, m, k] and factors [1 or 4, m]
    bk: int,
    threshold: float,
    per_token: bool,
):
    """One program per row. It needs the row's largest values before it can quantize.

    Where a tile holds the whole row, it is loaded once and stays in registers; otherwise the row is passed over twice.
    """
    *flags_ref, planes_ref, factors_ref = refs
    m, k = x_ref.shape
    row, steps = jnp.full((1,), pl.program_id(0), jnp.int32), pl.cdiv(k, bk)
    all_rows = _pallas.clamped_rows(0, pl.next_power_of_2(m), m)

    def tile(i):
        """Columns i * bk, ...: their indices, and the row's values there as (kept,) or (kept, outliers)."""
        # Load the tile of x, zeros past the end of the row.
        cols = _pallas.span(i * bk, bk)  # [bk]
        x = _pallas.load(x_ref, (row, cols), mask=cols < k).astype(jnp.float32)  # [bk]
        if threshold == 0:
            return cols, (x,)
        # Find the outliers: entries that reach the threshold, or all of a column in which one does.
        if per_token:
            out = jnp.abs(x) >= threshold
        elif flags_ref:
            out = column_flags(flags_ref[0], cols, cols < k) != 0
        else:  # Each program reads the columns of all rows. They are few, and it saves a launch to find the columns.
            column = _pallas.load(x_ref, (all_rows[:, None], cols[None, :]), mask=(cols < k)[None, :])
            reached = jnp.abs(column.astype(jnp.float32)) >= threshold
            out = jnp.max(reached.astype(jnp.int32), axis=0) != 0
        return cols, (jnp.where(out, 0.0, x), jnp.where(out, x, 0.0))

    if steps == 1:  # Both passes see one tile, which stays in registers.
        tile = functools.cache(tile)

    def loop(body, init):
        return body(0, init) if steps == 1 else lax.fori_loop(0, steps, body, init)

    def absmax(i, tops):
        _, parts = tile(i)
        return tuple(jnp.maximum(top, abs_bits(part)) for top, part in zip(tops, parts, strict=True))

    # First pass: the largest kept value and the largest outlier. Elementwise over tiles; the reduction comes once.
    tops = loop(absmax, (jnp.zeros((bk,), jnp.int32),) * (1 if threshold == 0 else 2))
    scales = [scale_of(jnp.max(top), largest) for top, largest in zip(tops, (INT8_MAX, DIGITS_MAX), strict=False)]
    factors = (scales[0], *(digit_factors(scales[1]) if threshold else ()))
    for p, factor in enumerate(factors):
        _pallas.store(factors_ref, (jnp.full((1,), p, jnp.int32), row), factor[None], mask=row < m)

    # Second pass: quantize the kept values, and split the outliers into digits.
    def quantize(i, carry):
        cols, (kept, *out) = tile(i)
        planes = (round_to_int(kept, scales[0]), *(split_digits(round_to_int(out[0], scales[1])) if out else ()))
        for p, plane in enumerate(planes):
            _pallas.store(planes_ref, (jnp.full((1,), p, jnp.int32), row, cols), plane, mask=cols < k)
        return carry

    loop(quantize, 0)


def quantize_few_rows(x: jax.Array, threshold: float, *, per_token: bool = False, interpret: bool = False) -> Planes:
    """Finds the outliers and splits x into int8 planes, in one launch or, where rows share columns, two above 16 rows.

    `planes[0]` are the kept values (`factors[0] = max(abs(kept)) / 127`, rounded half to even), `planes[1:]` three
    7-bit digits of the outliers, exact to 2**-22 of the row's largest.

    Args:
      x: float[m, k], m and k at least 1.
      threshold: static; 0 makes one plane, without outliers.
      per_token: an outlier is an entry that reaches the threshold; otherwise all of a column in which one does.
      interpret: run in Pallas's interpret mode.

    Returns:
      `Planes`. The factors of a row with a value that isn't finite are NaN.

    Examples:
      >>> quantize_few_rows(jnp.array([[127.0, 0.5, 1.5]]), 0, interpret=True).planes.tolist()
      [[[127, 0, 2]]]
    """
    m, k = x.shape
    planes = 1 + DIGITS if threshold else 1
    by_column = bool(threshold) and not per_token
    flags = [outlier_flags(x, threshold, interpret=interpret)] if by_column and m > _SEARCHED_ROWS else []
    rows = pl.next_power_of_2(m) if by_column and not flags else 1
    bk = min(_HELD_COLUMNS, _HELD // rows, max(128, pl.next_power_of_2(k)))
    return Planes(
        *_pallas.call(
            functools.partial(_quantize_few_rows_kernel, bk=bk, threshold=threshold, per_token=per_token),
            (m,),
            [x, *flags],
            [jax.ShapeDtypeStruct((planes, m, k), jnp.int8), jax.ShapeDtypeStruct((planes, m), jnp.float32)],
            num_warps=max(4, min(16, rows * bk // 1024)),
            num_stages=1,
            interpret=interpret,
        )
    )


def _int8_matmul_few_rows_kernel(
    planes_ref,  # [1 or 4, m, k]
    factors_ref,  # [1 or 4, m]
    w_ref,  # [n, k]
    scale_ref,  # [n]
    *rest,  # bias [n], if there is one, and the result [splits, m, n]
    bm: int,
    bn: int,
    bk: int,
    steps: int,
):
    """One program per tile of bn channels and part of k."""
    *bias_ref, y_ref = rest
    (planes, m, k), n, splits = planes_ref.shape, w_ref.shape[0], y_ref.shape[0]
    split, out_cols = pl.program_id(1), _pallas.span(pl.program_id(0) * bn, bn)
    cols = jnp.minimum(out_cols, n - 1)  # [bn], clamped as `clamped_rows` does
    # Stack the planes: row s of the product is row s % bm of plane s // bm.
    stacked = _pallas.span(0, planes * bm)
    plane, row = stacked // bm, jnp.minimum(stacked % bm, m - 1)
    # Where the steps of all parts don't add up to k exactly, the last ones reach beyond it and need a mask.
    tail = splits * steps * bk != k

    def step(i, acc):
        # Load a tile of the planes and one of the weights, both contiguous along k.
        depth = _pallas.span((split * steps + i) * bk, bk)  # [bk]
        mask = (depth < k)[None, :] if tail else None
        x = _pallas.load(planes_ref, (plane[:, None], row[:, None], depth[None, :]), mask=mask)  # [planes * bm, bk]
        w = _pallas.load(w_ref, (cols[:, None], depth[None, :]), mask=mask)  # [bn, bk]
        # Accumulate in int32. It must be asked for: ptxas rejects what a result of the operands' type compiles to.
        return acc + lax.dot_general(x, w, _pallas.CONTRACT_LAST, preferred_element_type=jnp.int32)

    acc = lax.fori_loop(0, steps, step, jnp.zeros((planes * bm, bn), jnp.int32))
    # Epilogue: each plane times its factors, then the planes added up.
    y = acc.astype(jnp.float32) * _pallas.load(factors_ref, (plane, row))[:, None]
    if planes > 1:
        y = jnp.sum(y.reshape(planes, bm, bn), axis=0)  # [bm, bn]
    # Scale and bias per channel. Where k is split, they follow once the parts are added.
    if splits == 1:
        y = y * _pallas.load(scale_ref, (cols,))[None, :]
        for ref in bias_ref:
            y = y + _pallas.load(ref, (cols,)).astype(jnp.float32)[None, :]
    rows = _pallas.span(0, bm)
    at = (jnp.full((1, 1), split, jnp.int32), rows[:, None], out_cols[None, :])
    _pallas.store(y_ref, at, y, mask=(rows < m)[:, None] & (out_cols < n)[None, :])


def int8_matmul_few_rows(
    x: Planes,
    w: jax.Array,
    w_scale: jax.Array,
    *,
    bias: jax.Array | None = None,
    dtype: DTypeLike,
    config: FewRowsConfig,
    interpret: bool = False,
) -> jax.Array:
    """y = (sum over planes of factors[p] * (planes[p] @ w.T)) * w_scale + bias, int8 products exact in int32.

    Args:
      x: from `quantize_few_rows`. The rows of all planes are one tile, up to `config.rows`.
      w: int8[n, k].
      w_scale: float32[n].
      bias: float[n] or None, added in float32.
      dtype: of the result; rounded once.
      config: tiles, and the number of parts that k is split into. More parts than 1 are added by a second kernel.
      interpret: run in Pallas's interpret mode.

    Returns:
      dtype[m, n].

    Examples:
      >>> x = quantize_few_rows(jnp.array([[127.0, 2.0]]), 0, interpret=True)
      >>> w, one = jnp.ones((1, 2), jnp.int8), jnp.ones(1)
      >>> int8_matmul_few_rows(x, w, one, dtype="float32", config=FewRowsConfig(), interpret=True).tolist()
      [[129.0]]
    """
    (planes, m, k), n = x.planes.shape, w.shape[0]
    # A tensor-core tile has at least 16 rows, over all planes.
    bm = max(16 // planes, pl.next_power_of_2(m))
    bn, bk = config.bn, config.bk
    # At most one part per step of k; at least so many that no part is longer than int32 sums are exact for.
    splits = max(min(config.splits, pl.cdiv(k, bk)), pl.cdiv(k, K_EXACT // bk * bk))
    steps = pl.cdiv(pl.cdiv(k, bk), splits)
    args = [x.planes, x.factors, w, w_scale] + ([] if bias is None else [bias])
    (y,) = _pallas.call(
        functools.partial(_int8_matmul_few_rows_kernel, bm=bm, bn=bn, bk=bk, steps=steps),
        (pl.cdiv(n, bn), splits),
        args,
        [jax.ShapeDtypeStruct((splits, m, n), dtype if splits == 1 else jnp.float32)],
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        interpret=interpret,
    )
    if splits == 1:
        return y[0]
    y = jnp.sum(y, axis=0) * w_scale
    return (y if bias is None else y + bias.astype(jnp.float32)).astype(dtype)
