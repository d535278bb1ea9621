"""A whole weight in four bits by GPTQ: any axes, smoothed and rotated or not, beside calibrated columns or without."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jint8._core.axes import as_matrices, from_matrices
from jint8._core.config import Config
from jint8._core.four_bits import group_count, in_channel_units, of_members, ranges
from jint8._core.gptq import inverse_factor, round_in_order
from jint8._core.grouping import Grouped, axis_of_groups, choices, importance_of, inside, within_coordinates


class Corrected(NamedTuple):
    """A weight that GPTQ rounded."""

    grouped: Grouped
    weight: jax.Array  # as it was, but for calibrated columns, which make up for the error of the others
    config: Config  # with the grouping that was chosen
    error: float  # of the output, as in `grouping.output_error`, for damped moments


def gptq(w, columns, rms, moments, *, contract_axes, stack_axes, config: Config) -> Corrected:
    """A weight in four bits with the smallest error of its output, `moments` being those of `check_moments`."""
    options = choices(w, (columns, rms, moments), contract_axes, stack_axes, config)
    axes = {"contract_axes": contract_axes, "stack_axes": stack_axes}
    return min((_in_groups(w, columns, rms, moments, **axes, config=c) for c in options), key=lambda found: found.error)


class _Matrices(NamedTuple):
    """A weight, in units of its scales, as its features are rounded: calibrated columns after all others."""

    values: jax.Array  # [stacked, k + c, n]
    steps: jax.Array | None  # of each of the k features' weights, `[stacked, k, n]`; None where groups are of a feature
    lows: jax.Array | None
    scale: jax.Array  # [stacked, n]


@functools.partial(jax.jit, static_argnames=("contract_axes", "stack_axes", "config"))
def _prepare(w, columns, rms, moments, *, contract_axes, stack_axes, config: Config):
    """The matrices to round, their moments `[stacked, k + c, k + c]`, and what is known of the weight in four bits."""
    axes = {"contract_axes": contract_axes, "stack_axes": stack_axes}
    values, smooth, least = inside(w, columns, rms, **axes, config=config)
    within = within_coordinates(moments, smooth, columns, **axes, config=config)
    along = axis_of_groups(w.shape, contract_axes, stack_axes, config.grouping)
    in_units, scale = in_channel_units(values, contract_axes, along, least)

    def flat(array):
        return as_matrices(array, contract_axes, stack_axes)

    steps = lows = found = None
    if config.grouping == "oc":
        importance = importance_of(within, w.shape, **axes, grouping=config.grouping)
        found = ranges(in_units, along, config.group, importance)
        steps, lows = (jnp.swapaxes(flat(of_members(a, along, w.shape[along], config.group)), 1, 2) for a in found)
    rows = flat(in_units)
    of_channels = flat(scale)
    if columns is not None:
        index = jnp.broadcast_to(columns.reshape(len(rows), 1, -1), (*rows.shape[:2], columns.shape[-1]))
        kept = jnp.take_along_axis(flat(w), index, axis=2, mode="fill", fill_value=0).astype(jnp.float32)
        kept = jnp.where(of_channels > 0, kept / jnp.where(of_channels > 0, of_channels, 1), 0)
        rows = jnp.concatenate([rows, kept], axis=2)
    assert within is not None
    step, low = found or (None, None)
    matrices = _Matrices(jnp.swapaxes(rows, 1, 2), steps, lows, of_channels[..., 0])
    return matrices, within, Grouped(None, scale, step, low, smooth, values)


class _Rounded(NamedTuple):
    """One of the stacked weights, its features in their own order."""

    codes: jax.Array  # uint8[n, k]
    of_groups: jax.Array | None  # float16[2, n / run * groups, k], where groups are of a feature
    kept: jax.Array  # calibrated columns, corrected: [n, c]
    error: jax.Array  # of the output, summed over channels


# The steps around `round_in_order` are part of its program: outside of a jit, each would be compiled on its own.
@functools.partial(jax.jit, static_argnames=("group", "run"))
def _rounded(matrices: _Matrices, entry, order, factor, *, group: int, run: int) -> _Rounded:
    """Rounds entry `entry` of the stacked weights, its features in this order and calibrated columns after them."""
    values, scale = matrices.values[entry], matrices.scale[entry]
    k = len(order)
    every = jnp.concatenate([order, jnp.arange(k, len(values))])
    rest = ((0, len(values) - k), (0, 0))
    of_weights = (None if a is None else a[entry][order].astype(jnp.float32) for a in (matrices.steps, matrices.lows))
    steps, lows = (None if a is None else jnp.pad(a, rest) for a in of_weights)
    found = round_in_order(values[every], factor, jnp.arange(len(every)) < k, steps, lows, group=group, run=run)
    back = jnp.argsort(order)
    of_groups = found.of_groups
    if of_groups is not None:
        of_groups = of_groups[:, :k][:, back].reshape(2, k, -1).swapaxes(1, 2)
    error = jnp.sum(found.errors * jnp.square(scale))
    return _Rounded(found.codes[:k][back].T, of_groups, (found.corrected[k:] * scale).T, error)


def _in_groups(w, columns, rms, moments, *, contract_axes, stack_axes, config: Config) -> Corrected:
    """A weight in the groups that `config` names."""
    axes = {"contract_axes": contract_axes, "stack_axes": stack_axes}
    matrices, within, grouped = _prepare(w, columns, rms, moments, **axes, config=config)
    along = axis_of_groups(w.shape, contract_axes, stack_axes, config.grouping)
    k = moments.shape[-1]
    entries = []
    for entry, of_entry in enumerate(np.asarray(within)):
        # Large activations first; calibrated columns, which aren't rounded, last.
        order = np.argsort(-np.diagonal(of_entry)[:k], kind="stable")
        factor = inverse_factor(of_entry, np.concatenate([order, np.arange(k, len(of_entry))]))
        entries.append(_rounded(matrices, entry, order, factor, group=config.group, run=w.shape[along]))
    error = sum(float(entry.error) for entry in entries)
    grouped, w = _joined(entries, grouped, w, columns, **axes, config=config)
    return Corrected(grouped, w, config, error)


@functools.partial(jax.jit, static_argnames=("contract_axes", "stack_axes", "config"))
def _joined(entries: list[_Rounded], grouped: Grouped, w, columns, *, contract_axes, stack_axes, config: Config):
    """`grouped` with what was found for the stacked weights, and `w` with its calibrated columns as corrected."""
    axes = {"contract_axes": contract_axes, "stack_axes": stack_axes}
    codes, of_groups, kept, _ = jax.tree.map(lambda *leaves: jnp.stack(leaves), *entries)
    grouped = grouped._replace(codes=from_matrices(codes, w.shape, **axes))
    if of_groups is not None:
        along = axis_of_groups(w.shape, contract_axes, stack_axes, config.grouping)
        shape = [group_count(size, config.group) if a == along else size for a, size in enumerate(w.shape)]
        step, low = (from_matrices(of_groups[:, i], shape, **axes) for i in (0, 1))
        grouped = grouped._replace(step=step, low=low)
    return grouped, w if columns is None else _with_columns(w, columns, kept, **axes)


def _with_columns(w, columns, kept, *, contract_axes, stack_axes):
    """`w` with `kept[stacked, n, c]` in the columns `[*stack, c]`."""
    flat = as_matrices(w, contract_axes, stack_axes)
    index = jnp.broadcast_to(columns.reshape(len(flat), 1, -1), kept.shape)
    flat = jnp.put_along_axis(flat, index, kept.astype(w.dtype), axis=2, inplace=False, mode="drop")
    return from_matrices(flat, w.shape, contract_axes, stack_axes)
