"""Weights to int8 and back, against the float64 oracle and by property."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jint8

SCHEMES = [name for name in oracle.SCHEMES if name != "none"]


def normal(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    ("shape", "axes", "stack"),
    [((37, 13), (0,), ()), ((5, 6, 7), (0, 1), ()), ((6, 5, 7), (-1,), (0,)), ((6, 5), (1,), ())],
    ids=str,
)
def test_integers_scales_and_zeros(shape, axes, stack, scheme):
    w = normal(*shape) + 0.3
    got = jint8.quantize(w, contract_axes=axes, stack_axes=stack, config=jint8.Config(scheme=scheme))
    expected = oracle.quantize(w, axes, scheme, stack)
    kept = tuple(1 if a in {b % len(shape) for b in axes} else size for a, size in enumerate(shape))
    assert (got.q.dtype, got.scale.dtype, got.scale.shape) == (jnp.int8, jnp.float32, kept)
    np.testing.assert_array_equal(got.q, expected.q)
    np.testing.assert_array_equal(got.scale, np.broadcast_to(expected.scale, kept))
    assert (got.zero is not None) == oracle.SCHEMES[scheme][2]
    if got.zero is not None:
        np.testing.assert_array_equal(got.zero, np.broadcast_to(expected.zero, kept))
        assert (got.zero.dtype, got.zero.shape) == (jnp.float32, kept)


def test_ties_round_to_even():
    w = np.array([[127, 0.5, 1.5, 2.5, -0.5, -1.5]], np.float32)
    np.testing.assert_array_equal(jint8.quantize(w, contract_axes=1).q[0], [127, 0, 2, 2, 0, -2])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=lambda d: np.dtype(d).name)
def test_half_the_largest_weight_is_divided_not_multiplied_by_a_reciprocal(dtype):
    """Its quotient is next to 63.5, where the reciprocal's rounding decides between two integers."""
    for largest in np.linspace(1, 2, 30):
        w = np.stack([np.full(8, largest), np.full(8, -largest / 2)]).astype(dtype)
        expected = oracle.quantize(w.astype(np.float32), scheme="llm.int8")
        np.testing.assert_array_equal(jint8.quantize(w).q, expected.q)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32], ids=lambda d: np.dtype(d).name)
def test_dtype_is_remembered(dtype):
    w = jint8.quantize(np.ones((3, 2), dtype))
    assert w.dtype == w.dequantize().dtype == dtype
    assert jint8.dequantize(w, jnp.float16).dtype == jnp.float16


def test_float64_is_what_jax_makes_of_it():
    w = np.ones((3, 2))
    assert jint8.quantize(w).dtype == jint8.quantize(w).dequantize().dtype == jnp.float32
    with jax.enable_x64(True):
        assert jint8.quantize(w).dtype == jint8.quantize(w).dequantize().dtype == jnp.float64


values = st.floats(-(2.0**127), 2.0**127, width=32, allow_subnormal=False)


@settings(deadline=None, max_examples=100)
@given(st.lists(values, min_size=12, max_size=12), st.sampled_from(["llm.int8", "vector-zp", "absmax", "zeropoint"]))
def test_dequantize_is_within_half_a_step(values, scheme):
    w = np.array(values, np.float32).reshape(4, 3)
    qt = jint8.quantize(w, config=jint8.Config(scheme=scheme))
    half = np.asarray(qt.scale, np.float64) / 2
    flushed = 255 * np.finfo(np.float32).tiny  # a range whose step would be subnormal becomes 0
    error = abs(np.asarray(qt.dequantize(), np.float64) - w)
    assert (error <= half + 4 * oracle.ROUNDING * (abs(w) + 255 * half) + flushed).all()


@pytest.mark.parametrize("scheme", ["llm.int8", "absmax"])
def test_quantizing_again_changes_nothing(scheme):
    config = jint8.Config(scheme=scheme)
    once = jint8.quantize(normal(64, 32), config=config)
    twice = jint8.quantize(once.dequantize(), config=config)
    np.testing.assert_array_equal(once.q, twice.q)
    np.testing.assert_allclose(once.scale, twice.scale, rtol=1e-6)


@pytest.mark.first_case
@pytest.mark.parametrize("scheme", SCHEMES)
def test_zero_channels_give_zeros(scheme):
    w = normal(8, 3)
    w[:, 1] = 0
    for weight in (w, 0 * w):
        got = np.asarray(jint8.quantize(weight, config=jint8.Config(scheme=scheme)).dequantize())
        np.testing.assert_array_equal(got[:, 1], 0)
        assert np.isfinite(got).all()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("size", [3e38, 1e-30, 1e-37, 1e-42], ids="size={}".format)
def test_extreme_weights(size, scheme):
    w = (size * np.array([[1, -0.5], [-1, 1], [0.25, 0]])).astype(np.float32)
    got = np.asarray(jint8.quantize(w, config=jint8.Config(scheme=scheme)).dequantize(), np.float64)
    # steps below the smallest normal float32 are taken as 0
    assert (abs(got - w) <= size / 127 + 255 * np.finfo(np.float32).tiny).all()


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (1, 1)], ids=str)
def test_empty_and_single(shape):
    w = jint8.quantize(jnp.ones(shape))
    np.testing.assert_allclose(w.dequantize(), np.ones(shape), rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("scheme", ["llm.int8", "vector-zp", "absmax"])
def test_non_finite_weights(bad, scheme):
    w = normal(2048, 3)  # long: a float maximum loses NaN there
    w[1000, 1] = bad
    for weight, axis in ((w, 0), (w.T, 1)):
        with pytest.raises(ValueError, match="Expected finite weights, got NaN or infinity"):
            jint8.quantize(weight, contract_axes=axis, config=jint8.Config(scheme=scheme))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: jint8.quantize(jnp.ones((2, 2), jnp.int32)), TypeError, "Expected w to be a float array, got int32"),
        (lambda: jint8.quantize([1.0]), TypeError, "Expected w to be a float array, got list"),
        (lambda: jint8.quantize(jnp.ones((2, 2)), config="row"), TypeError, "Expected config .* got str"),
        (lambda: jint8.quantize(jnp.ones((2, 2)), contract_axes=2), ValueError, r"contract_axes to be in .* got 2"),
        (lambda: jint8.quantize(jnp.ones((2, 2)), contract_axes=(0, -2)), ValueError, "each axis once, got .0, -2."),
        (lambda: jint8.quantize(jnp.ones((2, 2)), stack_axes=(5,)), ValueError, r"stack_axes to be in .* got 5"),
        (lambda: jint8.quantize(jnp.float32(1)), ValueError, "contract_axes"),
        (
            lambda: jint8.quantize(jnp.ones((2, 2)), config=jint8.Config(scheme="none")),
            ValueError,
            "Expected a scheme that quantizes weights, got 'none'",
        ),
        (lambda: jint8.dequantize(jnp.ones(2)), TypeError, "Expected w to be a QTensor, got"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
