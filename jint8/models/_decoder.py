"""A decoder-only transformer of the Llama family."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from jint8._layers import lookup
from jint8._matmul import matmul
from jint8._types import is_qtensor
from jint8.models._config import ModelConfig
from jint8.models._layers import Linear, RMSNorm, Rotary, project, rotary, rotate


class LayerCache(NamedTuple):
    """Keys and values of one layer, each in the order in which attention multiplies it."""

    key: jax.Array  # [b, kv_heads, head_dim, length]
    value: jax.Array  # [b, kv_heads, length, head_dim]


class Context(NamedTuple):
    """Where the tokens of a call stand: slots are columns of the cache, positions count from each row's first token."""

    slot: jax.Array  # int32: the slot of the call's first token
    first: jax.Array | None  # int32[b]: the slot of each row's first real token; None where nothing is padding
    positions: jax.Array  # int32[b, s]
    valid: jax.Array | None  # bool[b, s, 1]: tokens that aren't padding; None where none is


def context(tokens: jax.Array, slot: jax.Array | int = 0, first: jax.Array | None = None) -> Context:
    """The `Context` of `tokens[b, s]` that start at `slot`, in rows whose padding ends at `first[b]`."""
    b, s = tokens.shape
    slots = jnp.broadcast_to(slot + jnp.arange(s, dtype=jnp.int32), (b, s))
    if first is None:
        return Context(jnp.int32(slot), None, slots, None)
    positions = slots - first[:, None]
    return Context(jnp.int32(slot), first, jnp.maximum(positions, 0), (positions >= 0)[..., None])


def make_cache(config: ModelConfig, batch: int, length: int, dtype=jnp.float32) -> list[LayerCache]:
    """An empty cache of `length` slots."""
    key = (batch, config.num_kv_heads, config.head_dim, length)
    value = (batch, config.num_kv_heads, length, config.head_dim)
    return [LayerCache(jnp.zeros(key, dtype), jnp.zeros(value, dtype)) for _ in range(config.num_layers)]


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    config: ModelConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, at: Context, angles: Rotary, cache: LayerCache | None
    ) -> tuple[jax.Array, LayerCache | None]:
        """`x[b, s, d]` -> the same shape, and the cache with this call's keys and values."""
        c = self.config
        b, s, _ = x.shape
        groups = c.num_heads // c.num_kv_heads
        qkv = Linear((c.num_heads + 2 * c.num_kv_heads) * c.head_dim, c.attention_bias, self.dtype, name="qkv")(x)
        qkv = qkv.reshape(b, s, c.num_heads + 2 * c.num_kv_heads, c.head_dim)
        q, k, v = jnp.split(qkv, [c.num_heads, c.num_heads + c.num_kv_heads], axis=2)
        q = rotate(q, angles) * c.head_dim**-0.5
        k = rotate(k, angles)
        q = q.reshape(b, s, c.num_kv_heads, groups, c.head_dim).transpose(0, 2, 3, 1, 4)
        q = q.reshape(b, c.num_kv_heads, groups * s, c.head_dim)
        k, v = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)  # (b, kv_heads, d, s) and (b, kv_heads, s, d)
        if cache is not None:
            k = lax.dynamic_update_slice(cache.key, k.astype(cache.key.dtype), (0, 0, 0, at.slot))
            v = lax.dynamic_update_slice(cache.value, v.astype(cache.value.dtype), (0, 0, at.slot, 0))
            # or XLA fuses a second update into the products, and copies the cache for it
            k, v = cache = lax.optimization_barrier(LayerCache(k, v))
        length = k.shape[3]
        query_slot = (at.slot if cache is not None else 0) + jnp.arange(s)[:, None]
        visible = jnp.arange(length)[None, :] <= query_slot  # (s, length)
        if at.first is not None:
            visible = visible & (jnp.arange(length) >= at.first[:, None, None])  # (b, s, length)
            visible = visible[:, None, None]
        multiply = functools.partial(lax.dot_general, dimension_numbers=(((3,), (2,)), ((0, 1), (0, 1))))
        scores = multiply(q, k, preferred_element_type=jnp.float32).reshape(b, c.num_kv_heads, groups, s, length)
        scores = jnp.where(visible, scores, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype).reshape(*q.shape[:3], length)
        out = multiply(weights, v).reshape(b, c.num_heads, s, c.head_dim)
        out = out.transpose(0, 2, 1, 3).reshape(b, s, c.num_heads * c.head_dim)
        return Linear(c.hidden_size, c.attention_bias, self.dtype, name="out")(_mask(out, at)), cache


