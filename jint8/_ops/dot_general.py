"""`jint8.dot_general`: which axes, then the product of `jint8.matmul`."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, PartitionSpec
from jax.typing import DTypeLike

from jint8._core.config import Config
from jint8._core.qtensor import QTensor, config_for, is_qtensor, storage_axes
from jint8._ops.checks import check_activations, check_bias, check_result_type
from jint8._ops.compare import Compared, float_rows, hold, note_of
from jint8._ops.observe import Observed, watch
from jint8._ops.product import Implementation, rows_product
from jint8._ops.stand_ins import no_stand_ins
from jint8._ops.weight import Weight, groups_of, packing_of

Axes = Sequence[int]
DimensionNumbers = tuple[tuple[Axes, Axes], tuple[Axes, Axes]]  # (contracted of x, of w), (batch of x, of w)


def dot_general(
    lhs: Any,
    rhs: Any,
    dimension_numbers: DimensionNumbers,
    precision: Any = None,
    preferred_element_type: DTypeLike | None = None,
    out_sharding: Any = None,
    *,
    bias: jax.Array | None = None,
    config: Config | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """`jax.lax.dot_general` where one side may be a `QTensor`: that product is LLM.int8()'s.

    Args:
      lhs: array, or the `QTensor`.
      rhs: array, or the `QTensor`. Without any, this is `jax.lax.dot_general`.
      dimension_numbers: `((lhs_contract, rhs_contract), (lhs_batch, rhs_batch))`. The contracted axes of the weight
        must be those that it was quantized over. Outlier columns are decided within each entry of the batch axes.
      precision: as in `jax.lax`, of what is computed in floating point: calibrated outlier columns (by default at full
        precision), products with dequantized weights, derivatives. Sums of int8 products, and of the outliers that are
        found in a call, are exact whatever it says.
      preferred_element_type: dtype of the result; default: that of the activations.
      out_sharding: of the result, on a mesh whose axes are explicit, as in `jax.lax`.
      bias: None, or float `[*batch, *free axes of the weight]`: added before the result is rounded.
      config: None means the one stored in the weight.
      implementation: as in `jint8.matmul`.

    Returns:
      Batch axes, then the free axes of `lhs`, then those of `rhs`.

    Raises:
      TypeError: activations or a bias of an unsupported dtype, two `QTensor`s, or a bias without any.
      ValueError: shapes that don't fit, a weight quantized over other axes, or an `out_sharding` that the mesh hasn't.

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
        x, w, numbers = lhs, rhs, ((lhs_contract, rhs_contract), (lhs_batch, rhs_batch))
    elif is_qtensor(lhs):
        x, w, numbers = rhs, lhs, ((rhs_contract, lhs_contract), (rhs_batch, lhs_batch))
        if isinstance(precision, tuple):  # one for each side
            precision = precision[::-1]
    else:
        no_stand_ins()
        if bias is not None or config is not None or implementation is not None:
            raise TypeError("Expected a QTensor beside bias, config or implementation, got none.")
        return lax.dot_general(
            lhs, rhs, dimension_numbers, precision, preferred_element_type, out_sharding=out_sharding
        )
    check_activations(x, "activations")
    check_result_type(preferred_element_type)
    y = activations_first(
        x,
        w,
        numbers,
        config=config_for(w, config),
        implementation=implementation,
        dtype=x.dtype if preferred_element_type is None else preferred_element_type,
        bias=bias,
        precision=precision,
    )
    if w is lhs:  # batch, free of x, free of w -> batch, free of w, free of x
        batch, free_w = len(numbers[1][1]), len(w.shape) - len(numbers[1][1]) - len(numbers[0][1])
        axes = range(y.ndim)
        y = jnp.transpose(y, (*axes[:batch], *axes[y.ndim - free_w :], *axes[batch : y.ndim - free_w]))
    return y if out_sharding is None else jax.sharding.reshard(y, out_sharding)


def activations_first(
    x: jax.Array,
    w: QTensor,
    numbers: DimensionNumbers,
    *,
    config: Config,
    implementation: Implementation | None = None,
    dtype: DTypeLike,
    bias: jax.Array | None = None,
    precision: Any = None,
) -> jax.Array:
    """`dot_general(x, w, numbers)` -> `dtype`, batch axes, then free axes of x, then free axes of w."""
    (x_contract, w_contract), (x_batch, w_batch) = numbers
    _check_axes(x, w, x_contract, w_contract, x_batch, w_batch)
    product = functools.partial(
        _rows_first, numbers=numbers, config=config, implementation=implementation, dtype=dtype, precision=precision
    )
    if AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types:
        # Explicit axes would have to be told at each reshape where they go. Within, XLA decides.
        product = jax.sharding.auto_axes(product, out_sharding=_result_spec(x, w, numbers))
    return product(x, w, bias)


def _result_spec(x: jax.Array, w: QTensor, numbers: DimensionNumbers) -> PartitionSpec:
    """How the result is divided on explicit axes: as those axes of `x` and of the weight that it has.

    Sums over a divided contracted axis are complete on every device. An axis of the mesh that both sides have is that
    of `x`, for it can divide the result once only.
    """
    (x_contract, w_contract), (x_batch, w_batch) = numbers
    at = storage_axes(w)
    of_x, stored = jax.typeof(x).sharding.spec, jax.typeof(w.q).sharding.spec
    of_w = [stored[at[axis]] for axis in range(w.ndim)]
    batch = [of_x[a % x.ndim] or of_w[b % w.ndim] for a, b in zip(x_batch, w_batch, strict=True)]
    free_x = [of_x[a] for a in range(x.ndim) if a not in {b % x.ndim for b in (*x_contract, *x_batch)}]
    free_w = [of_w[a] for a in range(w.ndim) if a not in {b % w.ndim for b in (*w_contract, *w_batch)}]
    used: set[str] = set()
    result = []
    for entry in (*batch, *free_x, *free_w):
        names = () if entry is None else entry if isinstance(entry, tuple) else (entry,)
        free = used.isdisjoint(names)
        used.update(names)
        result.append(entry if free else None)
    return PartitionSpec(*result)


