"""Attention with a cache, and where the tokens of a call stand in it."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding

from jint8.models._config import ModelConfig
from jint8.models._fused import split_heads
from jint8.models._layers import Linear, Norm, softcap
from jint8.models._rope import Rotary, rotate

PART = 128  # queries that attend to the same keys: fewer save products of zeros, and take longer to compile


class LayerCache(NamedTuple):
    """Keys and values of one layer, each in the order in which attention multiplies it."""

    key: jax.Array  # [b, kv_heads, head_dim, length]
    value: jax.Array  # [b, kv_heads, length, head_dim]


class Context(NamedTuple):
    """Where the tokens of a call stand: slots are columns of the cache, positions count from each row's first token."""

    slot: jax.Array | None  # int32: the slot of the call's first token; None for 0, where the call's keys are all
    first: jax.Array | None  # int32[b]: the slot of each row's first real token; None where nothing is padding
    positions: jax.Array  # int32[b, s]
    valid: jax.Array | None  # bool[b, s, 1]: tokens that aren't padding; None where none is


def context(tokens: jax.Array, slot: jax.Array | None = None, first: jax.Array | None = None) -> Context:
    """The `Context` of `tokens[b, s]` that start at `slot`, in rows whose padding ends at `first[b]`."""
    b, s = tokens.shape
    slots = jnp.broadcast_to((0 if slot is None else slot) + jnp.arange(s, dtype=jnp.int32), (b, s))
    if first is None:
        return Context(slot, None, slots, None)
    positions = slots - first[:, None]
    return Context(slot, first, jnp.maximum(positions, 0), (positions >= 0)[..., None])


def make_cache(
    config: ModelConfig, batch: int, length: int, dtype=jnp.float32, sharding: NamedSharding | None = None
) -> list[LayerCache]:
    """An empty cache of `length` slots; `sharding`: of its arrays, which all begin with batch and key-value heads."""
    return _cache_maker(config, batch, length, jnp.dtype(dtype), sharding)()


@functools.lru_cache(maxsize=32)
def _cache_maker(config, batch, length, dtype, sharding):
    """One program, because starting one for each array takes longer than filling them."""
    key = (batch, config.num_kv_heads, config.head_dim, length)
    value = (batch, config.num_kv_heads, length, config.head_dim)
    make = functools.partial(jnp.zeros, dtype=dtype)
    caches = lambda: [LayerCache(make(key), make(value)) for _ in range(config.num_layers)]
    return jax.jit(caches, out_shardings=sharding)


