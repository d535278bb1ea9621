"""Parts of a step of decoding by the compiled library, each in one call of it."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jint8._core.config import Config
from jint8._ops.cpu.native import ATTENTION_TARGET, GATED_TARGET, LAYER_TARGET, options, scale_and_zero
from jint8._ops.weight import Weight

ACTIVATIONS = ("silu", "gelu_tanh", "relu", "gelu")  # of the library, by its numbers


def gated_network(
    x: jax.Array, gate_up: Weight, down: Weight, config: Config, *, blocks: int, activation: int
) -> jax.Array:
    """`down(activation(gate(x)) * up(x))` of float32 `x[m, d]` -> `[m, d]`, in one call of the library.

    `gate_up[2 n, d]` has `blocks` times some rows of the gate and then as many of the other factor. `activation` is a
    number in `ACTIVATIONS`.
    """
    out = jax.ShapeDtypeStruct(x.shape, jnp.float32)
    return jax.ffi.ffi_call(GATED_TARGET, out, vmap_method="sequential")(
        x,
        gate_up.q,
        *scale_and_zero(gate_up),
        down.q,
        *scale_and_zero(down),
        blocks=np.int64(blocks),
        activation=np.int64(activation),
        **options(config),
    )


def decode_attention(
    q: jax.Array,
    own_key: jax.Array,
    own_value: jax.Array,
    key: jax.Array,
    value: jax.Array,
    slot: jax.Array,
    first: jax.Array | None,
    *,
    window: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Attention of one token of each row, and the cache with its key and value, in one call of the library.

    Args:
      q: scaled queries, float32 `[b, kv_heads, groups, head_dim]`.
      own_key: of the token, `[b, kv_heads, head_dim]`.
      own_value: as `own_key`.
      key: the cache's `[b, kv_heads, head_dim, length]`, overwritten where XLA needs it no more.
      value: the cache's `[b, kv_heads, length, head_dim]`, as `key`.
      slot: of the token, int32.
      first: the slot of each row's first token, int32 `[b]`; None for 0.
      window: how many of the latest slots a token sees; 0 means all.

    Returns:
      `[b, kv_heads, groups, head_dim]`, and the cache's keys and values.
    """
    like = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (q, key, value)]
    # A vmap of a whole step of decoding is rare: its members one after the other.
    aliases = {3: 1, 4: 2}
    call = jax.ffi.ffi_call(ATTENTION_TARGET, like, input_output_aliases=aliases, vmap_method="sequential")
    starts = jnp.zeros(0, jnp.int32) if first is None else first
    out, keys, values = call(q, own_key, own_value, key, value, slot, starts, window=np.int64(window))
    return out, keys, values


@dataclasses.dataclass(frozen=True)
class LayerShape:
    """What is static about a decoder's layer.

    Attributes:
      groups: query heads of each key-value head.
      window: how many of the latest slots a token sees; 0 means all.
      rotated: features of a head that rotary positions turn.
      hidden: features between the two products of the feed-forward network.
      blocks: in which the rows of its gate and of the other factor take turns; 0 means that there is no gate.
      activation: its number in `ACTIVATIONS`.
      parallel: whether the network reads the layer's input, not what attention made of it.
      centered: whether norms take off the mean.
      eps, offset: of norms: `x / sqrt(mean(x**2) + eps) * (offset + scale)`.
      query_scale: factor of queries.
      softcap: scores are `softcap * tanh(score / softcap)`; 0 leaves them.
      slopes: by which scores of each query head fall for a slot of distance, after that; empty where they don't.
    """

    groups: int
    window: int
    rotated: int
    hidden: int
    blocks: int
    activation: int
    parallel: bool
    centered: bool
    eps: float
    offset: float
    query_scale: float
    softcap: float
    slopes: tuple[float, ...]


class Normed(NamedTuple):
    """A norm's gain and bias, float32 `[d]`; None where there is none."""

    scale: jax.Array | None
    bias: jax.Array | None


class Projection(NamedTuple):
    """A weight, whose columns are multiplied in 16 bits if it has any, and its bias `[n]`, or None."""

    weight: Weight
    bias: jax.Array | None


class LayerArrays(NamedTuple):
    """Parameters of a decoder's layer, in the order in which the library takes them."""

    attention_norm: Normed
    qkv: Projection  # for each key-value head its queries, its key and its value
    q_norm: Normed
    k_norm: Normed
    out: Projection
    attention_out_norm: Normed
    mlp_norm: Normed
    up: Projection
    down: Projection
    mlp_out_norm: Normed


def decode_layer(
    x: jax.Array,
    arrays: LayerArrays,
    slot: jax.Array,
    first: jax.Array | None,
    angles: tuple[jax.Array, jax.Array] | None,
    cache: tuple[jax.Array, jax.Array],
    *,
    shape: LayerShape,
    config: Config,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A decoder's layer for one token of each row, in one call of the library.

    Args:
      x: float32 `[b, d]`.
      arrays: its parameters.
      slot: of the token, int32.
      first: the slot of each row's first token, int32 `[b]`; None for 0.
      angles: sines, negative in the first half, and cosines `[b, rotated]`; None where nothing is rotated.
      cache: float32 keys `[b, kv_heads, head_dim, length]` and values `[b, kv_heads, length, head_dim]`, overwritten
        where XLA needs them no more.
      shape: what is static.
      config: of all weights, but for their rotation.

    Returns:
      `[b, d]`, and the cache's keys and values.
    """
    like = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (x, *cache)]
    sin, cos = angles or (jnp.zeros((len(x), 0)), jnp.zeros((len(x), 0)))
    starts = jnp.zeros(0, jnp.int32) if first is None else first
    slopes = jnp.asarray(shape.slopes, jnp.float32)
    operands = [x, sin, cos, slot, starts, slopes, *_flat(arrays), *cache]
    last = len(operands)
    numbers: dict[str, Any] = {
        name: np.float32(value) if isinstance(value, float) else value if isinstance(value, bool) else np.int64(value)
        for name, value in dataclasses.asdict(shape).items()
        if name != "slopes"
    }
    weights = [part.weight for part in arrays if isinstance(part, Projection)]
    numbers["rotations"] = np.array([0 if w.smooth is None else w.block for w in weights], np.int64)
    numbers["group"] = np.int64(0 if weights[0].packing is None else weights[0].packing.group)
    aliases = {last - 2: 1, last - 1: 2}
    call = jax.ffi.ffi_call(LAYER_TARGET, like, input_output_aliases=aliases, vmap_method="sequential")
    y, keys, values = call(*operands, **numbers, **options(config))
    return y, keys, values


def _flat(arrays: LayerArrays) -> list[jax.Array]:
    """The operands of a layer's parameters; an empty one for what there isn't."""
    nothing = jnp.zeros(0, jnp.float32)
    out: list[Any] = []
    for part in arrays:
        if isinstance(part, Normed):
            out += [nothing if v is None else v.astype(jnp.float32) for v in part]
            continue
        w, halves = part.weight, jnp.zeros(0, jnp.float16)
        out += [w.q, *scale_and_zero(w), nothing if part.bias is None else part.bias.astype(jnp.float32)]
        out.append(nothing if w.smooth is None else w.smooth)
        out += [halves if a is None else a for a in (w.group_scale, w.group_min)]
        columns = w.outlier_index is not None and w.outlier_rows is not None
        out += [w.outlier_index, w.outlier_rows] if columns else [jnp.zeros(0, jnp.int32), halves]
    return out
