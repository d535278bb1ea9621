"""`"xla_row"`: one row of activations on a CPU, against the float64 oracle."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax import lax

import jint8
from jint8._core.qtensor import contract_last
from jint8._ops.weight import Weight
from jint8._ops.xla.one_row import fits_row

SIZES = {"even": (96, 16), "odd_k": (77, 12), "prime_n": (64, 13), "n=1": (64, 1), "k=1": (1, 8), "k=1536": (1536, 8)}
CONFIGS = {
    "llm.int8": {},
    "threshold=0": {"threshold": 0.0},
    "no_outlier": {"threshold": 1e6},
    "by_token": {"outliers": "token"},
    "relative": {"threshold": 5.0, "relative": True},
    "two_digits": {"digits": 2},
    **{scheme: {"scheme": scheme} for scheme in oracle.SCHEMES if scheme not in ("none", "llm.int8")},
}
matmul = functools.partial(jax.jit, static_argnames=("config", "implementation"))(jint8.matmul)


def operands(k, n, large=()):
    rng = np.random.default_rng(k)
    x = np.clip(rng.standard_normal((1, k)) + 0.5, -5, 5).astype(np.float32)
    for i, value in enumerate(large):
        x[0, i] = value
    return x, rng.standard_normal((k, n)).astype(np.float32)


def quantized(w, config):
    return contract_last(jint8.quantize(w, config=config), (0,))


def check(x, w, config, bad_rows=()):
    got = matmul(x, quantized(w, config), implementation="xla_row")
    exact, bound = oracle.matmul(
        x,
        oracle.quantize(w, scheme=config.scheme),
        config.scheme,
        config.threshold,
        config.outliers,
        relative=config.relative,
        digits=config.digits,
    )
    oracle.assert_close(got, exact, bound, bad_rows)


@pytest.mark.first_case
@pytest.mark.parametrize("large", [(), (40.0,), (-7.0, 3000.0)], ids=["none", "one", "two"])
@pytest.mark.parametrize("config", CONFIGS)
def test_schemes(config, large):
    check(*operands(96, 16, large), jint8.Config(**CONFIGS[config]))


@pytest.mark.first_case
@pytest.mark.parametrize("digits", [1, 2])
@pytest.mark.parametrize("size", SIZES)
def test_sizes(size, digits):
    for large in [(), (-50.0,)]:
        check(*operands(*SIZES[size], large), jint8.Config(digits=digits))


@pytest.mark.parametrize("scheme", ["llm.int8", "llm.int8-zp", "vector"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e-44, 0.0], ids=str)
def test_special_values(value, scheme):
    x, w = operands(96, 16)
    x[0, 5] = value
    if abs(value) < 1:
        x[:] = value
    check(x, w, jint8.Config(scheme=scheme), bad_rows=() if np.isfinite(value) else (0,))


def test_the_largest_sums_fit():
    """Integers as large as they get, all of one sign."""
    for digits, k in ((1, 32_768), (2, 2048)):
        x, w = np.full((1, k), 3.0, np.float32), np.full((k, 4), 127.0, np.float32)
        y = matmul(x, quantized(w, jint8.Config(digits=digits)), implementation="xla_row")
        np.testing.assert_allclose(np.asarray(y, np.float64), 3.0 * 127 * k, rtol=2 * oracle.ROUNDING)


def test_what_does_not_fit_is_refused_and_not_chosen():
    config, two = jint8.Config(), jint8.Config(digits=2)

    def weight(k, k_last=True):
        q = jax.ShapeDtypeStruct((8, k) if k_last else (k, 8), jnp.int8)
        return Weight(q=q, scale=jax.ShapeDtypeStruct((8,), jnp.float32), k_last=k_last)

    assert fits_row(1, weight(4096), config)
    assert not fits_row(2, weight(4096), config)
    assert not fits_row(1, weight(4096, k_last=False), config)
    assert not fits_row(1, weight(524_288), config)
    assert not fits_row(1, weight(4096), two)
    x, w = operands(64, 8)
    with pytest.raises(NotImplementedError, match="Expected one row and a weight stored"):
        jint8.matmul(np.concatenate([x, x]), quantized(w, config), implementation="xla_row")
    with pytest.raises(NotImplementedError, match="Expected one row and a weight stored"):
        jint8.matmul(x, jint8.quantize(w), implementation="xla_row")


def test_one_row_equals_the_same_row_among_others_by_token():
    x, w = operands(96, 16, (40.0,))
    others = np.concatenate([x, operands(96, 16, (90.0, 8.0))[0], 2 * x])
    w = quantized(w, jint8.Config(outliers="token"))
    alone = matmul(x, w, implementation="xla_row")
    together = matmul(others, w, implementation="xla_digits")
    np.testing.assert_array_equal(alone[0], together[0])


@pytest.mark.parametrize("transform", ["vmap", "scan", "grad"])
def test_transforms(transform):
    x, w = operands(96, 16, (40.0,))
    rows = np.concatenate([x, operands(96, 16)[0], np.zeros_like(x)])
    w = quantized(w, jint8.Config())

    def product(row):
        return jint8.matmul(row, w, implementation="xla_row")

    expected = np.stack([product(row) for row in rows])
    if transform == "vmap":
        np.testing.assert_allclose(jax.jit(jax.vmap(product))(rows), expected, rtol=1e-6)
    elif transform == "scan":
        got = jax.jit(lambda rows: lax.scan(lambda c, row: (c, product(row)), 0, rows)[1])(rows)
        np.testing.assert_allclose(got, expected, rtol=1e-6)
    else:
        got = jax.jit(jax.grad(lambda row: jnp.sum(product(row))))(x[0])
        np.testing.assert_allclose(got, np.asarray(jint8.dequantize(w)).sum(1), rtol=1e-5)


def test_a_loop_does_not_widen_the_weights_before_it():
    x, w = operands(512, 512)
    w = quantized(w, jint8.Config(threshold=0))

    @jax.jit
    def repeat(x, w, times):
        step = lambda _, x: jnp.tanh(jint8.matmul(x, w, implementation="xla_row"))
        return lax.fori_loop(0, times, step, x)

    temporary = repeat.lower(x, w, 7).compile().memory_analysis().temp_size_in_bytes
    assert temporary < w.q.nbytes / 2


ROWS = np.concatenate([operands(96, 1, large)[0] for large in ((), (40.0,), (-7.0, 3000.0), (), (0.0, 9.0))])


@pytest.mark.first_case
@pytest.mark.parametrize("batched", ["rows", "rows_of_rows", "rows_and_weights", "weights"])
@pytest.mark.parametrize("config", CONFIGS)
def test_vmap_is_each_row_by_itself(config, batched):
    w = quantized(operands(96, 16)[1], jint8.Config(**CONFIGS[config]))
    product = functools.partial(jint8.matmul, implementation="xla_row")
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf] * len(ROWS)), w)
    x = ROWS if batched != "weights" else np.tile(ROWS[1], (len(ROWS), 1))
    got = {
        "rows": lambda: jax.vmap(product, (0, None))(x, w),
        "rows_of_rows": lambda: jax.vmap(jax.vmap(product, (0, None)), (0, None))(x[:, None], w)[:, 0],
        "rows_and_weights": lambda: jax.vmap(product)(x, stacked),
        "weights": lambda: jax.vmap(product, (None, 0))(x[0], stacked),
    }[batched]()
    for row, y in zip(x, got, strict=True):
        want = np.asarray(matmul(row, w, implementation="xla_row"))
        np.testing.assert_allclose(y, want, rtol=0, atol=1e-6 * np.abs(want).max())


def test_a_vmap_over_rows_is_one_product_of_all():
    w = quantized(operands(96, 16)[1], jint8.Config())
    product = lambda row: jint8.matmul(row, w, implementation="xla_row")
    found = str(jax.make_jaxpr(jax.vmap(product))(ROWS))
    assert f"i32[{len(ROWS)},16]" in found  # sums of int8 products of all rows
    assert "i16[" not in found  # and not the sums of one row


@pytest.mark.slow
def test_gradients_of_a_vmap():
    w = quantized(operands(96, 16)[1], jint8.Config())
    loss = lambda x: jnp.sum(jax.vmap(functools.partial(jint8.matmul, implementation="xla_row"), (0, None))(x, w) ** 2)
    one = lambda row: jnp.sum(jint8.matmul(row, w, implementation="xla_row") ** 2)
    for got in (jax.grad(loss)(ROWS), jax.vmap(jax.grad(one))(ROWS)):
        want = np.stack([jax.grad(one)(row) for row in ROWS])
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())
