"""A whole weight in four bits, and the axis of its groups that AdaDim chooses.

Source: Heo et al., arXiv 2309.15531, section 4: each layer takes the groups, of output or of input channels, that leave
the smaller error of its output on calibration activations.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jint8._core.axes import as_matrices, column_axis, columns_last, from_matrices
from jint8._core.config import Config
from jint8._core.four_bits import FEWEST_FEATURES, of_members, quantize_groups
from jint8._core.moments import moments_inside
from jint8._core.outlier_rows import MOST_STEPS, without_columns
from jint8._core.rotation import into_coordinates_in_place
from jint8._core.rounding import absmax


class Inside(NamedTuple):
    """A weight in the coordinates in which it is rounded; arrays have its axes."""

    values: jax.Array  # float32: smoothed and rotated, calibrated columns 0
    smooth: jax.Array | None
    least: jax.Array | None  # what each channel's scale is at least


class Grouped(NamedTuple):
    """A weight in four bits, before its codes are packed; arrays have the axes of the weight."""

    codes: Any  # uint8
    scale: jax.Array
    step: Any  # float16, in units of the scale
    low: Any  # float16, in units of the scale
    smooth: jax.Array | None
    values: jax.Array  # what the codes stand for as nearly as they can: those of `Inside`


def axis_of_groups(shape, contract_axes, stack_axes, grouping: str) -> int:
    """The axis of a weight along which it is grouped: the last contracted one, or the last of output channels."""
    if grouping == "oc":
        return column_axis(shape, contract_axes)
    return max(set(range(len(shape))) - {*contract_axes, *stack_axes})


def inside(w, columns, rms, *, contract_axes, stack_axes, config: Config) -> Inside:
    """A weight smoothed and rotated as `config` says, without its calibrated columns."""
    axes = {"contract_axes": contract_axes, "stack_axes": stack_axes}
    values, smooth, least = w, None, None
    if config.rotate:
        changed = into_coordinates_in_place(w, rms, columns, **axes, block=config.rotate)
        values, smooth = changed.values, changed.smooth
    elif columns is not None:
        values = without_columns(w, columns, **axes)
    if columns is not None:  # kept in units of the scale: see `quantize`
        least = absmax(w, contract_axes) / MOST_STEPS
    return Inside(values.astype(jnp.float32), smooth, least)


def importance_of(within: jax.Array | None, shape, contract_axes, stack_axes, grouping: str) -> jax.Array | None:
    """How much the square of an error counts in each feature of a weight of this shape, by `moments_inside`."""
    if within is None:
        return None
    if grouping == "ic":  # all weights of a group meet the same feature
        return jnp.ones((), jnp.float32)
    k = math.prod(shape[a] for a in contract_axes)
    squares = jnp.einsum("skk->sk", within)[:, None, :k]
    sizes = [size if a in contract_axes or a in stack_axes else 1 for a, size in enumerate(shape)]
    return from_matrices(squares, sizes, contract_axes, stack_axes)


def grouped(w, columns, rms, moments, *, contract_axes, stack_axes, config: Config) -> Grouped:
    """A weight in four bits, rounded to nearest in the groups of `config`, which aren't `"ada"` here."""
    axes = {"contract_axes": contract_axes, "stack_axes": stack_axes}
    values, smooth, least = inside(w, columns, rms, **axes, config=config)
    within = within_coordinates(moments, smooth, columns, **axes, config=config)
    importance = importance_of(within, w.shape, **axes, grouping=config.grouping)
    along = axis_of_groups(w.shape, contract_axes, stack_axes, config.grouping)
    codes, scale, step, low = quantize_groups(values, contract_axes, along, config.group, least, importance)
    return Grouped(codes, scale, step, low, smooth, values)


def within_coordinates(moments, smooth, columns, *, contract_axes, stack_axes, config: Config) -> jax.Array | None:
    """`moments_inside` of a weight's coordinates; None where there are no moments."""
    if moments is None:
        return None
    factors = None if smooth is None else as_matrices(smooth, contract_axes, stack_axes)
    return moments_inside(moments, factors, columns, config.rotate)


# Jitted, because outside of a jit every operation would be compiled as a program of its own.
@functools.partial(jax.jit, static_argnames=("contract_axes", "stack_axes", "config"))
def output_error(w, columns, rms, moments, *, contract_axes, stack_axes, config: Config) -> jax.Array:
    """The squared error of a weight's output, summed over output channels, in expectation over activations.

    Formula: `trace(d.T H d)` with `d[k, n]` the error of the weight and `H = E[x x.T]`, the second moments. Where only
    root mean squares are known, `H` is diagonal, `E[x_k**2]`, as if features didn't depend on each other; rotated
    ones have the mean of their block's. Where nothing is known, all have the same.
    """
    axes = {"contract_axes": contract_axes, "stack_axes": stack_axes}
    parts = grouped(w, columns, rms, moments, **axes, config=config)
    along = axis_of_groups(w.shape, contract_axes, stack_axes, config.grouping)
    step, low = (
        of_members(a, along, w.shape[along], config.group).astype(jnp.float32) for a in (parts.step, parts.low)
    )
    off = (parts.codes * step + low) * parts.scale - parts.values
    within = within_coordinates(moments, parts.smooth, columns, **axes, config=config)
    if within is not None:
        rows = as_matrices(off, contract_axes, stack_axes)  # [stacked, n, k]
        k = rows.shape[-1]  # calibrated columns, which aren't off, are behind
        return jnp.sum(rows * jnp.matmul(rows, within[:, :k, :k], precision="highest"))
    squares = jnp.square(off)
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


def choices(w: Any, known: tuple[Any, ...], contract_axes, stack_axes, config: Config) -> list[Config]:
    """The configs that a weight may have: its groupings are "oc" or "ic", of which `"ada"` is still to choose."""
    if w.shape[column_axis(w.shape, contract_axes)] < FEWEST_FEATURES:
        raise ValueError(
            f"Expected at least {FEWEST_FEATURES} features on the last contracted axis for four bits, got a weight of "
            f"shape {w.shape} that is contracted over {contract_axes}: leave it in floating point."
        )
    traced = any(isinstance(a, jax.core.Tracer) for a in (w, *known))
    if traced and config.rounding == "gptq":
        raise ValueError("Expected rounding='nearest' under jit, got 'gptq', which factors matrices on the host.")
    if not set(range(w.ndim)) - {*contract_axes, *stack_axes} or 0 in w.shape:  # one output channel, or nothing
        return [dataclasses.replace(config, grouping="oc")]
    if config.grouping != "ada":
        return [config]
    if traced:
        raise ValueError(
            "Expected grouping='oc' or 'ic' under jit, where shapes can't depend on values, got 'ada', which chooses "
            "by the values of the weight."
        )
    return [dataclasses.replace(config, grouping=grouping) for grouping in ("oc", "ic")]


def with_grouping(w, columns, rms, moments, contract_axes, stack_axes, config: Config) -> Config:
    """The config with the grouping of this weight: that of the smaller error where it is rounded to nearest."""
    options = choices(w, (columns, rms, moments), contract_axes, stack_axes, config)
    if len(options) == 1:
        return options[0]
    axes = {"contract_axes": contract_axes, "stack_axes": stack_axes}
    return min(options, key=lambda option: float(output_error(w, columns, rms, moments, config=option, **axes)))
