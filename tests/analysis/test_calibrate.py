"""Statistics of activations against NumPy, out of every transformation; the criteria on them."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jint8
from jint8._core.config import Config
from jint8._ops.observe import Seen
from jint8.analysis._calibrate import statistics
from jint8.analysis._criteria import Criteria, choose

LAYERS, K, M = 3, 6, 10


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def expected(x, threshold=2.0, relative=False):
    """`Seen` of activations `[..., k]`."""
    x = np.abs(np.asarray(x, np.float64)).reshape(-1, x.shape[-1])
    over = x >= (threshold * x.mean(1, keepdims=True) if relative else threshold)
    return Seen(np.full(x.shape[1], len(x)), over.sum(0), (x * over).sum(0), (x**2).sum(0), x.max(0))


def assert_seen(got, *layers):
    want = Seen(*np.stack(layers, 1)) if len(layers) > 1 else layers[0]
    for name, a, b in zip(Seen._fields, got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, err_msg=name)


X, W = 2 * normal(M, K), normal(K, 4, seed=1)
STACK = normal(LAYERS, K, K, seed=2) / 2
COUNTED = Config(threshold=2.0)


def activations():
    """What each layer of `scanned` gets."""
    xs = [X]
    for w in STACK[:-1]:
        xs.append(np.tanh(xs[-1] @ w) * 3)
    return xs


def scanned(params, x, wrap=lambda f: f):
    def layer(x, w):
        product = jint8.matmul(x, w) if isinstance(w, jint8.QTensor) else x @ w
        return jnp.tanh(product) * 3, None

    return jax.lax.scan(wrap(layer), x, params["kernel"])[0]


def test_several_batches_add_up():
    apply = lambda params, x: jint8.matmul(x, params["kernel"])
    int8 = {"kernel": jint8.quantize(W)}
    for counted in (COUNTED, Config(threshold=1.5, relative=True)):
        got = statistics(apply, int8, [X[:4], (X[4:],)], counted=counted)["kernel"]
        assert_seen(got, expected(X, counted.threshold, counted.relative))


@pytest.mark.parametrize("wrap", [lambda f: f, jax.checkpoint], ids=["scan", "scan_remat"])
def test_layers_of_a_scan(wrap):
    plan = jint8.plan(scanned, {"kernel": STACK}, X)
    run = lambda params, x: scanned(params, x, wrap)
    for given in (plan, dict(plan)):  # what a plain mapping doesn't say is found by tracing
        got = statistics(run, {"kernel": jnp.asarray(STACK)}, [X], counted=COUNTED, plan=given)["kernel"]
        assert_seen(got, *map(expected, activations()))
    int8 = jint8.quantize_params({"kernel": STACK}, plan=plan, config=Config(scheme="vector", digits=2))
    got = statistics(run, int8, [X], counted=COUNTED)["kernel"]
    np.testing.assert_allclose(got.square_sum, np.stack([expected(x).square_sum for x in activations()]), rtol=0.05)


@pytest.mark.parametrize("subscripts", ["med,edn->men", "dme,edn->emn"])
def test_experts(subscripts):
    experts = jint8.quantize(STACK, contract_axes=(1,), stack_axes=(0,))
    x = normal(*[dict(m=M, e=LAYERS, d=K)[label] for label in subscripts.split(",")[0]], seed=3)
    run = lambda params, x: jint8.einsum(subscripts, x, params["w"])
    got = statistics(run, {"w": experts}, [x], counted=COUNTED)["w"]
    by_expert = np.einsum(f"{subscripts.split(',')[0]}->emd", x)
    assert_seen(got, *map(expected, by_expert))


def test_sorted_experts():
    experts = jint8.quantize(STACK, contract_axes=(1,), stack_axes=(0,))
    sizes = jnp.array([3, 0, 6])  # and a row behind the last group
    run = lambda params, x: jint8.ragged_dot(x, params["w"], sizes)
    plan = jint8.Plan({"w": (1,)}, {"w": (0,)})
    got = statistics(run, {"w": experts}, [X], counted=COUNTED, plan=plan)["w"]
    for e, rows in enumerate([X[:3], X[:0], X[3:9]]):
        np.testing.assert_array_equal(got.positions[e], len(rows))
        np.testing.assert_array_equal(got.outliers[e], (abs(rows) >= 2).sum(0))
        np.testing.assert_allclose(got.square_sum[e], (rows**2).sum(0), rtol=1e-5)


def test_heads_and_vmap():
    w = jint8.quantize(normal(2, 3, 4), contract_axes=(0, 1))
    x = 2 * normal(5, M, 2, 3)
    run = lambda params, x: jax.vmap(lambda x: jint8.einsum("mhd,hdn->mn", x, params["w"]))(x)
    got, want = statistics(run, {"w": w}, [x], counted=COUNTED)["w"], expected(x.reshape(-1, 6))
    assert_seen(got._replace(largest=want.largest), want)
    np.testing.assert_allclose(got.largest, abs(x).max(1).mean(0).reshape(-1), rtol=1e-6)


def test_a_plain_function():
    """Its own products, of float weights or of int8 ones."""
    run = lambda params, x: jnp.tanh(x @ params["w"])
    for w in (W, jint8.quantize(W)):
        assert_seen(statistics(run, {"w": w}, [X], counted=COUNTED)["w"], expected(X))


def test_a_weight_that_is_used_twice():
    run = lambda params, x: jint8.matmul(x, params["w"]) + jint8.matmul(2 * x, params["w"])
    got = statistics(run, {"w": jint8.quantize(W)}, [X], counted=COUNTED)["w"]
    both = expected(np.concatenate([X, 2 * X]))
    assert_seen(got._replace(largest=both.largest), both)
    np.testing.assert_allclose(got.largest, 1.5 * abs(X).max(0), rtol=1e-6)


def layer(*outliers, positions=100, square=None):
    outliers = np.array(outliers, float)
    return Seen(np.full_like(outliers, positions), outliers, outliers * 7, np.array(square or outliers), outliers)


SEEN = {  # dimensions: everywhere, in one layer of four, in two but seldom, nowhere
    f"layers_{i}/up/kernel": layer(90, 50 if i == 0 else 0, 1 if i < 2 else 0, 0, square=[1, 5, i, 2]) for i in range(4)
}


@pytest.mark.parametrize(
    ("criteria", "chosen"),
    [
        ({}, [0, 1]),
        ({"layer_share": 0.3}, [0]),
        ({"position_share": 0.0}, [0, 1, 2]),
        ({"position_share": 0.6}, [0]),
        ({"layer_share": 0, "position_share": 0}, [0, 1, 2]),
    ],
)
def test_criteria(criteria, chosen):
    found = choose(SEEN, Criteria(**criteria))
    assert list(found) == list(SEEN)
    assert all(columns.tolist() == chosen for columns in found.values())


def test_other_projections_are_judged_by_themselves():
    found = choose(SEEN | {"layers_0/down/kernel": layer(0, 0, 99, 0)})
    assert found["layers_0/down/kernel"].tolist() == [2]
    assert found["layers_0/up/kernel"].tolist() == [0, 1]


def test_budget():
    found = choose(SEEN, Criteria(budget=2))
    assert [columns.tolist() for columns in found.values()] == [[1, 3], [1, 3], [1, 2], [1, 2]]
    assert [columns.tolist() for columns in choose(SEEN, Criteria(budget=0.25)).values()] == [[1]] * 4
    assert choose(SEEN, Criteria(budget=99))["layers_0/up/kernel"].tolist() == [0, 1, 2, 3]
    assert choose(SEEN, Criteria(budget=0.1))["layers_0/up/kernel"].tolist() == []


def test_budget_of_stacked_layers():
    seen = {"kernel": Seen(*(np.stack(a) for a in zip(*SEEN.values(), strict=True)))}
    assert choose(seen, Criteria(budget=1))["kernel"].tolist() == [[1], [1], [1], [1]]
    assert choose(seen)["kernel"].tolist() == [0, 1]


def test_calibrated_columns_make_the_product_better():
    params = {"a": {"kernel": normal(64, 32)}}
    apply = lambda params, x: jint8.matmul(x, params["a"]["kernel"])
    x = normal(8, 64, seed=4)
    x[:, [5, 9]] *= 50
    found = jint8.calibrate(apply, jint8.quantize_params(params), [x])
    assert found["a/kernel"].tolist() == [5, 9]
    exact = x.astype(np.float64) @ params["a"]["kernel"]
    int8, static = jint8.quantize_params(params), jint8.quantize_params(params, outliers=found)
    error = lambda tree: np.linalg.norm(apply(tree, x) - exact)
    assert error(static) < error(int8) / 5
    assert jint8.calibrate(apply, static, [x])["a/kernel"].tolist() == [5, 9]


WHAT_COUNTS = ["threshold", "relative"]
WHICH_DIMENSIONS = ["layer_share", "position_share", "budget"]
WHICH_WEIGHTS = ["plan", "skip", "include"]


@pytest.mark.parametrize(
    ("function", "options"),
    [
        (jint8.calibrate, [*WHAT_COUNTS, *WHICH_DIMENSIONS, *WHICH_WEIGHTS, "moments"]),
        (jint8.nnx.calibrate, [*WHAT_COUNTS, *WHICH_DIMENSIONS, *WHICH_WEIGHTS, "moments", "call"]),
        (jint8.analysis.outlier_statistics, [*WHAT_COUNTS, *WHICH_WEIGHTS]),
        (jint8.nnx.statistics, [*WHAT_COUNTS, *WHICH_WEIGHTS, "call"]),
    ],
    ids=lambda value: f"{value.__module__}.{value.__name__}" if callable(value) else "",
)
def test_one_order_of_arguments(function, options):
    parameters = inspect.signature(function).parameters.values()
    assert [p.name for p in parameters if p.kind is p.KEYWORD_ONLY] == options


PLAIN = {"kernel": jint8.quantize(W)}
ERRORS = {
    "not_a_function": (lambda: jint8.calibrate(3, PLAIN, [X]), TypeError, "Expected apply_fn to be callable, got int"),
    "no_batches": (lambda: jint8.calibrate(len, PLAIN, []), ValueError, "Expected at least one batch, got none"),
    "layer_share": (
        lambda: jint8.calibrate(len, PLAIN, [X], layer_share=2),
        ValueError,
        r"Expected layer_share to be in \[0, 1\], got 2",
    ),
    "budget": (
        lambda: jint8.calibrate(len, PLAIN, [X], budget=1.5),
        ValueError,
        "Expected budget to be a whole number of columns, or a share below 1, got 1.5",
    ),
    "threshold": (
        lambda: jint8.calibrate(len, PLAIN, [X], threshold=-1),
        ValueError,
        "Expected threshold to be finite and at least 0",
    ),
    "no_projections": (
        lambda: jint8.calibrate(lambda params, x: x + params["b"], {"b": np.ones(K, np.float32)}, [X]),
        ValueError,
        "Expected parameters with projections, got none",
    ),
    "not_differentiable": (
        lambda: jint8.calibrate(lambda p, x: jax.lax.stop_gradient(jint8.matmul(x, p["kernel"])), PLAIN, [X]),
        ValueError,
        "Expected a result that depends on every projection by differentiable operations, got none of kernel",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), ERRORS.values(), ids=ERRORS)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