def _rows_first(
    x: jax.Array,
    w: QTensor,
    bias: jax.Array | None,
    *,
    numbers: DimensionNumbers,
    config: Config,
    implementation: Implementation | None,
    dtype: DTypeLike,
    precision: Any,
) -> jax.Array:
    """`activations_first` by products of rows: the free axes of `x` become one, and so do those of the weight."""
    (x_contract, w_contract), (x_batch, w_batch) = numbers
    at = storage_axes(w)
    # Contracted axes in the order in which the weight stores them: permuting x is cheap, permuting the weight isn't.
    pairs = sorted((at[b % w.ndim], a % x.ndim) for a, b in zip(x_contract, w_contract, strict=True))
    stored_contract, x_contract = [p[0] for p in pairs], [p[1] for p in pairs]
    stored_batch, x_batch = [at[b % w.ndim] for b in w_batch], [a % x.ndim for a in x_batch]
    # Free axes in the order of the float weight.
    stored_free = [at[a] for a in range(w.ndim) if at[a] not in stored_contract and at[a] not in stored_batch]
    x_free = [a for a in range(x.ndim) if a not in x_contract and a not in x_batch]

    k_last = min(stored_contract) > max(stored_free, default=-1)
    order = stored_batch + (stored_free + stored_contract if k_last else stored_contract + stored_free)
    batch_shape = [x.shape[a] for a in x_batch]
    k, bytes_of_k = math.prod(x.shape[a] for a in x_contract), math.prod(w.q.shape[a] for a in stored_contract)
    free_shape = [w.q.shape[a] for a in stored_free]
    n = math.prod(free_shape)
    if bias is not None:
        check_bias(bias, (*batch_shape, *free_shape))
        bias = bias.reshape(*batch_shape, n)

    rows = jnp.transpose(x, x_batch + x_free + x_contract)
    rows = rows.reshape(*batch_shape, math.prod(x.shape[a] for a in x_free), k)
    if isinstance(w, Observed) and not isinstance(w, Compared):
        rows = watch(w.counted, rows, _column_lists(w.tap, order, stored_batch, stored_free, batch_shape))
    channels = lambda leaf: jnp.transpose(leaf, order).reshape(*batch_shape, n)
    outlier_rows = outlier_index = None
    if w.outlier_index is not None and w.outlier_rows is not None:
        outlier_index = _column_lists(w.outlier_index, order, stored_batch, stored_free, batch_shape)
        c = outlier_index.shape[-1]
        outlier_rows = jnp.transpose(w.outlier_rows, order).reshape(*batch_shape, *((n, c) if k_last else (c, n)))
    packing = packing_of(w, stored_free)
    group_scale, group_min = groups_of(w, packing)

    def groups(leaf):
        if leaf is None:
            return None
        moved = jnp.transpose(leaf, order)
        along = [math.prod(leaf.shape[a] for a in axes) for axes in (stored_free, stored_contract)]
        return moved.reshape(*batch_shape, *(along if k_last else along[::-1]))

    flat = Weight(
        q=jnp.transpose(w.q, order).reshape(*batch_shape, *((n, bytes_of_k) if k_last else (bytes_of_k, n))),
        scale=channels(w.scale),
        zero=None if w.zero is None else channels(w.zero),
        outlier_rows=outlier_rows,
        outlier_index=outlier_index,
        smooth=None if w.smooth is None else _column_lists(w.smooth, order, stored_batch, stored_free, batch_shape),
        group_scale=groups(group_scale),
        group_min=groups(group_min),
        k_last=k_last,
        block=w.config.rotate,
        packing=packing,
    )

    def product(x, weight, bias):
        return rows_product(
            x,
            weight,
            bias,
            config=config,
            implementation=implementation,
            dtype=dtype,
            precision=precision,
            note=note_of(w),
        )

    for _ in batch_shape:
        product = jax.vmap(product)
    y = product(rows, flat, bias)
    if isinstance(w, Compared):
        beside = jnp.transpose(w.beside, order).reshape(*batch_shape, *((n, k) if k_last else (k, n)))
        tap = _column_lists(w.tap, order, stored_batch, stored_free, batch_shape)
        y = hold(y, float_rows(rows, beside, k_last), bias, tap)
    return y.reshape(*batch_shape, *(x.shape[a] for a in x_free), *free_shape)


def _column_lists(leaf, order, stored_batch, stored_free, batch_shape) -> jax.Array:
    """A leaf with a list over columns for each stacked weight, as a list for each entry of the batch."""
    if any(leaf.shape[axis] != 1 for axis in stored_free):
        raise ValueError(
            "Expected one list of outlier columns for all output channels, and one of smoothing factors, got one for "
            f"each entry of an axis that isn't a batch axis: {leaf.shape}."
        )
    stacked = [leaf.shape[axis] for axis in stored_batch]
    columns = math.prod(leaf.shape[axis] for axis in order if axis not in stored_batch)
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
