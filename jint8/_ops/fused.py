"""Parts of a decoder's layer that the compiled library of the CPU computes in one call, and XLA in many small steps.

A step of decoding has little to compute between its products: for XLA each part of it is a program to start, and often
several threads to wake.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jint8._core.config import Config
from jint8._core.qtensor import QTensor
from jint8._ops.by_platform import Call, by_platform
from jint8._ops.cpu import decode, native
from jint8._ops.matmul import matrix_of
from jint8._ops.weight import Weight


def fits_gated_network(x: jax.Array, gate_up: Any, down: Any, activation: str) -> bool:
    """Whether the library may compute `gated_network` of these where nobody says what does."""
    if activation not in decode.ACTIVATIONS or x.dtype != jnp.float32 or 0 in x.shape:
        return False
    return native.by_default(x.size // x.shape[-1]) and _are_plain([gate_up, down])


def gated_network(
    x: jax.Array,
    gate_up: QTensor,
    down: QTensor,
    *,
    blocks: int,
    activation: str,
    apart: Callable[..., list[jax.Array]],
    static: Hashable,
) -> jax.Array:
    """`down(activation(gate(x)) * up(x))`, for what `fits_gated_network`.

    Args:
      x: float32 `[..., d]`.
      gate_up: both projections, `[2 n, d]`: `blocks` times some rows of the gate, then as many of the other one.
      down: `[d, n]`.
      blocks: of `gate_up`.
      activation: of `decode.ACTIVATIONS`.
      apart: the same of `static, x[m, d], gate_up, down`, in a list, by `matmul`: for programs without the library.
      static: hashable.

    Returns:
      The shape of `x`.
    """
    call = Call(
        by_xla=_gated_apart,
        outline=_like_rows,
        by_library=_gated_by_library,
        static=(apart, static, blocks, decode.ACTIVATIONS.index(activation)),
    )
    (y,) = _differentiable(call, x.reshape(-1, x.shape[-1]), gate_up, down)
    return y.reshape(x.shape)


def _like_rows(_, x, *weights):
    return [jnp.zeros_like(x)]


def _gated_apart(static, x, gate_up, down):
    apart, own, _, _ = static
    return apart(own, x, gate_up, down)  # whose products choose by platform as well


def _gated_by_library(static, x, gate_up, down):
    _, _, blocks, activation = static
    weights = matrix_of(gate_up), matrix_of(down)
    return [decode.gated_network(x, *weights, gate_up.config, blocks=blocks, activation=activation)]


def fits_decode_attention(q: jax.Array, key: jax.Array) -> bool:
    """Whether the library may compute `decode_attention` of these where nobody says what does."""
    floats = q.dtype == jnp.float32 and key.dtype == jnp.float32 and 0 not in q.shape
    return floats and q.shape[-1] % 16 == 0 and native.by_default(1) and native.kernels() is not None


def decode_attention(
    q: jax.Array,
    own: tuple[jax.Array, jax.Array],
    cache: tuple[jax.Array, jax.Array],
    slot: jax.Array,
    first: jax.Array | None,
    *,
    window: int,
    by_xla: Callable[..., list[jax.Array]],
    static: Hashable,
) -> list[jax.Array]:
    """Attention of one token of each row, for what `fits_decode_attention`.

    Args:
      q: scaled queries `[b, kv_heads, groups, head_dim]`.
      own: the token's key and value, `[b, kv_heads, head_dim]` each.
      cache: keys `[b, kv_heads, head_dim, length]` and values `[b, kv_heads, length, head_dim]`.
      slot: of the token, int32.
      first: the slot of each row's first token, int32 `[b]`; None for 0.
      window: how many of the latest slots the token sees; 0 means all.
      by_xla: the same of `static` and the arguments before `window`, where the library isn't.
      static: hashable.

    Returns:
      `[b, kv_heads, groups, head_dim]`, and the cache's keys and values with those of the token.
    """
    call = Call(
        by_xla=_attention_by_xla,
        outline=_like_attention,
        by_library=_attention_by_library,
        static=(by_xla, static, window),
    )
    return _differentiable(call, q, own, cache, slot, first)


def _like_attention(_, q, own, cache, slot, first):
    return [jnp.zeros_like(q), *map(jnp.zeros_like, cache)]


def _attention_by_xla(static, *args):
    by_xla, own, _ = static
    return by_xla(own, *args)


def _attention_by_library(static, q, own, cache, slot, first):
    (own_key, own_value), (key, value) = own, cache
    return list(decode.decode_attention(q, own_key, own_value, key, value, slot, first, window=static[2]))


def fits_decode_layer(x: jax.Array, cache: tuple[jax.Array, jax.Array], weights: Sequence[Any]) -> bool:
    """Whether the library may compute `decode_layer` of these where nobody says what does."""
    key, _ = cache
    if x.dtype != jnp.float32 or key.dtype != jnp.float32 or 0 in x.shape or key.shape[2] % 16:
        return False
    m = x.shape[0]  # which may be symbolic
    return native.by_default(m) and _are_alike(weights) and all(_is_known(w, m) for w in weights)


def decode_layer(
    x: jax.Array,
    params: Any,
    slot: jax.Array,
    first: jax.Array | None,
    angles: tuple[jax.Array, jax.Array] | None,
    cache: tuple[jax.Array, jax.Array],
    *,
    shape: decode.LayerShape,
    config: Config,
    arrays_of: Callable[[Any], decode.LayerArrays],
    by_xla: Callable[..., list[jax.Array]],
    static: Hashable,
) -> list[jax.Array]:
    """A decoder's layer for one token of each row, for what `fits_decode_layer`.

    Args:
      x: float32 `[b, d]`.
      params: of the layer.
      slot: of the token, int32.
      first: the slot of each row's first token, int32 `[b]`; None for 0.
      angles: sines, negative in the first half, and cosines `[b, rotated]`; None where nothing is rotated.
      cache: keys `[b, kv_heads, head_dim, length]` and values `[b, kv_heads, length, head_dim]`.
      shape: what is static.
      config: of all weights, but for their rotation.
      arrays_of: the parameters as the library takes them.
      by_xla: the same of `static` and the arguments up to `cache`, where the library isn't.
      static: hashable.

    Returns:
      `[b, d]`, and the cache's keys and values.
    """
    call = Call(
        by_xla=_layer_by_xla,
        outline=_like_layer,
        by_library=_layer_by_library,
        static=(by_xla, static, shape, config, arrays_of),
    )
    return _differentiable(call, x, params, slot, first, angles, cache)


def multiplied(w: QTensor) -> Weight:
    """The weight as a product multiplies it: with calibrated columns only where those are taken out of activations."""
    flat = matrix_of(w)
    apart = flat.block or flat.packing is not None or w.config.uses_calibrated_columns
    return flat if apart else dataclasses.replace(flat, outlier_index=None, outlier_rows=None)


def _like_layer(_, x, params, slot, first, angles, cache):
    return [jnp.zeros_like(x), *map(jnp.zeros_like, cache)]


def _layer_by_xla(static, *args):
    by_xla, own, *_ = static
    return by_xla(own, *args)


def _layer_by_library(static, x, params, *args):
    _, _, shape, config, arrays_of = static
    return list(decode.decode_layer(x, arrays_of(params), *args, shape=shape, config=config))


def _are_plain(weights: Sequence[Any]) -> bool:
    """Whether all weights are int8 ones of the same scheme, in their own coordinates, which the library multiplies."""
    if not _are_alike(weights):
        return False
    plain = (w.outlier_index is None and w.smooth is None for w in map(matrix_of, weights))
    return all(plain) and all(native.unsupported(matrix_of(w), w.config) is None for w in weights)


def _are_alike(weights: Sequence[Any]) -> bool:
    """Whether all are quantized by the same configuration, but for how many features are rotated together."""
    if any(type(w) is not QTensor for w in weights):
        return False
    return len({dataclasses.replace(w.config, rotate=0) for w in weights}) == 1


def _is_known(w: QTensor, m: int) -> bool:
    """Whether the library multiplies `m` rows by the weight."""
    flat = matrix_of(w)
    lacks = (
        native.unsupported(flat, w.config) if w.features is None else native.unsupported_four_bits(m, flat, w.config)
    )
    return lacks is None


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _differentiable(call: Call, *args: Any) -> list[jax.Array]:
    return by_platform(call, *args)


@_differentiable.defjvp
def _jvp(call: Call, primals, tangents):
    return jax.jvp(functools.partial(call.by_xla, call.static), primals, tangents)
