"""`jint8.nnx.quantize(model, x)`, which finds by tracing what is multiplied."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from flax.nnx import bridge

import jint8

X = cases.normal(2, 3, 32, seed=1)
EXACT = jint8.Config(threshold=0.0)


class Own(nnx.Module):
    def __init__(self, rngs):
        self.w = nnx.Param(jax.random.normal(rngs.params(), (32, 4, 8)) / 6)

    def __call__(self, x):
        return jnp.einsum("btd,dnh->btnh", x, self.w[...]).reshape(x.shape)


class Block(nnx.Module):
    """A layer of its own, a standard one, a norm, dropout, and state that each call changes."""

    def __init__(self, rngs):
        self.own, self.down = Own(rngs), nnx.Linear(32, 32, rngs=rngs)
        self.norm = nnx.BatchNorm(32, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.dropout(self.down(self.norm(self.own(x))))

    def without_norm(self, x, *, scale):
        return self.down(self.own(x)) * scale


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(32, name="b")(nn.relu(nn.Dense(64, name="a")(x)))


class Bridged(nnx.Module):
    def __init__(self, rngs):
        self.one = bridge.ToNNX(nn.Dense(32), rngs=rngs).lazy_init(X)
        self.nested = bridge.ToNNX(Linen(), rngs=rngs).lazy_init(X)

    def __call__(self, x):
        return self.nested(self.one(x))


class Parts(nnx.Module):
    """Weights in a list and in a dictionary."""

    def __init__(self, rngs):
        make = lambda: nnx.Param(jax.random.normal(rngs.params(), (32, 32)) / 6)
        self.parts, self.named = nnx.List([make(), make()]), nnx.data({"inner": {"w": make()}})

    def __call__(self, x):
        for part in self.parts:
            x = jnp.tanh(x @ part[...])
        return x @ self.named["inner"]["w"][...]


class Scanned(nnx.Module):
    """Layers stacked on axis 1, which no converter would guess."""

    def __init__(self, rngs):
        make = nnx.vmap(lambda key: nnx.Linear(32, 32, use_bias=False, rngs=nnx.Rngs(key)), out_axes=1)
        self.layers = make(jax.random.split(rngs.params(), 3))

    def __call__(self, x):
        scan = nnx.scan(lambda layer, x: layer(x), in_axes=(1, nnx.Carry), out_axes=nnx.Carry)
        return scan(self.layers, x)


# name: model, int8 weights by path, and how many products
MODELS = {
    "own": (Own, {"w"}),
    "block": (Block, {"own/w", "down/kernel"}),
    "bridge.ToNNX": (Bridged, {"one/kernel", "nested/a/kernel", "nested/b/kernel"}),
    "in containers": (Parts, {"parts/0", "parts/1", "named/inner/w"}),
    "scan over axis 1": (Scanned, {"layers/kernel"}),
}


def int8_paths(model):
    state = nnx.to_flat_state(nnx.state(model, jint8.nnx.Quantized))
    return {"/".join(map(str, path)) for path, _ in state}


def run(model, x=X):
    model = nnx.clone(model)
    model.eval()
    graphdef, state = nnx.split(model)
    return cases.jit(lambda state, x: nnx.merge(graphdef, state)(x))(state, x)


@pytest.mark.first_case
@pytest.mark.parametrize("name", MODELS)
def test_int8_products_and_error(name):
    make, expected = MODELS[name]
    model = make(nnx.Rngs(0))
    int8 = jint8.nnx.quantize(model, X, config=EXACT)
    assert int8_paths(int8) == expected
    graphdef, state = nnx.split(int8)
    assert cases.count_int8_products(lambda state, x: nnx.merge(graphdef, state)(x), state, X) == len(expected)
    got, want = run(int8), run(model)
    assert got.shape == want.shape
    assert cases.relative_error(got, want) < 0.03


def test_no_values_and_no_changes():
    """Shapes do as inputs, and tracing leaves counters, statistics and the model as they were."""
    model = Block(nnx.Rngs(0))
    before = jax.tree.map(np.asarray, jax.tree.leaves(nnx.state(model, (nnx.Param, nnx.BatchStat, nnx.RngCount))))
    got = jint8.nnx.quantize(model, jax.ShapeDtypeStruct(X.shape, X.dtype))
    jax.tree.map(
        np.testing.assert_array_equal,
        before,
        jax.tree.leaves(nnx.state(model, (nnx.Param, nnx.BatchStat, nnx.RngCount))),
    )
    want = jint8.nnx.quantize(model, X)
    jax.tree.map(
        np.testing.assert_array_equal, nnx.state(got, jint8.nnx.Quantized), nnx.state(want, jint8.nnx.Quantized)
    )
    assert isinstance(model.own.w, nnx.Param)


def test_call_says_how_the_model_runs():
    model = Block(nnx.Rngs(0))
    int8 = jint8.nnx.quantize(model, X, call=lambda model, x: model.without_norm(x, scale=2.0))
    assert int8_paths(int8) == MODELS["block"][1]
    want = model.without_norm(X, scale=2.0)
    assert cases.relative_error(int8.without_norm(X, scale=2.0), want) < 0.03


def test_options_count_as_with_a_plan():
    model = Block(nnx.Rngs(0))
    assert int8_paths(jint8.nnx.quantize(model, X, skip="own")) == {"down/kernel"}
    found = jint8.nnx.calibrate(model, [X], plan={"own/w": (0,), "down/kernel": (0,)}, budget=2)
    int8 = jint8.nnx.quantize(model, X, outliers=found, config=jint8.Config(outliers="static"))
    assert int8.own.w.get_value().outlier_rows is not None


def test_a_tied_embedding_is_included_by_name():
    class Tied(nnx.Module):
        def __init__(self, rngs):
            self.embed, self.dense = nnx.Embed(40, 32, rngs=rngs), nnx.Linear(32, 32, rngs=rngs)

        def __call__(self, tokens):
            return self.embed.attend(self.dense(self.embed(tokens)))

    model, tokens = Tied(nnx.Rngs(0)), jnp.array([[1, 2, 3]])
    assert int8_paths(jint8.nnx.quantize(model, tokens)) == {"dense/kernel"}
    int8 = jint8.nnx.quantize(model, tokens, include="embed")
    assert int8_paths(int8) == {"dense/kernel", "embed/embedding"}
    assert cases.relative_error(int8(tokens), model(tokens)) < 0.03


def test_inside_jit():
    model = Block(nnx.Rngs(0))
    int8 = nnx.jit(lambda model: jint8.nnx.quantize(model, X))(model)
    assert int8_paths(int8) == MODELS["block"][1]


def test_a_plan_and_inputs():
    with pytest.raises(TypeError, match="Expected a plan, or example inputs to find one with, got both"):
        jint8.nnx.quantize(Own(nnx.Rngs(0)), X, plan={"w": (0,)})
