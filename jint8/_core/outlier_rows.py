"""Calibrated outlier columns: their rows of a weight, kept in 16 bits beside its int8 values."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jint8._core.axes import column_axis, columns_back, columns_last
from jint8._core.config import Config
from jint8._core.rounding import SMALLEST_NORMAL

MOST_STEPS = 32_768.0  # of a scale, in a calibrated column of a weight that was rotated without it


def check_outliers(outliers, shape, contract_axes, stack_axes, config: Config) -> tuple[Config, Any]:
    """The config of a weight with calibrated outlier columns, and these as int32 `[*stack, c]`."""
    if isinstance(outliers, (str, Mapping)):
        raise TypeError(
            "Expected outliers to be the columns of one weight, integers (who decides what an outlier is, is said by "
            f"jint8.Config(outliers=...)), got {outliers!r}."
        )
    if not config.table_row.decomposition:
        raise ValueError(f"Expected a scheme with decomposition for outlier columns, got {config.scheme!r}.")
    if not isinstance(outliers, jax.Array):
        outliers = np.asarray(outliers)
        outliers = outliers.astype(np.int32) if outliers.size == 0 else outliers
    if not jnp.issubdtype(outliers.dtype, jnp.integer):
        raise TypeError(f"Expected outliers to be integers, got {outliers.dtype}.")
    k, stack = math.prod(shape[a] for a in contract_axes), tuple(shape[a] for a in stack_axes)
    if outliers.ndim != 1 and outliers.shape[:-1] != stack:
        expected = f"(c,) or {(*stack, 'c')}" if stack else "(c,)"
        raise ValueError(f"Expected outliers of shape {expected}, got {outliers.shape}.")
    if not isinstance(outliers, jax.core.Tracer) and outliers.size:
        values = np.sort(np.asarray(outliers), axis=-1)
        if values.min() < 0 or values.max() > k:
            raise ValueError(f"Expected outliers from 0 to {k}, got {values.min()} to {values.max()}.")
        twice = (values[..., 1:] == values[..., :-1]) & (values[..., 1:] < k)
        if twice.any():
            raise ValueError(f"Expected each outlier column once, got {values[..., 1:][twice][0]} twice.")
    outliers = jnp.broadcast_to(jnp.asarray(outliers, jnp.int32), (*stack, outliers.shape[-1]))
    return dataclasses.replace(config, outliers="static"), outliers


# Jitted, because outside of a jit every operation would be compiled as a program of its own.
@functools.partial(jax.jit, static_argnames=("contract_axes", "stack_axes"))
def keep_rows(w, scale, outliers, *, contract_axes, stack_axes) -> tuple[jax.Array | None, jax.Array | None]:
    """`QTensor.outlier_rows` and `QTensor.outlier_index`."""
    if outliers is None or outliers.shape[-1] == 0:
        return None, None
    own = [a for a in range(w.ndim) if a not in contract_axes]
    index = jnp.expand_dims(outliers, [i for i, a in enumerate(own) if a not in stack_axes])
    values = columns_last(w, contract_axes)
    everywhere = jnp.broadcast_to(index, (*values.shape[:-1], index.shape[-1]))
    rows = jnp.take_along_axis(values, everywhere, axis=-1, mode="fill", fill_value=0).astype(jnp.float32)
    rows = scaled(rows, columns_last(scale, contract_axes))

    at = column_axis(w.shape, contract_axes)
    others = [a for a in contract_axes if a != at]
    return _unflatten(rows, at, others), _unflatten(index, at, others)


def without_columns(w: jax.Array, columns: jax.Array, *, contract_axes, stack_axes) -> jax.Array:
    """A weight with 0 in calibrated columns `[*stack, c]`."""
    flat = columns_last(w, contract_axes)
    own = [a for a in range(w.ndim) if a not in contract_axes]
    numbers = jnp.arange(flat.shape[-1], dtype=jnp.int32)
    taken = jnp.any(columns[..., None] == numbers, axis=-2)
    taken = jnp.expand_dims(taken, [i for i, a in enumerate(own) if a not in stack_axes])
    return columns_back(jnp.where(taken, 0, flat), [w.shape[a] for a in contract_axes], contract_axes)


def scaled(rows: jax.Array, scale: jax.Array) -> jax.Array:
    """float32 rows in units of `scale`, in float16: up to 255, or `MOST_STEPS` if rotated, for any weight."""
    return jnp.where(scale < SMALLEST_NORMAL, 0.0, rows / scale).astype(jnp.float16)


def _unflatten(array: jax.Array, at: int, others: Sequence[int]) -> jax.Array:
    """`[*own, c]` with c moved to the axis `at`, and axes of size 1 at `others`."""
    own = array.ndim - 1
    before = at - sum(a < at for a in others)  # how many of the own axes come before it
    return jnp.expand_dims(jnp.moveaxis(array, own, before), sorted(others))


@functools.partial(jax.jit, static_argnames=("contract_axes",))
def put_rows(values, scale, outlier_rows, outlier_index, *, contract_axes: tuple[int, ...]) -> jax.Array:
    """A weight's `values`, with the calibrated outlier columns out of their 16-bit rows. All arrays are as stored."""
    flat = columns_last(values, contract_axes)
    rows = columns_last(outlier_rows, contract_axes).astype(jnp.float32) * columns_last(scale, contract_axes)
    index = jnp.broadcast_to(columns_last(outlier_index, contract_axes), rows.shape)
    flat = jnp.put_along_axis(flat, index, rows, axis=-1, inplace=False, mode="drop")
    return columns_back(flat, [values.shape[a] for a in sorted(contract_axes)], contract_axes)
