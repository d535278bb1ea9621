"""Rows of x to int8, for many rows: kept values with one scale per row, outlier columns gathered.

Those columns of the weights are gathered too, so that the product over them is one over contiguous memory.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

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
from pallas_kernels.configs import OutlierForm
from pallas_kernels.triton import _pallas
from pallas_kernels.triton.outliers import Outliers

_CHANNELS = 32  # output channels whose outlier columns one program gathers

# Up to this many values of x, one launch quantizes them and gathers columns of w. More take two: the first of them is
# the same for all products of one x, of which XLA runs one. From here on it takes longer than a launch, as predicted.
TOGETHER = 4 << 20


class QuantizedRows(NamedTuple):
    """x[m, k] = q * factors[0], plus its outlier columns, which stand side by side in `outliers`.

    Column j of `outliers` and `outlier_w` belongs to the outlier column `order[j]` of `Outliers`. The two are zero up
    to the end of the last block of columns that holds an outlier column, and uninitialised beyond it.

    Attributes:
      q: int8[m, k]; 0 where x is an outlier.
      factors: float32[1, m], or [4, m] with digits; NaN for rows with a kept value that isn't finite, and with digits
        for rows with any.
      outliers: x.dtype[m, gathered] as they are, or int8[3, m, gathered] as digits: an outlier is then the sum over
        the digits p of outliers[p] * factors[1 + p]. None where every value is kept.
      outlier_w: [n, gathered], the same columns of the weights: x.dtype beside outliers as they are, int8 beside
        digits. None where every value is kept.
      number: int32[1], of outlier columns. None where every value is kept.
    """

    q: jax.Array
    factors: jax.Array
    outliers: jax.Array | None = None
    outlier_w: jax.Array | None = None
    number: jax.Array | None = None


def gathered_size(k: int, block: int) -> int:
    """Columns to allocate for up to k gathered ones: k, rounded up to whole blocks."""
    return pl.cdiv(k, block) * block


def _quantize_rows_kernel(
    x_ref,  # [m, k]
    *refs,  # with outliers mask [k], order [k], number [1]; then the results
    bm: int,
    bk: int,
    form: OutlierForm | None,
    block: int,
    threshold: float | None,
):
    """One program per bm rows of x."""
    columns, out = (refs[:3], refs[3:]) if form else (None, refs)
    static = {"bm": bm, "bk": bk, "form": form, "block": block, "threshold": threshold}
    _quantize_rows(pl.program_id(0), x_ref, columns, out, **static)


def _gather_columns_kernel(
    w_ref,  # [n, k]
    *refs,  # mask [k], order [k], number [1]; the result
    block: int,
):
    """One program per _CHANNELS rows of w."""
    _gather_weights(pl.program_id(0), w_ref, refs[:3], refs[3], block=block)


def _quantize_and_gather_kernel(
    x_ref,  # [m, k]
    *refs,  # mask [k], order [k], number [1], w [n, k]; the results
    bm: int,
    block: int,
    **static,  # as in `_quantize_rows_kernel`
):
    """One program per bm rows of x, then one per _CHANNELS rows of w."""
    columns, (w_ref, *out, outlier_w_ref) = refs[:3], refs[3:]
    program, row_programs = pl.program_id(0), pl.cdiv(x_ref.shape[0], bm)

    @pl.when(program < row_programs)
    def _rows_of_x():
        _quantize_rows(program, x_ref, columns, out, bm=bm, block=block, **static)

    @pl.when(program >= row_programs)
    def _rows_of_w():
        _gather_weights(program - row_programs, w_ref, columns, outlier_w_ref, block=block)


def _quantize_rows(program, x_ref, columns, out, *, bm, bk, form, block, threshold):
    """Quantizes bm rows. It passes over them twice: for the largest values, then to quantize."""
    m, k = x_ref.shape
    q_ref, factors_ref, *gathered = out
    rows, steps = _pallas.clamped_rows(program, bm, m), pl.cdiv(k, bk)  # rows: [bm]
    out_rows = _pallas.span(program * bm, bm)
    written = out_rows < m

    def is_outlier(x, column):
        return column if threshold is None else column & (jnp.abs(x) >= threshold)

    def tile(i):
        """Columns i * bk, ...: their indices, the kept values [bm, bk] and the outliers [bm, bk], 0 elsewhere."""
        # Load the tile of x, zeros past the end of the rows.
        cols = _pallas.span(i * bk, bk)
        x = _pallas.load(x_ref, (rows[:, None], cols[None, :]), mask=(cols < k)[None, :]).astype(jnp.float32)
        if columns is None:
            return cols, x, jnp.zeros_like(x)
        # Look up which of the columns are outlier columns.
        column = _pallas.load(columns[0], (cols,), mask=cols < k)[None, :] != 0
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
        _pallas.store(q_ref, (out_rows[:, None], cols[None, :]), q, mask=written[:, None] & (cols < k)[None, :])
        return carry

    def loop(body, init):
        return body(0, init) if steps == 1 else lax.fori_loop(0, steps, body, init)

    def store_factor(p, factor):
        _pallas.store(factors_ref, (jnp.full((bm,), p, jnp.int32), out_rows), factor, mask=written)

    # First pass: the largest kept value of each row and, for digits, the largest outlier. Elementwise over tiles; the
    # reduction over columns comes once.
    tops = loop(absmax, (jnp.zeros((bm, bk), jnp.int32),) * (2 if form == "digits" else 1))
    scale = scale_of(jnp.max(tops[0], axis=1), INT8_MAX)
    store_factor(0, scale)
    # Second pass: quantize the kept values.
    loop(quantize, 0)
    if columns is None:
        return

    # The outlier columns, side by side: as they are, or as digits of a scale per row.
    _, order_ref, number_ref = columns
    (outliers_ref,) = gathered
    number = _pallas.scalar(number_ref)
    outlier_scale = None
    if form == "digits":
        outlier_scale = scale_of(jnp.max(tops[1], axis=1), DIGITS_MAX)
        for p, factor in enumerate(digit_factors(outlier_scale)):
            store_factor(1 + p, factor)

    def gather(i, carry):
        # Load a block of outlier columns. The lanes beyond the last one load column 0 and become zeros.
        lanes = _pallas.span(i * block, block)
        cols = _pallas.load(order_ref, (lanes,), mask=lanes < number)
        x = _pallas.load(x_ref, (rows[:, None], cols[None, :])).astype(jnp.float32)  # [bm, block]
        values = jnp.where(is_outlier(x, (lanes < number)[None, :]), x, 0.0)
        if outlier_scale is None:
            _pallas.store(outliers_ref, (out_rows[:, None], lanes[None, :]), values, mask=written[:, None])
            return carry
        for p, digit in enumerate(split_digits(round_to_int(values, outlier_scale[:, None]))):
            at = (jnp.full((1, 1), p, jnp.int32), out_rows[:, None], lanes[None, :])
            _pallas.store(outliers_ref, at, digit, mask=written[:, None])
        return carry

    lax.fori_loop(0, pl.cdiv(number, block), gather, 0)


def _gather_weights(program, w_ref, columns, out_ref, *, block):
    """Gathers the outlier columns of _CHANNELS rows of the weights."""
    n = w_ref.shape[0]
    rows = _pallas.clamped_rows(program, _CHANNELS, n)  # [_CHANNELS]
    out_rows = _pallas.span(program * _CHANNELS, _CHANNELS)
    _, order_ref, number_ref = columns
    number = _pallas.scalar(number_ref)

    def gather(i, carry):
        # Load a block of outlier columns of the weights.
        lanes = _pallas.span(i * block, block)
        cols = _pallas.load(order_ref, (lanes,), mask=lanes < number)
        # Lanes beyond the last outlier column become zeros. They would be multiplied by zeros of x in any case.
        w = jnp.where((lanes < number)[None, :], _pallas.load(w_ref, (rows[:, None], cols[None, :])), 0)
        # int8 is exact in any float.
        _pallas.store(out_ref, (out_rows[:, None], lanes[None, :]), w, mask=(out_rows < n)[:, None])
        return carry

    lax.fori_loop(0, pl.cdiv(number, block), gather, 0)


def quantize_rows(
    x: jax.Array,
    w: jax.Array | None = None,
    outliers: Outliers | None = None,
    *,
    form: OutlierForm = "digits",
    block: int = 32,
    threshold: float | None = None,
    height: int = 1,
    interpret: bool = False,
) -> QuantizedRows:
    """Quantizes each row by the largest absolute value among those that are kept, and gathers the outlier columns.

    One launch, or two for many values (`TOGETHER`).

    `factors[0] = max(abs(kept)) / 127`, `q = round_half_even(kept / factors[0])`. Outliers are left out of both. They
    come as they are, or as three 7-bit digits of `round(x / (max(abs(outlier)) / (127 * 2**14)))`, exact to 2**-22 of
    the row's largest outlier.

    Args:
      x: float[m, k], m and k at least 1; bfloat16 or float16 for outliers in the form "floats".
      w: int8[n, k], where there are outliers.
      outliers: the outlier columns, from `outlier_columns`; None keeps everything.
      form: of the gathered outliers: "digits" or "floats".
      block: gathered columns are zero to the end of a block of so many, a power of two.
      threshold: None takes all of an outlier column as outliers (the paper); a number only its entries with
        `abs(x) >= threshold`, so that a row depends on no other row.
      height: allocate rows for a multiple of it, those after the last one uninitialised.
      interpret: run in Pallas's interpret mode.

    Returns:
      `QuantizedRows`.

    Raises:
      ValueError: outliers without w.

    Examples:
      >>> x, w = jnp.array([[127.0, 500.0, 1.5, -2.5]]), jnp.array([[1, 2, 3, 4]], jnp.int8)
      >>> quantize_rows(jnp.where(x < 200, x, 0), interpret=True).q.tolist()
      [[127, 0, 2, -2]]
      >>> from pallas_kernels.triton.outliers import outlier_columns
      >>> rows = quantize_rows(x, w, outlier_columns(x, 200, interpret=True), interpret=True)
      >>> rows.q.tolist(), rows.outliers[0, 0, :2].tolist(), rows.outlier_w[0, :2].tolist()
      ([[127, 0, 2, -2]], [127, 0], [2, 0])

    References:
      LLM.int8(), sections 2.1 and 3 (https://arxiv.org/abs/2208.07339).
    """
    if outliers is not None and w is None:
        raise ValueError("Expected w beside outliers, to gather their columns, got None")
    m, k = x.shape
    # A program holds a tile of at most 8192 values in registers: up to four short rows, or one row, in steps of 8192
    # where it is longer.
    bk = min(8192, max(128, pl.next_power_of_2(k)))
    bm = max(1, min(4, 2048 // bk))
    programs, allocated = pl.cdiv(m, bm), pl.cdiv(m, height) * height
    digits = outliers is not None and form == "digits"
    out = [
        jax.ShapeDtypeStruct((allocated, k), jnp.int8),
        jax.ShapeDtypeStruct((1 + DIGITS if digits else 1, allocated), jnp.float32),
    ]
    static: dict[str, Any] = {"bm": bm, "bk": bk, "block": block, "threshold": threshold}
    call = functools.partial(_pallas.call, num_warps=max(1, min(8, bm * bk // 1024)), num_stages=1, interpret=interpret)
    if outliers is None or w is None:
        kernel = functools.partial(_quantize_rows_kernel, form=None, **static)
        q, factors = call(kernel, (programs,), [x], out)
        return QuantizedRows(q, factors)

    static["form"] = form
    n, size = w.shape[0], gathered_size(k, block)
    dtype = jnp.int8 if digits else x.dtype
    out.append(jax.ShapeDtypeStruct(((DIGITS,) if digits else ()) + (allocated, size), dtype))
    out_w, w_programs = jax.ShapeDtypeStruct((n, size), dtype), pl.cdiv(n, _CHANNELS)
    if m * k <= TOGETHER:
        kernel = functools.partial(_quantize_and_gather_kernel, **static)
        q, factors, gathered, outlier_w = call(kernel, (programs + w_programs,), [x, *outliers, w], [*out, out_w])
    else:
        kernel = functools.partial(_quantize_rows_kernel, **static)
        q, factors, gathered = call(kernel, (programs,), [x, *outliers], out)
        kernel = functools.partial(_gather_columns_kernel, block=block)
        (outlier_w,) = call(kernel, (w_programs,), [w, *outliers], [out_w])
    return QuantizedRows(q, factors, gathered, outlier_w, outliers.number)
