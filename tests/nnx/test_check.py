"""`jint8.nnx.check`: broken weights are found, whatever layer they are in."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx

import jint8


class Model(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.embed = nnx.Embed(20, 32, rngs=rngs)
        self.up = nnx.Linear(32, 48, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, 48, decode=False, rngs=rngs)
        self.own = nnx.Param(jnp.asarray(np.random.default_rng(0).standard_normal((48, 8)), jnp.float32))
        self.lm_head = nnx.Linear(8, 20, rngs=rngs)

    def __call__(self, tokens):
        x = self.up(self.embed(tokens))
        return self.lm_head((x + self.attention(x)) @ self.own[...])


TOKENS = jnp.arange(12).reshape(2, 6)
PROJECTIONS = {"up/kernel", "own", *(f"attention/{name}/kernel" for name in ("query", "key", "value", "out"))}


@pytest.mark.slow
def test_products_and_what_is_left_out():
    found = jint8.nnx.check(Model(), TOKENS)
    assert {product.path for product in found.products} == PROJECTIONS
    assert found.skipped.keys() == {"embed/embedding", "lm_head/kernel"}
    assert all(1e-4 < product.error < 0.02 for product in found.products)
    assert found.ran_int8


def test_error_of_a_layer():
    layer = nnx.Linear(16, 8, rngs=nnx.Rngs(0))
    x = np.random.default_rng(1).standard_normal((10, 16))
    w = np.asarray(layer.kernel[...], np.float64)
    got, _ = oracle.matmul(x, oracle.quantize(w))
    (product,) = jint8.nnx.check(layer, jnp.asarray(x, jnp.float32)).products
    assert product.error == pytest.approx(np.linalg.norm(got - x @ w) / np.linalg.norm(x @ w), rel=1e-3)


@pytest.mark.first_case
@pytest.mark.parametrize("path", ["attention/out/kernel", "own"])
def test_a_broken_weight_is_the_worst(path):
    model = Model()
    int8 = jint8.nnx.quantize(model, TOKENS)
    variable = int8
    for name in path.split("/"):
        variable = getattr(variable, name)
    w = variable.get_value()
    variable.set_value(dataclasses.replace(w, scale=w.scale * 1.1))
    found = jint8.nnx.check(model, TOKENS, int8=int8)
    assert found.products[0].path == path
    assert found.products[0].error == pytest.approx(0.1, rel=0.2)
    assert found.products[1].error < 0.02


def test_int8_alone():
    found = jint8.nnx.check(jint8.nnx.quantize(Model(), TOKENS), TOKENS)
    assert {product.path for product in found.products} == PROJECTIONS
    assert not found.weights_known
    assert found.skipped["embed/embedding"] == "embedding lookup"
    assert all(product.weight_error == 0 for product in found.products)


def test_bad_arguments():
    with pytest.raises(TypeError, match="Expected model to be an nnx module, got dict"):
        jint8.nnx.check({}, TOKENS)
    with pytest.raises(TypeError, match="Expected int8 to be an nnx module, got dict"):
        jint8.nnx.check(Model(), TOKENS, int8={})
