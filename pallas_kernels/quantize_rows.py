"""Rows of x to int8, for many rows: kept values with one scale per row, outlier columns gathered as int8 digits.

`gather_columns` gathers the same columns of the weights, so that the product over them is one over contiguous memory.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import _triton
from pallas_kernels._numerics import (
    DIGITS,
    DIGITS_MAX,
    INT8_MAX,
    abs_bits,
    digit_factors,
    round_to_int,
    scale_of,
    split_digits,
)
from pallas_kernels.outliers import Outliers

# Gathered columns per step of the product: what a tensor core contracts in one instruction, 32 bytes of int8.
OUTLIER_BLOCK = 32


class QuantizedRows(NamedTuple):
    """x[m, k] = q * factors[0] + sum over the digits p of (digits[p] * factors[1 + p]) at the outlier columns.

    Attributes:
      q: int8[m, k]; 0 where x is an outlier.
      factors: float32[1 or 4, m]; NaN for rows that hold a value that isn't finite.
      digits: int8[3, m, k rounded up to OUTLIER_BLOCK] or None. Column j belongs to outlier column `order[j]`. Zeros up
        to the end of the last block that holds an outlier column, and uninitialised beyond it.
    """

    q: jax.Array
    factors: jax.Array
    digits: jax.Array | None = None


def gathered_size(k: int) -> int:
    """Columns to allocate for up to k gathered ones: k, rounded up to whole blocks."""
    return pl.cdiv(k, OUTLIER_BLOCK) * OUTLIER_BLOCK


def _quantize_rows_kernel(
    x_ref,  # [m, k]
    *refs,  # without outliers: q, factors. With them: mask [k], order [k], number [1]; q, factors, digits
    bm: int,
    bk: int,
    threshold: float | None,
):
    """One program per bm rows. It passes over them twice: for the largest values, then to quantize."""
    m, k = x_ref.shape
    inputs = 3 if len(refs) == 6 else 0
    outliers, (q_ref, factors_ref, *digits) = refs[:inputs], refs[inputs:]
    rows, steps = _triton.clamped_rows(pl.program_id(0), bm, m), pl.cdiv(k, bk)  # rows: [bm]
    out_rows = _triton.span(pl.program_id(0) * bm, bm)
    written = out_rows < m

    def is_outlier(x, column):
        return column if threshold is None else column & (jnp.abs(x) >= threshold)

    def tile(i):
        """Columns i * bk, ...: their indices, the kept values [bm, bk] and the outliers [bm, bk], 0 elsewhere."""
        # Load the tile of x, zeros past the end of the rows.
        cols = _triton.span(i * bk, bk)
        x = _triton.load(x_ref, (rows[:, None], cols[None, :]), mask=(cols < k)[None, :]).astype(jnp.float32)
        if not outliers:
            return cols, x, jnp.zeros_like(x)
        # Look up which of the columns are outlier columns.
        column = _triton.load(outliers[0], (cols,), mask=cols < k)[None, :] != 0
        out = is_outlier(x, column)
        return cols, jnp.where(out, 0.0, x), jnp.where(out, x, 0.0)

    if steps == 1:  # Both passes see one tile, which stays in registers.
        tile = functools.cache(tile)

    def absmax(i, tops):
        _, *parts = tile(i)
        return tuple(jnp.maximum(top, abs_bits(part)) for top, part in zip(tops, parts, strict=False))

    def quantize(i, carry):
        cols, kept, _ = tile(i)
        q = round_to_int(kept, scale[:, None]).astype(jnp.int8)
        _triton.store(q_ref, (out_rows[:, None], cols[None, :]), q, mask=written[:, None] & (cols < k)[None, :])
        return carry

    def loop(body, init):
        return body(0, init) if steps == 1 else lax.fori_loop(0, steps, body, init)

    def store_factor(p, factor):
        _triton.store(factors_ref, (jnp.full((bm,), p, jnp.int32), out_rows), factor, mask=written)

    # First pass: the largest kept value and the largest outlier of each row. Elementwise over tiles; the reduction
    # over columns comes once.
    tops = loop(absmax, (jnp.zeros((bm, bk), jnp.int32),) * (2 if outliers else 1))
    scale = scale_of(jnp.max(tops[0], axis=1), INT8_MAX)
    store_factor(0, scale)
    # Second pass: quantize the kept values.
    loop(quantize, 0)
    if not outliers:
        return

    # The outlier columns, side by side, as digits.
    (_, order_ref, number_ref), (digits_ref,) = outliers, digits
    number = _triton.scalar(number_ref)
    outlier_scale = scale_of(jnp.max(tops[1], axis=1), DIGITS_MAX)
    for p, factor in enumerate(digit_factors(outlier_scale)):
        store_factor(1 + p, factor)

    def gather(i, carry):
        # Load a block of outlier columns. The lanes beyond the last one load column 0 and become zeros.
        lanes = _triton.span(i * OUTLIER_BLOCK, OUTLIER_BLOCK)
        cols = _triton.load(order_ref, (lanes,), mask=lanes < number)
        x = _triton.load(x_ref, (rows[:, None], cols[None, :])).astype(jnp.float32)  # [bm, OUTLIER_BLOCK]
        out = is_outlier(x, (lanes < number)[None, :])
        values = jnp.where(out, x, 0.0)
        # Split them into digits.
        for p, digit in enumerate(split_digits(round_to_int(values, outlier_scale[:, None]))):
            at = (jnp.full((1, 1), p, jnp.int32), out_rows[:, None], lanes[None, :])
            _triton.store(digits_ref, at, digit, mask=written[:, None])
        return carry

    lax.fori_loop(0, pl.cdiv(number, OUTLIER_BLOCK), gather, 0)


def quantize_rows(
    x: jax.Array, outliers: Outliers | None = None, *, threshold: float | None = None, interpret: bool = False
) -> QuantizedRows:
    """Quantizes each row by the largest absolute value among those that are kept.

    `factors[0] = max(abs(kept)) / 127`, `q = round_half_even(kept / factors[0])`. Outliers are left out of both and
    come as three 7-bit digits of `round(x / (max(abs(outlier)) / (127 * 2**14)))`, exact to 2**-22 of the row's largest
    outlier.

    Args:
      x: float[m, k], m and k at least 1.
      outliers: the outlier columns, from `compact`; None keeps everything.
      threshold: None takes all of an outlier column as outliers (the paper); a number only its entries with
        `abs(x) >= threshold`, so that a row depends on no other row.
      interpret: run in Pallas's interpret mode.

    Returns:
      `QuantizedRows`.

    Examples:
      >>> rows = quantize_rows(jnp.array([[127.0, 0.5, 1.5, -2.5]]), interpret=True)
      >>> rows.q.tolist(), rows.factors.tolist()
      ([[127, 0, 2, -2]], [[1.0]])

    References:
      LLM.int8(), sections 2.1 and 3 (https://arxiv.org/abs/2208.07339).
    """
    m, k = x.shape
    # A program holds a tile of at most 8192 values in registers: up to four short rows, or one row, in steps of 8192
    # where it is longer.
    bk = min(8192, max(128, pl.next_power_of_2(k)))
    bm = max(1, min(4, 2048 // bk))
    out = [
        jax.ShapeDtypeStruct((m, k), jnp.int8),
        jax.ShapeDtypeStruct((1 if outliers is None else 1 + DIGITS, m), jnp.float32),
    ]
    if outliers is not None:
        out.append(jax.ShapeDtypeStruct((DIGITS, m, gathered_size(k)), jnp.int8))
    return QuantizedRows(
        *_triton.call(
            functools.partial(_quantize_rows_kernel, bm=bm, bk=bk, threshold=threshold),
            (pl.cdiv(m, bm),),
            [x, *(outliers or ())],
            out,
            num_warps=max(1, min(8, bm * bk // 1024)),
            num_stages=1,
            interpret=interpret,
        )
    )


def _gather_columns_kernel(
    w_ref,  # [n, k]
    order_ref,  # [k]
    number_ref,  # [1]
    out_ref,  # [n, k rounded up to OUTLIER_BLOCK]
    *,
    bn: int,
):
    """One program per bn output channels."""
    n = w_ref.shape[0]
    rows = _triton.clamped_rows(pl.program_id(0), bn, n)  # [bn]
    out_rows = _triton.span(pl.program_id(0) * bn, bn)
    number = _triton.scalar(number_ref)

    def gather(i, carry):
        # Load a block of outlier columns of the weights.
        lanes = _triton.span(i * OUTLIER_BLOCK, OUTLIER_BLOCK)
        cols = _triton.load(order_ref, (lanes,), mask=lanes < number)
        # Lanes beyond the last outlier column become zeros. They would be multiplied by digits that are 0 in any case.
        w = jnp.where((lanes < number)[None, :], _triton.load(w_ref, (rows[:, None], cols[None, :])), 0)
        _triton.store(out_ref, (out_rows[:, None], lanes[None, :]), w, mask=(out_rows < n)[:, None])
        return carry

    lax.fori_loop(0, pl.cdiv(number, OUTLIER_BLOCK), gather, 0)


def gather_columns(w: jax.Array, outliers: Outliers, *, interpret: bool = False) -> jax.Array:
    """The outlier columns of the weights side by side, in the order of `QuantizedRows.digits`.

    Args:
      w: int8[n, k].
      outliers: from `compact`.
      interpret: run in Pallas's interpret mode.

    Returns:
      int8[n, k rounded up to OUTLIER_BLOCK]; uninitialised beyond the last block that holds an outlier column.

    Examples:
      >>> from pallas_kernels.outliers import compact
      >>> outliers = compact(jnp.array([False, True, False]), interpret=True)
      >>> gather_columns(jnp.array([[1, 2, 3], [4, 5, 6]], jnp.int8), outliers, interpret=True)[:, :2].tolist()
      [[2, 0], [5, 0]]
    """
    n, k = w.shape
    bn = 32
    (out,) = _triton.call(
        functools.partial(_gather_columns_kernel, bn=bn),
        (pl.cdiv(n, bn),),
        [w, outliers.order, outliers.number],
        [jax.ShapeDtypeStruct((n, gathered_size(k)), jnp.int8)],
        num_warps=4,
        num_stages=1,
        interpret=interpret,
    )
    return out
