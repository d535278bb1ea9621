"""Rows that are smoothed, rotated and quantized in one launch, and the products of those, against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels.test_bounds import poisoned  # noqa: F401  (a fixture)
from kernels.test_kernels import INTERPRET, PATHS, QUICK

import jint8
import pallas_kernels as pk
from jint8._core.platform import gpu_available
from pallas_kernels.triton import rotate_rows as module

SHAPES = [(1, 64, 64), (3, 576, 64), (2, 80, 16), (5, 96, 32), (4, 100, 1), (2, 320, 64)]


def hadamard(size):
    """Sylvester's construction, orthogonal."""
    h = np.ones((1, 1))
    while len(h) < size:
        h = np.block([[h, h], [h, -h]])
    return h / np.sqrt(size)


def rows(m, k, seed=0, dtype="bfloat16"):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((m, k))
    x[:, k // 2] *= 50
    return jnp.asarray(x, dtype), jnp.asarray(rng.uniform(0.5, 2, k), jnp.float32)


def turned(x, smooth, block):
    """In float64."""
    y = (np.asarray(x, np.float64) * np.asarray(smooth, np.float64)).reshape(len(x), -1, block)
    return (y @ hadamard(block)).reshape(x.shape)


def check(got, x, smooth, block):
    expected = turned(x, smooth, block)
    scale = np.abs(expected).max(axis=1) / 127
    np.testing.assert_allclose(got.factors[0, : len(x)], scale, rtol=1e-5)
    off = np.abs(np.asarray(got.q, np.float64)[: len(x)] - expected / scale[:, None])
    assert off.max() <= 0.5 + 1e-3  # a tie, within what is left of float32


quantize = jax.jit(functools.partial(pk.rotate_rows, interpret=INTERPRET), static_argnums=2, compiler_options=QUICK)


@pytest.mark.parametrize(("m", "k", "block"), SHAPES)
def test_rows(m, k, block):
    for dtype in ("bfloat16", "float16", "float32"):
        x, smooth = rows(m, k, dtype=dtype)
        check(quantize(x, smooth, block), x, smooth, block)


def test_rows_longer_than_registers_are_read_twice(monkeypatch):
    monkeypatch.setattr(module, "_HELD", 1024)
    x, smooth = rows(2, 64 * 35)
    check(pk.rotate_rows(x, smooth, 64, interpret=INTERPRET), x, smooth, 64)


@pytest.mark.skipif(gpu_available(), reason="interprets")
@pytest.mark.parametrize(("m", "k", "block"), SHAPES)
def test_nothing_beyond_its_arrays(m, k, block, poisoned):  # noqa: F811
    x, smooth = rows(m, k)
    check(pk.rotate_rows(x, smooth, block, height=4, interpret=True), x, smooth, block)


def test_values_that_are_not_finite_stay_in_their_row():
    x, smooth = rows(4, 128, dtype="float32")
    x = x.at[1, 3].set(jnp.inf).at[2, 100].set(jnp.nan)
    got = quantize(x, smooth, 64)
    assert np.isnan(got.factors[0]).tolist() == [False, True, True, False]
    good = jnp.array([0, 3])
    check(got._replace(q=got.q[good], factors=got.factors[:, good]), x[good], smooth, 64)


def test_zeros():
    got = quantize(jnp.zeros((2, 64)), jnp.ones(64), 64)
    assert not np.asarray(got.q).any()
    assert not np.asarray(got.factors).any()


@pytest.mark.first_case
@pytest.mark.parametrize("path", PATHS)
def test_product(path):
    """Few rows and many, by every kernel."""
    x, smooth = rows(5, 320, dtype="bfloat16")
    rng = np.random.default_rng(1)
    w, scale = rng.integers(-127, 128, (48, 320), dtype=np.int8), rng.uniform(0.5, 1, 48).astype(np.float32)
    bias = rng.standard_normal(48).astype(np.float32)
    run = functools.partial(pk.llm_int8_matmul, threshold=0.0, rotation=64, config=PATHS[path], interpret=INTERPRET)
    y = jax.jit(lambda x: run(x, w, scale, bias=bias, smooth=smooth), compiler_options=QUICK)(x)
    got = pk.rotate_rows(x, smooth, 64, interpret=INTERPRET)
    inside = np.asarray(got.q, np.float64) * np.asarray(got.factors[0], np.float64)[:, None]
    expected = inside @ w.T.astype(np.float64) * scale + bias
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=2.0**-8, atol=1e-3)


@pytest.mark.parametrize("block", [1, 64, 128])  # 128: by XLA
def test_from_jint8(block):
    """`jint8.matmul` of a rotated weight, with the same integers as XLA's path but for ties."""
    x = rows(3, 256, dtype="float32")[0]
    config = jint8.Config(scheme="vector", rotate=block)
    w = jint8.quantize(np.random.default_rng(2).standard_normal((24, 256)), contract_axes=(1,), config=config)
    run = lambda name: np.asarray(jint8.matmul(x, w, implementation=name), np.float64)
    np.testing.assert_allclose(run("triton"), run("xla"), atol=2e-2 * np.abs(run("xla")).max())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rotation": 128}, r"rotation to be one of \(1, 16, 32, 64\) that divides k = 64, got 128"),
        ({"rotation": 16, "smooth": None}, "rotation with smooth, got 16 without"),
        ({"threshold": 6.0}, "threshold 0 with smooth"),
        ({"smooth": jnp.ones(63)}, r"smooth to be float32\[64\], got float32\[63\]"),
    ],
)
def test_wrong_arguments(change, words):
    options = {"smooth": jnp.ones(64), "rotation": 16, "threshold": 0.0} | change
    with pytest.raises(ValueError, match=words):
        pk.llm_int8_matmul(jnp.ones((2, 64)), jnp.ones((4, 64), jnp.int8), jnp.ones(4), **options)
    with pytest.raises(ValueError, match="block to be one of"):
        pk.rotate_rows(jnp.ones((2, 60)), jnp.ones(60), 16)
