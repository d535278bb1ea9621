"""The product for few rows (decoding), which is bound by reading the int8 weights once.

x becomes four int8 planes of m rows each: the kept values, and the outliers as three digits in place. Their 4 * m rows
share one pass over the weights as one int8 product; a tensor core multiplies 16 rows in the time of one, so that the
digits are free for m <= 4 and cheap up to 16. There is nothing to gather, and every number of outliers takes the same
time.
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
    DIGITS_TOP,
    K_EXACT,
    Q_TOP,
    abs_bits,
    digit_factors,
    split_digits,
    step_of,
    to_int,
)
from pallas_kernels.configs import FewRowsConfig

FEW_ROWS = 16


class Planes(NamedTuple):
    """x[m, k] = sum of planes[p] * factors[p][:, None]: `planes` int8[1 or 4, m, k], `factors` float32[1 or 4, m]."""

    planes: jax.Array
    factors: jax.Array


def _quantize_few_rows_kernel(x_ref, planes_ref, factors_ref, *, bk, threshold, per_token):
    m, k = x_ref.shape
    row, steps = jnp.full((1,), pl.program_id(0), jnp.int32), pl.cdiv(k, bk)
    every = _triton.rows_of(0, pl.next_power_of_2(m), m)

    def tile(i):
        cols = _triton.span(i * bk, bk)
        x = _triton.load(x_ref, (row, cols), mask=cols < k).astype(jnp.float32)
        if threshold == 0:
            return cols, (x,)
        if per_token:
            out = jnp.abs(x) >= threshold
        else:  # every program looks at all rows: they are few, and a launch for the mask costs more
            column = _triton.load(x_ref, (every[:, None], cols[None, :]), mask=(cols < k)[None, :]).astype(jnp.float32)
            out = jnp.max((jnp.abs(column) >= threshold).astype(jnp.int32), axis=0) != 0
        return cols, (jnp.where(out, 0.0, x), jnp.where(out, x, 0.0))

    if steps == 1:
        tile = functools.cache(tile)

    def loop(body, init):
        return body(0, init) if steps == 1 else lax.fori_loop(0, steps, body, init)

    def absmax(i, tops):
        return tuple(jnp.maximum(top, abs_bits(part)) for top, part in zip(tops, tile(i)[1], strict=True))

    tops = loop(absmax, (jnp.zeros((bk,), jnp.int32),) * (1 if threshold == 0 else 2))
    unit = [step_of(jnp.max(top), whole) for top, whole in zip(tops, (Q_TOP, DIGITS_TOP), strict=False)]
    factors = (unit[0], *(digit_factors(unit[1]) if threshold else ()))
    for p, factor in enumerate(factors):
        _triton.store(factors_ref, (jnp.full((1,), p, jnp.int32), row), factor[None], mask=row < m)

    def quantize(i, carry):
        cols, (kept, *out) = tile(i)
        planes = (to_int(kept, unit[0]), *(split_digits(to_int(out[0], unit[1])) if out else ()))
        for p, plane in enumerate(planes):
            _triton.store(planes_ref, (jnp.full((1,), p, jnp.int32), row, cols), plane, mask=cols < k)
        return carry

    loop(quantize, 0)


def quantize_few_rows(x: jax.Array, threshold: float, *, per_token: bool = False, interpret: bool = False) -> Planes:
    """Finds the outliers and splits x into int8 planes, in one launch.

    `planes[0]` are the kept values (`factors[0] = max(abs(kept)) / 127`, rounded half to even), `planes[1:]` three
    7-bit digits of the outliers, exact to 2**-22 of the row's largest.

    Args:
      x: float[m, k], m and k at least 1.
      threshold: static; 0 makes one plane, without outliers.
      per_token: an outlier is an entry that reaches the threshold; otherwise all of a column in which one does.
      interpret: run in Pallas's interpret mode.

    Returns:
      `Planes`. The factors of a row with a value that isn't finite are NaN.

    Example:
      >>> quantize_few_rows(jnp.array([[127.0, 0.5, 1.5]]), 0, interpret=True).planes.tolist()
      [[[127, 0, 2]]]
    """
    m, k = x.shape
    planes = 1 + DIGITS if threshold else 1
    bk = min(1024, max(128, pl.next_power_of_2(k)))
    return Planes(
        *_triton.call(
            functools.partial(_quantize_few_rows_kernel, bk=bk, threshold=threshold, per_token=per_token),
            (m,),
            [x],
            [jax.ShapeDtypeStruct((planes, m, k), jnp.int8), jax.ShapeDtypeStruct((planes, m), jnp.float32)],
            num_warps=4,
            num_stages=1,
            interpret=interpret,
        )
    )


def _int8_matmul_few_rows_kernel(planes_ref, factors_ref, w_ref, scale_ref, *rest, bm, bn, bk, steps):
    *bias_ref, y_ref = rest
    (planes, m, k), n, splits = planes_ref.shape, w_ref.shape[0], y_ref.shape[0]
    split, out_cols = pl.program_id(1), _triton.span(pl.program_id(0) * bn, bn)
    cols = jnp.minimum(out_cols, n - 1)
    stacked = _triton.span(0, planes * bm)
    plane, row = stacked // bm, jnp.minimum(stacked % bm, m - 1)
    tail = splits * steps * bk != k  # the programs cover more than k: splits don't divide it

    def step(i, acc):
        depth = _triton.span((split * steps + i) * bk, bk)
        mask = (depth < k)[None, :] if tail else None
        x = _triton.load(planes_ref, (plane[:, None], row[:, None], depth[None, :]), mask=mask)
        w = _triton.load(w_ref, (cols[:, None], depth[None, :]), mask=mask)
        return acc + lax.dot_general(x, w, _triton.CONTRACT_LAST, preferred_element_type=jnp.int32)

    acc = lax.fori_loop(0, steps, step, jnp.zeros((planes * bm, bn), jnp.int32))
    y = acc.astype(jnp.float32) * _triton.load(factors_ref, (plane, row))[:, None]
    if planes > 1:
        y = jnp.sum(y.reshape(planes, bm, bn), axis=0)
    if splits == 1:
        y = y * _triton.load(scale_ref, (cols,))[None, :]
        for ref in bias_ref:
            y = y + _triton.load(ref, (cols,)).astype(jnp.float32)[None, :]
    rows = _triton.span(0, bm)
    at = (jnp.full((1, 1), split, jnp.int32), rows[:, None], out_cols[None, :])
    _triton.store(y_ref, at, y, mask=(rows < m)[:, None] & (out_cols < n)[None, :])


def int8_matmul_few_rows(
    x: Planes,
    w: jax.Array,
    w_scale: jax.Array,
    *,
    bias: jax.Array | None = None,
    dtype,
    config: FewRowsConfig,
    interpret: bool = False,
) -> jax.Array:
    """y = (sum over planes of factors[p] * (planes[p] @ w.T)) * w_scale + bias, int8 products exact in int32.

    Args:
      x: from `quantize_few_rows`, at most 64 rows over all planes keep it bound by the weights.
      w: int8[n, k].
      w_scale: float32[n].
      bias: float[n] or None, added in float32.
      dtype: of the result; rounded once.
      config: tiles, and the number of parts that k is split into. More parts than 1 are added by a second kernel.
      interpret: run in Pallas's interpret mode.

    Returns:
      dtype[m, n].

    Example:
      >>> x = quantize_few_rows(jnp.array([[127.0, 2.0]]), 0, interpret=True)
      >>> w, one = jnp.ones((1, 2), jnp.int8), jnp.ones(1)
      >>> int8_matmul_few_rows(x, w, one, dtype="float32", config=FewRowsConfig(), interpret=True).tolist()
      [[129.0]]
    """
    (planes, m, k), n = x.planes.shape, w.shape[0]
    # A tensor-core tile has at least 16 rows.
    bm = max(16 // planes, pl.next_power_of_2(m))
    bn, bk = config.bn, config.bk
    splits = max(min(config.splits, pl.cdiv(k, bk)), pl.cdiv(k, K_EXACT // bk * bk))
    steps = pl.cdiv(pl.cdiv(k, bk), splits)
    args = [x.planes, x.factors, w, w_scale] + ([] if bias is None else [bias])
    (y,) = _triton.call(
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
