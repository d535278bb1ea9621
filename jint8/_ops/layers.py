"""What the layers of Flax compute, with an int8 weight: shared by linen and nnx, and free of both.

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

from jint8._core.config import Config
from jint8._core.qtensor import QTensor, storage_axes
from jint8._core.quantize import quantize
from jint8._ops.checks import check_activations
from jint8._ops.dot_general import contract, dot_general
from jint8._ops.einsum import parse_subscripts

Weight = QTensor | jax.Array


def compute_dtype(dtype: Any, *arrays: Any) -> Any:
    """The dtype that a Flax layer computes in: its own, or what the inputs and parameters promote to."""
    if dtype is not None:
        return jnp.dtype(dtype)
    dtype = jnp.result_type(*(a.dtype for a in arrays if a is not None))
    return dtype if jnp.issubdtype(dtype, jnp.inexact) else jnp.promote_types(jnp.float32, dtype)


def product(
    x: jax.Array,
    w: Weight,
    numbers: Any,
    config: Config | None = None,
    *,
    bias: jax.Array | None = None,
    dtype: Any = jnp.float32,
) -> jax.Array:
    """`lax.dot_general(x, w, numbers)` with `w` in int8, plus `bias` of the free axes of `w`, rounded once to `dtype`.

    `config` quantizes a float `w`.
    """
    if isinstance(w, QTensor):
        check_activations(x, "activations")
        contracted, batched = numbers
        return contract(x, w, contracted, batched, w.config, None, dtype, bias)
    y = _float_weight_product(x, w, numbers, config)
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    return y.astype(dtype)


def _float_weight_product(x, w, numbers, config):
    config = config or Config()
    if not config.quantizes_weights:
        return lax.dot_general(x, w.astype(x.dtype), numbers, preferred_element_type=jnp.float32)
    numbers = tuple(tuple(tuple(int(a) for a in axes) for axes in pair) for pair in numbers)
    return _straight_through((numbers, config), x, w)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _straight_through(static, x, w):
    numbers, config = static
    q = quantize(w, contract_axes=numbers[0][1], stack_axes=numbers[1][1], config=config)
    return dot_general(x, q, numbers, preferred_element_type=jnp.float32)


@_straight_through.defjvp
def _straight_through_jvp(static, primals, tangents):
    (x, w), (x_dot, w_dot) = primals, tangents
    float_product = functools.partial(lax.dot_general, dimension_numbers=static[0], preferred_element_type=jnp.float32)
    w, w_dot = w.astype(x.dtype), w_dot.astype(x.dtype)
    return _straight_through(static, x, primals[1]), float_product(x_dot, w) + float_product(x, w_dot)


def dense_general(
    x: jax.Array,
    w: Weight,
    bias: jax.Array | None = None,
    *,
    axis: Sequence[int] = (-1,),
    batch_dims: Sequence[int] = (),
    dtype: Any = None,
    out_dtype: Any = None,
    config: Config | None = None,
) -> jax.Array:
    """`DenseGeneral`: `w[*batch, *contracted, *features]` over `axis` of `x` -> `[*batch, *free, *features]`."""
    dtype = compute_dtype(dtype, x, w, bias)
    axis, batch_dims = tuple(a % x.ndim for a in axis), tuple(a % x.ndim for a in batch_dims)
    batch, contracted = len(batch_dims), len(axis)
    numbers = ((axis, tuple(range(batch, batch + contracted))), (batch_dims, tuple(range(batch))))
    out_dtype = out_dtype or dtype
    if bias is None or not batch:
        bias = None if bias is None else bias.reshape(w.shape[contracted:])
        return product(x.astype(dtype), w, numbers, config, bias=bias, dtype=out_dtype)
    y = product(x.astype(dtype), w, numbers, config)
    shape = [x.shape[a] if a in batch_dims else 1 for a in range(x.ndim) if a not in axis]
    return (y + bias.reshape(*shape, *w.shape[batch + contracted :]).astype(jnp.float32)).astype(out_dtype)


def einsum(
    subscripts: str,
    x: jax.Array,
    w: Weight,
    bias: jax.Array | None = None,
    *,
    dtype: Any = None,
    out_dtype: Any = None,
    config: Config | None = None,
) -> jax.Array:
    """`jnp.einsum(subscripts, x, w) + bias`, the bias on those axes of the result that come from `w`."""
    dtype = compute_dtype(dtype, x, w, bias)
    (x_labels, w_labels), output = parse_subscripts(subscripts, x, w, 1)
    contract = [label for label in x_labels if label in w_labels and label not in output]
    batch = [label for label in x_labels if label in w_labels and label in output]
    summed = [i for i, label in enumerate(x_labels) if label not in w_labels and label not in output]
    x = jnp.sum(x.astype(dtype), axis=summed)
    x_labels = [label for i, label in enumerate(x_labels) if i not in summed]
    numbers = tuple(
        tuple(tuple(labels.index(label) for label in shared) for labels in (x_labels, w_labels))
        for shared in (contract, batch)
    )
    out_dtype = out_dtype or dtype
    y = product(x, w, numbers, config, dtype=out_dtype if bias is None else jnp.float32)
    got = batch + [a for a in x_labels if a not in w_labels] + [a for a in w_labels if a not in x_labels]
    y = jnp.transpose(y, [got.index(label) for label in output])
    if bias is not None:
        shape = [w.shape[w_labels.index(label)] if label in w_labels else 1 for label in output]
        y = y + bias.reshape(shape).astype(jnp.float32)
    return y.astype(out_dtype)


def lookup(w: QTensor, tokens: jax.Array, *, dtype: Any = None) -> jax.Array:
    """Rows of an int8 embedding `[vocabulary, k]` -> `[*tokens.shape, k]`. NaN for tokens out of range."""
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise TypeError(f"Expected tokens to be integers, got {tokens.dtype}.")

    def rows(leaf, dtype=jnp.float32):
        leaf = jnp.transpose(leaf, storage_axes(w))  # which XLA drops if it's none
        if leaf.shape[0] == 1 and w.shape[0] > 1:  # the same of all tokens
            same = jnp.broadcast_to(leaf[0].astype(dtype), (*tokens.shape, leaf.shape[1]))
            in_range = (tokens >= -w.shape[0]) & (tokens < w.shape[0])
            return jnp.where(in_range[..., None], same, jnp.nan) if dtype == jnp.float32 else same
        # taken before they are converted, or a loop around this would convert the whole embedding before it
        return lax.optimization_barrier(jnp.take(leaf, tokens, axis=0)).astype(dtype)

    q = rows(w.q) if w.zero is None else rows(w.q) - rows(w.zero)
    if w.outlier_index is not None:
        assert w.outlier_rows is not None
        index = rows(w.outlier_index, jnp.int32)  # of one row: all rows of an embedding have the same columns
        q = jnp.put_along_axis(q, index, rows(w.outlier_rows), axis=-1, inplace=False, mode="drop")
    return (q * rows(w.scale)).astype(w.dtype if dtype is None else dtype)


def attend(x: jax.Array, w: QTensor, *, dtype: Any = None) -> jax.Array:
    """`x[..., k] @ w[vocabulary, k].T`: a tied output head."""
    dtype = compute_dtype(dtype, x, w)
    numbers = (((x.ndim - 1,), (1,)), ((), ()))
    return product(x.astype(dtype), w, numbers, dtype=dtype)
