"""Weights to int8 in NumPy, against the formula in float64."""

import ml_dtypes
import numpy as np
import pytest

import jint8
from jint8._convert import quantize_rows

SHAPE = (37, 50)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def quantized(w):
    q, scale = np.full(w.shape, 99, np.int8), np.empty((w.shape[0], 1), np.float32)
    for rows, steps, scales in quantize_rows.quantized_rows(w):
        q[rows], scale[rows] = steps, scales
    return q, scale


def check(w, q, scale):
    w = np.asarray(w, np.float64)
    want = np.abs(w).max(axis=1, keepdims=True) / 127
    np.testing.assert_allclose(scale, want, rtol=1e-7)
    steps = np.divide(w, scale.astype(np.float64), out=np.zeros_like(w), where=scale > 0)
    assert np.abs(q - steps).max() <= 0.5 + 1e-5
    near_half = np.abs(np.abs(steps - np.trunc(steps)) - 0.5) < 1e-5
    np.testing.assert_array_equal(q[~near_half], np.round(steps)[~near_half])


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64], ids=lambda d: d.__name__)
@pytest.mark.parametrize("block", [1, 200, 1 << 18], ids=["rows=1", "rows=4", "all_rows"])
def test_formula(dtype, block, rng, monkeypatch):
    monkeypatch.setattr(quantize_rows, "BLOCK", block)
    w = rng.standard_normal(SHAPE).astype(dtype)
    q, scale = quantized(w)
    check(w, q, scale)
    assert np.abs(q).max(axis=1).tolist() == [127] * len(w)


def test_transposed_view(rng):
    w = rng.standard_normal(SHAPE[::-1]).astype(ml_dtypes.bfloat16).T
    check(w, *quantized(w))


def test_halves_go_to_even():
    w = np.array([[127, 0.5, 1.5, -2.5, 3.5]], np.float32)
    assert quantized(w)[0].tolist() == [[127, 0, 2, -2, 4]]


def test_zeros_and_subnormal_scales():
    w = np.array([[0, 0], [1e-40, -1e-42], [3e38, -1e30]], np.float32)
    q, scale = quantized(w)
    assert q.tolist() == [[0, 0], [0, 0], [127, 0]]
    assert scale[0, 0] == 0


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [(0, 0), (36, 49)], ids=["first", "last"])
def test_not_finite(value, at, rng):
    w = rng.standard_normal(SHAPE, np.float32)
    w[at] = value
    with pytest.raises(ValueError, match="Expected finite weights, got NaN or infinity"):
        quantized(w)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=lambda d: d.__name__)
@pytest.mark.parametrize("shape", [SHAPE, SHAPE[::-1], (50,), ()], ids=str)
def test_check_finite(dtype, shape, rng, monkeypatch):
    monkeypatch.setattr(quantize_rows, "BLOCK", 200)
    w = np.asarray(rng.standard_normal(shape)).astype(dtype)
    quantize_rows.check_finite(w)
    quantize_rows.check_finite(w.T)
    quantize_rows.check_finite(np.zeros((0, 3), dtype))
    for value in (np.nan, np.inf, -np.inf):
        bad = w.copy()
        bad[(-1,) * w.ndim] = value
        for x in (bad, bad.T):
            with pytest.raises(ValueError, match="Expected finite weights, got NaN or infinity"):
                quantize_rows.check_finite(x)


def test_no_more_than_a_step_from_quantize(rng):
    w = rng.standard_normal(SHAPE, np.float32)
    q, scale = quantized(w)
    want = jint8.quantize(w, contract_axes=1)
    np.testing.assert_array_equal(scale, want.scale)
    assert np.abs(q - np.asarray(want.q, int)).max() <= 1
    assert np.mean(q != want.q) < 0.002


def test_aligned():
    arrays = [quantize_rows.aligned((n, 3), np.float32) for n in range(1, 9)]
    assert all(array.ctypes.data % 64 == 0 and array.shape == (n, 3) for n, array in enumerate(arrays, 1))
