"""nnx layers that no converter knows: their own code runs, with its products in int8."""

import pickle

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jint8
from jint8.nnx._own_code import _become

X = cases.normal(2, 3, 32, seed=1)
TOKENS = jnp.array([[1, 2, 3], [4, 5, 6]])
EXACT = jint8.Config(threshold=0.0)  # one int8 product per layer on every path


def random(rngs, *shape):
    return nnx.Param(nnx.initializers.lecun_normal(-2, -1)(rngs.params(), shape))


class Einsum(nnx.Module):
    """An einsum on a parameter, with an attribute that others read."""

    def __init__(self, rngs):
        self.shape = (32, 4, 8)
        self.w = random(rngs, *self.shape)

    def __call__(self, x):
        return jnp.einsum("btd,dnh->btnh", x, self.w[...])


class Gated(nnx.Module):
    """Halves of one parameter, a standard layer, state, and a method that calls another one under remat."""

    def __init__(self, rngs):
        self.w = random(rngs, 2, 32, 64)
        self.down = nnx.Linear(64, 32, rngs=rngs)
        self.calls = nnx.BatchStat(jnp.zeros(()))

    def __call__(self, x):
        self.calls[...] += 1
        return nnx.remat(type(self).gate)(self, x)

    def gate(self, x):
        return self.down(nnx.gelu(x @ self.w[0]) * (x @ self.w[1]))


class Doubled(nnx.Linear):
    """A subclass whose own code no converter replaces."""

    def __call__(self, inputs, out_sharding=None):
        return 2 * super().__call__(inputs)


class Embedder(nnx.Module):
    """A tied embedding, used through two methods."""

    def __init__(self, rngs):
        self.table = random(rngs, 40, 32)

    def encode(self, tokens):
        return self.table[tokens]

    def decode(self, x):
        return jnp.dot(x, self.table[...].T)


class Tied(nnx.Module):
    def __init__(self, rngs):
        self.embedder = Embedder(rngs)

    def __call__(self, tokens):
        return self.embedder.decode(self.embedder.encode(tokens))


class Scanned(nnx.Module):
    def __init__(self, axis, rngs):
        make = nnx.vmap(lambda key: Gated(nnx.Rngs(key)), out_axes=axis)
        self.axis, self.layers = axis, make(jax.random.split(rngs.params(), 3))

    def __call__(self, x):
        state_axes = nnx.StateAxes({(nnx.Param, jint8.nnx.Quantized, nnx.BatchStat): self.axis})

        @nnx.scan(in_axes=(state_axes, nnx.Carry), out_axes=nnx.Carry)
        def forward(layer, x):
            return x + layer.gate(x)

        return forward(self.layers, x)


# name: constructor, argument, int8 layers
MODELS = {
    "einsum": (Einsum, X, 1),
    "halves, a standard layer, state, remat": (Gated, X, 3),
    "subclass of a standard layer": (lambda r: Doubled(32, 8, rngs=r), X, 1),
    "tied": (Tied, TOKENS, 1),
    "scan": (lambda r: Scanned(0, r), X, 3),
    "in a container": (lambda r: nnx.Sequential(Einsum(r), lambda x: x.reshape(2, 3, 32), Einsum(r)), X, 2),
}


def call(graphdef):
    return lambda state, x: nnx.merge(graphdef, state)(x)


def quantized(name, **kwargs):
    make, x, _ = MODELS[name]
    model = make(nnx.Rngs(0))
    graphdef, state = nnx.split(model)
    plan = jint8.plan(call(graphdef), state, x)
    return model, jint8.nnx.quantize(model, plan=plan.with_(plan.tied), **kwargs)


@pytest.mark.first_case
@pytest.mark.parametrize("name", MODELS)
def test_int8_products_and_error(name):
    _, x, products = MODELS[name]
    model, int8 = quantized(name, config=EXACT)
    (float_graph, float_state), (graphdef, state) = nnx.split(model), nnx.split(int8)
    assert cases.count_int8_products(call(graphdef), state, x) == products
    in_float = cases.count_float_products(call(float_graph), float_state, x)
    assert cases.count_float_products(call(graphdef), state, x) == in_float - products
    got, want = cases.jit(call(graphdef))(state, x), cases.jit(call(float_graph))(float_state, x)
    assert got.dtype == want.dtype
    assert cases.relative_error(got, want) < 0.03


def test_tied_weight_by_include():
    model, _ = quantized("tied")
    graphdef, state = nnx.split(model)
    plan = jint8.plan(call(graphdef), state, TOKENS)
    with pytest.warns(UserWarning, match="nothing becomes int8: the plan names none of the weights"):
        assert type(jint8.nnx.quantize(model, plan=plan).embedder) is Embedder
    int8 = jint8.nnx.quantize(model, plan=plan, include="embedder")
    assert isinstance(int8.embedder.table, jint8.nnx.Quantized)


def test_the_layer_stays_what_it_was():
    model, int8 = quantized("in a container")
    assert isinstance(int8.layers[0], Einsum)
    assert int8.layers[0].shape == (32, 4, 8)
    assert type(int8.layers[0]) is type(int8.layers[2])  # so that graph definitions are equal
    assert type(model.layers[0]) is Einsum
    assert {path for path, _ in nnx.to_flat_state(nnx.state(int8))} == {("layers", 0, "w"), ("layers", 2, "w")}


