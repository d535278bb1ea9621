"""What counts as an outlier, whose results depend on it, and that its number never leads back to the host."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matmul_cases import VALUES

import jint8

PATHS = pytest.mark.parametrize("implementation", ["xla_digits", "xla_gather"])
matmul = jax.jit(jint8.matmul, static_argnames=("config", "implementation"))
CASE = VALUES["few_outliers"]
W = jint8.quantize(CASE.w)


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4), (0, 4), (2, 0)], ids=str)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32], ids=lambda d: np.dtype(d).name)
def test_find_outliers(shape, dtype):
    x = jnp.asarray(np.random.default_rng(0).uniform(-9, 9, shape), dtype)
    expected = (abs(np.asarray(x, np.float32)) >= 6).reshape(-1, shape[-1]).any(0) if x.size else np.zeros(shape[-1])
    for find in (jint8.find_outliers, jax.jit(jint8.find_outliers, static_argnums=1)):
        got = find(x, 6.0)
        assert got.dtype == bool
        np.testing.assert_array_equal(got, expected)


def test_find_outliers_edges():
    x = jnp.array([6.0, -6.0, 5.9999995, jnp.nan, jnp.inf, -jnp.inf])
    assert jint8.find_outliers(x, 6.0).tolist() == [True, True, False, False, True, True]
    assert not jint8.find_outliers(x, 0).any()
    batched = jax.vmap(jint8.find_outliers, in_axes=(0, None))(jnp.stack([x, 0 * x]), 6.0)
    assert batched.sum(1).tolist() == [4, 0]
    assert jax.eval_shape(lambda x: jint8.find_outliers(x, 6.0), x).shape == (6,)


@pytest.mark.parametrize(
    ("x", "threshold", "error", "message"),
    [
        (jnp.ones(3, int), 6.0, TypeError, "Expected x to be a float array, got int32"),
        ([1.0], 6.0, TypeError, "Expected x to be a float array, got list"),
        (jnp.float32(1), 6.0, ValueError, "Expected x to have at least one dimension, got a scalar"),
        (jnp.ones(3), -1, ValueError, "Expected threshold to be at least 0, got -1"),
        (jnp.ones(3), float("nan"), ValueError, "Expected threshold to be at least 0, got nan"),
    ],
)
def test_find_outliers_errors(x, threshold, error, message):
    with pytest.raises(error, match=message):
        jint8.find_outliers(x, threshold)


def test_threshold_zero_is_no_decomposition():
    off = matmul(CASE.x, W, config=jint8.Config(threshold=0))
    np.testing.assert_array_equal(off, matmul(CASE.x, W, config=jint8.Config(scheme="vector")))
    assert (off != matmul(CASE.x, W)).any()


def test_a_threshold_that_nothing_reaches():
    plain = matmul(CASE.x, W, config=jint8.Config(scheme="vector"))
    for threshold in (1e4, 1e300):
        np.testing.assert_allclose(matmul(CASE.x, W, config=jint8.Config(threshold=threshold)), plain, rtol=1e-6)


@pytest.mark.first_case
@pytest.mark.parametrize("mode", ["batch", "token"])
@PATHS
def test_the_threshold_itself_is_an_outlier(implementation, mode):
    x = np.full((2, 8), 0.01, np.float32)
    x[0, 3] = 6  # kept, it would round the others to 0
    w = jint8.quantize(np.eye(8, dtype=np.float32))
    run = lambda threshold: np.asarray(
        matmul(x, w, config=jint8.Config(threshold=threshold, outliers=mode), implementation=implementation)
    )
    np.testing.assert_allclose(run(6.0), x, rtol=1e-4)
    assert (run(np.nextafter(np.float32(6), np.float32(7)))[0, :3] == 0).all()


@pytest.mark.first_case
@pytest.mark.parametrize("mode", ["token", "static"])
@PATHS
def test_by_token_neighbours_change_no_bit(implementation, mode):
    config = jint8.Config(outliers=mode)
    reference = np.asarray(matmul(CASE.x, W, config=config, implementation=implementation))[1]
    k = CASE.x.shape[1]
    for neighbour in (0.0, 5.9, 6.0, -3e4, 1e30, 3e38, np.inf, np.nan, *np.geomspace(1e-40, 1e38, 5)):
        for columns in (slice(None), slice(0, 1), slice(k - 1, k), slice(3, 4)):
            x = CASE.x.copy()
            x[[0, 2, 3, 4, 5], columns] = neighbour
            got = np.asarray(matmul(x, W, config=config, implementation=implementation))[1]
            np.testing.assert_array_equal(got, reference)


def test_in_a_batch_neighbours_do_matter():
    x = CASE.x.copy()
    x[0, 10] = 100
    assert (np.asarray(matmul(x, W))[1] != np.asarray(matmul(CASE.x, W))[1]).any()


@pytest.mark.first_case
@PATHS
def test_static_without_calibration_is_token(implementation):
    token, static = (
        matmul(CASE.x, W, config=jint8.Config(outliers=mode), implementation=implementation)
        for mode in ("token", "static")
    )
    np.testing.assert_array_equal(token, static)
    assert (token != matmul(CASE.x, W, implementation=implementation)).any()


def test_config_is_part_of_the_jit_key():
    run = jax.jit(lambda x, w: jint8.matmul(x, w))
    other = jint8.with_config(W, jint8.Config(threshold=0))
    a, b = run(CASE.x, W), run(CASE.x, other)
    assert (a != b).any()
    np.testing.assert_array_equal(b, matmul(CASE.x, W, config=jint8.Config(threshold=0)))
    np.testing.assert_array_equal(run(CASE.x, W), a)


def compilations(caplog, call):
    """How many programs XLA compiles while `call` runs."""
    caplog.clear()
    with jax.log_compiles(), caplog.at_level(logging.DEBUG, logger="jax"):
        jax.block_until_ready(call())
    return sum("Finished XLA compilation" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
@PATHS
def test_one_compilation_for_any_number_of_outliers(implementation, jit, caplog):
    w = jint8.quantize(np.ones((41, 3), np.float32))
    run = lambda x, w: jint8.matmul(x, w, implementation=implementation)
    run = jax.jit(run) if jit else run
    batches = []
    for count in (0, 1, 5, 32, 33, 41):
        x = np.ones((4, 41), np.float32)
        x[:, :count] = 50
        batches.append(jnp.asarray(x))
    assert compilations(caplog, lambda: run(batches[0], w)) > 0
    assert compilations(caplog, lambda: [run(x, w) for x in batches]) == 0


@PATHS
def test_the_program_never_calls_the_host(implementation):
    run = jax.jit(lambda x, w: jint8.matmul(x, w, implementation=implementation))
    lowered = run.lower(CASE.x, W)
    for text in (lowered.as_text(), lowered.compile().as_text()):
        assert not any(word in text for word in ("callback", "infeed", "outfeed"))


@PATHS
def test_zero_rows_pass_the_nan_debugger(implementation):
    with jax.debug_nans(True):
        assert (np.asarray(jint8.matmul(0 * CASE.x, W, implementation=implementation)) == 0).all()
