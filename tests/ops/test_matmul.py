"""The int8 product against the float64 oracle. A new implementation is one more entry in IMPLEMENTATIONS."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from matmul_cases import BEYOND_INT32, CASES, EXACT, NOT_FINITE, SHAPES, VALUES

import jint8
from jint8._core.qtensor import contract_last
from jint8._ops.xla.many_rows import largest_wide_digit

# name for `implementation=`, and whether it quantizes activations
IMPLEMENTATIONS = {"xla_digits": True, "xla_gather": True, "triton": True, "dequantize": False}
INT8 = [name for name, quantizes in IMPLEMENTATIONS.items() if quantizes]
XLA = ["xla_digits", "xla_gather"]

every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
int8_implementations = pytest.mark.parametrize("implementation", INT8)
jitted = functools.partial(jax.jit, jint8.matmul, static_argnames=("config", "implementation"))
optimized = jitted()
# an interpreted kernel is a large program that runs once
quick = jitted(compiler_options={"xla_backend_optimization_level": 0})


def matmul(*args, implementation=None, **kwargs):
    return (quick if implementation == "triton" else optimized)(*args, implementation=implementation, **kwargs)


@functools.cache
def quantized(name, config, n_k):
    w = jint8.quantize(CASES[name].w, config=config)
    return contract_last(w, (0,)) if n_k else w


def check(name, implementation, *, config=None, dtype=jnp.float32, n_k=True, bias=None, shift=0):
    """Quantizes and multiplies with the library and with the oracle, and compares."""
    case = CASES[name]
    config = config or jint8.Config(threshold=case.threshold)
    x = jnp.asarray(case.x + np.float32(shift), dtype)
    bias = None if bias is None else jnp.asarray(bias, dtype)
    got = matmul(x, quantized(name, config, n_k), bias=bias, implementation=implementation)
    assert (got.shape, got.dtype) == ((*case.x.shape[:-1], case.w.shape[1]), dtype)

    scheme = config.scheme if IMPLEMENTATIONS.get(implementation, True) else "none"
    rows = case._replace(x=np.asarray(x, np.float32)).rows
    weight = oracle.quantize(case.w, scheme=config.scheme)
    exact, bound = oracle.matmul(rows, weight, scheme, config.threshold, config.outliers, bias)
    oracle.assert_close(np.asarray(got).reshape(exact.shape), exact, bound, case.bad_rows)


@every_implementation
@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name, implementation):
    check(name, implementation)


@pytest.mark.first_case
@pytest.mark.parametrize("implementation", [None, *IMPLEMENTATIONS], ids=str)
@pytest.mark.parametrize("name", VALUES)
def test_values(name, implementation):
    check(name, implementation)


@pytest.mark.first_case
@int8_implementations
@pytest.mark.parametrize("name", [*VALUES, NOT_FINITE])
def test_values_by_token(name, implementation):
    check(name, implementation, config=jint8.Config(outliers="token"))


@int8_implementations
@pytest.mark.parametrize(
    ("name", "n_k"), [*((name, True) for name in EXACT), ("k=300_outliers=1", False), ("k=16384_extreme", False)]
)
def test_integers_are_exact(name, n_k, implementation):
    case = CASES[name]
    w = quantized(name, jint8.Config(threshold=case.threshold), n_k)
    assert (np.asarray(w.scale) == 1).all()
    got = np.asarray(matmul(case.x, w, implementation=implementation), np.float64)
    # the kernels' outliers have steps of 1 here; those of three digits are below 1 and rounded at the end
    rtol = 4 * oracle.ROUNDING if "outliers" in name and implementation in XLA else 0
    np.testing.assert_allclose(got, case.x.astype(np.float64) @ case.w.astype(np.float64), rtol=rtol)


@pytest.mark.first_case
@int8_implementations
@pytest.mark.parametrize("name", BEYOND_INT32)
def test_sums_beyond_int32(name, implementation):
    case = CASES[name]
    w = quantized(name, jint8.Config(threshold=case.threshold), True)
    if implementation == "triton":
        with pytest.raises(NotImplementedError, match="exceed int32"):
            matmul(case.x, w, implementation=implementation)
        return
    got = np.asarray(matmul(case.x, w, implementation=implementation), np.float64)
    np.testing.assert_allclose(got, case.x.astype(np.float64) @ case.w.astype(np.float64), rtol=4 * oracle.ROUNDING)


@pytest.mark.first_case
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("implementation", [None, *INT8], ids=str)
def test_integers_down_to_minus_128(rows, implementation):
    """Which jint8 doesn't make, and checkpoints of others have."""
    rng = np.random.default_rng(0)
    q = rng.integers(-128, 128, (8, 96)).astype(np.int8)
    q[0], scale = -128, rng.uniform(0.5, 2, (8, 1)).astype(np.float32)
    x = rng.standard_normal((rows, 96)).astype(np.float32)
    x[:, 5] *= 30
    w = jint8.QTensor(q=jnp.asarray(q), scale=jnp.asarray(scale), order=(1, 0))
    for config in (jint8.Config(), jint8.Config(scheme="vector")):
        got = matmul(x, w, config=config, implementation=implementation)
        weight = oracle.Quantized(*(np.asarray(a, np.float64).T for a in (q, scale, 0 * scale)))
        exact, bound = oracle.matmul(x, weight, config.scheme, config.threshold, config.outliers)
        oracle.assert_close(np.asarray(got), exact, bound)


