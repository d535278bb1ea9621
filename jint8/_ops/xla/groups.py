"""The product of int8 activations and a weight of four bits, of any number of rows: `"xla_groups"`.

Codes become int8, and each group of them has a product of integers of its own, exact in int32. What is done with the
steps depends on what a group is of:

- features of one output channel: activations are rounded once, and each group's sums are multiplied by its step;
- output channels of one feature: steps vary along the features, so they go onto the activations, `x * step`, which are
  rounded once for each group of channels. The sums have nothing else to multiply. Codes count from the middle of their
  range here, so that what is rounded in activations meets small numbers.

Outliers of activations are three int8 digits each, in further rows of the same products.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax

from jint8._core.config import Config
from jint8._core.four_bits import MIDDLE_CODE, by_group
from jint8._core.platform import on_one_cpu
from jint8._ops.activations import detect, split
from jint8._ops.digits import OUTLIER_DIGITS, digit_step, digits, join_digits
from jint8._ops.weight import Weight

# How many bytes the sums (or activations) of all groups may have where their products are one operation. Where they
# would have more, or more than a CPU's cache holds, groups take turns.
MOST_AT_ONCE, MOST_AT_ONCE_ON_CPU = 1 << 30, 1 << 24


def group_product(x: jax.Array, w: Weight, config: Config) -> jax.Array:
    """float32 `x[m, k]` times a weight of four bits, by a config that quantizes activations: float32 `[m, n]`."""
    assert w.packing is not None
    outlier = detect(x, config)[0] if config.decomposes else None
    y = (_of_features if w.packing.channels is None else _of_channels)(x, outlier, w, config)
    return y * w.scale


def quantized_rows(x: jax.Array, outlier: jax.Array | None, config: Config) -> list[tuple[jax.Array, jax.Array]]:
    """`x[m, k]` as int8 digits `[digits m, k]` and the unit of the lowest, `[m, 1]`: regular values, and outliers."""
    within = dataclasses.replace(config, threshold=0.0)
    regular = split(x if outlier is None else jnp.where(outlier, 0, x), within)
    rows = [(regular.q, regular.scale)]
    if outlier is not None:
        outliers = jnp.where(outlier, x, 0)
        unit = digit_step(outliers, 1, OUTLIER_DIGITS)
        rows.append((digits(outliers, unit, OUTLIER_DIGITS), unit))
    return rows


def joined(sums: jax.Array, rows: list[tuple[jax.Array, jax.Array]], m: int) -> jax.Array:
    """float32 sums of the digits in `rows`, `[all digits m, n]`, as sums of what they stand for: `[m, n]`."""
    total, start = jnp.float32(0), 0
    for q, unit in rows:
        total = total + join_digits(sums[start : start + len(q)], m) * unit
        start += len(q)
    return total


def _of_features(x: jax.Array, outlier: jax.Array | None, w: Weight, config: Config) -> jax.Array:
    assert w.packing is not None
    assert w.group_scale is not None
    assert w.group_min is not None
    group, features, _ = w.packing
    rows = quantized_rows(x, outlier, config)
    values = _in_groups(jnp.concatenate([q for q, _ in rows]), 1, features, group)  # [rows, groups, group]
    codes = _in_groups(w.codes().astype(jnp.int8), w.k_axis, features, group)
    codes, step, low = (a if w.k_last else jnp.moveaxis(a, -1, 0) for a in (codes, w.group_scale, w.group_min))
    step, low = step.T.astype(jnp.float32), low.T.astype(jnp.float32)  # [groups, n]
    contract = (((2,), (2,)), ((1,), (1,)))
    sums_of_values = jnp.sum(values, axis=2, dtype=jnp.int32).astype(jnp.float32)
    total = jnp.matmul(sums_of_values, low, precision=lax.Precision.HIGHEST)
    count, bytes_of_sums = values.shape[1], 4 * math.prod(values.shape[:2]) * w.n
    if _at_once(bytes_of_sums):
        sums = lax.dot_general(values, codes, contract, preferred_element_type=jnp.int32)  # [groups, rows, n]
        return joined(total + jnp.sum(sums.astype(jnp.float32) * step[:, None], axis=0), rows, len(x))

    def add_group(i, total):
        a, b = (lax.dynamic_slice_in_dim(both, i, 1, axis=1) for both in (values, codes))
        sums = lax.dot_general(a, b, contract, preferred_element_type=jnp.int32)[0]
        return total + sums.astype(jnp.float32) * lax.dynamic_slice_in_dim(step, i, 1)

    return joined(lax.fori_loop(0, count, add_group, total), rows, len(x))


def _of_channels(x: jax.Array, outlier: jax.Array | None, w: Weight, config: Config) -> jax.Array:
    assert w.packing is not None
    assert w.packing.channels is not None
    assert w.group_scale is not None
    assert w.group_min is not None
    group, channels = min(w.packing.group, w.packing.channels), w.packing.channels
    x = x.astype(jnp.float32)
    codes = w.codes().astype(jnp.int8) - jnp.int8(MIDDLE_CODE)
    codes, step, low = (a if w.k_last else a.T for a in (codes, w.group_scale, w.group_min))
    codes = _in_groups(codes, 0, channels, group)  # [groups, group, k]
    step = step.astype(jnp.float32)  # [groups, k]
    middle = low.astype(jnp.float32) + MIDDLE_CODE * step

    def of_group(pair):
        of_codes, of_steps = pair
        rows = quantized_rows(x * of_steps, outlier, config)
        stacked = jnp.concatenate([q for q, _ in rows])
        sums = lax.dot_general(stacked, of_codes, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
        return joined(sums.astype(jnp.float32), rows, len(x))

    at_once = _at_once(4 * x.size * len(step))
    sums = (jax.vmap(of_group) if at_once else lambda pairs: lax.map(of_group, pairs))((codes, step))
    sums = sums + jnp.matmul(middle, x.T, precision=lax.Precision.HIGHEST)[:, :, None]  # [groups, m, group]
    by_run = jnp.moveaxis(sums, 1, 0).reshape(len(x), w.n // channels, -1)
    return by_run[:, :, :channels].reshape(len(x), w.n)


def _in_groups(array: jax.Array, axis: int, run: int, group: int) -> jax.Array:
    """`array` with `axis`, which is several runs of equal size, split into groups; zeros fill up the last of a run."""
    shape, size = array.shape, min(group, run)
    runs = array.reshape(*shape[:axis], shape[axis] // run, run, *shape[axis + 1 :])
    return by_group(runs, axis + 1, size).reshape(*shape[:axis], -1, size, *shape[axis + 1 :])


def _at_once(size: int) -> bool:
    return isinstance(size, int) and size <= (MOST_AT_ONCE_ON_CPU if on_one_cpu() else MOST_AT_ONCE)
