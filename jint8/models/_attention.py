"""Attention with a cache, and where the tokens of a call stand in it.

Rows of a batch are padded on the left, so that all of them end at the same slot (column) of the cache: a step writes
the keys and values of one slot for all rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jint8._ops.fused import decode_attention, fits_decode_attention
from jint8.models._cache import Cache, LayerCache
from jint8.models._config import ModelConfig
from jint8.models._fused import split_heads
from jint8.models._layers import Linear, Norm, softcap
from jint8.models._rope import Rotary, rotate

# A prefill is cut into parts of so many queries, each of which is multiplied only by the keys that its queries may see.
# Smaller parts skip more of the masked products, but make a larger program that takes longer to compile.
PART = 128


class Context(NamedTuple):
    """Where the tokens of a call stand: slots are columns of the cache, positions count from each row's first token.

    None is known when a program is compiled, which then leaves out what it makes needless.
    """

    slot: (
        jax.Array | None
    )  # int32: the slot of the call's first token; None for 0: there are no keys but the call's own
    first: jax.Array | None  # int32[b]: the slot of each row's first real token; None where nothing is padding
    positions: jax.Array  # int32[b, s]
    valid: jax.Array | None  # bool[b, s, 1]: tokens that aren't padding; None where nothing is padding
    # int32[b]: of each row, for rotary frequencies that depend on it (`depends_on_length`), where later calls have more
    # of the row's tokens; None where the call's last token is the row's.
    length: jax.Array | None = None


def context(
    tokens: jax.Array,
    slot: jax.Array | None = None,
    first: jax.Array | None = None,
    length: jax.Array | None = None,
) -> Context:
    """The `Context` of `tokens[b, s]` that start at `slot`, in rows of `length[b]` whose padding ends at `first[b]`."""
    b, s = tokens.shape
    slots = jnp.broadcast_to((0 if slot is None else slot) + jnp.arange(s, dtype=jnp.int32), (b, s))
    if first is None:
        return Context(slot, None, slots, None, length)
    positions = slots - first[:, None]
    # A call of one token is a step of decoding, in which every row has a token of its own.
    valid = None if s == 1 else (positions >= 0)[..., None]
    return Context(slot, first, jnp.maximum(positions, 0), valid, length)


class Attention(nn.Module):
    """Grouped-query attention.

    Attributes:
      config: of the model.
      window: how many of the latest keys a query sees; 0 means all.
      dtype: of freshly made parameters.
      mesh: devices that weights and cache are sharded over.
    """

    config: ModelConfig
    window: int = 0
    dtype: DTypeLike = jnp.float32
    mesh: Mesh | None = None

    @nn.compact
    def __call__(
        self, x: jax.Array, at: Context, angles: Rotary | None, cache: Cache | None
    ) -> tuple[jax.Array, Cache | None]:
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
        if isinstance(cache, LayerCache) and at.slot is not None and self._decodes_at_once(q, cache):
            out, *arrays = decode_attention(
                q[:, :, :, 0],
                (k[..., 0], v[:, :, 0]),
                cache,
                at.slot,
                at.first,
                window=self.window,
                by_xla=_decode,
                static=(c, self.window),
            )
            out, cache = out.reshape(b, s, -1), LayerCache(*arrays)
        else:
            out, cache = self._over_slots(q, LayerCache(k, v), at, cache, x.dtype)
        out_projection = Linear(c.hidden_size, c.out_bias, self.dtype, self.mesh, row_parallel=True, name="out")
        return out_projection(mask(out, at)), cache

    def _decodes_at_once(self, q: jax.Array, cache: LayerCache) -> bool:
        """Whether attention may be one call of the CPU's library."""
        c = self.config
        plain = c.causal and not c.alibi and not c.attention_softcap and self.mesh is None
        return plain and q.shape[3] == 1 and fits_decode_attention(q, cache.key)

    def _over_slots(
        self, q: jax.Array, own: LayerCache, at: Context, cache: Cache | None, dtype: DTypeLike
    ) -> tuple[jax.Array, Cache | None]:
        """Attention `[b, s, heads head_dim]` of `q[b, kv_heads, groups, s, head_dim]`, and the cache with `own`."""
        c = self.config
        b, _, _, s, _ = q.shape
        # Keys and values are used twice, by the cache's update and by the products. Without a barrier XLA fuses the
        # transpositions into both and computes them twice.
        own = lax.optimization_barrier(own)
        held: Any = own
        slot = 0 if at.slot is None else at.slot
        if cache is not None:
            # Without a barrier XLA repeats the update inside the products, for which it keeps a copy of the old cache.
            cache = lax.optimization_barrier(cache.updated(own, slot, at.first))
            held = own if at.slot is None else cache  # from slot 0 the call's own keys are all that it sees
        q, held = held.prepared(q)
        parts = []
        for queries, seen in parts_of(s, held.length, self.window if c.causal and at.slot is None else None):
            part = q[:, :, :, queries].reshape(b, c.num_kv_heads, -1, c.head_dim)
            query_slot = slot + jnp.arange(queries.start, queries.stop)[:, None]
            part = attend(c, self.window, part, held.part(seen), query_slot, seen.start, at.first, dtype)
            parts.append(part.reshape(b, c.num_heads, -1, c.head_dim))  # (b, heads, queries, d)
        out = jnp.concatenate(parts, axis=2)
        return out.transpose(0, 2, 1, 3).reshape(b, s, c.num_heads * c.head_dim), cache


