"""What attention keeps of earlier tokens: keys and values of a layer, in floating point or in int8.

Both kinds have the same methods, which are all that `Attention` knows of them. The int8 kind is made accurate by two
changes of coordinates that softmax doesn't see:

- From all keys of a sequence a constant vector c is subtracted, for each key-value head. `q (k - c) = q k - q c`: all
  scores of a query shift alike. c is the mean of the sequence's first keys, so biases, which make a few channels of all
  keys large, are gone. A softcap on scores would see the shift, so there it isn't done.
- Queries and keys are multiplied by the same orthogonal matrix H, `(q H) (k H) = q k`: a Hadamard matrix spreads the
  channels that are large in some keys over all of them.

References:
  Ashkboos et al., QuaRot, 2024, arXiv 2404.00456, section 4 (the rotation).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jax.typing import DTypeLike

from jint8._core.rotation import rotate
from jint8._core.rounding import symmetric
from jint8._ops.digits import digit_step, digits, join_digits
from jint8.models._config import ModelConfig

FIRST_KEYS = 8  # how many keys of a sequence the constant vector is the mean of
# A query is written as so many int8 digits: 32512 steps to either side, so that it adds next to nothing to the error of
# the cache. An int8 product of few rows takes as long for twice as many.
QUERY_DIGITS = 2
# Softmax's weights are as many as there are tokens. Beside one large weight, thousands of small ones may hold half of
# the sum, and with two digits all those would be 0.
WEIGHT_DIGITS = 3
FEW_QUERIES = 16  # of a call; for more of them the time is in the products, of which those of floats are faster
LONGEST_SUM = (2**31 - 1) // 127**2  # products of int8 digits that fit in an int32 sum


class LayerCache(NamedTuple):
    """Keys and values of one layer, with axes in the order that attention's products need: no step transposes them."""

    key: jax.Array  # [b, kv_heads, head_dim, length]
    value: jax.Array  # [b, kv_heads, length, head_dim]

    @property
    def length(self) -> int:
        """How many slots there are."""
        return self.key.shape[3]

    def updated(self, own: LayerCache, slot: jax.Array | int, first: jax.Array | None) -> LayerCache:
        """With the keys and values `own` of a call in the slots from `slot` on."""
        return LayerCache(write(self.key, own.key, slot, axis=3), write(self.value, own.value, slot, axis=2))

    def with_row(self, row: LayerCache, index: jax.Array, move: jax.Array) -> LayerCache:
        """With `row`, of batch 1 and as many slots, as row `index`: its slots `move` further back, round the end."""
        key, value = jnp.roll(row.key, move, axis=3), jnp.roll(row.value, move, axis=2)
        return LayerCache(_with_row(self.key, key, index), _with_row(self.value, value, index))

    def part(self, slots: slice) -> LayerCache:
        """Some of the slots."""
        return LayerCache(self.key[:, :, :, slots], self.value[:, :, slots])

    def prepared(self, q: jax.Array) -> tuple[jax.Array, Cache]:
        """Queries `q[b, kv_heads, groups, s, head_dim]` in the keys' coordinates, and what they read: as they are."""
        return q, self

    def scores(self, q: jax.Array) -> jax.Array:
        """`q[b, kv_heads, rows, head_dim]` times all keys, float32 `[b, kv_heads, rows, length]`."""
        return lax.dot_general(q, self.key, KEYS_FIRST, preferred_element_type=jnp.float32)

    def weighted(self, weights: jax.Array, dtype: DTypeLike) -> jax.Array:
        """The values' sums by `weights[b, kv_heads, rows, length]`, `[b, kv_heads, rows, head_dim]` in `dtype`."""
        return lax.dot_general(weights.astype(dtype), self.value, KEYS_FIRST)


