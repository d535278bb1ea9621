"""Products with weights of four bits, on every path, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jint8
from jint8._core.platform import on_one_cpu
from jint8._core.qtensor import contract_last
from jint8._ops import gpu
from jint8._ops.product import choose_path
from jint8._ops.weight import Packing, Weight
from jint8._ops.xla import plain

SHAPES = {
    "whole_blocks": (64, 48),
    "odd_last_group": (80, 40),
    "three_quarters": (56, 33),
    "odd": (77, 31),
    "n=1": (9, 1),
}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
every_grouping = pytest.mark.parametrize("grouping", ["oc", "ic"])
COLUMNS = (1, 7)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def quantized(shape, grouping, *, columns=(), rotate=0, k_last=True, axes=(0,), stack=()):
    config = jint8.Config(scheme="int4", grouping=grouping, group=16, rotate=rotate)
    w = jint8.quantize(normal(*shape), contract_axes=axes, stack_axes=stack, config=config, outliers=columns or None)
    return contract_last(w, axes, stack) if k_last else w


def floats(w):
    return np.asarray(w.dequantize(jnp.float32), np.float64)


def assert_close(got, x, w, digits=2.0**-14):
    """`digits`: of activations of one row, which the blocks have in 16 bits of the largest."""
    x, w = (np.asarray(a, np.float64) for a in (x, w))
    bound = digits * np.abs(x).max(-1, keepdims=True) * np.abs(w).sum(0) + 1e-6
    assert (np.abs(np.asarray(got, np.float64) - x @ w) <= bound).all()


@pytest.mark.first_case
@pytest.mark.parametrize("k_last", [True, False], ids=["n_k", "k_n"])
@pytest.mark.parametrize("columns", [(), COLUMNS], ids=["", "columns"])
@every_grouping
@every_shape
def test_rows(shape, grouping, columns, k_last):
    w = quantized(shape, grouping, columns=columns, k_last=k_last)
    for m in (1, 5):
        x = normal(m, shape[0], seed=1)
        assert_close(jax.jit(jint8.matmul)(x, w), x, floats(w), 2.0**-20 if m > 1 else 2.0**-14)


@pytest.mark.first_case
@every_grouping
def test_smoothed_and_rotated(grouping):
    for columns in ((), COLUMNS):
        w = quantized((80, 40), grouping, columns=columns, rotate=16)
        for m in (1, 5):
            x = normal(m, 80, seed=1)
            assert_close(jint8.matmul(x, w), x, floats(w), 1e-3 if m == 1 else 2.0**-18)


@pytest.mark.first_case
@pytest.mark.skipif(not on_one_cpu(), reason="needs one CPU")
@every_grouping
@pytest.mark.parametrize("n", [72, 96], ids=["channels_left", "whole"])
def test_some_channels_at_a_time(n, grouping, monkeypatch):
    """32 channels are dequantized at a time, here; in this size no other test does."""
    monkeypatch.setattr(plain, "MOST_EXPANDED", 40 * 80)
    w, x = quantized((80, n), grouping, columns=COLUMNS), normal(5, 80, seed=1)
    assert "scan" in str(jax.make_jaxpr(jint8.matmul)(x, w))
    assert_close(jax.jit(jint8.matmul)(x, w), x, floats(w), 2.0**-20)
    gradient = jax.grad(lambda x: jnp.sum(jint8.matmul(x, w) ** 2))(x)
    expected = 2 * (np.asarray(x, np.float64) @ floats(w)) @ floats(w).T
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-3 * abs(expected).max())
    each = jax.vmap(lambda x: jint8.matmul(x[None], w, implementation="dequantize")[0])(x)
    assert_close(each, x, floats(w), 2.0**-20)


@pytest.mark.first_case
@every_grouping
@every_shape
def test_one_row_by_blocks_and_dequantized(shape, grouping):
    w, x = quantized(shape, grouping), normal(1, shape[0], seed=1)
    x[0, 0] = 1000
    blocks, floating = (jint8.matmul(x, w, implementation=name) for name in ("xla_blocks", "dequantize"))
    assert_close(floating, x, floats(w), 2.0**-22)
    assert_close(blocks, x, floats(w))
    assert not np.array_equal(blocks, floating) or shape[1] == 1


@every_grouping
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_rows_that_are_not_finite(bad, grouping):
    w = quantized((64, 48), grouping)
    for m in (1, 3):
        x = normal(m, 64, seed=1)
        x[0, 5] = bad
        got = np.asarray(jint8.matmul(x, w))
        assert not np.isfinite(got[0]).any()
        assert np.isfinite(got[1:]).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_dtypes_and_a_bias(dtype):
    w, bias = quantized((64, 48), "oc"), normal(48, seed=2)
    for m in (1, 4):
        x = jnp.asarray(normal(m, 64, seed=1), dtype)
        got = jint8.matmul(x, w, bias=jnp.asarray(bias, dtype))
        assert got.dtype == dtype
        np.testing.assert_allclose(
            np.asarray(got, np.float64), np.asarray(x, np.float64) @ floats(w) + bias, rtol=0.02, atol=0.1
        )


AXES = {
    "two_contracted": ((6, 40, 35), (0, 1), ()),
    "two_free": ((50, 6, 20), (0,), ()),
    "experts": ((3, 40, 36), (1,), (0,)),
    "experts_k_last": ((3, 36, 40), (2,), (0,)),
}


@pytest.mark.first_case
@pytest.mark.parametrize(("shape", "axes", "stack"), AXES.values(), ids=AXES)
@every_grouping
def test_dot_general(shape, axes, stack, grouping):
    w = quantized(shape, grouping, axes=axes, stack=stack)
    for m in (1, 4):
        x = normal(*(shape[a] for a in stack), m, *(shape[a] for a in axes), seed=1)
        batch = tuple(range(len(stack)))
        numbers = ((tuple(range(len(stack) + 1, x.ndim)), axes), (batch, stack))
        exact = jax.lax.dot_general(x, w.dequantize(), numbers, precision="highest")
        np.testing.assert_allclose(jint8.dot_general(x, w, numbers), exact, rtol=1e-3, atol=2e-3 * abs(exact).max())


@pytest.mark.first_case
@every_grouping
def test_transformations(grouping):
    w = quantized((64, 48), grouping)
    x = normal(3, 64, seed=1)
    gradient = jax.grad(lambda x: jnp.sum(jint8.matmul(x, w) ** 2) / 2)(x)
    np.testing.assert_allclose(gradient, (x @ floats(w)) @ floats(w).T, rtol=1e-3, atol=1e-2)
    one = jax.vmap(jint8.matmul, (0, None))(x, w)
    assert_close(one, x, floats(w))
    layers = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[quantized((40, 40), grouping) for _ in range(2)])
    y, _ = jax.lax.scan(lambda x, w: (jint8.matmul(x, w), None), x[:, :40], layers)
    square = floats(quantized((40, 40), grouping))
    np.testing.assert_allclose(y, x[:, :40] @ square @ square, rtol=1e-3, atol=1e-2)


@every_grouping
def test_experts_by_ragged_dot(grouping):
    w = quantized((3, 40, 36), grouping, axes=(1,), stack=(0,))
    x, sizes = normal(7, 40, seed=1), np.array([2, 0, 4])
    exact = np.concatenate([x[:2] @ floats(w)[0], x[2:6] @ floats(w)[2], np.zeros((1, 36))])
    np.testing.assert_allclose(jint8.ragged_dot(x, w, sizes), exact, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("scheme", ["int4", "int4-a8"])
def test_layers_are_unpacked_one_at_a_time(scheme):
    """A program of several products doesn't hold the unpacked weights of all."""
    config, size, layers = jint8.Config(scheme=scheme, grouping="oc", threshold=0.0), 512, 8
    w = jax.eval_shape(lambda: contract_last(jint8.quantize(jnp.zeros((size, size)), config=config), (0,)))

    def all_layers(x, weights):
        for one in weights:
            x = jnp.tanh(jint8.matmul(x, one))
        return x

    program = jax.jit(all_layers).lower(jax.ShapeDtypeStruct((8, size), jnp.float32), [w] * layers).compile()
    assert program.memory_analysis().temp_size_in_bytes < layers / 2 * size * size * 4


