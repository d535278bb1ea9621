"""Models of nnx in linen ones, by `nnx.bridge.ToLinen`."""

import cases
import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx
from flax.nnx import bridge

import jint8

X = cases.normal(2, 3, 32, seed=1)
EXACT = jint8.Config(threshold=0.0)


class Own(nnx.Module):
    def __init__(self, features, *, rngs):
        normal = jax.random.normal(rngs.params(), (32, features)) / 6
        self.w = nnx.Param(normal, out_sharding=(None, None), eager_sharding=False)

    def __call__(self, x):
        return x @ jnp.asarray(self.w[...], x.dtype)


class Nested(nnx.Module):
    """Modules of its own in a list, a standard one, and state that each call changes."""

    def __init__(self, *, rngs):
        self.layers = nnx.List([Own(32, rngs=rngs), Own(32, rngs=rngs)])
        self.dense = nnx.Linear(32, 16, rngs=rngs)
        self.calls = nnx.BatchStat(jnp.zeros(()))

    def __call__(self, x):
        self.calls[...] += 1
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        return self.dense(x)


class InLinen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return bridge.ToLinen(Nested, name="nested")(nn.Dense(32, name="first")(x))


# name: module, int8 products
MODELS = {
    "a standard layer": (bridge.ToLinen(nnx.Linear, args=(32, 8)), 1),
    "a layer of its own": (bridge.ToLinen(Own, args=(8,)), 1),
    "nested": (bridge.ToLinen(Nested), 3),
    "below a linen module": (InLinen(), 4),
}


@pytest.mark.first_case
@pytest.mark.parametrize("name", MODELS)
def test_int8_products_and_error(name):
    module, products = MODELS[name]
    variables = module.init(jax.random.key(0), X)
    plan = jint8.plan(module.apply, variables, X)
    int8 = jint8.quantize_params(variables, plan=plan, config=EXACT)
    run = jint8.apply(module.apply)
    assert len(plan) == products
    assert cases.count_int8_products(run, int8, X) == products
    assert cases.relative_error(cases.jit(run)(int8, X), module.apply(variables, X)) < 0.03


def test_state_comes_out():
    module = bridge.ToLinen(Nested)
    variables = module.init(jax.random.key(0), X)
    int8 = jint8.quantize_params(variables, plan=jint8.plan(module.apply, variables, X))
    want, expected = module.apply(variables, X, mutable=["batch_stats"])
    got, state = jint8.apply(module.apply)(int8, X, mutable=["batch_stats"])
    assert cases.relative_error(got, want) < 0.03
    assert jax.tree.leaves(state) == jax.tree.leaves(expected) == [1.0]


def test_names_alone_are_not_enough_for_layers_of_its_own():
    module = bridge.ToLinen(Nested)
    with pytest.warns(UserWarning, match=r"layers/\*/w \(2 times\): its name and its shape \(32, 32\) don't say"):
        jint8.quantize_params(module.init(jax.random.key(0), X))
