"""Axes of a weight, as numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def column_axis(shape: tuple[int, ...], contracted: Sequence[int]) -> int:
    """On which of the contracted axes a list of columns lies: the last that has more than one entry."""
    return max((a for a in contracted if shape[a] != 1), default=max(contracted))


def canonical_axes(axes: int | Sequence[int], ndim: int, name: str = "contract_axes") -> tuple[int, ...]:
    """Sorted axes without negatives. Raises ValueError for one that is out of range or named twice."""
    axes = (axes,) if isinstance(axes, (int, np.integer)) else tuple(axes)
    for axis in axes:
        if not -ndim <= axis < ndim:
            raise ValueError(f"Expected {name} to be in [{-ndim}, {ndim}), got {axis}.")
    positive = tuple(sorted(axis % ndim for axis in axes))
    if len(set(positive)) != len(positive):
        raise ValueError(f"Expected {name} to name each axis once, got {axes}.")
    return positive


def columns_last(array: jax.Array, contract_axes: Sequence[int]) -> jax.Array:
    """`array` with the contracted axes last, flattened to one: `[*own axes, k]`."""
    own = [a for a in range(array.ndim) if a not in contract_axes]
    moved = jnp.transpose(array, (*own, *sorted(contract_axes)))
    return moved.reshape(*(array.shape[a] for a in own), math.prod(array.shape[a] for a in contract_axes))


def columns_back(flat: jax.Array, sizes: Sequence[int], contract_axes: Sequence[int]) -> jax.Array:
    """The inverse of `columns_last`: `flat[*own axes, k]` with axes of these `sizes` where they were contracted."""
    axes = sorted(contract_axes)
    own = [a for a in range(flat.ndim - 1 + len(axes)) if a not in axes]
    moved = flat.reshape(*flat.shape[:-1], *sizes)
    return jnp.transpose(moved, [[*own, *axes].index(a) for a in range(moved.ndim)])


def as_matrices(array: jax.Array, contract_axes: Sequence[int], stack_axes: Sequence[int]) -> jax.Array:
    """Stacked weights as matrices `[stacked, n, k]`, of the other axes flattened and the contracted ones flattened."""
    order, others = _matrix_axes(array.ndim, contract_axes, stack_axes)
    sizes = [math.prod(array.shape[a] for a in axes) for axes in (stack_axes, others, contract_axes)]
    return jnp.transpose(array, order).reshape(sizes)


def from_matrices(
    matrices: jax.Array, shape: Sequence[int], contract_axes: Sequence[int], stack_axes: Sequence[int]
) -> jax.Array:
    """The inverse of `as_matrices`: an array of this shape."""
    order, _ = _matrix_axes(len(shape), contract_axes, stack_axes)
    return jnp.transpose(matrices.reshape([shape[a] for a in order]), np.argsort(order).tolist())


def _matrix_axes(ndim: int, contract_axes: Sequence[int], stack_axes: Sequence[int]) -> tuple[list[int], list[int]]:
    others = [a for a in range(ndim) if a not in contract_axes and a not in stack_axes]
    return [*sorted(stack_axes), *others, *sorted(contract_axes)], others
