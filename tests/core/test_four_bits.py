"""Weights in four bits: codes, how they are packed, and what they stand for, against a NumPy oracle."""

import functools
import math

import four_bit_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jint8
from jint8._core.four_bits import pack, unpack
from jint8._core.qtensor import contract_last, ordered, permuted

SHAPES = {
    "whole_blocks": (64, 48),
    "odd_last_group": (72, 40),
    "three_quarters": (60, 33),
    "odd": (77, 31),
    "n=1": (9, 1),
}
GROUPINGS = ("oc", "ic")
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
every_grouping = pytest.mark.parametrize("grouping", GROUPINGS)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def four_bits(grouping="oc", group=16, **options):
    return jint8.Config(scheme="int4", grouping=grouping, group=group, **options)


@pytest.mark.first_case
@every_grouping
@every_shape
def test_codes_steps_and_bytes(shape, grouping):
    w = normal(*shape) + np.float32(0.3)
    w[:, shape[1] // 2] *= 100
    got = jint8.quantize(w, config=four_bits(grouping))
    codes, scale, steps, lows = oracle.quantize(w, 16, grouping)
    assert (got.q.dtype, got.group_scale.dtype, got.group_min.dtype) == (jnp.uint8, jnp.float16, jnp.float16)
    np.testing.assert_array_equal(got.scale[0], scale)
    np.testing.assert_array_equal(got.group_scale, steps)
    np.testing.assert_array_equal(got.group_min, lows)
    np.testing.assert_array_equal(got.q, oracle.pack(codes, 16))
    exact = oracle.dequantize(codes, scale, steps, lows, 16, grouping)
    np.testing.assert_allclose(got.dequantize(), exact, rtol=1e-6, atol=1e-6 * abs(exact).max())


@pytest.mark.first_case
@every_shape
def test_every_weight_is_within_half_a_step(shape):
    w = normal(*shape)
    got = jint8.quantize(w, config=four_bits("oc"))
    step = np.repeat(np.asarray(got.group_scale, np.float32), 16, 0)[: shape[0]] * np.asarray(got.scale)
    assert (abs(np.asarray(got.dequantize()) - w) <= step * 0.52).all()  # the rest is float16's


@pytest.mark.first_case
@pytest.mark.parametrize("group", [2, 16, 64])
@pytest.mark.parametrize("size", [3, 31, 32, 33, 64, 95, 96, 97, 128, 200])
def test_unpack_is_the_inverse_of_pack(size, group):
    codes = np.random.default_rng(size).integers(0, 16, (size, 3), np.uint8)
    packed = jax.jit(functools.partial(pack, axis=0, group=group))(codes)
    np.testing.assert_array_equal(packed, oracle.pack(codes.astype(np.int64), group))
    assert len(packed) == math.ceil(size / 2)
    np.testing.assert_array_equal(jax.jit(lambda q: unpack(q, 0, size, group))(packed), codes)
    np.testing.assert_array_equal(unpack(packed.T, 1, size, group), codes.T)


@pytest.mark.first_case
@every_grouping
def test_shape_bytes_and_leaves(grouping):
    w = jint8.quantize(normal(5, 72, 40), contract_axes=1, stack_axes=(0,), config=four_bits(grouping))
    assert (w.shape, w.ndim, w.size, w.dtype) == ((5, 72, 40), 3, 5 * 72 * 40, jnp.float32)
    assert (w.q.shape, w.scale.shape) == ((5, 36, 40), (5, 1, 40))
    assert w.group_scale.shape == ((5, 5, 40) if grouping == "oc" else (5, 72, 3))
    leaves = jax.tree.leaves(w)
    assert leaves[0] is w.q
    assert {leaf.ndim for leaf in leaves} == {3}
    assert w.nbytes == sum(leaf.nbytes for leaf in leaves)
    assert jint8.memory_report({"kernel": w}).bytes == w.nbytes
    moved = contract_last(w, (1,), (0,))
    assert (moved.q.shape, moved.shape) == ((5, 40, 36), (5, 72, 40))
    np.testing.assert_array_equal(moved.dequantize(), w.dequantize())
    turned = permuted(ordered(moved), (2, 0, 1))
    assert turned.shape == (40, 5, 72)
    np.testing.assert_array_equal(turned.dequantize(), jnp.transpose(w.dequantize(), (2, 0, 1)))
    layer = jax.tree.map(lambda leaf: leaf[3], moved)
    np.testing.assert_array_equal(layer.dequantize(), w.dequantize()[3])


def test_bits_of_a_weight_in_whole_groups():
    w = jint8.quantize(normal(576, 576), config=four_bits("oc", group=64))
    assert 8 * w.nbytes / w.size == pytest.approx(4 + 2 * 16 / 64 + 32 / 576)


def test_adadim_takes_the_axis_that_isolates_what_is_large():
    """A large feature spoils the steps of groups along features, a large channel those of groups along channels."""
    of_feature, of_channel = normal(64, 64), normal(64, 64)
    of_feature[::16] *= 50
    of_channel[:, ::16] *= 50
    chosen = [jint8.quantize(w, config=four_bits("ada")).config.grouping for w in (of_feature, of_channel)]
    assert chosen == ["ic", "oc"]


@pytest.mark.first_case
@pytest.mark.parametrize("rotate", [0, 16])
def test_adadim_weighs_errors_by_the_activations(rotate):
    """By what the output is off on such activations, the chosen axis is the better one."""
    rng = np.random.default_rng(3)
    for seed in range(4):
        w = normal(64, 48, seed=seed) * np.exp(rng.standard_normal((64, 1))).astype(np.float32)
        w[:, ::7] *= 4
        rms = np.exp(2 * rng.standard_normal(64)).astype(np.float32)
        x = rng.standard_normal((4000, 64)) * rms
        config = four_bits("ada", rotate=rotate)
        error = {}
        for grouping in GROUPINGS:
            config = four_bits(grouping, rotate=rotate)
            got = jint8.quantize(w, config=config, rms=rms)
            error[grouping] = np.square(x @ (np.asarray(got.dequantize(), np.float64) - w)).sum()
        better = min(error, key=error.get)
        chosen = jint8.quantize(w, config=four_bits("ada", rotate=rotate), rms=rms).config.grouping
        assert error[chosen] <= 1.05 * error[better]


@every_grouping
def test_channels_of_zeros(grouping):
    w = normal(40, 6)
    w[:, 2] = 0
    got = jint8.quantize(w, config=four_bits(grouping))
    assert not np.asarray(got.dequantize())[:, 2].any()
    assert not np.asarray(jint8.quantize(np.zeros((40, 6), np.float32), config=four_bits(grouping)).dequantize()).any()


@every_grouping
@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_sizes_near_the_ends_of_float32(size, grouping):
    w = normal(40, 6) * np.float32(size)
    got = np.asarray(jint8.quantize(w, config=four_bits(grouping)).dequantize())
    np.testing.assert_allclose(got / size, w / size, atol=0.5)


@pytest.mark.first_case
@pytest.mark.parametrize("rotate", [0, 16])
@every_grouping
def test_calibrated_columns_stay_in_16_bits(grouping, rotate):
    w = normal(64, 24)
    w[[5, 40]] *= 200
    config = four_bits(grouping, rotate=rotate, outliers="static")
    got = jint8.quantize(w, config=config, outliers=[5, 40])
    back = np.asarray(got.dequantize())
    np.testing.assert_allclose(back[[5, 40]], w[[5, 40]], rtol=2e-3, atol=0.05)
    rest = [i for i in range(64) if i not in (5, 40)]
    assert abs(back - w)[rest].max() < 0.8  # whose steps the large ones don't spoil


@pytest.mark.first_case
@pytest.mark.parametrize("grouping", ["oc", "ic"])
def test_under_jit_and_vmap(grouping):
    w = normal(3, 40, 24)
    config = four_bits(grouping)
    one = functools.partial(jint8.quantize, config=config)
    each = [one(a) for a in w]
    mapped = jax.jit(jax.vmap(one))(w)
    for i, expected in enumerate(each):
        np.testing.assert_allclose(mapped.dequantize()[i], expected.dequantize(), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="grouping='oc' or 'ic' under jit"):
        jax.jit(functools.partial(jint8.quantize, config=four_bits("ada")))(w[0])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"group": 48}, ValueError, "group to be a power of two from 2 to 1024, got 48"),
        ({"group": 64.0}, TypeError, "group to be an integer, got 64.0"),
        ({"grouping": "row"}, ValueError, "grouping to be one of oc, ic, ada, got 'row'"),
        ({"rounding": "up"}, ValueError, "rounding to be one of nearest, gptq, got 'up'"),
        ({"digits": 2}, ValueError, "digits=1 with float activations"),
        ({"rotate": 16, "outliers": "up"}, ValueError, "outliers to be one of"),
        ({"scheme": "llm.int8", "group": 32}, ValueError, "group with scheme='int4' or 'int4-a8', got group=32"),
        ({"scheme": "vector", "grouping": "ic"}, ValueError, "grouping with scheme='int4' or .*, got grouping='ic'"),
    ],
)
def test_configs_that_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        jint8.Config(**({"scheme": "int4"} | options))


def test_weights_that_are_refused():
    with pytest.raises(ValueError, match="at least 3 features"):
        jint8.quantize(normal(2, 8), config=four_bits())
    with pytest.raises(ValueError, match="NaN or infinity"):
        jint8.quantize(np.full((8, 8), np.nan, np.float32), config=four_bits())
    w = jint8.quantize(normal(8, 8), config=four_bits())
    with pytest.raises(ValueError, match=r"config of the scheme 'int4', as the weight was quantized, got 'llm\.int8'"):
        jint8.matmul(jnp.ones((1, 8)), w, config=jint8.Config())
    with pytest.raises(ValueError, match=r"config of the scheme 'llm\.int8', as the weight was quantized, got 'int4'"):
        jint8.matmul(jnp.ones((1, 8)), jint8.quantize(normal(8, 8)), config=four_bits())
