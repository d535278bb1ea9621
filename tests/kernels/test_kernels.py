"""Every path of the product against the float64 oracle. On a GPU the same tests run the compiled kernels."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels import kernel_oracle

import pallas_kernels as pk

INTERPRET = jax.default_backend() != "gpu"
THRESHOLD = 6.0
QUICK = {"xla_backend_optimization_level": 0} if INTERPRET else None

# Tiles are as small as tensor cores take them, so that small shapes have several tiles and tails in every dimension.
PATHS = {
    "few_rows": pk.FewRowsConfig(bn=32, bk=128),
    "few_rows_split": pk.FewRowsConfig(bn=16, bk=32, splits=3),
    "triton": pk.TritonConfig(bm=16, bn=32, bk=64, group=2),
    "triton_panels": pk.TritonConfig(bm=16, bn=32, bk=32, panels=2),
}


class Case(NamedTuple):
    x: jax.Array
    w: np.ndarray
    w_scale: np.ndarray
    bias: np.ndarray | None


def make_case(m, n, k, dtype="bfloat16", *, outliers=3, bias=True, seed=0):
    rng = np.random.default_rng([seed, m, n, k])
    x = rng.standard_normal((m, k), dtype=np.float32)
    x = np.clip(x, -5.5, 5.5)
    columns = rng.choice(k, outliers, replace=False)
    x[:, columns] *= rng.choice([1.0, 30.0], (m, outliers))
    x[rng.integers(m, size=outliers), columns] = 20.0  # each column has one
    w = rng.integers(-127, 128, (n, k), dtype=np.int8)
    scale = (rng.random(n, dtype=np.float32) + 0.5) / 127
    return Case(jnp.asarray(x, dtype), w, scale, rng.standard_normal(n, dtype=np.float32) if bias else None)


def with_rows(case, rows, value):
    return case._replace(x=case.x.at[rows].set(value))


ORDINARY = make_case(5, 37, 208)

CASES = {
    # Same shapes, so that each path compiles once for all of them.
    "ordinary": ORDINARY,
    "no_outliers": ORDINARY._replace(x=jnp.clip(ORDINARY.x, -5.0, 5.0)),
    "all_outliers": ORDINARY._replace(x=ORDINARY.x + 20),
    "nan_row": with_rows(ORDINARY, (2, 7), jnp.nan),
    "nan_row_beside_outlier": with_rows(with_rows(ORDINARY, (2, 7), jnp.nan), (1, 7), 100.0),
    "inf_row": with_rows(ORDINARY, (4, 100), -jnp.inf),
    "zero_rows": with_rows(ORDINARY, np.array([0, 3]), 0.0),
    "only_outliers_in_row": with_rows(with_rows(ORDINARY, 1, 0.0), (1, 11), 50.0),
    "huge_beside_small_outlier": with_rows(with_rows(ORDINARY, (0, 3), 2983.0), (0, 9), 6.3),
    "at_threshold": with_rows(ORDINARY, (3, 50), 6.0),
    # Shapes and dtypes.
    "rows=1": make_case(1, 64, 128),
    "rows=16": make_case(16, 48, 256),
    "odd_k": make_case(3, 40, 131, "float16"),
    "prime_n": make_case(2, 67, 96, "float32"),
    "one_channel": make_case(2, 1, 64, outliers=1),
    "one_column": make_case(2, 20, 1, "float32", outliers=1),
    "tails_everywhere": make_case(17, 33, 272, "float32"),
    "more_outliers_than_a_block": make_case(4, 20, 160, "float32", outliers=150),
    "no_bias": make_case(5, 37, 208, bias=False),
}


@functools.partial(jax.jit, static_argnames=("threshold", "mode", "config"), compiler_options=QUICK)
def product(x, w, w_scale, bias, *, threshold, mode, config):
    return pk.llm_int8_matmul(
        x, w, w_scale, bias=bias, threshold=threshold, mode=mode, config=config, interpret=INTERPRET
    )


def check(y, case, threshold, mode):
    expected = kernel_oracle.product(*case, threshold, mode)
    allowed = kernel_oracle.tolerance(*case, threshold, mode, case.x.dtype)
    assert y.dtype == case.x.dtype
    y = np.asarray(y, np.float64)
    bad = np.isnan(expected)
    assert not np.isfinite(y[bad]).any(), "a row that isn't finite came out finite"
    assert np.isfinite(y[~bad]).all(), "a finite row came out not finite"
    excess = np.abs(y - expected)[~bad] - allowed[~bad]
    assert excess.size == 0 or excess.max() <= 0, f"off by {excess.max()} more than allowed"


# Every path runs all values at one shape, in both modes; at other shapes, which each cost a compilation, paths take
# turns.
VALUES = [name for name, case in CASES.items() if case.x.shape == ORDINARY.x.shape and case.bias is not None]
SHAPES = [name for name in CASES if name not in VALUES]
TURNS = [("few_rows", "triton_panels"), ("few_rows_split", "triton")]
RUNS = [(name, path, mode) for name in VALUES for path in PATHS for mode in ("batch", "token")]
RUNS += [
    pytest.param(name, path, "batch", marks=[] if i // 2 % 2 == turn else pytest.mark.slow)
    for i, name in enumerate(SHAPES)
    for turn, path in enumerate(TURNS[i % 2])
]


@pytest.mark.first_case
@pytest.mark.parametrize(("name", "path", "mode"), RUNS)
def test_product(name, path, mode):
    case = CASES[name]
    y = product(*case, threshold=THRESHOLD, mode=mode, config=PATHS[path])
    check(y, case, THRESHOLD, mode)


@pytest.mark.first_case
@pytest.mark.parametrize("path", PATHS)
def test_threshold_zero_keeps_everything(path):
    check(product(*ORDINARY, threshold=0.0, mode="batch", config=PATHS[path]), ORDINARY, 0.0, "batch")


@pytest.mark.first_case
@pytest.mark.parametrize("path", PATHS)
def test_integer_products_are_exact(path):
    rng = np.random.default_rng(1)
    x = rng.integers(-127, 128, (5, 208)).astype(np.float32)
    x[:, 0] = 127  # so that every scale is 1
    w = rng.integers(-127, 128, (37, 208), dtype=np.int8)
    y = product(jnp.asarray(x), w, np.ones(37, np.float32), None, threshold=0.0, mode="batch", config=PATHS[path])
    np.testing.assert_array_equal(np.asarray(y), x.astype(np.int64) @ w.T.astype(np.int64))


@pytest.mark.first_case
@pytest.mark.parametrize("path", PATHS)
def test_token_rows_are_independent_bit_for_bit(path):
    x, *rest = ORDINARY
    other = jnp.concatenate([x[:1], x[1:][::-1] * 40])
    run = functools.partial(product, threshold=THRESHOLD, mode="token", config=PATHS[path])
    first, second = run(x, *rest)[0], run(other, *rest)[0]
    np.testing.assert_array_equal(np.asarray(first, np.float32), np.asarray(second, np.float32))


@pytest.mark.first_case
@pytest.mark.parametrize("path", ["few_rows", "triton"])
def test_vmap_over_batches(path):
    x = jnp.stack([ORDINARY.x, ORDINARY.x[::-1] * 2])
    fn = functools.partial(product, threshold=THRESHOLD, mode="batch", config=PATHS[path])
    y = jax.vmap(lambda x: fn(x, ORDINARY.w, ORDINARY.w_scale, ORDINARY.bias))(x)
    for i in range(2):
        check(y[i], ORDINARY._replace(x=x[i]), THRESHOLD, "batch")


@pytest.mark.first_case
@pytest.mark.parametrize("shape", [(0, 4, 32), (3, 0, 32), (3, 4, 0)], ids=["no_rows", "no_channels", "no_columns"])
def test_empty(shape):
    m, n, k = shape
    bias = jnp.arange(n, dtype=jnp.float32)
    y = pk.llm_int8_matmul(
        jnp.zeros((m, k), jnp.bfloat16), jnp.zeros((n, k), jnp.int8), jnp.ones(n), bias=bias, interpret=INTERPRET
    )
    np.testing.assert_array_equal(np.asarray(y, np.float32), np.broadcast_to(bias, (m, n)))


@pytest.mark.slow
def test_long_sums_leave_int32_in_between(monkeypatch):
    from pallas_kernels.triton import few_rows, many_rows

    jax.clear_caches()
    monkeypatch.setattr(few_rows, "K_EXACT", 128)
    monkeypatch.setattr(many_rows, "K_EXACT", 128)
    for path in ("few_rows", "triton"):
        y = pk.llm_int8_matmul(*ORDINARY[:3], bias=ORDINARY.bias, config=PATHS[path], interpret=True)
        check(y, ORDINARY, THRESHOLD, "batch")
    jax.clear_caches()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["batch", "token"])
def test_gathering_in_a_launch_of_its_own_changes_nothing(monkeypatch, mode):
    from pallas_kernels.triton import quantize_rows

    together = quantized(ORDINARY.x, ORDINARY.w, mode)[1:3]
    jax.clear_caches()
    monkeypatch.setattr(quantize_rows, "TOGETHER", 0)
    apart = quantized(ORDINARY.x, ORDINARY.w, mode)[1:3]
    jax.clear_caches()
    as_floats = lambda tree: [np.asarray(leaf, np.float32) for leaf in jax.tree.leaves(tree)]
    for got, want in zip(as_floats(apart), as_floats(together), strict=True):
        np.testing.assert_array_equal(got, want)
    check(product(*ORDINARY, threshold=THRESHOLD, mode=mode, config=PATHS["triton"]), ORDINARY, THRESHOLD, mode)


def test_longest_exact_sum():
    from pallas_kernels._numerics import K_EXACT

    assert K_EXACT * 127 * 128 <= 2**31 - 1 < (K_EXACT + 1) * 127 * 128


BLOCK = 32  # gathered columns are zero to the end of a block


@functools.partial(jax.jit, static_argnames="mode")
def quantized(x, w, mode):
    """Where the outliers are; rows with gathered outliers as digits and as they are, and with their digits in place."""
    found = pk.outlier_columns(x, THRESHOLD, interpret=INTERPRET)
    threshold = THRESHOLD if mode == "token" else None
    digits, floats = (
        pk.quantize_rows(x, w, found, form=form, block=BLOCK, threshold=threshold, interpret=INTERPRET)
        for form in ("digits", "floats")
    )
    return found, digits, floats, pk.quantize_few_rows(x, THRESHOLD, per_token=mode == "token", interpret=INTERPRET)


@pytest.mark.first_case
@pytest.mark.parametrize(
    "name", ["ordinary", "all_outliers", "zero_rows", "nan_row", "inf_row", "huge_beside_small_outlier"]
)
@pytest.mark.parametrize("mode", ["batch", "token"])
def test_quantized_rows(name, mode):
    x, w = CASES[name][:2]
    x64 = np.asarray(x, np.float64)
    out = kernel_oracle.outliers(x64, THRESHOLD, mode)
    _, scale, ratio = kernel_oracle.quantize_rows(x64, out)
    found, rows, floats, planes = quantized(x, w, mode)
    columns = np.flatnonzero(kernel_oracle.outliers(x64, THRESHOLD, "token").any(axis=0))
    np.testing.assert_array_equal(found.order[: len(columns)], columns)
    np.testing.assert_array_equal(np.sort(found.order), np.arange(x.shape[1]))
    np.testing.assert_array_equal(np.flatnonzero(found.mask), columns)
    assert found.number.tolist() == rows.number.tolist() == [len(columns)]

    np.testing.assert_allclose(rows.factors[0], scale, rtol=1e-6)
    finite = np.isfinite(np.asarray(rows.factors)).all(axis=0)
    np.testing.assert_array_equal(finite, np.isfinite(x64).all(axis=1))
    assert (np.abs(np.asarray(rows.q, np.float64) - ratio)[finite] <= 0.5 + 1e-4).all()
    np.testing.assert_array_equal(np.asarray(rows.q)[finite], np.asarray(planes.planes[0])[finite])
    np.testing.assert_array_equal(rows.factors, planes.factors)

    # Digits, gathered and in place, stand for the outliers to 2**-22 of the row's largest.
    wanted = np.where(out, x64, 0)[finite]
    factors = np.asarray(rows.factors, np.float64)[1:, finite, None]
    in_place = (np.asarray(planes.planes, np.float64)[1:, finite] * factors).sum(axis=0)
    digits = np.asarray(rows.outliers, np.float64)[:, finite, : len(columns)]
    allowed = 2.0**-21 * np.abs(wanted).max(axis=1, keepdims=True)
    assert (np.abs(in_place - wanted) <= allowed).all()
    assert (np.abs((digits * factors).sum(axis=0) - wanted[:, columns]) <= allowed).all()
    end = -(-len(columns) // BLOCK) * BLOCK
    assert not np.asarray(rows.outliers)[:, finite, len(columns) : end].any(), "padding lanes must be zero"

    # As they are, outliers and the weights of their columns are exact, and zero to the end of the block.
    np.testing.assert_array_equal(floats.q, rows.q)
    np.testing.assert_array_equal(floats.factors[0], rows.factors[0])
    exact = np.where(out, x64, 0)[:, columns]
    np.testing.assert_array_equal(np.asarray(floats.outliers, np.float64)[:, : len(columns)], exact)
    for outlier_w in (rows.outlier_w, floats.outlier_w):
        outlier_w = np.asarray(outlier_w, np.float32)
        np.testing.assert_array_equal(outlier_w[:, : len(columns)], w[:, columns])
        assert not outlier_w[:, len(columns) : end].any()
    assert not np.asarray(floats.outliers, np.float32)[:, len(columns) : end].any()


def test_ties_round_to_even():
    x = jnp.asarray([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 3.4]])
    assert pk.quantize_rows(x, interpret=INTERPRET).q.tolist() == [[127, 0, 2, 2, 0, -2, -2, 3]]
    assert pk.quantize_few_rows(x, 0, interpret=INTERPRET).planes.tolist() == [[[127, 0, 2, 2, 0, -2, -2, 3]]]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": jnp.zeros((2, 8), jnp.int32)}, TypeError, "Expected x to be bfloat16, float16 or float32, got int32"),
        ({"w": jnp.zeros((4, 8))}, TypeError, "Expected w to be int8, got float32"),
        ({"w_scale": jnp.zeros(4, jnp.bfloat16)}, TypeError, "Expected w_scale to be float32, got bfloat16"),
        ({"w": jnp.zeros((4, 9), jnp.int8)}, ValueError, r"got \(2, 8\) and \(4, 9\)"),
        ({"x": jnp.zeros(8)}, ValueError, r"Expected x\[m, k\] and w\[n, k\]"),
        ({"w_scale": jnp.ones(5)}, ValueError, r"w_scale to have shape \(4,\), got \(5,\)"),
        ({"bias": jnp.ones((1, 4))}, ValueError, r"bias to have shape \(4,\), got \(1, 4\)"),
        ({"threshold": -1.0}, ValueError, "threshold to be at least 0, got -1.0"),
        ({"threshold": float("nan")}, ValueError, "threshold to be at least 0, got nan"),
        ({"mode": "column"}, ValueError, "mode to be 'batch' or 'token', got 'column'"),
        ({"backend": "cuda"}, ValueError, "backend to be None, 'triton' or 'mosaic', got 'cuda'"),
    ],
)
def test_wrong_arguments(change, error, words):
    args = {"x": jnp.zeros((2, 8)), "w": jnp.zeros((4, 8), jnp.int8), "w_scale": jnp.ones(4)} | change
    with pytest.raises(error, match=words):
        pk.llm_int8_matmul(args.pop("x"), args.pop("w"), args.pop("w_scale"), **args, interpret=INTERPRET)


def test_arrays_that_32_bit_offsets_cannot_address():
    args = (
        jax.ShapeDtypeStruct(s, d)
        for s, d in (((1, 2**16), "bfloat16"), ((2**15, 2**16), "int8"), ((2**15,), "float32"))
    )
    with pytest.raises(NotImplementedError, match="fewer than 2\\*\\*31 elements"):
        jax.eval_shape(pk.llm_int8_matmul, *args)
