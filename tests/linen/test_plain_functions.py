"""`jint8.apply` on functions of a pytree that know nothing of Flax, or of int8."""

import dataclasses

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import jint8

X = cases.plant(cases.normal(5, 16))
PARAMS = {
    "embedding": cases.normal(50, 16, seed=1),
    "layers": {"up": cases.normal(3, 16, 32, seed=2) / 4, "down": cases.normal(3, 32, 16, seed=3) / 6},
    "bias": jnp.linspace(-1, 1, 16),
}


def layers(params, x):
    """As such a model is written: one layer's code, scanned over the stacked weights of all."""

    def layer(x, w):
        return x + jax.nn.gelu(x @ w["up"]) @ w["down"], None

    return jax.lax.scan(layer, x, params["layers"])[0] + params["bias"]


def language_model(params, tokens, *, scale=1.0):
    x = layers(params, params["embedding"][tokens] * scale)
    return {"logits": x @ params["embedding"].T, "kind": "logits"}


@pytest.mark.slow
def test_a_scanned_model():
    plan = jint8.plan(layers, PARAMS, X)
    assert dict(plan) == {"layers/up": (1,), "layers/down": (1,)}
    int8 = jint8.quantize_params(PARAMS, plan=plan)
    run = jint8.apply(layers)
    assert cases.relative_error(run(int8, X), layers(PARAMS, X)) < 0.02
    np.testing.assert_allclose(cases.jit(run)(int8, X), run(int8, X), rtol=1e-5, atol=1e-5)
    rows = jax.vmap(run, in_axes=(None, 0))(int8, X[:, None])[:, 0]
    assert cases.relative_error(rows, layers(PARAMS, X)) < 0.02
    got, want = (jax.grad(lambda x, f=f, p=p: f(p, x).sum())(X) for f, p in ((run, int8), (layers, PARAMS)))
    assert cases.relative_error(got, want) < 0.05


def test_the_products_are_those_of_matmul():
    function = lambda params, x: jnp.tanh(x @ params["w"])
    w = jint8.quantize(PARAMS["layers"]["up"][0])
    np.testing.assert_array_equal(jint8.apply(function)({"w": w}, X), jnp.tanh(jint8.matmul(X, w)))
    config = jint8.Config(threshold=0.0)
    by_config = jint8.apply(function, config=config)({"w": w}, X)
    np.testing.assert_array_equal(by_config, jnp.tanh(jint8.matmul(X, w, config=config)))


@pytest.mark.slow
def test_results_and_keywords_that_are_no_arrays():
    plan = jint8.plan(language_model, PARAMS, jnp.ones((2, 3), jnp.int32))
    int8 = jint8.quantize_params(PARAMS, plan=plan.with_(plan.tied))
    assert isinstance(int8["embedding"], jint8.QTensor)
    tokens = jnp.arange(6).reshape(2, 3)
    got = jint8.apply(language_model)(params=int8, tokens=tokens, scale=0.5)
    assert got["kind"] == "logits"
    assert cases.relative_error(got["logits"], language_model(PARAMS, tokens, scale=0.5)["logits"]) < 0.03


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Linear:
    """A module as a pytree, as equinox has them."""

    weight: jax.Array
    bias: jax.Array
    name: str = dataclasses.field(default="linear", metadata={"static": True})

    def __call__(self, x):
        return self.weight @ x + self.bias


def test_modules_that_are_pytrees():
    model = Linear(PARAMS["layers"]["up"][0].T, jnp.ones(32))
    batched = lambda model, x: jax.vmap(model)(x)
    int8 = jint8.quantize_params(model, plan=jint8.plan(batched, model, X))
    assert isinstance(int8, Linear)
    assert isinstance(int8.weight, jint8.QTensor)
    assert cases.relative_error(jint8.apply(batched)(int8, X), batched(model, X)) < 0.02


def test_an_nnx_model_that_was_split():
    model = nnx.Linear(16, 8, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(model)
    run = lambda state, x: nnx.merge(graphdef, state)(x)
    int8 = jint8.quantize_params(state, plan=jint8.plan(run, state, X))
    assert cases.relative_error(jint8.apply(run)(int8, X), model(X)) < 0.02


def test_code_that_is_given_the_weights_themselves():
    """Functions of this library, and linen modules, get the `QTensor`s: they know more of them."""
    w = jint8.quantize(PARAMS["layers"]["up"][0])
    seen = []

    def of_jint8(params, x):
        seen.append(params["w"])
        return jint8.einsum("mk,kn->mn", x, params["w"], implementation="dequantize")

    want = jint8.matmul(X, w, implementation="dequantize")
    np.testing.assert_allclose(jint8.apply(of_jint8)({"w": w}, X), want, rtol=1e-6, atol=1e-6)
    assert isinstance(seen[-1], jint8.QTensor)
    dense = nn.Dense(32, use_bias=False)
    got = jint8.apply(lambda params, x: dense.apply({"params": params}, x))({"kernel": w}, X)
    np.testing.assert_array_equal(got, jint8.apply(dense.apply)({"params": {"kernel": w}}, X))
    fields = jint8.apply(lambda params, x: x * params["w"].scale.sum())({"w": w}, X)
    np.testing.assert_allclose(fields, X * w.scale.sum())


def test_what_needs_float_values_is_refused():
    def scaled(params, x):
        return x @ (params["w"] * 2)

    int8 = {"w": jint8.quantize(PARAMS["layers"]["up"][0])}
    with pytest.raises(TypeError, match=r"scaled: .*got mul.*skip="):
        jint8.apply(scaled)(int8, X)
    halved = lambda params, x: x @ jax.tree.map(lambda w: w / 2, params)["w"]  # values and scales, if they got through
    with pytest.raises(TypeError, match="got div"):
        jint8.apply(halved)(int8, X)


def test_a_functions_own_errors():
    int8 = {"w": jint8.quantize(PARAMS["layers"]["up"][0])}
    with pytest.raises(TypeError, match="dot_general requires contracting dimensions"):
        jint8.apply(lambda params, x: x[:, :3] @ params["w"])(int8, X)

    def own(params, x):
        raise KeyError("missing")

    with pytest.raises(KeyError, match="missing"):
        jint8.apply(own)(int8, X)


def test_a_function_that_is_jitted():
    int8 = jint8.quantize_params(PARAMS, plan=jint8.plan(layers, PARAMS, X))
    got = jint8.apply(jax.jit(layers))(int8, X)
    np.testing.assert_allclose(got, jint8.apply(layers)(int8, X), rtol=1e-5, atol=1e-5)