def test_what_is_refused():
    w, x = quantized((64, 48), "oc"), jnp.ones((2, 64))
    for name in ("xla_row", "xla_digits", "xla_gather", "triton", "mosaic"):
        with pytest.raises(NotImplementedError, match="'native', 'xla', 'xla_blocks' for a weight of four bits"):
            jint8.matmul(x, w, implementation=name)
    with pytest.raises(NotImplementedError, match="one row and a weight stored"):
        jint8.matmul(x, w, implementation="xla_blocks")
    with pytest.raises(NotImplementedError, match="weight of four bits for 'xla_blocks', got one of int8"):
        jint8.matmul(x[:1], jint8.quantize(normal(64, 48)), implementation="xla_blocks")


def test_paths_that_are_picked():
    q, groups = jax.ShapeDtypeStruct((48, 32), jnp.uint8), jax.ShapeDtypeStruct((48, 4), jnp.float16)
    config = jint8.Config(scheme="int4", grouping="oc", group=16)
    scale = jax.ShapeDtypeStruct((48,), jnp.float32)
    w = Weight(q=q, scale=scale, group_scale=groups, group_min=groups, k_last=True, packing=Packing(16, 64, None))
    assert (w.k, w.n) == (64, 48)
    assert choose_path(1, w, config, None) == ("xla_blocks" if on_one_cpu() else "dequantize")
    assert choose_path(2, w, config, None) == choose_path(1, w, config, "dequantize") == "dequantize"
    assert "four bits" in gpu.unsupported(4, w, config)
