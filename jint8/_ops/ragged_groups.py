"""The ragged product of int8 activations and experts in four bits, as `jint8._ops.xla.groups` has it of one weight."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jint8._core.config import Config
from jint8._core.four_bits import MIDDLE_CODE, by_group, unpack
from jint8._core.qtensor import QTensor, storage_axes
from jint8._core.storage import packed_axis
from jint8._ops.activations import detect
from jint8._ops.xla.groups import joined, quantized_rows


def ragged_groups(
    x: jax.Array, w: QTensor, expert: jax.Array, group_sizes: jax.Array, config: Config, precision: Any
) -> jax.Array:
    """`x[m, k]` times experts `w[experts, k, n]` in units of their scales, float32 `[m, n]`.

    Groups take turns. `expert` is that of each row; `precision` is of what is computed in floating point.
    """
    assert w.features is not None
    assert w.group_scale is not None
    assert w.group_min is not None
    at, group = storage_axes(w), w.config.group
    codes = jnp.transpose(unpack(w.q, packed_axis(w), w.features, group), at).astype(jnp.int8)
    step, low = (jnp.transpose(a, at).astype(jnp.float32) for a in (w.group_scale, w.group_min))
    outlier = detect(x, config)[0] if config.decomposes else None

    def product(rows, of_codes):  # of digits: all rows of one digit are sorted by expert
        parts = [rows[start : start + len(x)] for start in range(0, len(rows), len(x))]
        sums = [lax.ragged_dot(part, of_codes, group_sizes, preferred_element_type=jnp.int32) for part in parts]
        return jnp.concatenate(sums).astype(jnp.float32)

    if w.config.grouping == "oc":
        rows = quantized_rows(x, outlier, config)
        values = by_group(jnp.concatenate([q for q, _ in rows]), 1, group)  # [rows, groups, group]
        codes = by_group(codes, 1, group)
        of_row = jnp.tile(expert, len(values) // len(x))

        def add_group(i, total):
            of_values, of_codes = (lax.dynamic_index_in_dim(a, i, 1, keepdims=False) for a in (values, codes))
            of_step, of_low = (lax.dynamic_index_in_dim(a, i, 1, keepdims=False)[of_row] for a in (step, low))
            alone = jnp.sum(of_values, axis=1, keepdims=True, dtype=jnp.int32).astype(jnp.float32)
            return total + product(of_values, of_codes) * of_step + alone * of_low

        zeros = jnp.zeros((len(values), w.shape[2]), jnp.float32)
        return joined(lax.fori_loop(0, values.shape[1], add_group, zeros), rows, len(x))

    codes = by_group(codes - jnp.int8(MIDDLE_CODE), 2, group)  # [experts, k, groups, group]
    x = x.astype(jnp.float32)

    def of_group(i):
        of_step = lax.dynamic_index_in_dim(step, i, 2, keepdims=False)[expert]  # [m, k]
        rows = quantized_rows(x * of_step, outlier, config)
        of_codes = lax.dynamic_index_in_dim(codes, i, 2, keepdims=False)
        return joined(product(jnp.concatenate([q for q, _ in rows]), of_codes), rows, len(x))

    sums = lax.map(of_group, jnp.arange(step.shape[2]))  # [groups, m, group]
    sums = sums + lax.ragged_dot(x, low + MIDDLE_CODE * step, group_sizes, precision=precision).T[:, :, None]
    return jnp.moveaxis(sums, 0, 1).reshape(len(x), -1)[:, : w.shape[2]]
