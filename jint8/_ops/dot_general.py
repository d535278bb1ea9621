"""`jint8.dot_general`: which axes, then the product of `jint8.matmul`."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jint8._core.config import Config
from jint8._core.qtensor import is_qtensor, storage_axes
from jint8._ops.checks import check_activations
from jint8._ops.observe import Observed, watch
from jint8._ops.product import product_2d
from jint8._ops.weight import Weight


def dot_general(
    lhs: Any,
    rhs: Any,
    dimension_numbers,
    precision=None,
    preferred_element_type=None,
    out_sharding=None,
    *,
    config: Config | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """`jax.lax.dot_general` where one side may be a `QTensor`: that product is LLM.int8()'s.

    Args:
        lhs: array, or the `QTensor`.
        rhs: array, or the `QTensor`. Without any, this is `jax.lax.dot_general`.
        dimension_numbers: `((lhs_contract, rhs_contract), (lhs_batch, rhs_batch))`. The contracted axes of the weight
            must be those that it was quantized over. Outlier columns are decided within each entry of the batch axes.
        precision: only for products without a `QTensor`.
        preferred_element_type: dtype of the result; default: that of the activations.
        out_sharding: only for products without a `QTensor`.
        config: None means the one stored in the weight.
        implementation: as in `jint8.matmul`.

    Returns:
        Batch axes, then the free axes of `lhs`, then those of `rhs`.

    Raises:
        TypeError: activations of an unsupported dtype, or two `QTensor`s.
        ValueError: shapes that don't fit, or a weight quantized over other axes.

    Examples:
        >>> import jax.numpy as jnp, jint8
        >>> w = jint8.quantize(jnp.ones((4, 2, 3)), contract_axes=(0,))
        >>> jint8.dot_general(jnp.ones((5, 4)), w, (((1,), (0,)), ((), ()))).shape
        (5, 2, 3)
    """
    if is_qtensor(lhs) and is_qtensor(rhs):
        raise TypeError("Expected at most one QTensor, got two.")
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = (map(tuple, pair) for pair in dimension_numbers)
    if is_qtensor(rhs):
        x, w, x_contract, w_contract, x_batch, w_batch = lhs, rhs, lhs_contract, rhs_contract, lhs_batch, rhs_batch
    elif is_qtensor(lhs):
        x, w, x_contract, w_contract, x_batch, w_batch = rhs, lhs, rhs_contract, lhs_contract, rhs_batch, lhs_batch
    else:
        return lax.dot_general(
            lhs, rhs, dimension_numbers, precision, preferred_element_type, out_sharding=out_sharding
        )
    check_activations(x, "activations")
    config = w.config if config is None else config
    dtype = x.dtype if preferred_element_type is None else preferred_element_type
    y = contract(x, w, (x_contract, w_contract), (x_batch, w_batch), config, implementation, dtype)
    if w is lhs:  # batch, free of x, free of w -> batch, free of w, free of x
        batch, free_w = len(x_batch), len(w.shape) - len(w_batch) - len(w_contract)
        axes = range(y.ndim)
        y = jnp.transpose(y, (*axes[:batch], *axes[y.ndim - free_w :], *axes[batch : y.ndim - free_w]))
    return y


def contract(x, w, contracted, batched, config, implementation, dtype, bias=None):
    """`dtype`, batch axes, then free axes of x, then free axes of w. `bias` has the free axes of w: no batch axes."""
    (x_contract, w_contract), (x_batch, w_batch) = contracted, batched
    _check_axes(x, w, x_contract, w_contract, x_batch, w_batch)
    at = storage_axes(w)
    # contracted axes in the order in which the weight stores them: permuting x is cheap, permuting the weight isn't
    pairs = sorted((at[b % w.ndim], a % x.ndim) for a, b in zip(x_contract, w_contract, strict=True))
    stored_contract, x_contract = [p[0] for p in pairs], [p[1] for p in pairs]
    stored_batch, x_batch = [at[b % w.ndim] for b in w_batch], [a % x.ndim for a in x_batch]
    # free axes in the order of the float weight
    stored_free = [at[a] for a in range(w.ndim) if at[a] not in stored_contract and at[a] not in stored_batch]
    x_free = [a for a in range(x.ndim) if a not in x_contract and a not in x_batch]

    k_last = min(stored_contract) > max(stored_free, default=-1)
    order = stored_batch + (stored_free + stored_contract if k_last else stored_contract + stored_free)
    batch_shape = [x.shape[a] for a in x_batch]
    k = math.prod(x.shape[a] for a in x_contract)
    free_shape = [w.q.shape[a] for a in stored_free]
    n = math.prod(free_shape)

    x_rows = jnp.transpose(x, x_batch + x_free + x_contract)
    x_rows = x_rows.reshape(*batch_shape, math.prod(x.shape[a] for a in x_free), k)
    q = jnp.transpose(w.q, order).reshape(*batch_shape, *((n, k) if k_last else (k, n)))
    scale = jnp.transpose(w.scale, order).reshape(*batch_shape, n)
    zero = None if w.zero is None else jnp.transpose(w.zero, order).reshape(*batch_shape, n)
    if isinstance(w, Observed):
        tap = _columns(w.tap, order, stored_batch, stored_free, batch_shape)
        x_rows = watch(w.counted, x_rows, tap)
    rows, index = _outlier_columns(w, order, stored_batch, stored_free, batch_shape, (n, -1) if k_last else (-1, n))
    flat_bias = None if bias is None else bias.reshape(n)

    def product(x, weight):
        return product_2d(
            x, weight, flat_bias, k_last=k_last, config=config, implementation=implementation, dtype=dtype
        )

    for _ in batch_shape:
        product = jax.vmap(product)
    y = product(x_rows, Weight(q, scale, zero, rows, index))
    return y.reshape(*batch_shape, *(x.shape[a] for a in x_free), *free_shape)


def _outlier_columns(w, order, stored_batch, stored_free, batch_shape, shape):
    """`Weight.rows` and `index` of a weight that is transposed by `order`, for each entry of the batch."""
    if w.outlier_index is None:
        return None, None
    rows = jnp.transpose(w.outlier_rows, order).reshape(*batch_shape, *shape)
    return rows, _columns(w.outlier_index, order, stored_batch, stored_free, batch_shape)


def _columns(leaf, order, stored_batch, stored_free, batch_shape):
    """A leaf with a list for each stacked weight, as a list for each entry of the batch."""
    if any(leaf.shape[axis] != 1 for axis in stored_free):
        raise ValueError(
            "Expected one list of outlier columns for all output channels, got one for each entry of an axis that "
            f"isn't a batch axis: {leaf.shape}."
        )
    stacked = [leaf.shape[axis] for axis in stored_batch]
    columns = leaf.size // math.prod(stacked)
    return jnp.broadcast_to(jnp.transpose(leaf, order).reshape(*stacked, columns), (*batch_shape, columns))


def _check_axes(x, w, x_contract, w_contract, x_batch, w_batch):
    for name, ours, theirs in (("contracted", x_contract, w_contract), ("batch", x_batch, w_batch)):
        if len(ours) != len(theirs):
            raise ValueError(f"Expected as many {name} axes on both sides, got {tuple(ours)} and {tuple(theirs)}.")
        for a, b in zip(ours, theirs, strict=True):
            if not (-x.ndim <= a < x.ndim and -w.ndim <= b < w.ndim):
                raise ValueError(f"Expected {name} axes within {x.shape} and {w.shape}, got {a} and {b}.")
            if x.shape[a] != w.shape[b]:
                raise ValueError(
                    f"Expected {name} axes of one size, got {x.shape[a]} (axis {a} of {x.shape}) "
                    f"and {w.shape[b]} (axis {b} of the weight {w.shape})."
                )
    for ndim, axes in ((x.ndim, (*x_contract, *x_batch)), (w.ndim, (*w_contract, *w_batch))):
        if len({a % ndim for a in axes}) != len(axes):
            raise ValueError(f"Expected each axis to be contracted or batched once, got {axes}.")
    if not w_contract:
        raise ValueError("Expected at least one contracted axis, got none.")
    at = storage_axes(w)
    contract = {at[b % w.ndim] for b in w_contract}
    for axis in range(w.ndim):
        size, scales = w.q.shape[axis], w.scale.shape[axis]
        if (axis in contract and scales != 1) or (axis not in contract and scales != size):
            raise ValueError(
                f"Expected a weight that was quantized over the contracted axes {tuple(w_contract)}, "
                f"got one of shape {w.shape} with scales of shape {w.scale.shape}; see contract_axes in jint8.quantize."
            )
