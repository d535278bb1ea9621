"""Rotary positions: angles of a call's tokens, made once for all layers."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jint8.models._config import ModelConfig, Rope


class Rotary(NamedTuple):
    """Sines and cosines of rotary positions, float32 `[b, s, 1, 1, d]`: entry i of each half is pair i.

    `(x1, x2)` becomes `(x1 cos - x2 sin, x2 cos + x1 sin)`, which is `x * cos + swapped(x) * sin`.
    """

    sin: jax.Array  # negative in the first half
    cos: jax.Array


def rotary(positions: jax.Array, rope: Rope, length: jax.Array | None = None) -> Rotary:
    """`Rotary` of `positions[b, s]`, in rows of `length[b]` tokens; None for those up to the last position."""
    frequencies = _frequencies(positions, rope, length)
    angle = positions[..., None, None, None].astype(jnp.float32) * frequencies  # [b, s, 1, 1, half]
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    if rope.scale != 1:
        sin, cos = sin * rope.scale, cos * rope.scale
    table = Rotary(jnp.concatenate([-sin, sin], axis=-1), jnp.concatenate([cos, cos], axis=-1))
    return lax.optimization_barrier(table)  # without it XLA fuses sines and cosines into every layer, and repeats them


def depends_on_length(config: ModelConfig) -> bool:
    """Whether a model's frequencies depend on the length of the sequence."""
    return any(rope is not None and bool(rope.long or rope.ntk) for rope in (config.rope, config.local_rope))


def same_until(config: ModelConfig, length: int) -> int | None:
    """The longest sequence that has the same frequencies as one of `length` tokens; None where all longer ones have."""
    limits = []
    for rope in (config.rope, config.local_rope):
        if rope is None or not (rope.long or rope.ntk):
            continue
        if length <= rope.trained:
            limits.append(rope.trained)
        elif not rope.long:  # dynamic NTK scaling: every length has frequencies of its own
            limits.append(length)
    return min(limits, default=None)


def _frequencies(positions: jax.Array, rope: Rope, length: jax.Array | None) -> jax.Array | np.ndarray:
    """Frequencies `[half]`, or `[b, 1, 1, 1, half]` where they depend on the length of each row."""
    frequencies = np.asarray(rope.frequencies, np.float32)
    if not rope.long and not rope.ntk:
        return frequencies
    length = (jnp.max(positions, axis=1) + 1 if length is None else length)[:, None, None, None, None]
    if rope.long:
        return jnp.where(length > rope.trained, np.asarray(rope.long, np.float32), frequencies)
    # Dynamic NTK scaling replaces the base by base * stretch ** (d / (d - 2)), which divides frequency i by
    # stretch ** (i / (half - 1)): not at all for the fastest, by `stretch` for the slowest.
    stretch = rope.ntk * jnp.maximum(length, rope.trained) / rope.trained - (rope.ntk - 1)
    return frequencies * stretch ** -np.linspace(0, 1, len(frequencies), dtype=np.float32)


def rotate(x: jax.Array, at: Rotary) -> jax.Array:
    """`x[b, s, kv_heads, group, d]` rotated; where `at` has fewer than `d` entries, only the first dimensions are."""
    rotated = at.cos.shape[-1]
    if rotated < x.shape[-1]:
        return jnp.concatenate([rotate(x[..., :rotated], at), x[..., rotated:]], axis=-1)
    return (x * at.cos + jnp.roll(x, rotated // 2, axis=-1) * at.sin).astype(x.dtype)