@pytest.mark.parametrize("k", [1, 8000, 8300, 32_768, 100_000])
def test_wide_digits_fit(k):
    assert 0 < largest_wide_digit(k) * 128 * k < 2**31


@pytest.mark.first_case
@every_implementation
@pytest.mark.parametrize(("n_k", "bias"), [(True, True), (False, False)], ids=["[n,k]_bias", "[k,n]"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32], ids=lambda d: np.dtype(d).name)
def test_dtypes_and_orders(dtype, n_k, bias, implementation):
    bias = np.linspace(-3, 3, VALUES["few_outliers"].w.shape[1]) if bias else None
    check("few_outliers", implementation, dtype=dtype, n_k=n_k, bias=bias)


def test_bias_is_added_before_the_one_rounding():
    # 257 isn't a bfloat16: rounded before the bias it would be 256, and 256 - 1 = 255
    w = jint8.quantize(jnp.ones((257, 1)))
    y = jint8.matmul(jnp.ones((3, 257), jnp.bfloat16), w, bias=jnp.array([-1.0]))
    np.testing.assert_array_equal(np.asarray(y, np.float32), 256)


@pytest.mark.parametrize("scheme", [s for s in oracle.SCHEMES if s != "none"])
def test_schemes(scheme):
    decomposes = oracle.SCHEMES[scheme][3]
    for implementation in XLA if decomposes else [None]:
        for mode in ("batch", "token") if decomposes else ("batch",):
            config = jint8.Config(scheme=scheme, outliers=mode)
            check("few_outliers", implementation, config=config, shift=1.5)  # off centre: zero points matter


@pytest.mark.parametrize(("w_scheme", "x_scheme"), [*(("vector-zp", s) for s in oracle.SCHEMES), ("row", "vector-zp")])
def test_config_of_the_call_wins(w_scheme, x_scheme):
    case = VALUES["few_outliers"]
    w = quantized("few_outliers", jint8.Config(scheme=w_scheme), n_k=False)
    got = matmul(case.x, w, config=jint8.Config(scheme=x_scheme, threshold=40.0))
    exact, bound = oracle.matmul(case.x, oracle.quantize(case.w, scheme=w_scheme), x_scheme, threshold=40.0)
    oracle.assert_close(got, exact, bound)


@pytest.mark.first_case
@int8_implementations
def test_an_outlier_is_off_by_little_of_the_largest(implementation):
    x = np.random.default_rng(0).uniform(6, 3000, (512, 8)).astype(np.float32)
    w = jint8.quantize(np.eye(8, dtype=np.float32) * 127)  # scale 1, each outlier comes out alone
    error = abs(np.asarray(matmul(x, w, implementation=implementation), np.float64) / 127 - x)
    allowed = 2.0**-22 if implementation in XLA else oracle.OUTLIER_ERROR  # three digits, or 16 bits
    assert (error <= allowed * x.max(1, keepdims=True)).all()


@pytest.mark.first_case
@int8_implementations
def test_outlier_columns_take_no_part_in_the_scale(implementation):
    x = np.full((2, 16), 0.5, np.float32)
    x[0, 0], x[1, 0] = 100, 5.9  # below the threshold, but in an outlier column
    w = jint8.quantize(np.eye(16, dtype=np.float32))
    got = np.asarray(matmul(x, w, implementation=implementation))
    np.testing.assert_allclose(got[:, 1:], 0.5, rtol=1e-6)


def test_the_paths_agree_and_none_is_one_of_them(monkeypatch):
    monkeypatch.setenv("JINT8_NATIVE", "named")
    case, w = VALUES["few_outliers"], quantized("few_outliers", jint8.Config(), True)
    digits, gather, none, xla = (matmul(case.x, w, implementation=name) for name in [*XLA, None, "xla"])
    np.testing.assert_array_equal(none, gather)
    np.testing.assert_array_equal(xla, gather)
    np.testing.assert_allclose(digits, gather, rtol=0, atol=3e-6 * np.max(np.abs(gather)))  # other digits of outliers


def test_more_outlier_columns_than_fit_into_one_block_or_one_sum():
    """Two columns differ, all others are outliers too: exact, whatever else is gathered."""
    m, k, n = 4, 40_000, 8
    rng = np.random.default_rng(0)
    x = np.zeros((m, k), np.float32)
    x[0, ::3], x[1, 5], x[1, 39_999] = 7.0, 3000.0, -6.25
    q = rng.integers(-127, 128, (n, k))
    q[:, 0] = 127
    w = jint8.quantize(q.astype(np.float32), contract_axes=(1,), config=jint8.Config(outliers="token"))
    together = matmul(x, w, implementation="xla_gather")
    expected = x.astype(np.float64) @ q.T
    step = 3000 / 2**19 / 2
    np.testing.assert_allclose(together[1], expected[1], rtol=1e-6, atol=2 * 127 * step)
    np.testing.assert_allclose(together[0], expected[0], rtol=1e-5, atol=1e-6 * np.abs(x[0]).sum() * 127)
    x[0] = 0
    np.testing.assert_array_equal(matmul(x, w, implementation="xla_gather")[1], together[1])
