"""What the compiled library computes in one call of a decoder's layer, against float64 and against XLA."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import jint8
from jint8._ops import fused
from jint8._ops.cpu import decode, native
from jint8._ops.matmul import matrix_of

pytestmark = pytest.mark.skipif(native.kernels() is None, reason="jint8 was installed without a C++ compiler")


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def attention_inputs(b, heads, groups, d, length):
    q, own = normal(b, heads, groups, d), (normal(b, heads, d, seed=1), normal(b, heads, d, seed=2))
    return q, own, (normal(b, heads, d, length, seed=3), normal(b, heads, length, d, seed=4))


def softmax_of_values(q, key, value, first, last):
    """In float64, `[groups, d]` of one row's key-value head."""
    scores = q.astype(np.float64) @ key[:, first : last + 1].astype(np.float64)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ value[first : last + 1].astype(np.float64)


@jax.jit
def attend(q, own, cache, slot, first):
    return decode.decode_attention(q, *own, *cache, slot, first, window=0)


@pytest.mark.parametrize(
    ("b", "heads", "groups", "d", "length", "slot", "first"),
    [
        (2, 3, 3, 64, 40, 37, [0, 5]),
        (1, 2, 1, 16, 1, 0, None),
        (3, 1, 7, 48, 33, 4, [0, 4, 2]),  # fewer slots than a vector has
        (1, 1, 4, 80, 130, 129, [17]),
        (2, 2, 2, 128, 64, 20, None),
    ],
)
def test_attention_equals_float64(b, heads, groups, d, length, slot, first):
    q, own, cache = attention_inputs(b, heads, groups, d, length)
    starts = None if first is None else jnp.array(first, jnp.int32)
    out, key, value = map(np.asarray, attend(q, own, cache, jnp.int32(slot), starts))
    expected_key, expected_value = (a.copy() for a in cache)
    expected_key[..., slot], expected_value[:, :, slot] = own
    np.testing.assert_array_equal(key, expected_key)
    np.testing.assert_array_equal(value, expected_value)
    for i in range(b):
        for h in range(heads):
            begin = 0 if first is None else first[i]
            expected = softmax_of_values(q[i, h], key[i, h], value[i, h], begin, slot)
            np.testing.assert_allclose(out[i, h], expected, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("window", [1, 7, 500])
def test_attention_within_a_window(window):
    q, own, cache = attention_inputs(1, 2, 3, 32, 50)
    run = jax.jit(lambda *args: decode.decode_attention(q, *own, *cache, *args, window=window))
    out, key, value = map(np.asarray, run(jnp.int32(41), jnp.array([3], jnp.int32)))
    for h in range(2):
        expected = softmax_of_values(q[0, h], key[0, h], value[0, h], max(3, 42 - window), 41)
        np.testing.assert_allclose(out[0, h], expected, rtol=2e-5, atol=1e-5)


def test_attention_of_values_that_are_not_finite():
    """What a row doesn't see can't reach it; what it sees does."""
    q, own, (key, value) = attention_inputs(2, 1, 2, 16, 40)
    key[:, :, :, 30:], value[:, :, 30:] = np.nan, np.nan  # behind the token
    key[:, :, :, 2], value[0, 0, 2, 5] = np.inf, np.nan  # before the first row's, within the second one's
    out, *_ = attend(q, own, (key, value), jnp.int32(25), jnp.array([3, 0], jnp.int32))
    assert np.isfinite(out[0]).all()
    assert np.isnan(out[1]).any()


def test_scores_that_differ_much():
    q, own, cache = attention_inputs(1, 1, 1, 16, 32)
    out, key, value = map(np.asarray, attend(400 * q, own, cache, jnp.int32(31), None))
    expected = softmax_of_values(400 * q[0, 0], key[0, 0], value[0, 0], 0, 31)
    np.testing.assert_allclose(out[0, 0], expected, rtol=1e-4, atol=1e-5)


def test_a_cache_that_is_still_needed_is_not_overwritten():
    q, own, cache = attention_inputs(1, 1, 1, 16, 32)
    cache = tuple(map(jnp.asarray, cache))
    before = [np.array(a) for a in cache]
    run = jax.jit(lambda cache: (attend(q, own, cache, jnp.int32(4), None), cache[0] + cache[1].swapaxes(2, 3)))
    _, sums = run(cache)
    np.testing.assert_array_equal(sums, before[0] + before[1].swapaxes(2, 3))
    np.testing.assert_array_equal(cache[0], before[0])


def network(n, d, config, blocks):
    gate_up, down = normal(2 * n, d), normal(d, n, seed=1)
    weights = [jint8.quantize(w / np.sqrt(w.shape[1]), contract_axes=(1,), config=config) for w in (gate_up, down)]
    assert n % blocks == 0
    return weights


ACTIVATIONS = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu_tanh": lambda x: x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: np.maximum(x, 0),
    "gelu": lambda x: x / 2 * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    ("m", "n", "d", "blocks", "config"),
    [
        (1, 96, 64, 16, jint8.Config()),
        (5, 48, 40, 16, jint8.Config(scheme="llm.int8-zp", outliers="token")),
        (33, 70, 24, 2, jint8.Config(threshold=0)),
    ],
)
def test_gated_network(m, n, d, blocks, config, activation):
    """Of the hidden features that the library's own first product gives, the rest is that of the oracle."""
    x, (gate_up, down) = normal(m, d, seed=2), network(n, d, config, blocks)
    x[:, 3] = 8  # an outlier column
    number = decode.ACTIVATIONS.index(activation)
    run = jax.jit(
        lambda x: decode.gated_network(x, *map(matrix_of, (gate_up, down)), config, blocks=blocks, activation=number)
    )
    got = np.asarray(run(x))
    both = np.asarray(jint8.matmul(x, gate_up, implementation="native"), np.float64).reshape(m, blocks, 2, n // blocks)
    hidden = (ACTIVATIONS[activation](both[:, :, 0]) * both[:, :, 1]).reshape(m, n)
    weight = oracle.quantize(np.asarray(normal(d, n, seed=1) / np.sqrt(n)).T, scheme=config.scheme)
    exact, bound = oracle.matmul(hidden, weight, config.scheme, config.threshold, config.outliers, None)
    oracle.assert_close(got, exact, bound, [])


def test_gradients_and_programs_for_other_machines_are_those_of_xla(monkeypatch):
    monkeypatch.setenv("JINT8_NATIVE", "1")
    x, (gate_up, down) = normal(2, 32), network(32, 32, jint8.Config(), 16)

    def unfused(_, x, gate_up, down):
        both = jint8.matmul(x, gate_up, implementation="xla").reshape(-1, 16, 2, 2)
        hidden = (jax.nn.silu(both[:, :, 0]) * both[:, :, 1]).reshape(x.shape[0], -1)
        return [jint8.matmul(hidden, down, implementation="xla")]

    def run(x):
        return fused.gated_network(x, gate_up, down, blocks=16, activation="silu", apart=unfused, static=None)

    assert fused.fits_gated_network(x, gate_up, down, "silu")
    assert native.GATED_TARGET in jax.jit(run).lower(x).as_text()
    np.testing.assert_allclose(run(x), unfused(None, x, gate_up, down)[0], rtol=1e-3, atol=1e-4)
    got, expected = (
        jax.grad(lambda x, f=f: jnp.sum(f(x) ** 2))(x) for f in (run, lambda x: unfused(0, x, gate_up, down)[0])
    )
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    exported = jax.export.export(jax.jit(run), platforms=["cpu"])(x)
    assert native.GATED_TARGET not in exported.mlir_module()
    one_by_one = jnp.stack([run(row[None]) for row in x])
    np.testing.assert_array_equal(jax.vmap(run)(x[:, None]), one_by_one)


@pytest.mark.parametrize(
    "other",
    [
        jint8.Config(relative=True),
        jint8.Config(digits=2),
        jint8.Config(scheme="absmax"),
        jint8.Config(scheme="vector", rotate=16),
    ],
)
def test_what_is_not_fused(other, monkeypatch):
    monkeypatch.setenv("JINT8_NATIVE", "1")
    x, weights = normal(2, 32), network(32, 32, other, 16)
    assert not fused.fits_gated_network(x, *weights, "silu")
    plain = network(32, 32, jint8.Config(), 16)
    assert not fused.fits_gated_network(x, *plain, "tanh")
    assert not fused.fits_gated_network(jnp.asarray(x, jnp.bfloat16), *plain, "silu")
    assert not fused.fits_gated_network(x, jint8.dequantize(plain[0]), plain[1], "silu")
    monkeypatch.setenv("JINT8_NATIVE", "named")
    assert not fused.fits_gated_network(x, *plain, "silu")
    assert not fused.fits_decode_attention(x, x)
