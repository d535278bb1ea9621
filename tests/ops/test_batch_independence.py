"""With outliers decided per token or calibrated, a row's result is the same bits beside any other rows."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jint8

M, K, N = 5, 100, 13  # so many columns that a condition decides whether and how outliers are gathered
CONFIGS = {
    "token": jint8.Config(outliers="token"),
    "static": jint8.Config(outliers="static"),
    "static_zero_points": jint8.Config(scheme="llm.int8-zp", outliers="static"),
    "static_two_digits": jint8.Config(scheme="llm.int8-zp", outliers="static", digits=2),
    "rotated": jint8.Config.preset("rotated"),
    "best": jint8.Config.preset("best"),
    "token_relative": jint8.Config(outliers="token", relative=True, threshold=3.0),
    "vector": jint8.Config(scheme="vector"),
}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


ROW = normal(K)
ROW[[3, 20, 30]] = 500, -70, 6.5
matmul = jax.jit(jint8.matmul, static_argnames="implementation")
CASES = [(name, implementation) for name in CONFIGS for implementation in ("xla_digits", "xla_gather")]


@functools.cache
def weight(name):
    config = CONFIGS[name]
    outliers = [3, 8] if config.outliers == "static" else None
    return jint8.quantize(normal(K, N, seed=1), config=config, outliers=outliers)


@functools.cache
def reference(name, implementation):
    """The product of `ROW` beside copies of itself."""
    return np.asarray(matmul(np.tile(ROW, (M, 1)), weight(name), implementation=implementation))[0]


entries = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.sampled_from([0.0, -0.0, 6.0, np.nextafter(np.float32(6), 0), 1e30, 3e38, np.inf, -np.inf, np.nan, 1e-40]),
)


@pytest.mark.first_case
@pytest.mark.parametrize(("name", "implementation"), CASES)
@settings(max_examples=25, deadline=None)
@given(position=st.integers(0, M - 1), fill=entries, columns=st.sets(st.integers(0, K - 1)), value=entries)
def test_any_neighbours(name, implementation, position, fill, columns, value):
    x = np.full((M, K), fill, np.float32)
    x[:, sorted(columns)] = value
    x[position] = ROW
    got = np.asarray(matmul(x, weight(name), implementation=implementation))[position]
    np.testing.assert_array_equal(got, reference(name, implementation))


@pytest.mark.first_case
@pytest.mark.parametrize(("name", "implementation"), CASES)
def test_neighbours_that_make_every_column_an_outlier(name, implementation):
    for scale in (1e-3, 7, 1e4, 1e30):
        x = scale * np.sign(normal(M, K, seed=2))
        x[2] = ROW
        got = np.asarray(matmul(x, weight(name), implementation=implementation))[2]
        np.testing.assert_array_equal(got, reference(name, implementation))


@pytest.mark.first_case
@pytest.mark.parametrize("name", CONFIGS)
def test_padding_of_zeros(name):
    """Rows that are masked to zeros add nothing, and come out as zeros."""
    for implementation in ("xla_digits", "xla_gather"):
        x = np.zeros((M, K), np.float32)
        x[1] = ROW
        got = np.asarray(matmul(x, weight(name), implementation=implementation))
        np.testing.assert_array_equal(got[1], reference(name, implementation))
        assert (np.delete(got, 1, 0) == 0).all()


def test_the_batch_mode_of_the_paper_does_depend_on_neighbours():
    w = jint8.quantize(normal(K, N, seed=1))
    alone, beside = np.tile(ROW, (M, 1)), np.tile(ROW, (M, 1))
    beside[0, 10] = 100
    assert (np.asarray(matmul(alone, w))[1] != np.asarray(matmul(beside, w))[1]).any()
