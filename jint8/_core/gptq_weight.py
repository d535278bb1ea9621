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
    moments: jax.Array  # [stacked, k + c, k + c]
    scale: jax.Array  # [stacked, n]


@functools.partial(jax.jit, static_argnames=("contract_axes", "stack_axes", "config"))
def _prepare(w, columns, rms, moments, *, contract_axes, stack_axes, config: Config):
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
    matrices = _Matrices(jnp.swapaxes(rows, 1, 2), steps, lows, within, of_channels[..., 0])
    return matrices, Grouped(None, scale, step, low, smooth, values)


def _in_groups(w, columns, rms, moments, *, contract_axes, stack_axes, config: Config) -> Corrected:
    """A weight in the groups that `config` names."""
    axes = {"contract_axes": contract_axes, "stack_axes": stack_axes}
    prepared, grouped = _prepare(w, columns, rms, moments, **axes, config=config)
    along = axis_of_groups(w.shape, contract_axes, stack_axes, config.grouping)
    k = moments.shape[-1]
    codes, of_groups, kept, error = [], [], [], 0.0
    for entry in range(len(prepared.values)):
        values, within, scale = (a[entry] for a in (prepared.values, prepared.moments, prepared.scale))
        within = np.asarray(within)
        # Large activations first; calibrated columns, which aren't rounded, last.
        order = np.argsort(-np.diagonal(within)[:k], kind="stable")
        every = np.concatenate([order, np.arange(k, len(within))])
        rounded = jnp.arange(len(every)) < k
        rest = ((0, len(every) - k), (0, 0))
        steps, lows = (
            None if a is None else jnp.pad(a[entry][order].astype(jnp.float32), rest)
            for a in (prepared.steps, prepared.lows)
        )
        options = {"group": config.group, "run": w.shape[along]}
        found = round_in_order(values[every], inverse_factor(within, every), rounded, steps, lows, **options)
        back = np.argsort(order)
        codes.append(found.codes[:k][back].T)
        if found.of_groups is not None:
            of_groups.append(found.of_groups[:, :k][:, back].reshape(2, k, -1).swapaxes(1, 2))
        kept.append((found.corrected[k:] * scale).T)
        error += float(jnp.sum(found.errors * jnp.square(scale)))
    grouped = grouped._replace(codes=from_matrices(jnp.stack(codes), w.shape, **axes))
    if of_groups:
        shape = [group_count(size, config.group) if a == along else size for a, size in enumerate(w.shape)]
        step, low = (from_matrices(jnp.stack([a[i] for a in of_groups]), shape, **axes) for i in (0, 1))
        grouped = grouped._replace(step=step, low=low)
    if columns is not None:
        w = _with_columns(w, columns, jnp.stack(kept), **axes)
    return Corrected(grouped, w, config, error)


@functools.partial(jax.jit, static_argnames=("contract_axes", "stack_axes"))
def _with_columns(w, columns, kept, *, contract_axes, stack_axes):
    """`w` with `kept[stacked, n, c]` in the columns `[*stack, c]`."""
    flat = as_matrices(w, contract_axes, stack_axes)
    index = jnp.broadcast_to(columns.reshape(len(flat), 1, -1), kept.shape)
    flat = jnp.put_along_axis(flat, index, kept.astype(w.dtype), axis=2, inplace=False, mode="drop")
    return from_matrices(flat, w.shape, contract_axes, stack_axes)
