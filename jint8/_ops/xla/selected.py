"""The product of many rows on a TPU, `"xla_selected"`: outlier columns are selected by a product.

A TPU gathers columns of a weight by copying all of it in another order, which takes longer than the product. A product
with a matrix of zeros and ones selects the same columns, exactly, and costs as much as `COLUMNS` more rows.

How many columns hold outliers decides between three programs, each of which ends in the finished rows: a condition that
handed on float32 sums would write and read them once more.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from jint8._core.config import Config
from jint8._ops.activations import Outliers, split
from jint8._ops.digits import OUTLIER_DIGITS, digit_step, digits, join_digits
from jint8._ops.weight import MAX_K, Weight
from jint8._ops.xla.decomposed import int8_rows, regular_product
from jint8._ops.xla.many_rows import only_outliers
from jint8._ops.xla.plain import dot, int8_dot, row_sum, without_zero

COLUMNS = 128  # outlier columns that are selected; with more, all columns are multiplied once more
# Up to which digits are taken. By the compiler's estimates for v5e and 4096 x 14336, 64 rows take 221,000 cycles by
# digits, and here about 190,000 without outliers, 235,000 with some and 310,000 with many.
FEW_ROWS_ON_TPU = 64


def selects(w: Weight, config: Config) -> bool:
    """Whether `"xla_selected"` can compute products with this weight."""
    return w.packing is None and config.decomposes and w.k <= MAX_K


def selected_product(x: jax.Array, w: Weight, bias: jax.Array | None, config: Config, dtype: DTypeLike) -> jax.Array:
    """`x[m, k]` times `w`, plus `bias[n]` -> `dtype[m, n]`, for any number of outliers."""
    parts = split(x, config)
    outliers = parts.outliers
    assert outliers is not None
    stacked = int8_rows(parts)

    def finished(side: Callable[[], jax.Array] | None) -> jax.Array:
        y = regular_product(parts, w, int8_dot(stacked, w), row_sum(stacked), x.shape[0])
        y = (y if side is None else y + side()) * w.scale
        return (y if bias is None else y + bias.astype(jnp.float32)).astype(dtype)

    # Where each token decides for itself, what it gets must not depend on which columns other tokens select, so their
    # sums are of integers. In bfloat16 one product of values is as exact as float32, and cheaper.
    product = _float_product if outliers.limit is None and x.dtype == jnp.bfloat16 else _digit_product
    count = jnp.sum(outliers.columns)

    def selected() -> jax.Array:
        return product(*_selected(x, outliers, w), w)

    def every_column() -> jax.Array:
        return product(only_outliers(x, outliers), w.q, w.k_last, w)

    sides: list[Callable[[], jax.Array] | None]
    if w.k <= COLUMNS:
        sides, case = [None, every_column], count > 0
    else:
        sides, case = [None, selected, every_column], (count > 0).astype(jnp.int32) + (count > COLUMNS)
    return lax.switch(case.astype(jnp.int32), [functools.partial(finished, side) for side in sides])


def _selected(x: jax.Array, outliers: Outliers, w: Weight) -> tuple[jax.Array, jax.Array, bool]:
    """The columns that hold outliers, at most `COLUMNS`: of `x`, of the weight as `[COLUMNS, n]`; its `k_last`."""
    place = jnp.cumsum(outliers.columns.astype(jnp.int32)) - 1
    chosen = (place == jnp.arange(COLUMNS)[:, None]) & outliers.columns
    weights = dot(chosen.astype(jnp.int8), w.q, k_last=w.k_last, dtype=jnp.int32).astype(jnp.int8)
    values = only_outliers(x, outliers)
    if x.dtype == jnp.bfloat16:
        # A row that holds infinity or NaN becomes NaN as a whole, and so does its result.
        columns = dot(values, chosen.astype(x.dtype), k_last=True, dtype=jnp.float32).astype(x.dtype)
    else:  # a TPU's products of float32 are of parts, which overflow near the largest values
        index = jnp.where(jnp.any(chosen, 1), jnp.argmax(chosen, 1), w.k)
        columns = jnp.take(values, index, axis=1, mode="fill", fill_value=0)
    return columns, weights, False


def _float_product(x: jax.Array, q: jax.Array, k_last: bool, w: Weight) -> jax.Array:
    """Outliers `x[m, c]` in bfloat16 times int8 weights, which bfloat16 holds exactly: float32 `[m, n]`."""
    products = dot(x, q.astype(x.dtype), k_last=k_last, dtype=jnp.float32)
    return without_zero((products, jnp.sum(x.astype(jnp.float32), axis=1, keepdims=True)), w)


def _digit_product(x: jax.Array, q: jax.Array, k_last: bool, w: Weight) -> jax.Array:
    """Outliers `x[m, c]` as int8 digits times int8 weights, summed exactly: float32 `[m, n]`."""
    x = x.astype(jnp.float32)
    step = digit_step(x, 1, OUTLIER_DIGITS)
    rows = digits(x, step, OUTLIER_DIGITS)
    sums = without_zero((dot(rows, q, k_last=k_last, dtype=jnp.int32), row_sum(rows)), w)
    return join_digits(sums, x.shape[0]) * step
