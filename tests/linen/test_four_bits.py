"""Weights in four bits in linen models: standard layers under transforms, own code, and what is refused there."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import jint8

X = cases.normal(2, 3, 32, seed=1)
TOKENS = jnp.array([[1, 2, 3], [4, 5, 6]])
every_grouping = pytest.mark.parametrize("grouping", ["oc", "ic"])


class Block(nn.Module):
    """Several output axes, several contracted ones, with the signature that nn.scan wants."""

    @nn.compact
    def __call__(self, x, _=None):
        y = jnp.tanh(nn.DenseGeneral((4, 12), name="up")(x))
        x = x + nn.DenseGeneral(32, axis=(-2, -1), name="down")(y)
        return x + nn.MultiHeadDotProductAttention(4, name="attention")(x / 10), None


class Tied(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(40, 48, name="embed")
        return embed.attend(embed(tokens))


class OwnCode(nn.Module):
    """Products of its own, of a transpose, of one of stacked weights, of experts; declared in `setup`."""

    def setup(self):
        normal = nn.initializers.normal(0.3)
        self.heads = self.param("heads", normal, (4, 32, 8))
        self.turned = self.param("turned", normal, (16, 32))
        self.experts = self.param("experts", normal, (3, 32, 16))
        self.ragged = self.param("ragged", normal, (3, 32, 16))

    def __call__(self, x):
        y = jnp.einsum("btd,ndh->btnh", x, self.heads).reshape(x.shape)
        rows = jax.lax.ragged_dot(x.reshape(6, 32), self.ragged, jnp.array([1, 3, 2])).reshape(2, 3, 16)
        return jnp.einsum("btd,edf->btef", y, self.experts).sum(2) + x @ self.turned.T + x @ self.experts[1] + rows


class Halves(nn.Module):
    @nn.compact
    def __call__(self, x):
        w = self.param("w", nn.initializers.normal(0.3), (64, 32))
        return x @ w[:32] + x @ w[32:]


MODELS = {
    "scan": (nn.scan(Block, variable_axes={"params": 1}, split_rngs={"params": True}, length=2)(), X),
    "tied": (Tied(), TOKENS),
    "own code": (OwnCode(), X),
}


def quantized(name, grouping):
    module, x = MODELS[name]
    floats = cases.jit(module.init)(jax.random.key(0), x)
    plan = jint8.plan(module.apply, floats, x)
    config = jint8.Config(scheme="int4", group=8, grouping=grouping)
    tree = jint8.quantize_params(floats, plan=plan.with_(plan.tied), config=config)
    return module, x, tree


@pytest.mark.first_case
@every_grouping
@pytest.mark.parametrize("name", MODELS)
def test_as_the_dequantized_model(name, grouping):
    module, x, tree = quantized(name, grouping)
    leaves = jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, jint8.QTensor))
    assert sum(isinstance(leaf, jint8.QTensor) for leaf in leaves) == {"scan": 6, "tied": 1, "own code": 4}[name]
    assert all(leaf.features for leaf in leaves if isinstance(leaf, jint8.QTensor))
    first = lambda result: result[0] if isinstance(result, tuple) else result
    got = first(cases.jit(jint8.apply(module.apply))(tree, x))
    want = first(cases.jit(module.apply)(jint8.dequantize_params(tree), x))
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3 * float(jnp.abs(want).max()))


def test_features_in_parts_are_refused():
    module = Halves()
    floats = module.init(jax.random.key(0), X)
    config = jint8.Config(scheme="int4", group=16, grouping="oc")
    tree = jint8.quantize_params(floats, plan={"w": (0,)}, config=config)
    with pytest.raises(ValueError, match=r"don't cut the axis along which it is packed or grouped .* got 32 of it"):
        jint8.apply(module.apply)(tree, X)


@pytest.mark.first_case
@every_grouping
def test_gradients_of_the_activations(grouping):
    module, x, tree = quantized("own code", grouping)
    loss = lambda apply: lambda tree, x: jnp.sum(jnp.sin(apply(tree, x)))
    got = cases.jit(jax.grad(loss(jint8.apply(module.apply)), 1))(tree, x)
    want = cases.jit(jax.grad(loss(module.apply), 1))(jint8.dequantize_params(tree), x)
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3 * float(jnp.abs(want).max()))