class Int8Cache(NamedTuple):
    """The same in int8, with a float32 scale for each token and key-value head.

    Few queries, as decoding has, read it by int8 products, whose sums are exact, without a copy in floating point:

        scores = (digits of q H) key * key_scale
        out    = (digits of weights * value_scale) value

    For many, a chunk of a prompt, one layer at a time is dequantized: fewer numbers than there are scores.

    Invariants: `key * key_scale` is `k H - shift`, and `value * value_scale` is v, each within half a step. A row's
    shift is set by the call that its first token is in, and never changes after it. Slots that nothing was written to
    hold zeros.
    """

    key: jax.Array  # int8 [b, kv_heads, length, head_dim]
    key_scale: jax.Array  # [b, kv_heads, length]
    value: jax.Array  # int8 [b, kv_heads, length, head_dim]
    value_scale: jax.Array  # [b, kv_heads, length]
    shift: jax.Array | None  # [b, kv_heads, head_dim], in the coordinates of `k H`; None under a softcap on scores

    @property
    def length(self) -> int:
        """How many slots there are."""
        return self.key.shape[2]

    def updated(self, own: LayerCache, slot: jax.Array | int, first: jax.Array | None) -> Int8Cache:
        """With the keys and values `own` of a call in the slots from `slot` on; padding ends at the slots `first`."""
        key = turned(own.key.swapaxes(2, 3))
        shift = self.shift
        if shift is not None:
            shift = constant_vector(key, shift, slot, first)
            key = key - shift[:, :, None]
        key, key_scale = symmetric(key, -1)
        value, value_scale = symmetric(own.value, -1)
        return Int8Cache(
            write(self.key, key, slot),
            write(self.key_scale, key_scale[..., 0], slot),
            write(self.value, value, slot),
            write(self.value_scale, value_scale[..., 0], slot),
            shift,
        )

    def with_row(self, row: Int8Cache, index: jax.Array, move: jax.Array) -> Int8Cache:
        """With `row`, of batch 1 and as many slots, as row `index`: its slots `move` further back, round the end."""
        moved = lambda old, new: _with_row(old, jnp.roll(new, move, axis=2), index)
        key, key_scale, value, value_scale = map(moved, self[:4], row[:4])
        shift = None if self.shift is None or row.shift is None else _with_row(self.shift, row.shift, index)
        return Int8Cache(key, key_scale, value, value_scale, shift)

    def part(self, slots: slice) -> Int8Cache:
        """Some of the slots."""
        key, key_scale, value, value_scale = (array[:, :, slots] for array in self[:4])
        return Int8Cache(key, key_scale, value, value_scale, self.shift)

    def prepared(self, q: jax.Array) -> tuple[jax.Array, Cache]:
        """Queries `q[b, kv_heads, groups, s, head_dim]` in the keys' coordinates, `q H`, and what they read."""
        return (
            (turned(q), self) if q.shape[3] <= FEW_QUERIES else (turned(q).astype(q.dtype), self.dequantized(q.dtype))
        )

    def dequantized(self, dtype: DTypeLike) -> LayerCache:
        """Keys (less their shift, times H) and values in floating point."""
        key = self.key.astype(jnp.float32) * self.key_scale[..., None]
        value = self.value.astype(jnp.float32) * self.value_scale[..., None]
        return LayerCache(key.astype(dtype).swapaxes(2, 3), value.astype(dtype))

    def scores(self, q: jax.Array) -> jax.Array:
        """`q[b, kv_heads, rows, head_dim]` times all keys, float32 `[b, kv_heads, rows, length]`."""
        return digit_product(q, self.key, KEYS_LAST, QUERY_DIGITS) * self.key_scale[:, :, None]

    def weighted(self, weights: jax.Array, dtype: DTypeLike) -> jax.Array:
        """The values' sums by `weights[b, kv_heads, rows, length]`, `[b, kv_heads, rows, head_dim]` in `dtype`."""
        weights = weights * self.value_scale[:, :, None]
        pieces = [slice(i, min(i + LONGEST_SUM, self.length)) for i in range(0, self.length, LONGEST_SUM)]
        product = functools.partial(digit_product, dimension_numbers=KEYS_FIRST, count=WEIGHT_DIGITS)
        sums = [product(weights[..., piece], self.value[:, :, piece]) for piece in pieces]
        return functools.reduce(jnp.add, sums).astype(dtype)


Cache = LayerCache | Int8Cache

# Products of `[b, kv_heads, rows, contracted]` with `[b, kv_heads, contracted, n]`, and with `[.., n, contracted]`.
KEYS_FIRST = (((3,), (2,)), ((0, 1), (0, 1)))
KEYS_LAST = (((3,), (3,)), ((0, 1), (0, 1)))


def write(held: jax.Array, own: jax.Array, slot: jax.Array | int, axis: int = 2) -> jax.Array:
    """`held` with `own` in the slots from `slot` on, which are its `axis`."""
    own = own.astype(held.dtype)
    if own.shape[axis] == 1 < held.shape[axis] and jax.default_backend() == "cpu":
        # A slot and the one after it (or before the last one), which stays as it is. XLA's CPU backend regards an
        # update of one slot as so cheap that it would rather compute it once for each that reads the result. Then each
        # holds a copy of all keys or values, and makes it again with every token. (In JAX 0.10: its backend drops
        # barriers before it decides that. A later one needs neither.)
        start = jnp.minimum(slot, held.shape[axis] - 2)
        before = lax.dynamic_slice_in_dim(held, start, 2, axis)
        own = jnp.where(lax.broadcasted_iota(jnp.int32, before.shape, axis) == slot - start, own, before)
        slot = start
    return lax.dynamic_update_slice_in_dim(held, own, slot, axis)


