"""Rotary positions: angles of a call's tokens, made once for all layers."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jint8.models._config import Rope


class Rotary(NamedTuple):
    """Sines and cosines of rotary positions, float32 `[b, s, 1, 1, d]`: the two halves of `d` are the pairs."""

    sin: jax.Array  # with the sign that its half is multiplied by
    cos: jax.Array


def rotary(positions: jax.Array, rope: Rope) -> Rotary:
    """`Rotary` of `positions[b, s]`."""
    angle = positions[..., None, None, None].astype(jnp.float32) * _frequencies(positions, rope)  # [b, s, 1, 1, half]
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    if rope.scale != 1:
        sin, cos = sin * rope.scale, cos * rope.scale
    table = Rotary(jnp.concatenate([-sin, sin], axis=-1), jnp.concatenate([cos, cos], axis=-1))
    return lax.optimization_barrier(table)  # or XLA computes them again in every layer


def _frequencies(positions: jax.Array, rope: Rope):
    """Those of each row's length so far."""
    frequencies = np.asarray(rope.frequencies, np.float32)
    if not rope.long and not rope.ntk:
        return frequencies
    length = (jnp.max(positions, axis=1) + 1)[:, None, None, None, None]
    if rope.long:
        return jnp.where(length > rope.trained, np.asarray(rope.long, np.float32), frequencies)
    # with base * stretch ** (d / (d - 2)) the slowest pair turns `stretch` times slower, the fastest as before
    stretch = rope.ntk * jnp.maximum(length, rope.trained) / rope.trained - (rope.ntk - 1)
    return frequencies * stretch ** -np.linspace(0, 1, len(frequencies), dtype=np.float32)


def rotate(x: jax.Array, at: Rotary) -> jax.Array:
    """Rotary positions on `x[b, s, kv_heads, group, d]`, or on its first dimensions where `at` has fewer."""
    rotated = at.cos.shape[-1]
    if rotated < x.shape[-1]:
        return jnp.concatenate([rotate(x[..., :rotated], at), x[..., rotated:]], axis=-1)
    return (x * at.cos + jnp.roll(x, rotated // 2, axis=-1) * at.sin).astype(x.dtype)
