"""A whole weight in four bits, and the axis of its groups that AdaDim chooses.

Source: Heo et al., arXiv 2309.15531, section 4: each layer takes the groups, of output or of input channels, that leave
the smaller error of its output on calibration activations.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jint8._core.axes import column_axis, columns_last
from jint8._core.config import Config
from jint8._core.four_bits import FEWEST_FEATURES, of_members, quantize_groups
from jint8._core.outlier_rows import MOST_STEPS, without_columns
from jint8._core.rotation import into_coordinates_in_place
from jint8._core.rounding import absmax


class Grouped(NamedTuple):
    """A weight in four bits, before its codes are packed; arrays have the axes of the weight."""

    codes: jax.Array  # uint8
    scale: jax.Array
    step: jax.Array  # float16, in units of the scale
    low: jax.Array  # float16, in units of the scale
    smooth: jax.Array | None
    values: jax.Array  # what the codes stand for as nearly as they can: smoothed and rotated, calibrated columns 0


def axis_of_groups(shape, contract_axes, stack_axes, grouping: str) -> int:
    """The axis of a weight along which it is grouped: the last contracted one, or the last of output channels."""
    if grouping == "oc":
        return column_axis(shape, contract_axes)
    return max(set(range(len(shape))) - {*contract_axes, *stack_axes})


def grouped(w, columns, rms, *, contract_axes, stack_axes, config: Config) -> Grouped:
    """A weight in four bits, in the groups of `config`, which aren't `"ada"` here."""
    values, smooth, least = w, None, None
    axes = {"contract_axes": contract_axes, "stack_axes": stack_axes}
    if config.rotate:
        inside = into_coordinates_in_place(w, rms, columns, **axes, block=config.rotate)
        values, smooth = inside.values, inside.smooth
    elif columns is not None:
        values = without_columns(w, columns, **axes)
    if columns is not None:  # kept in units of the scale: see `quantize`
        least = absmax(w, contract_axes) / MOST_STEPS
    along = axis_of_groups(w.shape, contract_axes, stack_axes, config.grouping)
    codes, scale, step, low = quantize_groups(values, contract_axes, along, config.group, least)
    return Grouped(codes, scale, step, low, smooth, values.astype(jnp.float32))


# Jitted, because outside of a jit every operation would be compiled as a program of its own.
@functools.partial(jax.jit, static_argnames=("contract_axes", "stack_axes", "config"))
def output_error(w, columns, rms, *, contract_axes, stack_axes, config: Config) -> jax.Array:
    """The squared error of a weight's output, summed over output channels, in expectation over activations.

    Formula: `sum_k E[x_k**2] sum_n (w - w_quantized)[k, n]**2`, for features that don't depend on each other; all have
    the same mean square where that isn't known. Rotated features have the mean of their block's.
    """
    parts = grouped(w, columns, rms, contract_axes=contract_axes, stack_axes=stack_axes, config=config)
    along = axis_of_groups(w.shape, contract_axes, stack_axes, config.grouping)
    step, low = (
        of_members(a, along, w.shape[along], config.group).astype(jnp.float32) for a in (parts.step, parts.low)
    )
    squares = jnp.square((parts.codes * step + low) * parts.scale - parts.values)
    if rms is None:
        return jnp.sum(squares)
    own = [a for a in range(w.ndim) if a not in contract_axes]
    channels = [i for i, a in enumerate(own) if a not in stack_axes]
    of_x = jnp.expand_dims(rms, channels)
    if config.rotate:
        assert parts.smooth is not None
        of_x = of_x * columns_last(parts.smooth, contract_axes)
        blocks = jnp.square(of_x).reshape(*of_x.shape[:-1], -1, config.rotate)
        of_x = jnp.sqrt(jnp.broadcast_to(jnp.mean(blocks, -1, keepdims=True), blocks.shape)).reshape(of_x.shape)
    return jnp.sum(columns_last(squares, contract_axes) * jnp.square(of_x))


def with_grouping(w, columns, rms, contract_axes, stack_axes, config: Config) -> Config:
    """The config with the grouping of this weight: "oc" or "ic"."""
    if w.shape[column_axis(w.shape, contract_axes)] < FEWEST_FEATURES:
        raise ValueError(
            f"Expected at least {FEWEST_FEATURES} features on the last contracted axis for four bits, got a weight of "
            f"shape {w.shape} that is contracted over {contract_axes}: leave it in floating point."
        )
    if not set(range(w.ndim)) - {*contract_axes, *stack_axes} or 0 in w.shape:  # one output channel, or nothing
        return dataclasses.replace(config, grouping="oc")
    if config.grouping != "ada":
        return config
    if isinstance(w, jax.core.Tracer) or isinstance(rms, jax.core.Tracer) or isinstance(columns, jax.core.Tracer):
        raise ValueError(
            "Expected grouping='oc' or 'ic' under jit, where shapes can't depend on values, got 'ada', which chooses "
            "by the values of the weight."
        )
    choices = [dataclasses.replace(config, grouping=grouping) for grouping in ("oc", "ic")]
    options = {"contract_axes": contract_axes, "stack_axes": stack_axes}
    return min(choices, key=lambda choice: float(output_error(w, columns, rms, config=choice, **options)))