def _with_row(rows: jax.Array, row: jax.Array, index: jax.Array) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(rows, row, index, axis=0)


def digit_product(x: jax.Array, q: jax.Array, dimension_numbers, count: int) -> jax.Array:
    """float32 `x[b, kv_heads, m, k]` times int8 `q`, with each row of `x` as `count` int8 rows: float32, unscaled."""
    step = digit_step(x, -1, count)
    over_heads = lambda fn: jax.vmap(jax.vmap(fn))
    rows = over_heads(functools.partial(digits, count=count))(x, step)
    sums = lax.dot_general(rows, q, dimension_numbers, preferred_element_type=jnp.int32).astype(jnp.float32)
    return over_heads(functools.partial(join_digits, m=x.shape[2]))(sums) * step


def constant_vector(key: jax.Array, before: jax.Array, slot: jax.Array | int, first: jax.Array | None) -> jax.Array:
    """The vector that is subtracted from all keys of a row, `[b, kv_heads, d]`.

    Args:
      key: of a call's tokens, `[b, kv_heads, s, d]`.
      before: the vector up to now, which remains where the row's first token isn't among them.
      slot: of the call's first token.
      first: the slot of each row's first real token, int32 `[b]`; None for 0.

    Returns:
      The mean over the row's first tokens, at most `FIRST_KEYS` and those of this call only: `before`'s shape.
    """
    begin = (jnp.zeros(len(key), jnp.int32) if first is None else first) - slot  # of each row, in this call
    index = jnp.arange(key.shape[2])
    taken = (index >= begin[:, None]) & (index < begin[:, None] + FIRST_KEYS)  # (b, s)
    count = jnp.maximum(jnp.sum(taken, axis=1, dtype=jnp.float32), 1)[:, None, None]
    mean = jnp.sum(jnp.where(taken[:, None, :, None], key, 0), axis=2) / count
    begins_here = (begin >= 0) & (begin < key.shape[2])
    return jnp.where(begins_here[:, None, None], mean, before)


def turned(x: jax.Array) -> jax.Array:
    """`x[..., d]` in float32 times H: Hadamard matrices along the diagonal, of the largest size that divides d."""
    d = x.shape[-1]
    return rotate(x, d & -d)  # the largest power of two that divides d


def check_cache(cache: str | None) -> str | None:
    """The kind of cache that a user asks for.

    Raises:
      ValueError: it is none of those there are.
    """
    if cache not in (None, "int8"):
        raise ValueError(f"Expected cache to be None (the activations' dtype) or 'int8', got {cache!r}.")
    return cache


def make_cache(
    config: ModelConfig,
    batch: int,
    length: int,
    dtype: DTypeLike = jnp.float32,
    sharding: NamedSharding | None = None,
) -> list[Cache]:
    """An empty cache of `length` slots.

    Args:
      config: of the model.
      batch: rows.
      length: slots of each row.
      dtype: of keys and values; with int8 they have scales (`Int8Cache`).
      sharding: of each array, whose first axes are batch and key-value heads; None is JAX's default device.

    Returns:
      Zeros, for each layer.

    Raises:
      TypeError: a dtype that is neither a float type nor int8.
    """
    dtype = jnp.dtype(dtype)
    if dtype != jnp.int8 and not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"Expected a cache of floats or int8, got {dtype}.")
    return _cache_maker(config, batch, length, dtype, sharding)()


@functools.lru_cache(maxsize=32)
def _cache_maker(
    config: ModelConfig, batch: int, length: int, dtype: np.dtype, sharding: NamedSharding | None
) -> Callable[[], list[Cache]]:
    """One jitted program that makes all arrays: dispatching one for each takes longer than filling them with zeros."""
    make = lambda: [empty_layer(config, batch, length, dtype) for _ in range(config.num_layers)]
    return jax.jit(make, out_shardings=sharding)


def empty_layer(config: ModelConfig, batch: int, length: int, dtype: DTypeLike) -> Cache:
    """The cache of one layer, for `make_cache` and for programs that begin with an empty one."""
    heads, d = (batch, config.num_kv_heads), config.head_dim
    if dtype != jnp.int8:
        return LayerCache(jnp.zeros((*heads, d, length), dtype), jnp.zeros((*heads, length, d), dtype))
    values = functools.partial(jnp.zeros, (*heads, length, d), jnp.int8)
    scales = functools.partial(jnp.zeros, (*heads, length), jnp.float32)
    shift = None if config.attention_softcap else jnp.zeros((*heads, d), jnp.float32)
    return Int8Cache(values(), scales(), values(), scales(), shift)