class Attention(nn.Module):
    """Grouped-query attention.

    Attributes:
      config: of the model.
      window: how many of the latest keys a query sees; 0 means all.
      dtype: of freshly made parameters.
      mesh: devices that weights and cache are divided among.
    """

    config: ModelConfig
    window: int = 0
    dtype: Any = jnp.float32
    mesh: Mesh | None = None

    @nn.compact
    def __call__(
        self, x: jax.Array, at: Context, angles: Rotary | None, cache: LayerCache | None
    ) -> tuple[jax.Array, LayerCache | None]:
        """`x[b, s, d]` -> the same shape, and the cache with this call's keys and values."""
        c = self.config
        b, s, _ = x.shape
        qkv = Linear((c.num_heads + 2 * c.num_kv_heads) * c.head_dim, c.qkv_bias, self.dtype, self.mesh, name="qkv")(x)
        q, k, v = split_heads(qkv, c)
        if c.qk_norm:
            q, k = Norm(c, self.dtype, name="q_norm")(q), Norm(c, self.dtype, name="k_norm")(k)
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        q = q * (c.head_dim**-0.5 if c.attention_scale is None else c.attention_scale)
        q = q.transpose(0, 2, 3, 1, 4)  # (b, kv_heads, groups, s, d)
        k = k[:, :, :, 0].transpose(0, 2, 3, 1)  # (b, kv_heads, d, s)
        v = v[:, :, :, 0].transpose(0, 2, 1, 3)  # (b, kv_heads, s, d)
        k, v = lax.optimization_barrier((k, v))  # transposed once, for the cache and for the products
        slot = 0 if at.slot is None else at.slot
        if cache is not None:
            keys = lax.dynamic_update_slice(cache.key, k.astype(cache.key.dtype), (0, 0, 0, slot))
            values = lax.dynamic_update_slice(cache.value, v.astype(cache.value.dtype), (0, 0, slot, 0))
            # or XLA fuses a second update into the products, and copies the cache for it
            cache = lax.optimization_barrier(LayerCache(keys, values))
            k, v = (k, v) if at.slot is None else cache
        parts = []
        for queries, seen in parts_of(s, k.shape[3], self.window if c.causal and at.slot is None else None):
            part = q[:, :, :, queries].reshape(b, c.num_kv_heads, -1, c.head_dim)
            query_slot = slot + jnp.arange(queries.start, queries.stop)[:, None]
            part = self._attend(part, k[:, :, :, seen], v[:, :, seen], query_slot, seen.start, at.first)
            parts.append(part.reshape(b, c.num_heads, -1, c.head_dim))
        out = jnp.concatenate(parts, axis=2)
        out = out.transpose(0, 2, 1, 3).reshape(b, s, c.num_heads * c.head_dim)
        project = Linear(c.hidden_size, c.out_bias, self.dtype, self.mesh, row_parallel=True, name="out")
        return project(mask(out, at)), cache

    def _attend(self, q, k, v, query_slot, first_key, first):
        """Queries `q[b, kv_heads, groups s, d]` -> the same shape; `first_key` is the slot of the first key."""
        c = self.config
        b, kv_heads, rows, _ = q.shape
        s, length = len(query_slot), k.shape[3]
        key_slot = first_key + jnp.arange(length)[None, :]
        visible = key_slot <= (query_slot if c.causal else first_key + length)  # (s, length)
        if self.window:
            visible = visible & (key_slot > query_slot - self.window)
        if first is not None:
            visible = visible & (key_slot[0] >= first[:, None, None])  # (b, s, length)
            visible = visible[:, None, None]
        multiply = functools.partial(lax.dot_general, dimension_numbers=(((3,), (2,)), ((0, 1), (0, 1))))
        scores = multiply(q, k, preferred_element_type=jnp.float32).reshape(b, kv_heads, rows // s, s, length)
        scores = softcap(scores, c.attention_softcap)
        if c.alibi:
            slopes = alibi_slopes(c.num_heads).reshape(kv_heads, rows // s, 1, 1)
            scores = scores + slopes * (key_slot - query_slot)
        scores = jnp.where(visible, scores, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype).reshape(b, kv_heads, rows, length)
        return multiply(weights, v)


def parts_of(s: int, length: int, window: int | None) -> list[tuple[slice, slice]]:
    """Which of `length` keys each part of `s` queries sees at most.

    Where query i sees key i and those before it, up to `window` of them (0: all), the queries are in parts, each of
    which leaves out most of what it doesn't see. None: all queries see all keys.
    """
    if window is None or s < 2 * PART:
        return [(slice(0, s), slice(0, length))]
    size = -(-s // (s // PART))
    starts = range(0, s, size)
    return [
        (slice(i, min(i + size, s)), slice(max(0, i - window + 1) if window else 0, min(i + size, s))) for i in starts
    ]


def mask(x: jax.Array, at: Context) -> jax.Array:
    """Zeros in place of padding, so that it can't make a column an outlier column."""
    return x if at.valid is None else jnp.where(at.valid, x, 0)


def alibi_slopes(heads: int) -> np.ndarray:
    """float32 `[heads]`: a geometric sequence from `2**(-8/n)` to `2**-8` for n heads.

    Where their number isn't a power of two, the heads beyond the next smaller one get every other slope of twice as
    many.

    References:
      Press et al., Train Short, Test Long, 2022, arXiv 2108.12409, section 3 and appendix A.
    """
    power = 1 << (heads.bit_length() - 1)
    own = 2.0 ** (-8 / power * np.arange(1, power + 1))
    between = 2.0 ** (-4 / power * np.arange(1, 2 * (heads - power), 2))
    return np.concatenate([own, between]).astype(np.float32)