def test_nnx_lets_a_layer_change_its_class():
    """What `_become` relies on, which isn't in nnx's documentation."""

    class Other(Einsum):
        def __call__(self, x):
            return 2 * super().__call__(x)

    layer = Einsum(nnx.Rngs(0))
    attributes, before = dict(vars(layer)), layer(X)
    _become(layer, Other)
    assert type(layer) is Other
    assert vars(layer).keys() == attributes.keys()
    assert all(value is attributes[name] for name, value in vars(layer).items())
    merged = nnx.merge(*nnx.split(layer))
    assert type(merged) is Other
    assert jnp.array_equal(merged(X), 2 * before)


def test_state_is_kept_and_not_the_models():
    model, int8 = quantized("halves, a standard layer, state, remat", config=EXACT)
    run = nnx.jit(lambda model, x: model(x))
    run(int8, X)
    run(int8, X)
    assert int8.calls[...] == 2
    assert model.calls[...] == 0


class Observing(nnx.Module):
    """Adds Variables to itself while it runs."""

    def __init__(self, rngs):
        self.w = nnx.Param(jax.random.normal(rngs.params(), (32, 16)) / 6)

    def __call__(self, x):
        y = x @ self.w[...]
        self.mean = nnx.Intermediate(y.mean(), note="of the products")
        self.first = nnx.Intermediate((y[0],))  # as sow makes them, which newer versions of Flax deprecate here
        return y


@pytest.mark.parametrize("jit", [lambda run: run, nnx.jit], ids=["eager", "jit"])
def test_variables_that_are_made_in_a_call(jit):
    x = cases.normal(2, 32, seed=1)
    model = Observing(nnx.Rngs(0))
    int8 = jint8.nnx.quantize(model, x)
    y = jit(lambda model, x: model(x))(int8, x)
    assert type(int8.mean) is type(int8.first) is nnx.Intermediate
    assert int8.mean.note == "of the products"
    np.testing.assert_allclose(int8.mean[...], y.mean(), rtol=1e-5)
    np.testing.assert_array_equal(int8.first.get_value()[0], y[0])


def test_gradient_leaves_int8_weights_alone():
    model, int8 = quantized("halves, a standard layer, state, remat", config=EXACT)
    loss = lambda model: jnp.sin(model.gate(X)).sum()
    got, want = (nnx.jit(nnx.grad(loss))(m) for m in (int8, model))
    assert [path for path, _ in nnx.to_flat_state(got)] == [("down", "bias")]
    assert cases.relative_error(got["down"]["bias"].get_value(), want["down"]["bias"].get_value()) < 0.05


def test_lora_parameters_stay_trainable():
    class Adapted(nnx.Module):
        def __init__(self, rngs):
            self.base = Einsum(rngs)
            self.a = nnx.LoRAParam(jnp.ones((32, 2)))

        def __call__(self, x):
            return self.base(x).sum() + (x @ self.a[...]).sum()

    model = Adapted(nnx.Rngs(0))
    graphdef, state = nnx.split(model)
    plan = jint8.plan(call(graphdef), state, X)
    assert "a" in plan
    int8 = jint8.nnx.quantize(model, plan=plan)
    assert isinstance(int8.a, nnx.LoRAParam)
    assert isinstance(int8.base.w, jint8.nnx.Quantized)


def test_state_goes_through_pickle():
    _, int8 = quantized("einsum", config=EXACT)
    graphdef, state = nnx.split(int8)
    restored = nnx.merge(graphdef, pickle.loads(pickle.dumps(state)))
    assert jnp.array_equal(restored(X), int8(X))


@pytest.mark.slow
def test_a_plain_mapping_as_plan():
    """It doesn't say which axes are stacked. A layer of nnx's own knows the shape of its kernel; others don't."""
    heads, x = nnx.LinearGeneral(32, (4, 8), rngs=nnx.Rngs(0)), X
    int8 = jint8.nnx.quantize(heads, plan={"kernel": (0,)}, config=jint8.Config(scheme="absmax"))
    assert int8.kernel.get_value().q.shape == (4, 8, 32)
    assert cases.relative_error(int8(x), heads(x)) < 0.05
    model = Scanned(0, nnx.Rngs(0))
    graphdef, state = nnx.split(model)
    plan = jint8.plan(call(graphdef), state, X)
    want = cases.jit(lambda model, x: model(x))(jint8.nnx.quantize(model, plan=plan, config=EXACT), X)
    got = cases.jit(lambda model, x: model(x))(jint8.nnx.quantize(model, plan=dict(plan), config=EXACT), X)
    assert cases.relative_error(got, want) < 1e-5
    with pytest.raises(ValueError, match=r"layers/.*: Expected a plan .* got a plain mapping"):
        jint8.nnx.quantize(model, plan=dict(plan), config=jint8.Config(scheme="absmax"))


def test_use_of_the_values_names_the_layer():
    class Masked(nnx.Module):
        def __init__(self, rngs):
            self.w = random(rngs, 32, 32)

        def __call__(self, x):
            return x @ (self.w[...] * jnp.tri(32))

    int8 = jint8.nnx.quantize(Masked(nnx.Rngs(0)), plan={"w": (0,)})
    with pytest.raises(TypeError, match=r"Masked with int8 weights \(w\).*got mul.*jint8.nnx.register"):
        int8(X)
