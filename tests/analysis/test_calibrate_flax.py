"""Calibration of linen and nnx models, and what is done with the result: applied, saved, loaded, differentiated."""

import functools
import pickle

import cases
import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import jint8

X = cases.plant(cases.normal(2, 5, 16), columns=(3, 11), factor=12.0)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        h = nn.Dense(24, name="up")(nn.LayerNorm(name="norm")(x) * jnp.ones(16).at[3].set(30.0))
        return x + nn.Dense(16, name="down")(nn.gelu(h)), None


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        layers = nn.scan(nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return nn.MultiHeadDotProductAttention(2, name="attention")(layers(name="layers")(x, None)[0])


MODEL = Scanned()
CRITERIA = {"layer_share": 1, "position_share": 0.6}


@functools.cache
def floats():
    return cases.jit(MODEL.init)(jax.random.key(1), X)


@functools.cache
def calibrated():
    return jint8.calibrate(MODEL.apply, floats(), [X, -X], **CRITERIA)


def static(found=None):
    found = calibrated() if found is None else found
    return jint8.quantize_params(floats(), plan=jint8.plan(MODEL.apply, floats(), X), outliers=found)


@pytest.mark.slow
def test_scanned_linen():
    assert 3 in calibrated()["layers/up/kernel"]
    assert {3, 11} <= set(calibrated()["attention/query/kernel"].tolist())
    float_y = MODEL.apply(floats(), X)
    dynamic = jint8.quantize_params(floats(), plan=jint8.plan(MODEL.apply, floats(), X))
    apply = cases.jit(jint8.apply(MODEL.apply))
    errors = [cases.relative_error(apply(tree, X), float_y) for tree in (dynamic, static())]
    assert errors[1] < errors[0]
    again = jint8.calibrate(jint8.apply(MODEL.apply), static(), [X, -X], **CRITERIA)
    assert again["layers/up/kernel"].tolist() == calibrated()["layers/up/kernel"].tolist()


@pytest.mark.slow
def test_lists_of_different_layers():
    found = jint8.calibrate(MODEL.apply, floats(), [X], budget=2)
    assert found["layers/down/kernel"].shape == (3, 2)
    assert static(found)["params"]["layers"]["down"]["kernel"].outlier_index.shape == (3, 1, 2)
    y = cases.jit(jint8.apply(MODEL.apply))(static(found), X)
    assert cases.relative_error(y, MODEL.apply(floats(), X)) < 0.05


@pytest.mark.slow
def test_gradients_and_vmap():
    apply = jint8.apply(MODEL.apply)
    loss = lambda x: jnp.sum(apply(static(), x) ** 2)
    want = jax.grad(lambda x: jnp.sum(MODEL.apply(floats(), x) ** 2))(X)
    assert cases.relative_error(cases.jit(jax.grad(loss))(X), want) < 0.05
    rows = cases.jit(jax.vmap(lambda x: apply(static(), x)))(X[:, None])
    assert cases.relative_error(rows[:, 0], apply(static(), X)) < 1e-5


@pytest.mark.first_case
@pytest.mark.parametrize(
    "clone",
    [
        lambda tree: pickle.loads(pickle.dumps(tree)),
        lambda tree: flax.serialization.from_bytes(
            jax.tree.map(jnp.zeros_like, tree), flax.serialization.to_bytes(tree)
        ),
        lambda tree: flax.serialization.from_bytes(  # into a tree without columns
            jint8.quantize_params(floats(), plan=jint8.plan(MODEL.apply, floats(), X)),
            flax.serialization.to_bytes(tree),
        ),
    ],
    ids=["pickle", "flax", "flax_other_target"],
)
def test_saved(clone):
    tree, other = static(), clone(static())
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    assert all(map(np.array_equal, jax.tree.leaves(tree), jax.tree.leaves(other)))


class Net(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(16, 24, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(24, 24, rngs=rngs) for _ in range(2)])
        self.attention = nnx.MultiHeadAttention(2, 24, decode=False, rngs=rngs)

    def __call__(self, x):
        x = self.up(x)
        for layer in self.layers:
            x = nnx.gelu(layer(x)) / 9
        return self.attention(x)


@pytest.mark.slow
def test_nnx():
    model = Net(nnx.Rngs(0))
    found = jint8.nnx.calibrate(model, [X, -X])
    assert found["up/kernel"].tolist() == [3, 11]
    assert {"layers/0/kernel", "layers/1/kernel", "attention/query/kernel", "attention/out/kernel"} <= set(found)
    int8, plain = jint8.nnx.quantize(model, outliers=found), jint8.nnx.quantize(model)
    assert int8.up.kernel.get_value().outlier_rows.shape == (24, 2)
    errors = [cases.relative_error(nnx.jit(m)(X), model(X)) for m in (plain, int8)]
    assert errors[1] < errors[0]
    again = jint8.nnx.calibrate(int8, [X, -X], call=lambda m, x: m(x))
    assert again["up/kernel"].tolist() == [3, 11]
    with pytest.raises(ValueError, match="Expected outliers for attributes of modules, got nothing"):
        jint8.nnx.quantize(model, outliers={"nothing": [1]})
