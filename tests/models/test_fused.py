"""Where the rows of projections lie in one product."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jint8.models import ModelConfig
from jint8.models._fused import gate_blocks, row_order, split_gate, split_heads

CONFIG = ModelConfig(
    family="llama",
    vocab_size=9,
    hidden_size=8,
    intermediate_size=24,
    num_layers=1,
    num_heads=12,
    num_kv_heads=4,
    head_dim=2,
)


def test_heads_of_a_product():
    """Row numbers in place of a product's features: each projection finds its own, in order."""
    order = row_order("layers/attention/qkv", CONFIG)
    q, k, v = split_heads(jnp.asarray(order)[None, None], CONFIG)
    assert q.shape == (1, 1, 4, 3, 2)
    np.testing.assert_array_equal(q.reshape(-1), np.arange(24))
    np.testing.assert_array_equal(k.reshape(-1), np.arange(24, 32))
    np.testing.assert_array_equal(v.reshape(-1), np.arange(32, 40))


def test_devices_hold_whole_groups_of_heads():
    halves = row_order("layers/attention/qkv", CONFIG).reshape(2, -1)
    assert sorted(halves[0]) == [*range(12), *range(24, 28), *range(32, 36)]


@pytest.mark.parametrize("experts", [0, 3])
def test_gates_of_a_product(experts):
    config = dataclasses.replace(CONFIG, experts=experts)
    order = row_order("layers/mlp/gate_up", config).reshape(-1, 48)
    for expert, rows in enumerate(order):
        gate, up = split_gate(jnp.asarray(rows))
        np.testing.assert_array_equal(gate.reshape(-1), 48 * expert + np.arange(24))
        np.testing.assert_array_equal(up.reshape(-1), 48 * expert + np.arange(24, 48))


def test_devices_hold_pairs_of_gates():
    parts = row_order("layers/mlp/gate_up", CONFIG).reshape(4, 2, 2, 3)  # devices, blocks, gate and up
    np.testing.assert_array_equal(parts[:, :, 0] + 24, parts[:, :, 1])


@pytest.mark.parametrize(("n", "blocks"), [(14336, 16), (8960, 16), (24, 8), (11, 1)])
def test_blocks(n, blocks):
    assert gate_blocks(n) == blocks


def test_a_product_of_one_projection():
    assert row_order("layers/mlp/down", CONFIG) is None
