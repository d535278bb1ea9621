"""Smoothed and rotated weights in linen models: standard layers under transforms, own code, layers that quantize."""

import functools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from marks import slow_but

import jint8

ROTATED = jint8.Config.preset("rotated")
COLUMNS = jint8.Config(outliers="static", rotate=64)
NONE = jint8.Config(scheme="none")  # float activations: then a product is that of the dequantized weights
X = cases.plant(cases.normal(2, 3, 32, seed=1), factor=20.0)
TOKENS = jnp.array([[1, 2, 3], [4, 5, 6]])


class Block(nn.Module):
    """A feed-forward network with two output axes in the middle, with the signature that nn.scan wants."""

    @nn.compact
    def __call__(self, x, _=None):
        y = jnp.tanh(nn.DenseGeneral((4, 12), name="up")(x))
        return x + nn.DenseGeneral(32, axis=(-2, -1), name="down")(y), None


class Attention(nn.Module):
    """Its last projection contracts two axes."""

    @nn.compact
    def __call__(self, x, _=None):
        return x + nn.MultiHeadDotProductAttention(4, name="attention")(x / 10), None


def normal(module, name, *shape):
    return module.param(name, nn.initializers.normal(0.3), shape)


class Table(nn.Module):
    """An embedding of its own code: looked up, also in pieces of several rows, and a product with its transpose."""

    @nn.compact
    def __call__(self, tokens):
        table = normal(self, "table", 40, 48)
        x = jnp.take(table, tokens, axis=0) + table[10:20][tokens]
        return x @ table.T


