"""`jint8.check`: each error against float64, out of every transformation; what it says of weights and paths."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import jint8

K, N, M = 32, 24, 9


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


X, UP, DOWN = normal(M, K) * 2, normal(K, N, seed=1), normal(N, K, seed=2)


def expected_error(x, w):
    """Of one product `x[m, k] @ w[k, n]` in float64."""
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    got, _ = oracle.matmul(x, oracle.quantize(w))
    return np.linalg.norm(got - x @ w) / np.linalg.norm(x @ w)


def by_path(found):
    return {product.path: product for product in found.products}


def model(params, x):
    return jnp.tanh(x @ params["up"]) @ params["down"]


PARAMS = {"up": UP, "down": DOWN, "unused": normal(3, 3)}


def broken(w, factor=1.1):
    return dataclasses.replace(w, scale=w.scale * factor)


def test_each_product_has_its_own_error():
    found = jint8.check(model, PARAMS, X)
    hidden = np.tanh(np.float64(X) @ UP).astype(np.float32)
    products = by_path(found)
    assert products["up"].error == pytest.approx(expected_error(X, UP), rel=1e-3)
    assert products["down"].error == pytest.approx(expected_error(hidden, DOWN), rel=2e-2)
    for path, w in (("up", UP), ("down", DOWN)):
        q = oracle.quantize(w.astype(np.float64))
        off = q.dequantize() - w
        assert products[path].weight_error == pytest.approx(np.linalg.norm(off) / np.linalg.norm(w), rel=1e-4)
    assert [p.error for p in found.products] == sorted((p.error for p in found.products), reverse=True)
    assert found.skipped == {"unused": "not used"}


def test_error_of_the_result_is_that_of_apply():
    plan = jint8.plan(model, PARAMS, X)
    y = jint8.apply(model)(jint8.quantize_params(PARAMS, plan=plan), X)
    wanted = np.tanh(np.float64(X) @ UP) @ DOWN
    assert jint8.check(model, PARAMS, X).error == pytest.approx(
        np.linalg.norm(y - wanted) / np.linalg.norm(wanted), rel=1e-3
    )


@pytest.mark.parametrize("path", ["up", "down"])
def test_a_broken_weight_is_the_worst(path):
    int8 = jint8.quantize_params(PARAMS, plan=jint8.plan(model, PARAMS, X))
    int8 = {**int8, path: broken(int8[path])}
    found = jint8.check(model, PARAMS, X, int8=int8)
    assert found.products[0].path == path
    assert found.products[0].error == pytest.approx(0.1, rel=0.2)
    assert found.products[0].weight_error == pytest.approx(0.1, rel=0.2)
    assert found.products[1].error < 0.02
    assert f"\n{path} " in str(found).partition("the worst products")[2]


def test_int8_alone_has_the_error_of_the_activations():
    q = jint8.quantize(UP)
    found = jint8.check(lambda params, x: jint8.matmul(x, params["up"]), {"up": q}, X)
    exact, _ = oracle.matmul(X.astype(np.float64), oracle.quantize(UP.astype(np.float64)))
    wanted = X.astype(np.float64) @ np.asarray(q.dequantize(), np.float64)
    error = np.linalg.norm(exact - wanted) / np.linalg.norm(wanted)
    assert found.products[0].error == pytest.approx(error, rel=1e-3)
    assert found.products[0].weight_error == 0
    assert "no float weights" in str(found)


STACK = normal(3, K, K, seed=3) / 3


def scanned(params, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w) * 3, None), x, params["kernel"])[0]


def mapped(params, x):
    return jax.vmap(jnp.matmul)(jnp.stack([x, x, x]), params["kernel"])


def rearranged(params, x):
    halves = jnp.split(jnp.swapaxes(params["kernel"].reshape(3, K, 4, K // 4), 0, 1), [K // 2])
    return sum(jnp.einsum("mk,kenh->menh", part, w) for part, w in zip(jnp.split(x, 2, axis=1), halves, strict=True))


def checkpointed(params, x):
    return jax.jit(jax.checkpoint(scanned))(params, x)


@pytest.mark.parametrize("run", [scanned, mapped, checkpointed], ids=lambda run: run.__name__)
def test_entries_of_a_stack_have_errors_of_their_own(run):
    found = by_path(jint8.check(run, {"kernel": STACK}, X))
    x = X
    for layer, w in enumerate(STACK):
        assert found[f"kernel[{layer}]"].error == pytest.approx(expected_error(x, w), rel=3e-2)
        if run is not mapped:
            x = np.tanh(x @ w) * 3
    assert len(found) == 3


def test_a_broken_layer_of_a_stack_is_the_worst():
    int8 = jint8.quantize_params({"kernel": STACK}, plan=jint8.plan(scanned, {"kernel": STACK}, X))
    scale = int8["kernel"].scale
    int8 = {"kernel": dataclasses.replace(int8["kernel"], scale=scale.at[1].multiply(1.1))}
    found = jint8.check(scanned, {"kernel": STACK}, X, int8=int8)
    assert found.products[0].path == "kernel[1]"
    assert found.products[0].error == pytest.approx(0.1, rel=0.2)


def test_rearranged_weights():
    """Slices of the contracted axis are products of their own; their sums make up the error."""
    found = jint8.check(rearranged, {"kernel": STACK}, X)
    w = np.moveaxis(STACK, 0, 1).reshape(K, -1)
    error = reference = 0.0
    halves = ((X[:, : K // 2], w[: K // 2]), (X[:, K // 2 :], w[K // 2 :]))
    q = oracle.quantize(w.astype(np.float64))
    for rows, (x, part) in zip((slice(0, K // 2), slice(K // 2, K)), halves, strict=True):
        got, _ = oracle.matmul(x.astype(np.float64), q._replace(q=q.q[rows]))
        error += np.sum((got - np.float64(x) @ part) ** 2)
        reference += np.sum((np.float64(x) @ part) ** 2)
    (product,) = found.products
    assert product.error == pytest.approx(np.sqrt(error / reference), rel=1e-2)


def test_ragged_products():
    sizes = np.array([4, 0, 3], np.int32)  # and two rows behind the last group

    def run(params, x):
        return jax.lax.ragged_dot(x, params["experts"], sizes)

    found = jint8.check(run, {"experts": STACK}, X)
    groups = {0: X[:4], 2: X[4:7]}
    for expert, x in groups.items():
        got = by_path(found)[f"experts[{expert}]"].error
        assert got == pytest.approx(expected_error(x, STACK[expert]), rel=0.3)  # outlier columns are the call's
    assert found.products[0].implementations == ("xla_digits",)


def test_linen_layers_and_bias():
    module = nn.Sequential([nn.Dense(N, bias_init=nn.initializers.constant(100.0)), nn.relu, nn.Dense(K)])
    params = module.init(jax.random.key(0), X)
    found = by_path(jint8.check(module.apply, params, X))
    kernel = params["params"]["layers_0"]["kernel"]
    assert found["layers_0/kernel"].error == pytest.approx(
        expected_error(X, kernel), rel=1e-2
    )  # not hidden by the bias


@pytest.mark.first_case
@pytest.mark.parametrize("preset", ["static", "rotated", "w4"])
def test_presets(preset):
    found = jint8.check(model, PARAMS, X, config=jint8.Config.preset(preset))
    assert found.ran_int8 == (preset != "w4")
    assert len(found.products) == 2
    for product in found.products:
        assert 1e-4 < product.error < (0.3 if preset == "w4" else 0.05)
        assert product.weight_error > 1e-4


def test_which_implementation_ran(monkeypatch):
    monkeypatch.setenv("JINT8_NATIVE", "named")
    said = []
    for rows in (1, 2, 3):
        found = jint8.check(lambda params, x: x @ params["w"], {"w": normal(K, 64)}, normal(rows, K))
        said += found.products[0].implementations
        assert found.to_dict()["implementations"] == {f"XLA ({said[-1]})": 1}
    assert said == ["xla_row", "xla_digits", "xla_gather"]


@pytest.mark.first_case
@pytest.mark.parametrize("name", ["triton", "mosaic"])
def test_kernels_by_name(name):
    w = jint8.quantize(normal(N, 32), contract_axes=(1,))
    run = lambda params, x: jint8.matmul(x, params["w"], implementation=name)
    found = jint8.check(run, {"w": w}, normal(16, 32))
    assert found.products[0].implementations == (name,)
    assert found.ran_int8
    assert f"1 by {name.capitalize()}" in str(found)
    assert found.products[0].error < 0.05


def test_asked_again_it_says_the_same():
    assert jint8.check(model, PARAMS, X) == jint8.check(model, PARAMS, X)


def test_what_stays_in_floating_point_is_named():
    params = {"embedding": normal(10, K), "up": UP, "lm_head": normal(N, 10), "gain": normal(K, 1), "bias": normal(N)}

    def run(params, tokens):
        return ((params["embedding"][tokens] * params["gain"][:, 0]) @ params["up"] + params["bias"]) @ params[
            "lm_head"
        ]

    tokens = np.arange(8)
    assert jint8.check(run, params, tokens).skipped == {
        "embedding": "embedding lookup",
        "lm_head": "an output head, which stays in floating point unless include= names it",
    }
    assert jint8.check(run, params, tokens, include="lm_head").skipped.keys() == {"embedding"}
    skipped = jint8.check(run, params, tokens, skip="up")
    assert skipped.skipped["up"] == "left out by skip="
    assert not skipped.ran_int8
    assert "0 of 0 compared products ran in int8" in str(skipped)


def test_products_that_are_not_seen_are_named():
    run = lambda params, x: jnp.argmax(x @ params["up"], axis=-1)
    found = jint8.check(run, {"up": UP}, X)
    assert not found.products
    assert "doesn't depend on its products" in found.skipped["up"]


def test_a_product_that_is_not_finite_comes_first():
    x = np.where(np.arange(K) == 3, np.nan, X)
    params = {"first": normal(K, K), "second": normal(K, K, seed=1)}
    run = lambda params, x: (X @ params["first"], x @ params["second"])
    found = jint8.check(run, params, x)
    assert found.products[0].path == "second"
    assert np.isnan(found.products[0].error)


def test_zeros_are_no_error():
    found = jint8.check(model, {"up": UP * 0, "down": DOWN}, X)
    assert {product.error for product in found.products} == {0.0}
    assert found.error == 0


def test_bad_arguments():
    int8 = jint8.quantize_params({"up": UP}, plan={"up": (0,)})
    with pytest.raises(TypeError, match="Expected apply_fn to be callable, got int"):
        jint8.check(1, PARAMS, X)
    with pytest.raises(ValueError, match=r"Expected int8 to be the quantized params, with down of shape"):
        jint8.check(model, PARAMS, X, int8=int8)