class MLP(nn.Module):
    """SwiGLU: `down(silu(gate(x)) * up(x))`."""

    config: ModelConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, at: Context) -> jax.Array:
        """`x[b, s, d]` -> the same shape."""
        c = self.config
        gate_up = Linear(2 * c.intermediate_size, c.mlp_bias, self.dtype, name="gate_up")(x)
        gate, up = jnp.split(gate_up, 2, axis=-1)
        return Linear(c.hidden_size, c.mlp_bias, self.dtype, name="down")(_mask(jax.nn.silu(gate) * up, at))


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each with a residual."""

    config: ModelConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, at: Context, angles: Rotary, cache: LayerCache | None
    ) -> tuple[jax.Array, LayerCache | None]:
        """`x[b, s, d]` -> the same shape, and the cache."""
        c = self.config
        h = _mask(RMSNorm(c.norm_eps, self.dtype, name="attention_norm")(x), at)
        h, cache = Attention(c, self.dtype, name="attention")(h, at, angles, cache)
        x = x + h
        h = _mask(RMSNorm(c.norm_eps, self.dtype, name="mlp_norm")(x), at)
        return x + MLP(c, self.dtype, name="mlp")(h, at), cache


class Decoder(nn.Module):
    """A decoder of the Llama family: SmolLM2, Llama, and what shares their architecture.

    Parameters may be float arrays or, for the projections, `QTensor`s; the same code runs either.

    Attributes:
      config: sizes and choices.
      dtype: of activations, and of freshly made parameters.
    """

    config: ModelConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, tokens: jax.Array, at: Context | None = None, cache: list[LayerCache] | None = None, last: bool = False
    ) -> tuple[jax.Array, list[LayerCache] | None]:
        """Logits of `tokens`, and the cache with their keys and values.

        Args:
          tokens: int `[b, s]`.
          at: where they stand; None means from slot 0, without padding.
          cache: None computes without one.
          last: only the logits of the last token, `[b, 1, vocab]`.

        Returns:
          float32 `[b, s, vocab]`, and the cache (None without one).
        """
        c = self.config
        at = context(tokens) if at is None else at
        embedding = self.param("embedding", nn.initializers.normal(0.02), (c.vocab_size, c.hidden_size), self.dtype)
        x = embed(embedding, tokens).astype(self.dtype)
        angles = rotary(at.positions, c.head_dim, c.rope_theta)
        new_cache: list[Any] = []
        for i in range(c.num_layers):
            layer_cache = None if cache is None else cache[i]
            x, layer_cache = Block(c, self.dtype, name=f"layers_{i}")(x, at, angles, layer_cache)
            new_cache.append(layer_cache)
        x = x[:, -1:] if last else x
        x = _mask(RMSNorm(c.norm_eps, self.dtype, name="norm")(x), at._replace(valid=None) if last else at)
        if c.tie_embeddings:
            logits = matmul(x, embedding) if is_qtensor(embedding) else project(x, embedding)
        else:
            logits = Linear(c.vocab_size, dtype=self.dtype, name="lm_head")(x)
        return logits.astype(jnp.float32), None if cache is None else new_cache


def embed(embedding, tokens: jax.Array) -> jax.Array:
    """Rows of the embedding; of an int8 one, only those rows are dequantized."""
    return lookup(embedding, tokens) if is_qtensor(embedding) else jnp.take(embedding, tokens, axis=0)


def _mask(x: jax.Array, at: Context) -> jax.Array:
    """Zeros in place of padding, so that it can't make a column an outlier column."""
    return x if at.valid is None else jnp.where(at.valid, x, 0)
