"""A `QTensor` after transposes, reshapes and slices of the weight that it stands for.

Every function takes and returns `QTensor`s whose `order` names all axes (`ordered` makes one), and axes are those of
the float weight. Only `reshaped` may move data, and not where the contracted axes are stored last.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jint8._core.axes import column_axis
from jint8._core.qtensor import QTensor, axis_order, contracted_axes, ordered, permuted, storage_axes
from jint8._tracing.views import View

__all__ = ["dynamic_sliced", "expanded", "looked_up", "ordered", "permuted", "reshaped", "sliced", "squeezed"]


def squeezed(w: QTensor, axes: Sequence[int]) -> QTensor:
    """`squeeze(w, axes)`."""
    kept = [axis for axis in range(w.ndim) if axis not in axes]
    gone = tuple(stored for stored, axis in enumerate(axis_order(w)) if axis in axes)
    squeeze = jax.tree.map(lambda leaf: lax.squeeze(leaf, gone), w)
    return dataclasses.replace(squeeze, order=tuple(kept.index(axis) for axis in axis_order(w) if axis in kept))


def expanded(w: QTensor, rank: int, positions: Sequence[int]) -> QTensor:
    """`w` with further axes of size 1, its own being at `positions`."""
    new = [axis for axis in range(rank) if axis not in positions]
    expand = jax.tree.map(lambda leaf: lax.expand_dims(leaf, range(len(new))), w)
    return dataclasses.replace(expand, order=(*new, *(positions[axis] for axis in axis_order(w))))


def sliced(w: QTensor, start: Sequence[int], limit: Sequence[int], strides: Sequence[int] | None) -> QTensor:
    """`lax.slice(w, start, limit, strides)`."""
    strides = [1] * w.ndim if strides is None else strides
    return _each_leaf(w, list(zip(start, limit, strides, strict=True)), lambda size: (0, size, 1), lax.slice)


def dynamic_sliced(w: QTensor, start: Sequence[Any], sizes: Sequence[int]) -> QTensor:
    """`lax.dynamic_slice(w, start, sizes)`."""
    zero = jnp.zeros_like(start[0])
    return _each_leaf(w, list(zip(start, sizes, strict=True)), lambda size: (zero, size), lax.dynamic_slice)


def _each_leaf(
    w: QTensor, per_axis: list[tuple[Any, ...]], whole: Callable[[int], tuple[Any, ...]], operation: Callable
) -> QTensor:
    """`operation(leaf, *arguments)`, one argument per element of `per_axis`' tuples, each a list over stored axes.

    Where a leaf has another size because the axis is contracted, it is taken whole.
    """
    stored = [per_axis[axis] for axis in axis_order(w)]

    def on_leaf(leaf):
        shapes = zip(leaf.shape, w.q.shape, stored, strict=True)
        arguments = [whole(size) if size != of_q else given for size, of_q, given in shapes]
        return operation(leaf, *map(list, zip(*arguments, strict=True)))

    result = jax.tree.map(on_leaf, w)
    contracted = contracted_axes(w)
    if w.outlier_index is not None and any(result.q.shape[s] != w.q.shape[s] for s in contracted):
        raise ValueError("Expected no slice of the contracted axes of a weight with calibrated outlier columns.")
    return result


def reshaped(w: QTensor, shape: Sequence[int]) -> QTensor:
    """`reshape(w, shape)`, where every new axis is either contracted or not.

    Raises:
        ValueError: an axis of the result mixes contracted ones with others.
    """
    order = axis_order(w)
    contracted = {order[stored] for stored in contracted_axes(w)}
    view = View.of_leaf(0, w.shape).reshaped(w.shape, shape)
    if any(0 < len(contracted & set(axes)) < len(set(axes)) for axes in view.axes):
        raise ValueError(f"Expected a reshape of {w.shape} that keeps contracted axes apart, got {tuple(shape)}.")
    is_contracted = [bool(contracted & set(axes)) for axes in view.axes]
    grouped = sorted(range(w.ndim), key=lambda axis: (axis in contracted, axis))
    new_order = sorted(range(len(shape)), key=lambda axis: (is_contracted[axis], axis))

    def reshape(leaf, is_q):
        leaf = jnp.transpose(leaf, [order.index(axis) for axis in grouped])
        return leaf.reshape([shape[axis] if is_q or not is_contracted[axis] else 1 for axis in new_order])

    zero = None if w.zero is None else reshape(w.zero, False)
    new = dataclasses.replace(w, q=reshape(w.q, True), scale=reshape(w.scale, False), zero=zero, order=tuple(new_order))
    if w.outlier_index is None:
        return new
    assert w.outlier_rows is not None
    stored = contracted_axes(w)
    count = w.outlier_rows.shape[column_axis(w.q.shape, stored)]
    if w.outlier_index.size != count or sorted(order[s] for s in stored) != [order[s] for s in stored]:
        raise ValueError(f"Expected no reshape of stacked or rearranged outlier columns, got {w} to {tuple(shape)}.")
    at = column_axis(new.q.shape, [i for i, axis in enumerate(new_order) if is_contracted[axis]])

    def with_columns(sizes: Sequence[int]) -> list[int]:
        return [count if i == at else size for i, size in enumerate(sizes)]

    rows = jnp.transpose(w.outlier_rows, [order.index(axis) for axis in grouped])
    index = w.outlier_index.reshape(with_columns([1] * len(shape)))
    return dataclasses.replace(new, outlier_rows=rows.reshape(with_columns(new.scale.shape)), outlier_index=index)


def looked_up(
    w: QTensor, indices: jax.Array, numbers: Any, sizes: Sequence[int], fill_value: Any, **kwargs
) -> jax.Array:
    """`lax.gather(w, indices, numbers, sizes)` of whole contracted axes: only the entries taken are dequantized.

    Raises:
        ValueError: only a part of a contracted axis is taken.
    """
    contracted = {axis_order(w)[stored] for stored in contracted_axes(w)}
    if any(sizes[axis] != w.shape[axis] for axis in contracted):
        raise ValueError(f"Expected a lookup of whole rows of an int8 weight of shape {w.shape}, got slices {sizes}.")

    def take(leaf, fill):  # a fill value f is 1 * f, and the scale carries it
        leaf = jnp.transpose(leaf, storage_axes(w))
        of_leaf = [1 if axis in contracted and leaf.shape[axis] == 1 else size for axis, size in enumerate(sizes)]
        return lax.gather(leaf, indices, numbers, of_leaf, fill_value=fill, **kwargs)

    q = take(w.q, 1).astype(jnp.float32)
    q = q if w.zero is None else q - take(w.zero, 0)
    return (q * take(w.scale, fill_value)).astype(w.dtype)
