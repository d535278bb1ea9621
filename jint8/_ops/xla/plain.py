"""Products of whole arrays: int8 with int8, and floats with dequantized weights. The other paths are made of these."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from jint8._core.platform import on_one_cpu
from jint8._ops.weight import Weight
from jint8._ops.xla.blocks import block_product

MOST_EXPANDED = 1 << 21  # float32 values of a weight at a time, on a CPU


def float_product(x: jax.Array, w: Weight, precision: Any = None, *, by_blocks: bool = False) -> jax.Array:
    """`x[m, k]` times the dequantized weight, in `x`'s dtype -> `[m, n]`; `by_blocks` as `"xla_blocks"` computes it."""
    rest = x if w.outlier_index is None else without_columns(x, w.outlier_index)
    rest = w.coordinates(rest)  # float32 where that changes them: small features of a block would drown in 16 bits
    if by_blocks:
        y = (block_product(rest.astype(jnp.float32), w) * w.scale).astype(x.dtype)
    else:
        y = _some_channels_at_a_time(rest, w, precision).astype(x.dtype)
    return y if w.outlier_index is None else y + column_product(x, w, precision).astype(x.dtype)


def _dequantized_product(x: jax.Array, w: Weight, precision: Any) -> jax.Array:
    weights = (w.in_units() * w.per_channel(w.scale)).astype(x.dtype)
    return dot(x, weights, k_last=w.k_last, dtype=x.dtype, precision=precision)


def _some_channels_at_a_time(x: jax.Array, w: Weight, precision: Any) -> jax.Array:
    """The product with the dequantized weight. In four bits, on a CPU, with as much of it at a time as stays in cache.

    A whole weight in float32 goes to memory that is new at each call, for up to 16 rows longer than the product itself.
    """
    size, packing = _channels_at_once(w), w.packing
    if size is None or packing is None:
        return _dequantized_product(x, w, precision)
    assert w.group_scale is not None
    assert w.group_min is not None
    count, of_groups = w.n // size, size if packing.channels is None else size // packing.group

    def product(parts: tuple[jax.Array, ...], channels: int) -> jax.Array:
        q, scale, step, low = parts
        held = packing._replace(channels=None if packing.channels is None else channels)
        some = dataclasses.replace(w, q=q, scale=scale, group_scale=step, group_min=low, packing=held)
        return _dequantized_product(x, some, precision)

    arrays = ((w.q, size), (w.scale, size), (w.group_scale, of_groups), (w.group_min, of_groups))
    blocks = tuple(a[: count * rows].reshape(count, rows, *a.shape[1:]) for a, rows in arrays)
    y = jnp.moveaxis(lax.map(lambda parts: product(parts, size), blocks), 0, 1).reshape(len(x), count * size)
    if not (left := w.n - count * size):
        return y
    return jnp.concatenate([y, product(tuple(a[count * rows :] for a, rows in arrays), left)], axis=1)


def _channels_at_once(w: Weight) -> int | None:
    """How many output channels are dequantized at a time, whole groups of them; None: all."""
    if w.packing is None or not w.k_last or w.packing.channels not in (None, w.n) or not on_one_cpu():
        return None
    group = w.packing.group
    size = MOST_EXPANDED // max(w.k, 1) // group * group
    return size if 0 < size <= w.n // 2 else None


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
