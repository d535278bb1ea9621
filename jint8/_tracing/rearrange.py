"""A `QTensor` after transposes, reshapes and slices of the weight that it stands for.

Every function takes and returns `QTensor`s whose `order` names all axes (`ordered` makes one), and axes are those of
the float weight. Only `reshaped` may move data, and not where the contracted axes are stored last.

All arrays of a weight have `q`'s rank. On an axis of channels each has `q`'s size, or 1 where all channels share it. On
the contracted axes `smooth` has `q`'s sizes; taken together, `scale` and `zero` have one entry there, and the others a
list over columns: calibrated outlier columns, or the tap of an `Observed` weight. (A `Compared` weight's tap is a list
of other things there, and `beside` is as `q` would be unpacked.) Whatever changes which columns there
are, or their order, also changes what is in these lists: `_with_columns`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jint8._core.axes import column_axis
from jint8._core.qtensor import QTensor, axis_order, contracted_axes, ordered, permuted, storage_axes
from jint8._core.rotation import out_of_coordinates
from jint8._core.storage import grouped_axis, packed_axis, stored_shape
from jint8._ops.observe import Observed, take_columns
from jint8._ops.weight import rows_in_units
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
    _check_whole(w, [len(range(*each)) for each in zip(start, limit, strides, strict=True)])
    return _each_leaf(w, list(zip(start, limit, strides, strict=True)), lambda size: (0, size, 1), _slice)


def _slice(array: Any, start: Sequence[int], limit: Sequence[int], strides: Sequence[int]) -> Any:
    """`lax.slice`; of a NumPy array one of those, which is known under `jit`, too."""
    if isinstance(array, np.ndarray):
        return array[tuple(map(slice, start, limit, strides))]
    return lax.slice(array, start, limit, strides)


def dynamic_sliced(w: QTensor, start: Sequence[Any], sizes: Sequence[int]) -> QTensor:
    """`lax.dynamic_slice(w, start, sizes)`."""
    zero = jnp.zeros_like(start[0])
    _check_whole(w, sizes)
    return _each_leaf(w, list(zip(start, sizes, strict=True)), lambda size: (zero, size), lax.dynamic_slice)


def _each_leaf(
    w: QTensor, per_axis: list[tuple[Any, ...]], whole: Callable[[int], tuple[Any, ...]], operation: Callable
) -> QTensor:
    """`operation(leaf, *arguments)`, one argument per element of `per_axis`' tuples, each a list over stored axes.

    `whole(size)` is what takes an axis whole: a leaf's axis that doesn't run over `q`'s.
    """
    stored = [per_axis[axis] for axis in axis_order(w)]
    contracted = contracted_axes(w)
    uncut = set() if w.features is None else {packed_axis(w), grouped_axis(w)}

    def slice_axes(leaf: Any, axes: Sequence[int]) -> Any:
        arguments = [given if s in axes else whole(leaf.shape[s]) for s, given in enumerate(stored)]
        return operation(leaf, *map(list, zip(*arguments, strict=True)))

    def runs_over(name: str, leaf: jax.Array) -> list[int]:
        axes = [s for s in range(w.ndim) if s not in uncut]
        over_columns = name in ("q", "beside", "smooth", "group_scale", "group_min")
        return [s for s in axes if leaf.shape[s] == w.q.shape[s] and (over_columns or s not in contracted)]

    leaves: dict[str, Any] = {name: slice_axes(leaf, runs_over(name, leaf)) for name, leaf in _leaves(w).items()}
    result = dataclasses.replace(w, **leaves)
    if all(result.q.shape[s] == w.q.shape[s] for s in contracted):
        return result
    numbers = slice_axes(_column_numbers(w), contracted)
    return _with_columns(w, result, contracted, numbers.ravel())


def _check_whole(w: QTensor, sizes: Sequence[int]) -> None:
    """Raises ValueError where a slice of these `sizes` cuts groups or bytes of a weight of four bits."""
    if w.features is None:
        return
    full = stored_shape(w)
    for stored in {packed_axis(w), grouped_axis(w)}:
        axis = axis_order(w)[stored]
        if sizes[axis] != full[stored]:
            raise ValueError(
                f"Expected slices of a weight in four bits that don't cut the axis along which it is packed or grouped "
                f"(axis {axis} of {w.shape}), got {sizes[axis]} of it: quantize this weight with a scheme of int8."
            )


def _check_kept(w: QTensor, view: View, shape: Sequence[int]) -> None:
    """Raises ValueError where a reshape merges or splits the axes along which four bits are packed or grouped."""
    if w.features is None:
        return
    full = stored_shape(w)
    for stored in {packed_axis(w), grouped_axis(w)}:
        axis = axis_order(w)[stored]
        if full[stored] != 1 and not any(
            size == full[stored] and {a for a in axes if w.shape[a] != 1} == {axis}
            for size, axes in zip(shape, view.axes, strict=True)
        ):
            raise ValueError(
                f"Expected a reshape of a weight in four bits that keeps the axis along which it is packed or grouped "
                f"(axis {axis} of {w.shape}), got {tuple(shape)}: quantize this weight with a scheme of int8."
            )


def reshaped(w: QTensor, shape: Sequence[int]) -> QTensor:
    """`reshape(w, shape)`, where every new axis is either contracted or not.

    Raises:
      ValueError: an axis of the result mixes contracted ones with others, or no contracted axis is left.
    """
    order = axis_order(w)
    contracted = {order[stored] for stored in contracted_axes(w)}
    view = View.of_leaf(0, w.shape).reshaped(w.shape, shape)
    if any(0 < len(contracted & set(axes)) < len(set(axes)) for axes in view.axes):
        raise ValueError(f"Expected a reshape of {w.shape} that keeps contracted axes apart, got {tuple(shape)}.")
    _check_kept(w, view, shape)
    is_contracted = [bool(contracted & set(axes)) for axes in view.axes]
    if not any(is_contracted):  # a single column, whose axis of size 1 the reshape drops
        raise ValueError(f"Expected a reshape of {w.shape} that keeps a contracted axis, got {tuple(shape)}.")
    # Both before and after, contracted axes come last, and otherwise axes are in the order of the float weight.
    grouped = sorted(range(w.ndim), key=lambda axis: (axis in contracted, axis))
    new_order = sorted(range(len(shape)), key=lambda axis: (is_contracted[axis], axis))
    new_contracted = [stored for stored, axis in enumerate(new_order) if is_contracted[axis]]
    at = column_axis(tuple(shape[axis] for axis in new_order), new_contracted)

    def group(array: Any) -> Any:
        return array.transpose([order.index(axis) for axis in grouped])

    def reshape(name: str, leaf: jax.Array) -> jax.Array:
        of_four_bits = name in ("group_scale", "group_min") or (name == "q" and w.features is not None)
        if of_four_bits:  # on the axes that are kept, bytes or groups
            held = [leaf.shape[order.index(axis)] for axis in range(w.ndim)]
            new = [math.prod(held[a] for a in axes if w.shape[a] != 1) for axes in view.axes]
            return group(leaf).reshape([new[axis] for axis in new_order])
        leaf = group(leaf)
        if name in ("q", "beside"):
            return leaf.reshape([shape[axis] for axis in new_order])
        own = {axis for axis, size in zip(grouped, leaf.shape, strict=True) if size > 1}
        # Of axes that are merged, a leaf needs all that it has any of.
        needed = set().union(*(axes for axes in view.axes if own.intersection(axes))) - contracted
        full = [w.shape[a] if a in needed else size for a, size in zip(grouped, leaf.shape, strict=True)]
        sizes = [shape[axis] if needed.intersection(view.axes[axis]) else 1 for axis in new_order]
        if name == "smooth":
            sizes = [shape[axis] if is_contracted[axis] else size for axis, size in zip(new_order, sizes, strict=True)]
            return jnp.broadcast_to(leaf, full).reshape(sizes)
        sizes[at] = math.prod(size for axis, size in zip(grouped, full, strict=True) if axis in contracted)
        return jnp.broadcast_to(leaf, full).reshape(sizes)

    leaves: dict[str, Any] = {name: reshape(name, leaf) for name, leaf in _leaves(w).items()}
    result = dataclasses.replace(w, **leaves, order=tuple(new_order))
    return _with_columns(w, result, new_contracted, group(_column_numbers(w)).ravel())


def _leaves(w: QTensor) -> dict[str, jax.Array]:
    """The arrays of a weight, observed or not, by field."""
    return {path[0].name: leaf for path, leaf in jax.tree_util.tree_leaves_with_path(w)}


def _column_numbers(w: QTensor) -> np.ndarray:
    """For each entry of the contracted axes of `q`, its number in lists over columns; other axes have size 1."""
    contracted = contracted_axes(w)
    shape = [size if s in contracted else 1 for s, size in enumerate(stored_shape(w))]
    return np.arange(math.prod(shape), dtype=np.int32).reshape(shape)


def _with_columns(before: QTensor, w: QTensor, contracted: Sequence[int], columns: Any) -> QTensor:
    """`w` with lists over its columns, which were `columns` (int `[k]`) of the weight `before` it was rearranged.

    `contracted` are the stored axes of `w`'s columns. Calibrated columns that it doesn't have any more leave slots that
    aren't used.
    """
    count, k = _column_numbers(before).size, columns.size
    if isinstance(columns, np.ndarray) and np.array_equal(columns, np.arange(count)):
        return w
    _check_blocks(w, columns)
    at = column_axis(w.q.shape, contracted)

    def on_column_axis(leaf: jax.Array) -> jax.Array:
        """A slice may have moved it, as one of size 1 isn't taken. The lists are the only leaves with entries on it."""
        held = next((s for s in contracted if leaf.shape[s] != 1), at)
        return jnp.swapaxes(leaf, held, at)

    changed: dict[str, Any] = {}
    if w.outlier_index is not None and w.outlier_rows is not None:
        new_numbers = jnp.full(count + 1, k, jnp.int32).at[columns].set(jnp.arange(k, dtype=jnp.int32))
        changed = {
            "outlier_rows": on_column_axis(w.outlier_rows),
            "outlier_index": on_column_axis(new_numbers[w.outlier_index]),
        }
    if isinstance(w, Observed) and w.tap is not None:
        tap = on_column_axis(w.tap)
        changed["tap"] = take_columns(tap, at, columns, count) if w.by_column else tap
    return dataclasses.replace(w, **changed)


