"""Smoothed and rotated weights in nnx models."""

import pickle

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jint8

ROTATED = jint8.Config.preset("rotated")
COLUMNS = jint8.Config(outliers="static", rotate=64)
NONE = jint8.Config(scheme="none")
X = cases.plant(cases.normal(2, 3, 32, seed=1), factor=20.0)
TOKENS = jnp.array([[1, 2, 3], [4, 5, 6]])


class OwnCode(nnx.Module):
    """A projection of its own, and one by a transpose of halves."""

    def __init__(self, rngs):
        self.w = nnx.Param(jax.random.normal(rngs.params(), (4, 32, 8)) / 6)
        self.gate_up = nnx.Param(jax.random.normal(rngs.params(), (64, 32)) / 6)

    def __call__(self, x):
        y = jnp.einsum("btd,ndh->btnh", x, self.w[...]).reshape(x.shape)
        gate, up = jnp.split(self.gate_up[...].T, 2, axis=1)
        return jax.nn.sigmoid(x @ gate) * (y @ up)


class Model(nnx.Module):
    """The standard layers that have kernels, and a layer of its own."""

    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(4, 32, decode=False, rngs=rngs)
        self.general = nnx.LinearGeneral(32, (4, 12), rngs=rngs)
        self.einsum = nnx.Einsum("btij,nijh->btnh", (2, 4, 12, 16), (2, 16), rngs=rngs)
        self.lora = nnx.LoRALinear(32, 32, lora_rank=2, rngs=rngs, b_initializer=nnx.initializers.normal())
        self.own = OwnCode(rngs)

    def __call__(self, x):
        y = self.attention(x / 10)
        y = self.einsum(jnp.tanh(self.general(x + y)))
        return self.own(self.lora(y.reshape(x.shape)))


