"""Stacked experts: one scale per expert and channel, by einsum and by ragged_dot."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import linen as nn

import jint8
from jint8._core.qtensor import contract_last

K, N = 32, 8
W = cases.normal(3, K, N) * jnp.array([0.1, 1.0, 10.0])[:, None, None]
X = cases.normal(10, K, seed=1)
SIZES = jnp.array([4, 0, 5])  # the last row belongs to no expert


def reference(x, w, sizes):
    """float64, a loop over experts."""
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    out, start = np.zeros((len(x), w.shape[2])), 0
    for expert, size in enumerate(np.asarray(sizes)):
        out[start : start + size] = x[start : start + size] @ w[expert]
        start += size
    return out


@pytest.fixture(params=["contracted last", "order kept"])
def order(request):
    return lambda w: contract_last(w, (1,), (0,)) if request.param == "contracted last" else w


def test_one_scale_per_expert_and_channel():
    int8 = jint8.quantize_params({"w": W}, plan={"w": (1,)}, config=jint8.Config(scheme="vector"))
    assert sorted(int8["w"].scale.shape) == [1, 3, N]


@pytest.mark.first_case
@pytest.mark.parametrize("scheme", [name for name in oracle.SCHEMES if name != "none"])
def test_ragged_dot(scheme, order):
    config = jint8.Config(scheme=scheme)
    w = order(jint8.quantize(W, contract_axes=(1,), stack_axes=(0,), config=config))
    got = jax.jit(jint8.ragged_dot)(X, w, SIZES)
    want = reference(X, W, SIZES)
    for rows in (slice(0, 4), slice(4, 9)):  # experts are 100 times apart: each on its own
        assert cases.relative_error(got[rows], want[rows]) < 0.04
    assert jnp.all(got[9:] == 0)


def test_ragged_dot_equals_matmul_of_each_expert(order):
    """Where all rows belong to one expert, the integers are those of `jint8.matmul`."""
    x = cases.plant(X)
    w = order(jint8.quantize(W, contract_axes=(1,)))
    for expert in range(3):
        sizes = jnp.zeros(3, int).at[expert].set(10)
        want = jint8.matmul(x, jint8.quantize(W[expert]))
        assert cases.relative_error(jint8.ragged_dot(x, w, sizes), want) < 1e-6


def test_ragged_dot_of_planted_outliers(order):
    x = cases.plant(X)
    w = order(jint8.quantize(W, contract_axes=(1,)))
    want = reference(x, W, SIZES)
    errors = [
        cases.relative_error(jint8.ragged_dot(x, w, SIZES, config=jint8.Config(threshold=t)), want) for t in (6.0, 0.0)
    ]
    assert 1.5 * errors[0] < errors[1]


def test_ragged_dot_without_quantized_activations(order):
    w = order(jint8.quantize(W, contract_axes=(1,)))
    got = jint8.ragged_dot(X, w, SIZES, config=jint8.Config(scheme="none"))
    assert cases.relative_error(got, reference(X, w.dequantize(), SIZES)) < 1e-6


def test_ragged_dot_rows_of_no_expert_change_nothing(order):
    w = order(jint8.quantize(W, contract_axes=(1,)))
    x = X.at[9].set(jnp.nan)
    assert jnp.array_equal(jint8.ragged_dot(x, w, SIZES), jint8.ragged_dot(X, w, SIZES))
    assert not jnp.isfinite(jint8.ragged_dot(X.at[2].set(jnp.nan), w, SIZES)[2]).any()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_ragged_dot_dtype(dtype, order):
    w = order(jint8.quantize(W.astype(dtype), contract_axes=(1,)))
    got = jint8.ragged_dot(X.astype(dtype), w, SIZES)
    assert got.dtype == dtype
    assert cases.relative_error(got, reference(X, W, SIZES)) < 0.02


def test_ragged_dot_gradient(order):
    w = order(jint8.quantize(W, contract_axes=(1,)))
    loss = lambda x: jnp.sum(jint8.ragged_dot(x, w, SIZES) * jnp.arange(N))
    got = jax.grad(loss)(X)
    assert cases.relative_error(got[:4], jnp.broadcast_to(w.dequantize()[0] @ jnp.arange(N), (4, K))) < 1e-5
    assert jnp.all(got[9:] == 0)


def test_ragged_dot_int8_products():
    w = jint8.quantize(W, contract_axes=(1,))
    run = lambda config: cases.count_int8_products(lambda x: jint8.ragged_dot(x, w, SIZES, config=config), X)
    assert run(jint8.Config(threshold=0.0)) == 1
    assert run(jint8.Config()) == 4  # the regular part and three digits of the outliers


@pytest.mark.parametrize(
    ("lhs", "rhs", "sizes", "error"),
    [
        pytest.param(jnp.ones((2, K), int), W, SIZES, TypeError, id="integer activations"),
        pytest.param(X, None, SIZES, TypeError, id="float experts"),
        pytest.param(X, W, jnp.ones(3), TypeError, id="float sizes"),
        pytest.param(X[:, :4], W, SIZES, ValueError, id="another k"),
        pytest.param(X, W, SIZES[:2], ValueError, id="too few sizes"),
        pytest.param(X[0], W, SIZES, ValueError, id="a vector"),
    ],
)
def test_ragged_dot_bad_arguments(lhs, rhs, sizes, error):
    rhs = W if rhs is None else jint8.quantize(rhs, contract_axes=(1,))
    with pytest.raises(error, match="Expected"):
        jint8.ragged_dot(lhs, rhs, sizes)


def test_ragged_dot_of_another_axis():
    with pytest.raises(ValueError, match="quantized over axis 1"):
        jint8.ragged_dot(X, jint8.quantize(W, contract_axes=(2,)), SIZES)


def test_experts_by_einsum_in_a_linen_model():
    class Experts(nn.Module):
        """Every expert on every token, as dense mixtures do it."""

        @nn.compact
        def __call__(self, x):
            return jnp.einsum("td,edf->etf", x, self.param("w", lambda *_: W))

    module = Experts()
    floats, int8, plan = cases.quantize_linen(module, X)
    assert plan["w"] == (1,)
    from jint8.linen import _registry

    handlers = dict(_registry._HANDLERS)
    try:
        jint8.linen.register(Experts, lambda module, x: jint8.einsum("td,edf->etf", x, jint8.linen.param(module, "w")))
        got, want = jint8.apply(module.apply)(int8, X), module.apply(floats, X)
    finally:
        _registry._HANDLERS.clear()
        _registry._HANDLERS.update(handlers)
    for expert in range(3):
        assert cases.relative_error(got[expert], want[expert]) < 0.02