def attend(
    config: ModelConfig,
    window: int,
    q: jax.Array,
    held: Cache,
    query_slot: jax.Array,
    first_key: int,
    first: jax.Array | None,
    dtype: DTypeLike,
) -> jax.Array:
    """`softmax(q k) v` over the keys that each query sees.

    Args:
      config: of the model.
      window: how many of the latest keys a query sees; 0 means all.
      q: scaled queries `[b, kv_heads, groups s, d]`: all heads of a group share a key-value head.
      held: keys and values.
      query_slot: `[s, 1]`.
      first_key: the slot of the first key.
      first: `Context.first`.
      dtype: of the result.

    Returns:
      The shape of `q`.
    """
    b, kv_heads, rows, _ = q.shape
    s, length = len(query_slot), held.length
    key_slot = first_key + jnp.arange(length)[None, :]
    visible = key_slot <= (query_slot if config.causal else first_key + length)  # (s or 1, length)
    if window:
        visible = visible & (key_slot > query_slot - window)
    if first is not None:
        visible = visible & (key_slot[0] >= first[:, None, None])  # (b, s, length): no padding
        visible = visible[:, None, None]  # (b, 1, 1, s, length), as scores are
    scores = held.scores(q).reshape(b, kv_heads, rows // s, s, length)
    scores = softcap(scores, config.attention_softcap)
    if config.alibi:
        slopes = alibi_slopes(config.num_heads).reshape(kv_heads, rows // s, 1, 1)
        scores = scores + slopes * (key_slot - query_slot)
    scores = jnp.where(visible, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).reshape(b, kv_heads, rows, length)
    return held.weighted(weights, dtype)


def _decode(static: Any, q, own, cache, slot, first) -> list[jax.Array]:
    """`decode_attention` by XLA."""
    config, window = static
    own = lax.optimization_barrier(LayerCache(own[0][..., None], own[1][:, :, None]))
    cache = lax.optimization_barrier(LayerCache(*cache).updated(own, slot, first))
    out = attend(config, window, q, cache, jnp.reshape(slot, (1, 1)), 0, first, q.dtype)
    return [out, *cache]


def parts_of(s: int, length: int, window: int | None) -> list[tuple[slice, slice]]:
    """Cuts `s` queries into parts, and says which keys each part is multiplied by.

    Args:
      s: queries.
      length: keys.
      window: query i sees this many of the keys up to key i; 0 means all of those. None means that any query may see
        any key, and gives one part.

    Returns:
      For each part its queries, and a range of keys that contains all that they see.
    """
    if window is None or s < 2 * PART:
        return [(slice(0, s), slice(0, length))]
    size = -(-s // (s // PART))
    starts = range(0, s, size)
    return [
        (slice(i, min(i + size, s)), slice(max(0, i - window + 1) if window else 0, min(i + size, s))) for i in starts
    ]


def mask(x: jax.Array, at: Context) -> jax.Array:
    """Zeros in place of padding, whose values could otherwise make a column of an int8 product an outlier column."""
    return x if at.valid is None else jnp.where(at.valid, x, 0)


def alibi_slopes(heads: int) -> np.ndarray:
    """float32 `[heads]`: a geometric sequence from `2**(-8/n)` to `2**-8` for n heads.

    For another number of heads, with p the next smaller power of two, the first p heads have the slopes of p heads, the
    others the first, third, fifth, ... of 2 p heads.

    References:
      Press et al., Train Short, Test Long, 2022, arXiv 2108.12409, section 3 and appendix A.
    """
    power = 1 << (heads.bit_length() - 1)
    own = 2.0 ** (-8 / power * np.arange(1, power + 1))
    between = 2.0 ** (-4 / power * np.arange(1, 2 * (heads - power), 2))
    return np.concatenate([own, between]).astype(np.float32)
