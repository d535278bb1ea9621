"""`"xla_selected"`, the product of many rows in programs for TPUs, run on a CPU against the float64 oracle."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from matmul_cases import CASES, NOT_FINITE, SHAPES, VALUES

import jint8
from jint8._ops.weight import Weight
from jint8._ops.xla.paths import choose_xla_path_on_tpu, xla_product

CONFIGS = {
    "llm.int8": {},
    "by_token": {"outliers": "token"},
    "relative": {"threshold": 5.0, "relative": True},
    "two_digits": {"digits": 2},
    "row+dec": {"scheme": "row+dec"},
    "llm.int8-zp": {"scheme": "llm.int8-zp"},
}


def check(x, w, config, dtype=jnp.float32, *, k_last=True, bias=None, bad_rows=()):
    """The product against the oracle's; returns it."""
    q = jint8.quantize(w, config=config)
    zero = None if q.zero is None else q.zero.reshape(-1)
    weight = Weight(q=q.q.T if k_last else q.q, scale=jnp.ravel(q.scale), zero=zero, k_last=k_last)
    scale = jnp.broadcast_to(weight.scale, (weight.n,))
    zero = None if zero is None else jnp.broadcast_to(zero, (weight.n,))
    weight = dataclasses.replace(weight, scale=scale, zero=zero)
    x = jnp.asarray(x, dtype)
    got = xla_product(x, weight, bias, config, path="xla_selected", dtype=dtype)
    exact, bound = oracle.matmul(
        np.asarray(x, np.float32),
        oracle.quantize(w, scheme=config.scheme),
        config.scheme,
        config.threshold,
        config.outliers,
        bias,
        relative=config.relative,
        digits=config.digits,
    )
    oracle.assert_close(got, exact, bound, bad_rows)
    return np.asarray(got)


def operands(outliers, m=6, k=300, n=24):
    rng = np.random.default_rng(outliers)
    # With scales that are powers of two: other quotients may be halves that the library and the oracle round apart.
    x = (rng.integers(-8192, 8193, (m, k)) / 8192).astype(np.float32)
    x[:, rng.permutation(k)[:20]] = 127 / 32
    columns = rng.permutation(k)[:outliers]
    x[rng.integers(0, m, outliers), columns] = rng.choice([6.0, -7.5, 40.0, 2983.0], outliers)
    return x, rng.standard_normal((k, n)).astype(np.float32)


@pytest.mark.first_case
@pytest.mark.parametrize("name", [*SHAPES, *VALUES, NOT_FINITE])
@pytest.mark.parametrize("outliers", ["batch", "token"])
def test_cases(name, outliers):
    case = CASES[name]
    if case.threshold == 0 or 0 in case.rows.shape:
        pytest.skip("nothing to select")
    config = jint8.Config(threshold=case.threshold, outliers=outliers)
    check(case.rows, case.w, config, bad_rows=case.bad_rows)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("outliers", [0, 1, 128, 129, 300])
def test_any_number_of_outliers(outliers, config, dtype):
    x, w = operands(outliers)
    check(x, w, jint8.Config(**CONFIGS[config]), dtype)


def test_weights_stored_k_first_and_a_bias():
    x, w = operands(5)
    bias = np.arange(24, dtype=np.float32)
    check(x, w, jint8.Config(), jnp.bfloat16, k_last=False, bias=bias)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("outliers", [3, 200])
def test_what_is_not_finite_stays_in_its_row(outliers, bad, dtype):
    x, w = operands(outliers)
    x[2, 17] = bad
    for mode in ("batch", "token"):
        check(x, w, jint8.Config(outliers=mode), dtype, bad_rows=(2,))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
def test_a_token_does_not_depend_on_the_others(dtype):
    """Whichever of the three programs its neighbours' outliers choose, to the last bit."""
    config = jint8.Config(outliers="token")
    few, w = operands(4)
    others = [operands(count)[0] for count in (1, 100, 200, 300)]
    alone = check(few, w, config, dtype)
    none = np.clip(few[2:3], -5, 5)
    regular = check(np.tile(none, (6, 1)), w, config, dtype)[0]
    for rows in others:
        np.testing.assert_array_equal(check(np.concatenate([few[:3], rows[3:]]), w, config, dtype)[:3], alone[:3])
        np.testing.assert_array_equal(check(np.concatenate([none, rows[1:]]), w, config, dtype)[0], regular)


def test_choice():
    config = jint8.Config()
    w = Weight(q=jnp.zeros((8, 64), jnp.int8), scale=jnp.ones(8), k_last=True)
    choose = functools.partial(choose_xla_path_on_tpu, w=w)
    assert choose(16, config=config) == "xla_digits"
    assert choose(512, config=config) == "xla_selected"
    assert choose(512, config=jint8.Config(threshold=0)) == "xla_gather"
    assert choose("m", config=config) == "xla_gather"


@pytest.mark.parametrize("native", ["0", "1"])
@pytest.mark.parametrize("m", [4, 80])
def test_one_program_for_several_platforms(monkeypatch, m, native):
    """The lowering for a TPU has no loop, and that for a CPU computes what it did."""
    monkeypatch.setenv("JINT8_NATIVE", native)
    monkeypatch.setenv("JINT8_TPU", "1")
    w = jint8.quantize(jnp.asarray(operands(3)[1]))
    x = jnp.asarray(operands(3, m=m)[0])
    product = lambda x, w: jint8.matmul(x, w)  # JAX remembers programs by function
    texts = {p: jax.export.export(jax.jit(product), platforms=[p])(x, w).mlir_module() for p in ("cpu", "tpu")}
    assert "stablehlo.while" in texts["cpu"]
    assert "stablehlo.while" not in texts["tpu"]
    both = jax.export.export(jax.jit(product), platforms=["cpu", "tpu"])(x, w)
    np.testing.assert_array_equal(both.call(x, w), jax.jit(functools.partial(jint8.matmul, implementation="xla"))(x, w))