def _check_blocks(w: QTensor, columns: Any) -> None:
    """Raises ValueError where a rotated weight is left with a part of a block of columns, or with another order."""
    block = w.config.rotate
    if block <= 1:
        return
    whole = isinstance(columns, np.ndarray) and columns.size % block == 0
    if whole and (columns.reshape(-1, block) == columns[::block, None] // block * block + np.arange(block)).all():
        return
    raise ValueError(
        f"Expected the contracted features of a weight whose features are rotated in blocks of {block} to be used in "
        "their order and by whole blocks, got a slice or another order of them: quantize this weight without rotate."
    )


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

    gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    kept = [axis for axis in range(w.ndim) if axis not in gone]
    # Where the contracted axes are in the result, in the order in which their features are numbered.
    stored = [axis_order(w)[s] for s in contracted_axes(w)]
    at = [numbers.offset_dims[kept.index(axis)] for axis in stored if axis in kept]
    last = range(-len(at), 0)

    def take(leaf: jax.Array, fill: Any) -> jax.Array:
        """The entries of a leaf, `[*own axes, features]`."""
        leaf = jnp.transpose(leaf, storage_axes(w))
        shared = {axis for axis in range(w.ndim) if axis not in contracted and leaf.shape[axis] < w.shape[axis]}
        for axis in shared.intersection(numbers.operand_batching_dims):
            leaf = jnp.repeat(leaf, w.shape[axis], axis)
        whole = {*contracted, *shared}
        of_leaf = [leaf.shape[axis] if axis in whole else size for axis, size in enumerate(sizes)]
        of_leaf = [1 if axis in gone else size for axis, size in enumerate(of_leaf)]
        # What all entries of an axis share is at index 0, to which "clip" takes any other.
        mode = {"mode": "clip"} if shared.intersection(numbers.start_index_map) else {}
        taken = lax.gather(leaf, indices, numbers, of_leaf, fill_value=fill, **{**kwargs, **mode})
        taken = jnp.moveaxis(taken, at, last)
        return taken.reshape(*taken.shape[: taken.ndim - len(at)], math.prod(taken.shape[taken.ndim - len(at) :]))

    scale = take(w.scale, 0)
    if w.features is not None:
        if w.config.grouping != "oc":
            raise ValueError("Expected grouping='oc' of a weight in four bits that is looked up, got 'ic'.")
        assert w.group_scale is not None
        assert w.group_min is not None
        values = rows_in_units(w, take(w.q, 0), take(w.group_scale, 0), take(w.group_min, 0)) * scale
    else:
        q = take(w.q, 0).astype(jnp.float32)
        values = (q if w.zero is None else q - take(w.zero, 0)) * scale
    if w.smooth is not None:
        values = out_of_coordinates(values, take(w.smooth, 1), w.config.rotate)
    if w.outlier_index is not None and w.outlier_rows is not None:
        rows = take(w.outlier_rows, 0).astype(jnp.float32) * scale
        index = jnp.broadcast_to(take(w.outlier_index, 0), rows.shape)
        values = jnp.put_along_axis(values, index, rows, axis=-1, inplace=False, mode="drop")
    # Entries out of range are to be `fill_value`, which is NaN unless the caller says otherwise.
    there = take(jnp.ones(w.scale.shape, bool), False)
    values = jnp.where(there, values, jnp.nan if fill_value is None else fill_value)
    values = values.reshape(*values.shape[:-1], *(w.shape[axis] for axis in stored if axis in kept))
    return jnp.moveaxis(values, last, at).astype(w.dtype)