class Tied(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(40, 48, rngs=rngs)

    def __call__(self, tokens):
        return self.embed.attend(self.embed(tokens))


class Scanned(nnx.Module):
    def __init__(self, rngs):
        keys = jax.random.split(rngs.params(), 3)
        self.layers = nnx.vmap(lambda key: nnx.Linear(32, 32, rngs=nnx.Rngs(key)))(keys)

    def __call__(self, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def forward(layer, x):
            return x + jnp.tanh(layer(x))

        return forward(self.layers, x)


# name: constructor, argument, config, int8 weights
MODELS = {
    "layers": (Model, X, COLUMNS, 9),
    "tied": (Tied, TOKENS, COLUMNS, 1),
    "scan": (Scanned, X, ROTATED, 1),
}
_MADE = {}


def is_qtensor(leaf):
    return isinstance(leaf, jint8.QTensor)


def call(graphdef):
    return lambda state, x: nnx.merge(graphdef, state)(x)


def quantized(name):
    """A float model, its plan, what calibration finds, and the int8 model by that."""
    if name not in _MADE:
        make, x, config, _ = MODELS[name]
        model = make(nnx.Rngs(0))
        nnx.update(model, cases.randomize_biases(nnx.state(model)))
        graphdef, state = nnx.split(model)
        plan = jint8.plan(call(graphdef), state, x)
        plan = plan.with_(plan.tied)
        lora = {path for path in plan if "lora_" in path}
        plan = jint8.Plan({p: a for p, a in plan.items() if p not in lora}, plan.stacked, shapes=plan.shapes)
        found = jint8.nnx.calibrate(model, [x], budget=2, plan=plan, include="*")
        _MADE[name] = model, plan, found, jint8.nnx.quantize(model, plan=plan, config=config, outliers=found)
    return _MADE[name]


def weights(model):
    return [w for w in jax.tree.leaves(nnx.state(model), is_leaf=is_qtensor) if is_qtensor(w)]


@pytest.mark.first_case
@pytest.mark.parametrize("name", MODELS)
def test_exactly_the_dequantized_weights_and_close_in_int8(name):
    """Split, with another config or dequantized, merged and run under jit."""
    _, x, config, count = MODELS[name]
    model, _, found, int8 = quantized(name)
    assert len(weights(int8)) == len(found) == count
    assert all(w.smooth is not None and (w.outlier_rows is not None) == config.decomposes for w in weights(int8))
    graphdef, state = nnx.split(int8)
    in_float = nnx.merge(graphdef, jint8.with_config(state, NONE))
    got, exact, want = cases.jit(lambda *models: [m(x) for m in models])(int8, in_float, model)
    assert cases.relative_error(got, want) < 0.03
    assert 1e-4 < cases.relative_error(got, exact) < 0.03
    assert cases.relative_error(exact, want) < 0.03


def test_the_kernels_stand_for_those_of_the_float_model():
    model, plan, _, int8 = quantized("layers")
    for path in plan:
        *parents, name = path.split("/")
        w, want = int8, model
        for parent in parents:
            w, want = getattr(w, parent), getattr(want, parent)
        w, want = getattr(w, name).get_value(), getattr(want, name).get_value()
        assert w.shape == want.shape
        assert cases.relative_error(w.dequantize(), want) < 0.01
        contracted = np.prod([want.shape[axis] for axis in plan[path]])
        assert w.config.rotate == np.gcd(contracted, 64)


def test_stacked_layers_have_their_own_factors():
    w = quantized("scan")[3].layers.kernel.get_value()
    assert w.smooth.shape == (3, 1, 32)
    assert not np.allclose(w.smooth[0], w.smooth[1])


def test_gradients_reach_adapters_and_biases():
    model, _, _, int8 = quantized("layers")
    loss = lambda model: jnp.sin(model(X) / 3).sum()
    got, want = (nnx.jit(nnx.grad(loss))(m) for m in (int8, model))
    for path in (("lora", "lora_a"), ("lora", "lora_b"), ("general", "bias"), ("attention", "out", "bias")):
        pair = []
        for tree in (got, want):
            for key in path if path[0] != "lora" else ("lora", "lora", path[1]):
                tree = tree[key]
            pair.append(tree.get_value())
        assert cases.relative_error(*pair) < 0.1, path
    assert not any(map(is_qtensor, jax.tree.leaves(got, is_leaf=is_qtensor)))


def test_statistics_of_an_int8_model_are_of_activations_before_they_are_smoothed():
    _, plan, found, int8 = quantized("layers")
    again = jint8.nnx.calibrate(int8, [X], budget=2, plan=plan)
    assert again.rms.keys() == found.rms.keys()
    np.testing.assert_allclose(again.rms["general/kernel"], found.rms["general/kernel"], rtol=0.05)
    np.testing.assert_allclose(
        again.rms["attention/query/kernel"], np.sqrt(np.mean(np.square(X / 10), (0, 1))), rtol=1e-5
    )


def test_by_the_weights_alone_and_without_a_plan():
    model = quantized("tied")[0]
    int8 = jint8.nnx.quantize(model, config=ROTATED, include="embed")
    assert int8.embed.embedding.get_value().smooth.shape == (1, 48)
    assert cases.relative_error(cases.jit(lambda m: m(TOKENS))(int8), cases.jit(lambda m: m(TOKENS))(model)) < 0.02


def test_state_goes_through_pickle_and_abstract_models():
    int8 = quantized("scan")[3]
    state = nnx.state(int8)
    restored = pickle.loads(pickle.dumps(state))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    abstract = nnx.eval_shape(lambda: jint8.nnx.quantize(nnx.Linear(32, 8, rngs=nnx.Rngs(0)), config=ROTATED))
    assert abstract.kernel.get_value().smooth.shape == (1, 32)


def test_a_plain_mapping_does_not_say_which_axes_are_stacked():
    model, plan, *_ = quantized("scan")
    with pytest.raises(ValueError, match=r"layers/kernel: Expected a plan .* got a plain mapping"):
        jint8.nnx.quantize(model, plan=dict(plan), config=ROTATED)
