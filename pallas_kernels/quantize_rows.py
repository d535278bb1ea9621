"""Rows to int8: kept values with one scale per row, outlier columns gathered as three int8 digits."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import _triton
from pallas_kernels._numerics import DIGITS, DIGITS_TOP, Q_TOP, abs_bits, digit_factors, split_digits, step_of, to_int
from pallas_kernels.outliers import Outliers

OUTLIER_BLOCK = 32  # gathered columns per step of the product: one tensor-core step of int8


class QuantizedRows(NamedTuple):
    """x[m, k] = q * factors[0] + sum over the digits p of (digits[p] * factors[1 + p]) at the outlier columns.

    `q` int8[m, k] (outliers 0); `factors` float32[1 or 4, m] (NaN in rows that hold a value that isn't finite);
    `digits` int8[3, m, k rounded up to OUTLIER_BLOCK] or None: column j belongs to outlier column `order[j]`, zeros up
    to the end of the last block that holds one, and not written beyond it.
    """

    q: jax.Array
    factors: jax.Array
    digits: jax.Array | None = None


def gathered_size(k: int) -> int:
    """Columns to allocate for up to k gathered ones."""
    return pl.cdiv(k, OUTLIER_BLOCK) * OUTLIER_BLOCK


def _quantize_rows_kernel(x_ref, *refs, bm, bk, threshold):
    m, k = x_ref.shape
    outliers, (q_ref, factors_ref, *digits) = refs[: len(refs) // 6 * 3], refs[len(refs) // 6 * 3 :]
    rows, steps = _triton.rows_of(pl.program_id(0), bm, m), pl.cdiv(k, bk)
    out_rows = _triton.span(pl.program_id(0) * bm, bm)
    written = out_rows < m

    def is_outlier(x, column):
        return column if threshold is None else column & (jnp.abs(x) >= threshold)

    def tile(i):
        cols = _triton.span(i * bk, bk)
        x = _triton.load(x_ref, (rows[:, None], cols[None, :]), mask=(cols < k)[None, :]).astype(jnp.float32)
        if not outliers:
            return cols, x, jnp.zeros_like(x)
        column = _triton.load(outliers[0], (cols,), mask=cols < k)[None, :] != 0
        out = is_outlier(x, column)
        return cols, jnp.where(out, 0.0, x), jnp.where(out, x, 0.0)

    if steps == 1:  # the rows stay in registers
        tile = functools.cache(tile)

    def absmax(i, tops):
        _, *parts = tile(i)
        return tuple(jnp.maximum(top, abs_bits(part)) for top, part in zip(tops, parts, strict=False))

    def quantize(i, carry):
        cols, kept, _ = tile(i)
        q = to_int(kept, step[:, None]).astype(jnp.int8)
        _triton.store(q_ref, (out_rows[:, None], cols[None, :]), q, mask=written[:, None] & (cols < k)[None, :])
        return carry

    def loop(body, init):
        return body(0, init) if steps == 1 else lax.fori_loop(0, steps, body, init)

    def put(p, factor):
        _triton.store(factors_ref, (jnp.full((bm,), p, jnp.int32), out_rows), factor, mask=written)

    tops = loop(absmax, (jnp.zeros((bm, bk), jnp.int32),) * (2 if outliers else 1))
    step = step_of(jnp.max(tops[0], axis=1), Q_TOP)
    put(0, step)
    loop(quantize, 0)
    if not outliers:
        return

    (_, order_ref, number_ref), (digits_ref,) = outliers, digits
    number = _triton.scalar(number_ref)
    outlier_step = step_of(jnp.max(tops[1], axis=1), DIGITS_TOP)
    for p, factor in enumerate(digit_factors(outlier_step)):
        put(1 + p, factor)

    def gather(i, carry):
        lanes = _triton.span(i * OUTLIER_BLOCK, OUTLIER_BLOCK)
        cols = _triton.load(order_ref, (lanes,), mask=lanes < number)
        x = _triton.load(x_ref, (rows[:, None], cols[None, :])).astype(jnp.float32)
        out = is_outlier(x, (lanes < number)[None, :])
        values = jnp.where(out, x, 0.0)
        for p, digit in enumerate(split_digits(to_int(values, outlier_step[:, None]))):
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

    Example:
      >>> rows = quantize_rows(jnp.array([[127.0, 0.5, 1.5, -2.5]]), interpret=True)
      >>> rows.q.tolist(), rows.factors.tolist()
      ([[127, 0, 2, -2]], [[1.0]])

    References:
      LLM.int8(), sections 2.1 and 3 (https://arxiv.org/abs/2208.07339).
    """
    m, k = x.shape
    # One program holds about 8192 values: a long row alone, several short ones together.
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


def _gather_columns_kernel(w_ref, order_ref, number_ref, out_ref, *, bn):
    n = w_ref.shape[0]
    rows = _triton.rows_of(pl.program_id(0), bn, n)
    out_rows = _triton.span(pl.program_id(0) * bn, bn)
    number = _triton.scalar(number_ref)

    def gather(i, carry):
        lanes = _triton.span(i * OUTLIER_BLOCK, OUTLIER_BLOCK)
        cols = _triton.load(order_ref, (lanes,), mask=lanes < number)
        # The digits beyond `number` are zeros, so that what stands here meets nothing; zeros all the same.
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
      int8[n, k rounded up to OUTLIER_BLOCK]; written up to the end of the last block that holds an outlier column.
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
