"""Shardings from what the model says itself: linen's partitioning boxes, and metadata of nnx variables."""

import cases
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jint8

INIT = nn.initializers.lecun_normal()
X = cases.normal(4, 32).at[:, 3].multiply(20)
MESH = jax.make_mesh((1, 1), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
COLUMN, ROW = (None, "model"), ("model", None)


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        bias_init = nn.with_partitioning(nn.initializers.zeros, ("model",))
        h = nn.Dense(64, kernel_init=nn.with_partitioning(INIT, COLUMN), bias_init=bias_init, name="up")(x)
        return nn.Dense(16, kernel_init=nn.with_partitioning(INIT, ROW), name="down")(nn.relu(h))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        bias_init = nnx.with_partitioning(nnx.initializers.zeros_init(), ("model",))
        kernel_init = nnx.with_partitioning(INIT, COLUMN)
        self.up = nnx.Linear(32, 64, rngs=rngs, kernel_init=kernel_init, bias_init=bias_init)
        self.down = nnx.Linear(64, 16, rngs=rngs, kernel_init=nnx.with_partitioning(INIT, ROW))

    def __call__(self, x):
        return self.down(nnx.relu(self.up(x)))


def check(placed):
    """Of weights that are stored [n, k]."""
    specs = {jax.tree_util.keystr(path): leaf.spec for path, leaf in jax.tree_util.tree_leaves_with_path(placed)}
    by_name = {
        tuple(name for name in ("up", "down", "bias", "q", "scale") if name in path): specs[path] for path in specs
    }
    assert by_name == {
        ("up", "bias"): P("model"),
        ("up", "q"): P("model", None),
        ("up", "scale"): P("model", None),
        ("down", "bias"): P(None),
        ("down", "q"): P(None, "model"),
        ("down", "scale"): P(None, None),
    }


@pytest.mark.parametrize("boxed", [True, False])
def test_linen(boxed):
    module = Linen()
    variables = module.init(jax.random.key(1), X)
    int8 = jint8.quantize_params(variables if boxed else nn.unbox(variables))
    placed = jint8.shardings(int8, nn.get_partition_spec(variables), mesh=MESH)
    check(placed)
    apply = jax.jit(jint8.apply(module.apply))
    np.testing.assert_array_equal(apply(jax.device_put(int8, placed), X), apply(int8, X))


def test_nnx():
    with jax.set_mesh(MESH):  # nnx shards variables as they are made
        model = Nnx(nnx.Rngs(0))
        specs = nnx.get_partition_spec(nnx.state(model))
        int8 = jint8.nnx.quantize(model)
        graph, state = nnx.split(int8)
        placed = jint8.shardings(state, specs, mesh=MESH)
        check(placed)
        run = jax.jit(lambda state, x: nnx.merge(graph, state)(x))
        np.testing.assert_array_equal(run(jax.device_put(state, placed), X), run(state, X))
        assert jnp.linalg.norm(run(state, X) - model(X)) < 0.02 * jnp.linalg.norm(model(X))
