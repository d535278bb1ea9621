"""Projections that share their input are one product: where the rows of each lie in the fused weight.

Stacked above each other, the rows of a query and of its key would be far apart, and a weight that is sharded by rows
would have them on different devices. So the rows are interleaved in such a way that a shard is complete in itself:

- `qkv`: for each key-value head its query heads, its key and its value; heads attend to nothing else;
- `gate_up`: in blocks, of which each has some rows of the gate and then the same rows of the factor that it multiplies.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from jint8.models._config import ModelConfig

MOST_BLOCKS = 16  # layers are rarely sharded over more devices


def split_heads(qkv: jax.Array, config: ModelConfig) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`qkv[b, s, n]` -> queries `[b, s, kv_heads, group, head_dim]`; keys and values, which have a group of 1."""
    group = config.num_heads // config.num_kv_heads
    qkv = qkv.reshape(*qkv.shape[:-1], config.num_kv_heads, group + 2, config.head_dim)
    q, k, v = jnp.split(qkv, [group, group + 1], axis=-2)
    return q, k, v


def split_gate(gate_up: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`gate_up[..., 2 n]` -> both factors `[..., blocks, n / blocks]`."""
    n = gate_up.shape[-1] // 2
    factors = gate_up.reshape(*gate_up.shape[:-1], gate_blocks(n), 2, n // gate_blocks(n))
    return factors[..., 0, :], factors[..., 1, :]


def gate_blocks(n: int) -> int:
    """How many blocks the rows of gate and up are interleaved in, for `n` features: `gcd(n, 16)`."""
    return math.gcd(n, MOST_BLOCKS)


def row_order(module: str, config: ModelConfig) -> np.ndarray | None:
    """The order of rows of a fused weight: `fused = stacked[order]`, with `stacked` the projections above each other.

    Args:
      module: such as `"attention/qkv"`. With experts, both projections of one are stacked above those of the next one.
      config: of the model.

    Returns:
      Integers `[n]`, or None for a module that isn't fused.
    """
    if module.endswith("qkv"):
        return _heads(config.num_heads, config.num_kv_heads, config.head_dim)
    if module.endswith("gate_up"):
        return _gates(config.intermediate_size, max(config.experts, 1))
    return None


@functools.cache
def _heads(heads: int, kv_heads: int, head_dim: int) -> np.ndarray:
    """For `qkv`: one block for each key-value head."""
    return _alternate([heads * head_dim, kv_heads * head_dim, kv_heads * head_dim], kv_heads)


@functools.cache
def _gates(size: int, experts: int) -> np.ndarray:
    """For `gate_up`: the order of one expert, repeated for each."""
    order = _alternate([size, size], gate_blocks(size))
    return (np.arange(experts)[:, None] * len(order) + order).reshape(-1)


def _alternate(sizes: list[int], blocks: int) -> np.ndarray:
    """The order that interleaves stacked parts of `sizes` rows in `blocks`: each has an equal share of every part."""
    starts = np.cumsum([0, *sizes[:-1]])
    rows = [start + np.arange(size).reshape(blocks, -1) for start, size in zip(starts, sizes, strict=True)]
    order = np.concatenate(rows, axis=1).reshape(-1)
    order.flags.writeable = False  # cached, and shared by all callers
    return order
