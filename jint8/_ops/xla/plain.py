"""Products of whole arrays: int8 with int8, and floats with dequantized weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jint8._ops.weight import Weight


def float_product(x: jax.Array, w: Weight, *, k_last: bool) -> jax.Array:
    """`x[m, k]` times the dequantized weight, in `x`'s dtype -> `[m, n]`."""
    q = w.q.astype(jnp.float32)
    per_channel = (slice(None), None) if k_last else (None, slice(None))
    if w.zero is not None:
        q = q - w.zero[per_channel]
    rest = x if w.outlier_index is None else without_columns(x, w.outlier_index)
    y = dot(rest, (q * w.scale[per_channel]).astype(x.dtype), k_last, x.dtype)
    return y if w.outlier_index is None else y + column_product(x, w, k_last=k_last).astype(x.dtype)


def without_columns(x: jax.Array, index: jax.Array) -> jax.Array:
    """`x[m, k]` with 0 in the columns `index`."""
    taken = jnp.zeros(x.shape[1], bool).at[index].set(True, mode="drop")
    return jnp.where(taken, 0, x)


def column_product(x: jax.Array, w: Weight, *, k_last: bool) -> jax.Array:
    """The calibrated outlier columns of `x[m, k]` times the weight's 16-bit rows, float32 `[m, n]`."""
    assert w.outlier_index is not None
    assert w.outlier_rows is not None
    columns = jnp.take(x, w.outlier_index, axis=1, mode="fill", fill_value=0).astype(jnp.float32)
    # at full precision, because outliers are large: GPUs and TPUs would round them to 8 or 11 bits
    y = dot(columns, w.outlier_rows.astype(jnp.float32), k_last, jnp.float32, lax.Precision.HIGHEST)
    return y * w.scale


def without_zero(sums, w: Weight):
    """Exact `sum_k q wq`, with the row sums of q, to float32 `sum_k q (wq - wzero)`."""
    acc, row_sum = sums
    out = acc.astype(jnp.float32)
    return out if w.zero is None else out - row_sum.astype(jnp.float32) * w.zero


def row_sum(q):
    """int32 `[m, 1]`: the sums of int8 rows."""
    return jnp.sum(q, axis=1, keepdims=True, dtype=jnp.int32)


def int8_dot(x: jax.Array, q: jax.Array, k_last: bool) -> jax.Array:
    """int8 `[m, k]` times int8 weights, accumulated exactly in int32 `[m, n]`."""
    if x.shape[0] == 1:
        # XLA's CPU backend runs a matrix-vector product of int8 as a scalar loop, 10 to 50 times slower than two rows
        return dot(jnp.pad(x, ((0, 1), (0, 0))), q, k_last, jnp.int32)[:1]
    return dot(x, q, k_last, jnp.int32)


def dot(x, w, k_last, dtype, precision=None):
    """`x[m, k]` times `w`, accumulated in `dtype` -> `[m, n]`."""
    contract = (((1,), (1 if k_last else 0,)), ((), ()))
    return lax.dot_general(x, w, contract, precision, preferred_element_type=dtype)
