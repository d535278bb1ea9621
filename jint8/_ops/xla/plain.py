"""Products of whole arrays: int8 with int8, and floats with dequantized weights. The other paths are made of these."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from jint8._ops.weight import Weight
from jint8._ops.xla.blocks import block_product


def float_product(x: jax.Array, w: Weight, precision: Any = None, *, by_blocks: bool = False) -> jax.Array:
    """`x[m, k]` times the dequantized weight, in `x`'s dtype -> `[m, n]`; `by_blocks` as `"xla_blocks"` computes it."""
    rest = x if w.outlier_index is None else without_columns(x, w.outlier_index)
    rest = w.coordinates(rest)  # float32 where that changes them: small features of a block would drown in 16 bits
    if by_blocks:
        y = (block_product(rest.astype(jnp.float32), w) * w.scale).astype(x.dtype)
    else:
        weights = (w.in_units() * w.per_channel(w.scale)).astype(rest.dtype)
        y = dot(rest, weights, k_last=w.k_last, dtype=rest.dtype, precision=precision).astype(x.dtype)
    return y if w.outlier_index is None else y + column_product(x, w, precision).astype(x.dtype)


def without_columns(x: jax.Array, index: jax.Array) -> jax.Array:
    """`x[m, k]` with 0 in the columns `index`; indices out of range are none."""
    taken = jnp.zeros(x.shape[1], bool).at[index].set(True, mode="drop")
    return jnp.where(taken, 0, x)


def column_product(x: jax.Array, w: Weight, precision: Any = None) -> jax.Array:
    """The calibrated outlier columns of `x[m, k]` times the weight's 16-bit rows, float32 `[m, n]`."""
    assert w.outlier_index is not None
    assert w.outlier_rows is not None
    columns = jnp.take(x, w.outlier_index, axis=1, mode="fill", fill_value=0).astype(jnp.float32)
    # At full precision unless the caller says otherwise: outliers are large, and by default GPUs and TPUs would round
    # them to 8 or 11 bits.
    precision = lax.Precision.HIGHEST if precision is None else precision
    y = dot(columns, w.outlier_rows.astype(jnp.float32), k_last=w.k_last, dtype=jnp.float32, precision=precision)
    return y * w.scale


def without_zero(sums: tuple[jax.Array, jax.Array], w: Weight) -> jax.Array:
    """float32 `sum_k q (wq - wzero)`, out of the exact `sum_k q wq` and `sum_k q`."""
    acc, row_sums = sums
    out = acc.astype(jnp.float32)
    return out if w.zero is None else out - row_sums.astype(jnp.float32) * w.zero


def row_sum(q: jax.Array) -> jax.Array:
    """int32 `[m, 1]`: the sums of int8 rows."""
    return jnp.sum(q, axis=1, keepdims=True, dtype=jnp.int32)


def int8_dot(x: jax.Array, w: Weight) -> jax.Array:
    """int8 `[m, k]` times int8 weights, accumulated exactly in int32 `[m, n]`."""
    if x.shape[0] == 1:
        # XLA's CPU backend runs an int8 matrix-vector product as a scalar loop, 10 to 50 times slower than two rows.
        return dot(jnp.pad(x, ((0, 1), (0, 0))), w.q, k_last=w.k_last, dtype=jnp.int32)[:1]
    return dot(x, w.q, k_last=w.k_last, dtype=jnp.int32)


def dot(x: jax.Array, w: jax.Array, *, k_last: bool, dtype: DTypeLike, precision: Any = None) -> jax.Array:
    """`x[m, k]` times `w[n, k]` (`k_last`) or `w[k, n]`, accumulated in `dtype` -> `[m, n]`."""
    contract = (((1,), (1 if k_last else 0,)), ((), ()))
    return lax.dot_general(x, w, contract, precision, preferred_element_type=dtype)
