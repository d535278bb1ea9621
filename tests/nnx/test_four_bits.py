"""Weights in four bits in nnx models."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jint8

X = cases.normal(2, 3, 32, seed=1)
TOKENS = jnp.array([[1, 2, 3], [4, 5, 6]])


class Model(nnx.Module):
    """Standard layers, a LoRA one, and a projection of its own."""

    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(4, 32, decode=False, rngs=rngs)
        self.general = nnx.LinearGeneral(32, (4, 12), rngs=rngs)
        self.einsum = nnx.Einsum("btij,nijh->btnh", (2, 4, 12, 16), (2, 16), rngs=rngs)
        self.linear = nnx.Linear(32, 32, rngs=rngs)
        self.w = nnx.Param(jax.random.normal(rngs.params(), (4, 32, 8)) / 6)

    def __call__(self, x):
        y = self.attention(x / 10)
        y = self.linear(self.einsum(jnp.tanh(self.general(x + y))).reshape(x.shape))
        return jnp.einsum("btd,ndh->btnh", y, self.w[...])


class Tied(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(40, 48, rngs=rngs)

    def __call__(self, tokens):
        return self.embed.attend(self.embed(tokens))


MODELS = {"layers": (Model, X), "tied": (Tied, TOKENS)}


def is_qtensor(leaf):
    return isinstance(leaf, jint8.QTensor)


@pytest.mark.first_case
@pytest.mark.parametrize("grouping", ["oc", "ic", "ada"])
@pytest.mark.parametrize("name", MODELS)
def test_as_the_dequantized_model(name, grouping):
    make, x = MODELS[name]
    model = make(nnx.Rngs(0))
    graphdef, state = nnx.split(model)
    plan = jint8.plan(lambda state, x: nnx.merge(graphdef, state)(x), state, x)
    config = jint8.Config(scheme="int4", group=8, grouping=grouping)
    four = jint8.nnx.quantize(model, plan=plan.with_(plan.tied), config=config)
    weights = [leaf for leaf in jax.tree.leaves(nnx.state(four), is_leaf=is_qtensor) if is_qtensor(leaf)]
    assert len(weights) == {"layers": 8, "tied": 1}[name]
    assert all(w.features for w in weights)
    graphdef_of_four, state_of_four = nnx.split(four)
    got = cases.jit(lambda state, x: nnx.merge(graphdef_of_four, state)(x))(state_of_four, x)
    floats = jint8.quantize_params(state, plan=plan.with_(plan.tied), config=config)
    want = nnx.merge(graphdef, jint8.dequantize_params(floats))(x)
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3 * float(jnp.abs(want).max()))
