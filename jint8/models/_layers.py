"""Layers of the decoder. Their weights are `[n, k]`, float or `QTensor`: the tree decides what runs."""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jint8._matmul import matmul
from jint8._types import is_qtensor


class Linear(nn.Module):
    """`x @ weight.T + bias`, in int8 where the weight is a `QTensor`.

    Attributes:
      features: n.
      use_bias: whether there is a bias.
      dtype: of freshly made parameters.
    """

    features: int
    use_bias: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`x[..., k]` -> `[..., features]`."""
        init = nn.initializers.lecun_normal(in_axis=1, out_axis=0)
        weight = self.param("weight", init, (self.features, x.shape[-1]), self.dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), self.dtype) if self.use_bias else None
        if is_qtensor(weight):
            return matmul(x, weight, bias=bias)
        y = project(x, weight)
        return y if bias is None else y + bias.astype(y.dtype)


def project(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Float `x[..., k] @ weight[n, k].T`, in `x.dtype`."""
    weight = weight.astype(x.dtype)
    if x.size == x.shape[-1]:
        # as matrix times vector: XLA's CPU backend is up to 20 times slower with the single row on the left
        return jnp.matmul(weight, x.reshape(-1)).reshape(*x.shape[:-1], -1)
    return lax.dot_general(x, weight, (((x.ndim - 1,), (1,)), ((), ())))


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x**2) + eps) * scale`, in float32, rounded to `x.dtype`."""

    eps: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`x[..., d]` -> the same shape and dtype."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.dtype)
        x32 = x.astype(jnp.float32)
        x32 = x32 * lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return (x32 * scale).astype(x.dtype)


class Rotary(NamedTuple):
    """Sines and cosines of rotary positions, float32 `[b, s, 1, d]`: the two halves of `d` are the pairs."""

    sin: jax.Array  # with the sign that its half is multiplied by
    cos: jax.Array


def rotary(positions: jax.Array, head_dim: int, theta: float) -> Rotary:
    """`Rotary` of `positions[b, s]`, made once for all layers."""
    half = head_dim // 2
    frequency = theta ** (-np.arange(half, dtype=np.float64) / half)
    angle = positions[..., None, None].astype(jnp.float32) * frequency.astype(np.float32)  # [b, s, 1, half]
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    table = Rotary(jnp.concatenate([-sin, sin], axis=-1), jnp.concatenate([cos, cos], axis=-1))
    return lax.optimization_barrier(table)  # or XLA computes them again in every layer


def rotate(x: jax.Array, at: Rotary) -> jax.Array:
    """Rotary positions on `x[b, s, heads, d]`."""
    return (x * at.cos + jnp.roll(x, x.shape[-1] // 2, axis=-1) * at.sin).astype(x.dtype)
