"""Projections that share their input, as one product: where the rows of each lie in its weight.

Devices that divide such a weight by rows then hold what belongs together, and a layer needs no exchange between them:

- `qkv`: for each key-value head its query heads, its key and its value, which attend to each other alone;
- `gate_up`: in blocks, of which each has its rows of the gate and then those of the other factor.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from jint8.models._config import ModelConfig

MOST_BLOCKS = 16  # devices that one layer is divided among are rarely more


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
    """How many blocks the two factors of `n` hidden features alternate in: the largest power of two up to 16 in `n`."""
    return math.gcd(n, MOST_BLOCKS)


def row_order(module: str, config: ModelConfig) -> np.ndarray | None:
    """For each row of a module's weight, the row that it is of its projections stacked above each other.

    Args:
      module: such as `"attention/qkv"`. With experts, the projections of each are stacked above those of the next.
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
    return _alternate([heads * head_dim, kv_heads * head_dim, kv_heads * head_dim], kv_heads)


@functools.cache
def _gates(size: int, experts: int) -> np.ndarray:
    order = _alternate([size, size], gate_blocks(size))
    return (np.arange(experts)[:, None] * len(order) + order).reshape(-1)


def _alternate(sizes: list[int], blocks: int) -> np.ndarray:
    """Rows of stacked parts in `blocks`, of which each has its share of every part."""
    starts = np.cumsum([0, *sizes[:-1]])
    rows = [start + np.arange(size).reshape(blocks, -1) for start, size in zip(starts, sizes, strict=True)]
    order = np.concatenate(rows, axis=1).reshape(-1)
    order.flags.writeable = False
    return order