class Tied(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(40, 48, name="embed")
        return embed.attend(embed(tokens)) + Table(name="own")(tokens)


class OwnCode(nn.Module):
    """Transposes, reshapes, whole blocks of the contracted features, one of stacked weights, experts."""

    @nn.compact
    def __call__(self, x):
        heads = normal(self, "heads", 4, 32, 8)
        y = jnp.einsum("btd,ndh->btnh", x, heads)
        out = normal(self, "out", 32, 4, 8)
        y = y.reshape(*x.shape[:-1], 32) @ jnp.transpose(out, (1, 2, 0)).reshape(32, 32)
        gate, up = jnp.split(normal(self, "gate_up", 32, 64), 2, axis=1)
        y = jax.nn.silu(x @ gate) * (y @ up)
        long = normal(self, "long", 128, 32)
        y = jnp.concatenate([y, x], -1) @ long[:64] + jnp.concatenate([x, y], -1) @ long[64:]
        experts = normal(self, "experts", 3, 32, 16)
        y = jnp.einsum("btd,edf->btef", y, experts).sum(2) + x @ normal(self, "picked", 3, 32, 16)[1]
        rows = jax.lax.ragged_dot(x.reshape(6, 32), normal(self, "ragged", 3, 32, 16), jnp.array([1, 3, 2]))
        return y + rows.reshape(2, 3, 16)


def scanned(axis, block):
    return nn.scan(block, variable_axes={"params": axis}, split_rngs={"params": True}, length=3)()


def vmapped(axis):
    return nn.vmap(nn.Dense, in_axes=0, variable_axes={"params": axis}, split_rngs={"params": True})(8)


# name: module, argument, config
MODELS = {
    "scan": (scanned(0, Block), X, ROTATED),
    "scan, axis 1, remat": (scanned(1, nn.remat(Attention)), X, COLUMNS),
    "vmap, last axis": (vmapped(-1), X, COLUMNS),
    "tied": (Tied(), TOKENS, COLUMNS),
    "own code": (OwnCode(), X, COLUMNS),
}


def weights(tree):
    return [w for w in jax.tree.leaves(tree, is_leaf=is_qtensor) if is_qtensor(w)]


def is_qtensor(leaf):
    return isinstance(leaf, jint8.QTensor)


def first(tree):
    return jax.tree.leaves(tree)[0]


@functools.cache
def quantized(name):
    """Float variables, their plan, what calibration finds, and int8 ones by that."""
    module, x, config = MODELS[name]
    floats = cases.randomize_biases(cases.jit(module.init)(jax.random.key(0), x))
    plan = jint8.plan(module.apply, floats, x)
    plan = plan.with_(plan.tied)
    found = jint8.calibrate(module.apply, floats, [x], plan=plan, budget=2, include="*")
    return floats, plan, found, jint8.quantize_params(floats, plan=plan, config=config, outliers=found)


@pytest.mark.first_case
@pytest.mark.parametrize("name", slow_but(MODELS, "scan", "tied"))
def test_exactly_the_dequantized_weights_and_close_in_int8(name):
    module, x, config = MODELS[name]
    floats, plan, _, int8 = quantized(name)
    assert len(weights(int8)) == len(plan)
    assert all(w.config.rotate and w.smooth is not None for w in weights(int8))
    assert all((w.outlier_rows is not None) == config.decomposes for w in weights(int8))
    dequantized = jint8.dequantize_params(int8)
    for got, want in zip(jax.tree.leaves(dequantized), jax.tree.leaves(floats), strict=True):
        assert cases.relative_error(got, want) < 0.05

    def run(int8, dequantized, x):
        in_float = jint8.apply(module.apply, config=NONE)(int8, x)
        outputs = jint8.apply(module.apply)(int8, x), in_float, module.apply(dequantized, x)
        return [*map(first, outputs)]

    got, in_float, want = cases.jit(run)(int8, dequantized, x)
    assert cases.relative_error(in_float, want) < 1e-4
    assert 1e-4 < cases.relative_error(got, want) < 0.02


@pytest.mark.parametrize(
    ("name", "axis"), [("scan", 0), pytest.param("scan, axis 1, remat", 1, marks=pytest.mark.slow)]
)
def test_scanned_weights_have_factors_for_each_layer(name, axis):
    """On the axis that the scan takes layers from, so that a layer has its own."""
    for w in weights(quantized(name)[3]):
        assert w.shape[axis] == 3
        stored = w.q.shape.index(3)
        assert w.smooth.shape[stored] == 3
        layers = np.moveaxis(np.asarray(w.smooth), stored, 0).reshape(3, -1)
        assert not np.allclose(layers[0], layers[1])


def test_calibrated_factors_are_those_of_the_activations():
    """Planted outlier features get factors by which they are smaller: about the square root of how large they are."""
    floats, plan, _, int8 = quantized("scan")
    up = int8["params"]["up"]["kernel"].smooth[0].ravel()
    assert up[5] < 0.6 * np.median(up)
    alone = jint8.quantize_params(floats, plan=plan, config=ROTATED)["params"]["up"]["kernel"].smooth[0].ravel()
    assert 0.6 < alone[5] / np.median(alone) < 1.6


def test_calibration_sees_activations_before_they_are_smoothed():
    module, x, _ = MODELS["scan"]
    _, plan, of_floats, int8 = quantized("scan")
    of_int8 = jint8.calibrate(module.apply, int8, [x], plan=plan, budget=2)
    assert of_int8.rms.keys() == of_floats.rms.keys() == set(plan)
    for path in plan:
        assert of_int8.rms[path].shape == of_floats.rms[path].shape
        assert cases.relative_error(of_int8.rms[path], of_floats.rms[path]) < 0.02
    np.testing.assert_allclose(of_int8.rms["up/kernel"][0], np.sqrt(np.mean(np.square(x), (0, 1))), rtol=1e-5)
    np.testing.assert_array_equal(of_int8["up/kernel"], of_floats["up/kernel"])


class Parts(nn.Module):
    """Uses a part of a block of the contracted features, or another order of them."""

    use: str

    @nn.compact
    def __call__(self, x):
        w = normal(self, "w", 64, 8)
        x = jnp.concatenate([x, x], -1)
        if self.use == "part":
            return x[..., :40] @ w[:40]
        if self.use == "shifted":
            return x[..., :32] @ w[16:48]
        return x @ w.reshape(2, 32, 8).transpose(1, 0, 2).reshape(64, 8)


@pytest.mark.first_case
@pytest.mark.parametrize("use", ["part", "shifted", "order"])
def test_parts_of_a_block_are_refused(use):
    module = Parts(use)
    floats = module.init(jax.random.key(0), X)
    int8 = jint8.quantize_params(floats, plan=jint8.Plan({"w": (0,)}, {"w": ()}), config=ROTATED)
    with pytest.raises(ValueError, match=r"rotated in blocks of 64 to be used in their order and by whole blocks"):
        jint8.apply(module.apply)(int8, X)
    plain = jint8.quantize_params(floats, plan=jint8.Plan({"w": (0,)}, {"w": ()}), config=jint8.Config(scheme="vector"))
    assert cases.relative_error(jint8.apply(module.apply)(plain, X), module.apply(floats, X)) < 0.03


def test_a_plain_mapping_is_refused_where_axes_may_be_stacked():
    floats, plan, *_ = quantized("scan")
    with pytest.raises(ValueError, match=r"kernel: Expected a plan that says which axes are stacked"):
        jint8.quantize_params(floats, plan=dict(plan), config=ROTATED)


class Layer(nn.Module):
    config: jint8.Config

    @nn.compact
    def __call__(self, x, _=None):
        return x + jint8.linen.Int8Dense(32, config=self.config, name="dense")(x), None


# layers that quantize float kernels at each call, by their config
QUANTIZING = {
    "Int8DenseGeneral": lambda c: jint8.linen.Int8DenseGeneral((2, 4), axis=(-2, -1), config=c),
    "Int8TransformerBlock": lambda c: jint8.linen.Int8TransformerBlock(num_heads=4, mlp_dim=48, config=c),
    "vmap": lambda c: nn.vmap(
        jint8.linen.Int8Dense, in_axes=0, variable_axes={"params": 0}, split_rngs={"params": True}
    )(8, config=c),
    "scan": lambda c: nn.scan(Layer, variable_axes={"params": 1}, split_rngs={"params": True}, length=3)(c),
}


@pytest.mark.first_case
@pytest.mark.parametrize("name", slow_but(QUANTIZING, *(name for name in QUANTIZING if name != "Int8TransformerBlock")))
def test_layers_that_quantize_at_each_call(name):
    """They are planned as their float layers are, give the same as quantized parameters, and gradients go through."""
    module, plain = (QUANTIZING[name](config) for config in (ROTATED, NONE))
    floats = cases.randomize_biases(cases.jit(plain.init)(jax.random.key(0), X))
    plan = jint8.plan(module.apply, floats, X)
    assert plan == jint8.plan(plain.apply, floats, X)
    assert len(plan) > 0
    int8 = jint8.quantize_params(floats, plan=plan, config=ROTATED)

    def loss(module, params):
        y = first(module.apply(params, X))
        return jnp.sum(jnp.sin(y / 8)), y

    def run(floats, int8):
        straight, got = jax.grad(functools.partial(loss, module), has_aux=True)(floats)
        exact, want = jax.grad(functools.partial(loss, plain), has_aux=True)(floats)
        return straight, exact, got, want, loss(module, int8)[1]

    straight, exact, got, want, same = cases.jit(run)(floats, int8)
    assert cases.relative_error(got, want) < 0.03
    assert cases.relative_error(same, got) < 1e-4
    for path in plan:
        a, b = (functools.reduce(lambda tree, key: tree[key], path.split("/"), g["params"]) for g in (straight, exact))
        assert cases.relative_error(a, b) < 0.12 or np.abs(b).max() < 1e-3, path


def test_gradient_of_inputs_is_that_of_the_dequantized_weights():
    module, x, _ = MODELS["scan"]
    int8 = quantized("scan")[3]
    loss = lambda apply_fn: lambda params, x: jnp.sum(jnp.sin(first(apply_fn(params, x)) / 30))
    got = cases.jit(jax.grad(loss(jint8.apply(module.apply)), 1))(int8, x)
    want = cases.jit(jax.grad(loss(module.apply), 1))(jint8.dequantize_params(int8), x)
    assert cases.relative_error(got, want) < 0.02
