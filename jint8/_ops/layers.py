"""What the layers of Flax compute, with a quantized weight: shared by linen and nnx, and free of both.

A weight is a `QTensor`, or a float array with the `Config` to quantize it by: then the gradient reaches it straight
through (as if it weren't quantized).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from jint8._core.config import Config
from jint8._core.qtensor import QTensor, storage_axes
from jint8._core.quantize import quantize
from jint8._core.rotation import out_of_coordinates
from jint8._ops.checks import check_activations, check_precision
from jint8._ops.dot_general import DimensionNumbers, activations_first, dot_general
from jint8._ops.einsum import parse_subscripts
from jint8._ops.weight import rows_in_units

FloatOrInt8 = QTensor | jax.Array


def compute_dtype(dtype: DTypeLike | None, *arrays: Any) -> Any:
    """The dtype that a Flax layer computes in: its own, or what the inputs and parameters promote to."""
    if dtype is not None:
        return jnp.dtype(dtype)
    dtype = jnp.result_type(*(a.dtype for a in arrays if a is not None))
    return dtype if jnp.issubdtype(dtype, jnp.inexact) else jnp.promote_types(jnp.float32, dtype)


def weight_product(
    x: jax.Array,
    w: FloatOrInt8,
    numbers: DimensionNumbers,
    config: Config | None = None,
    *,
    bias: jax.Array | None = None,
    dtype: DTypeLike = jnp.float32,
    precision: Any = None,
) -> jax.Array:
    """`lax.dot_general(x, w, numbers)` with `w` in int8, plus `bias[*batch, *free axes of w]`, rounded once to `dtype`.

    `config` quantizes a float `w`. `precision` is that of `jint8.dot_general`.
    """
    if isinstance(w, QTensor):
        check_activations(x, "activations")
        return activations_first(x, w, numbers, config=w.config, dtype=dtype, bias=bias, precision=precision)
    y = _float_weight_product(x, w, numbers, config, precision)
    if bias is not None:
        batch = len(numbers[1][1])
        free_x = x.ndim - batch - len(numbers[0][0])
        y = y + bias.reshape(*bias.shape[:batch], *(1,) * free_x, *bias.shape[batch:]).astype(jnp.float32)
    return y.astype(dtype)


def _float_weight_product(x, w, numbers, config, precision) -> jax.Array:
    """The product with a float weight, as `config` quantizes it: float32."""
    config = config or Config()
    if not config.quantizes_weights:
        return lax.dot_general(x, w.astype(x.dtype), numbers, precision, preferred_element_type=jnp.float32)
    check_precision(precision)
    numbers = tuple(tuple(tuple(int(a) for a in axes) for axes in pair) for pair in numbers)
    return _straight_through((numbers, config, precision), x, w)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _straight_through(static, x, w):
    numbers, config, precision = static
    q = quantize(w, contract_axes=numbers[0][1], stack_axes=numbers[1][1], config=config)
    return dot_general(x, q, numbers, precision, preferred_element_type=jnp.float32)


@_straight_through.defjvp
def _straight_through_jvp(static, primals, tangents):
    (x, w), (x_dot, w_dot) = primals, tangents
    numbers, _, precision = static
    float_product = functools.partial(
        lax.dot_general, dimension_numbers=numbers, precision=precision, preferred_element_type=jnp.float32
    )
    w, w_dot = w.astype(x.dtype), w_dot.astype(x.dtype)
    return _straight_through(static, x, primals[1]), float_product(x_dot, w) + float_product(x, w_dot)


def dense_general(
    x: jax.Array,
    w: FloatOrInt8,
    bias: jax.Array | None = None,
    *,
    axis: Sequence[int] = (-1,),
    batch_dims: Sequence[int] = (),
    dtype: DTypeLike | None = None,
    out_dtype: DTypeLike | None = None,
    config: Config | None = None,
    precision: Any = None,
) -> jax.Array:
    """`DenseGeneral`: `w[*batch, *contracted, *features]` over `axis` of `x` -> `[*batch, *free, *features]`."""
    dtype = compute_dtype(dtype, x, w, bias)
    axis, batch_dims = tuple(a % x.ndim for a in axis), tuple(a % x.ndim for a in batch_dims)
    batch, contracted = len(batch_dims), len(axis)
    numbers = ((axis, tuple(range(batch, batch + contracted))), (batch_dims, tuple(range(batch))))
    if bias is not None:  # some layers keep it flat
        bias = bias.reshape(*w.shape[:batch], *w.shape[batch + contracted :])
    return weight_product(x.astype(dtype), w, numbers, config, bias=bias, dtype=out_dtype or dtype, precision=precision)


def einsum(
    subscripts: str,
    x: jax.Array,
    w: FloatOrInt8,
    bias: jax.Array | None = None,
    *,
    dtype: DTypeLike | None = None,
    out_dtype: DTypeLike | None = None,
    config: Config | None = None,
    precision: Any = None,
) -> jax.Array:
    """`jnp.einsum(subscripts, x, w) + bias`, the bias on those axes of the result that come from `w`."""
    dtype = compute_dtype(dtype, x, w, bias)
    labels = parse_subscripts(subscripts, x, w, 1)
    if bias is not None:  # Flax broadcasts it over the whole result
        bias = bias.reshape([w.shape[labels.w.index(label)] for label in labels.output if label in labels.w])
        bias = labels.arrange_bias(bias)
    y = weight_product(
        labels.sum_alone(x.astype(dtype)),
        w,
        labels.numbers,
        config,
        bias=bias,
        dtype=out_dtype or dtype,
        precision=precision,
    )
    return labels.arrange(y)


def lookup(w: QTensor, tokens: jax.Array, *, dtype: DTypeLike | None = None) -> jax.Array:
    """Rows of an int8 embedding `[vocabulary, k]` -> `[*tokens.shape, k]`. NaN for tokens out of range."""
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise TypeError(f"Expected tokens to be integers, got {tokens.dtype}.")

    def rows(leaf, dtype=jnp.float32, at=tokens):
        leaf = jnp.transpose(leaf, storage_axes(w))  # A no-op where w is stored in its own order; XLA removes it.
        if leaf.shape[0] == 1 and w.shape[0] > 1:  # one value for all tokens: nothing to take
            same = jnp.broadcast_to(leaf[0].astype(dtype), (*tokens.shape, leaf.shape[1]))
            in_range = (tokens >= -w.shape[0]) & (tokens < w.shape[0])
            return jnp.where(in_range[..., None], same, jnp.nan) if dtype == jnp.float32 else same
        # The barrier keeps rows from being converted before they are taken: a loop around this would convert the whole
        # table once, before it.
        return lax.optimization_barrier(jnp.take(leaf, at, axis=0)).astype(dtype)

    if w.features is not None:
        by_group = tokens % w.shape[0] // w.config.group if w.config.grouping == "ic" else tokens
        step, low = (rows(leaf, at=by_group) for leaf in (w.group_scale, w.group_min))
        q = rows_in_units(w, rows(w.q, jnp.uint8), step, low)
        q = jnp.where(((tokens >= -w.shape[0]) & (tokens < w.shape[0]))[..., None], q, jnp.nan)
    else:
        q = rows(w.q) if w.zero is None else rows(w.q) - rows(w.zero)
    scale = rows(w.scale)
    values = q * scale
    if w.smooth is not None:
        values = out_of_coordinates(values, rows(w.smooth), w.config.rotate)
    if w.outlier_index is not None:
        assert w.outlier_rows is not None
        index = rows(w.outlier_index, jnp.int32)  # all rows of an embedding have the same columns
        kept = rows(w.outlier_rows) * scale
        values = jnp.put_along_axis(values, index, kept, axis=-1, inplace=False, mode="drop")
    return values.astype(w.dtype if dtype is None else dtype)


def attend(x: jax.Array, w: QTensor, *, dtype: DTypeLike | None = None, precision: Any = None) -> jax.Array:
    """`x[..., k] @ w[vocabulary, k].T`: a tied output head."""
    dtype = compute_dtype(dtype, x, w)
    numbers = (((x.ndim - 1,), (1,)), ((), ()))
    return weight_product(x.astype(dtype), w, numbers, dtype=dtype, precision=precision)
