"""Products of few rows and weights of four bits in the compiled library, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jint8
from jint8._ops.cpu import native

pytestmark = pytest.mark.skipif(native.kernels() is None, reason="jint8 was installed without a C++ compiler")
matmul = jax.jit(jint8.matmul, static_argnames="implementation")
COLUMNS = (1, 70)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def quantized(n, k, *, columns=(), **options):
    config = jint8.Config(scheme="int4", grouping="oc", **options)
    return jint8.quantize(normal(n, k), contract_axes=(1,), config=config, outliers=columns or None)


def check(x, w, bias=None, *, implementation="native"):
    """Each activation is off by half of 1/32512 of the largest of its group, in the weight's coordinates."""
    got = np.asarray(matmul(x, w, bias=bias, implementation=implementation), np.float64)
    weights, rows = np.asarray(w.dequantize(jnp.float32), np.float64), np.asarray(x, np.float64)
    rotation = 1.0 if not w.config.rotate else np.sqrt(w.config.rotate)
    bound = rotation * np.abs(rows).max(-1, keepdims=True) * np.abs(weights).sum(1) / 32512 + 1e-5
    expected = rows @ weights.T + (0 if bias is None else np.asarray(bias, np.float64))
    rounding = 0 if x.dtype == np.float32 else 2.0**-8 * np.abs(expected)
    assert got.shape == expected.shape
    assert (np.abs(got - expected) <= bound + rounding).all()


@pytest.mark.parametrize("m", [1, 3, 4, 9, 16])
@pytest.mark.parametrize(
    ("n", "k", "group"),
    [
        (33, 256, 64),  # whole blocks of two groups
        (70, 576, 64),  # a group is left
        (9, 191, 64),  # an odd number of features: more than a group is left
        (40, 131, 64),
        (5, 40, 64),  # less than a group
        (1, 3, 64),
        (20, 640, 128),
        (64, 300, 256),
    ],
)
def test_shapes(n, k, group, m):
    check(normal(m, k, seed=1), quantized(n, k, group=group))


@pytest.mark.parametrize("columns", [(), COLUMNS], ids=["", "columns"])
@pytest.mark.parametrize("rotate", [0, 1, 32, 64])
def test_smoothed_rotated_and_with_columns(rotate, columns):
    x = normal(5, 320, seed=1)
    x[:, list(COLUMNS)] *= 30
    w = quantized(48, 320, rotate=rotate, columns=columns, outliers="static" if columns else "batch")
    check(x, w, normal(48, seed=2))
    by_xla = matmul(x, w, implementation="xla")
    np.testing.assert_allclose(matmul(x, w, implementation="native"), by_xla, rtol=0, atol=2e-3 * np.abs(by_xla).max())


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=lambda d: np.dtype(d).name)
def test_dtypes(dtype):
    w, x = quantized(24, 128), jnp.asarray(normal(2, 128, seed=1), dtype)
    assert matmul(x, w, implementation="native").dtype == dtype
    check(x, w)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_stay_in_their_row(value):
    w, x = quantized(24, 128), normal(3, 128, seed=1)
    expected = np.asarray(matmul(x, w, implementation="native"))
    x[1, 100] = value
    got = np.asarray(matmul(x, w, implementation="native"))
    assert not np.isfinite(got[1]).any()
    np.testing.assert_array_equal(got[[0, 2]], expected[[0, 2]])


def test_rows_of_zeros_and_of_tiny_values():
    w, x = quantized(24, 128), normal(3, 128, seed=1)
    x[0], x[1] = 0, x[1] * np.float32(1e-42)
    got = np.asarray(matmul(x, w, implementation="native"))
    np.testing.assert_array_equal(got[0], 0)
    assert np.abs(got[1]).max() < 1e-37
    check(x[2:], w)


def test_a_row_does_not_depend_on_its_neighbours():
    w, x = quantized(24, 320, rotate=64), normal(7, 320, seed=1)
    together = matmul(x, w, implementation="native")
    for i, row in enumerate(x):
        np.testing.assert_array_equal(matmul(row[None], w, implementation="native")[0], together[i])


def test_who_runs_it(monkeypatch):
    monkeypatch.delenv("JINT8_NATIVE", raising=False)
    on_cpu = jax.default_backend() == "cpu"

    def in_library(m, w, **options):
        product = jax.jit(lambda x, w: jint8.matmul(x, w, **options))
        return native.FOUR_BITS_TARGET in product.lower(normal(m, 128), w).as_text()

    w = quantized(24, 128)
    assert in_library(1, w) == in_library(16, w) == on_cpu
    assert not in_library(17, w)
    assert not in_library(1, w, implementation="xla")
    assert not in_library(1, quantized(24, 128, group=32))
    exported = jint8.export(jint8.matmul, platforms=("cpu",))(normal(2, 128), w)
    assert native.FOUR_BITS_TARGET not in exported.mlir_module()
    monkeypatch.setenv("JINT8_NATIVE", "named")
    assert not in_library(1, w)
    assert in_library(1, w, implementation="native")


def test_gradients_and_vmap():
    w, x = quantized(24, 128, rotate=64), normal(3, 128, seed=1)
    weights = np.asarray(w.dequantize(jnp.float32), np.float64)
    gradient = jax.grad(lambda x: jint8.matmul(x, w, implementation="native").sum())(x)
    np.testing.assert_allclose(gradient, np.broadcast_to(weights.sum(0), x.shape), rtol=1e-4, atol=1e-4)
    rows = jax.vmap(lambda row: jint8.matmul(row, w, implementation="native"))(x)
    np.testing.assert_array_equal(rows, matmul(x, w, implementation="native"))


@pytest.mark.parametrize(
    ("m", "options", "message"),
    [
        (17, {}, "17 rows, more than 16"),
        (1, {"group": 32}, "groups of 32 features, not of a multiple of 64"),
    ],
)
def test_what_it_cannot_compute_is_refused(m, options, message):
    with pytest.raises(NotImplementedError, match=message):
        jint8.matmul(normal(m, 128), quantized(24, 128, **options), implementation="native")
    by_channels = jint8.quantize(normal(64, 128), contract_axes=(1,), config=jint8.Config(scheme="int4", grouping="ic"))
    with pytest.raises(NotImplementedError, match="groups of output channels"):
        jint8.matmul(normal(1, 128), by_channels, implementation="native")
    in_int8 = jint8.quantize(normal(64, 128), contract_axes=(1,), config=jint8.Config(scheme="int4-a8", grouping="oc"))
    with pytest.raises(NotImplementedError, match="whose activations aren't floats"):
        jint8.matmul(normal(1, 128), in_int8, implementation="native")
