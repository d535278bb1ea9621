"""Smoothing and rotation of weights, against the float64 oracle, which does both by its own code."""

import functools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import jint8
from jint8._core.qtensor import contract_last
from jint8._core.rotation import hadamard

SCHEMES = [name for name in oracle.SCHEMES if name != "none"]
quantize = cases.jit(jint8.quantize, static_argnames=("contract_axes", "stack_axes", "config"))


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def rotating(scheme="vector", rotate=64):
    return jint8.Config(scheme=scheme, rotate=rotate, outliers="static")


def uneven(*shape, axis=0):
    """Features between a tenth and ten times as large as others, and one twenty times larger still."""
    spread = 10 ** np.random.default_rng(5).uniform(-1, 1, shape[axis])
    spread[shape[axis] // 2] *= 20
    return normal(*shape) * np.expand_dims(spread, [a for a in range(len(shape)) if a != axis % len(shape)]).astype(
        "f4"
    )


def each(stack):
    return np.ndindex(*stack)


def check(w, got, axes, stack_axes=(), rms=None, columns=()):
    """Every leaf of `got` is what the oracle makes of `w`; integers differ only beside a half, and by one."""
    config = got.config
    _, granularity, is_affine, _ = oracle.SCHEMES[config.scheme]
    matrices, back = oracle.as_matrices(w, axes, stack_axes)
    *stack, k = np.delete(matrices.shape, -2)
    assert config.rotate == oracle.block_of(k)
    lists = np.broadcast_to(np.asarray(columns, int), (*stack, len(np.atleast_1d(columns).T)))
    rms = None if rms is None else np.broadcast_to(np.asarray(rms, np.float64), (*stack, k))
    kept = tuple(1 if a in {b % w.ndim for b in axes} else size for a, size in enumerate(w.shape))
    assert (got.q.dtype, got.q.shape) == (jnp.int8, w.shape)
    assert (got.scale.dtype, got.scale.shape) == (jnp.float32, kept)

    def leaf(array):  # [*stack, n or 1, k or 1]
        return oracle.as_matrices(np.asarray(array), axes, stack_axes)[0]

    smooth, q, scale = leaf(got.smooth), leaf(got.q), leaf(got.scale)
    zero = np.zeros_like(scale) if got.zero is None else leaf(got.zero)
    assert (got.smooth.dtype, smooth.shape) == (jnp.float32, (*stack, 1, k))
    np.testing.assert_array_equal(back(smooth), got.smooth)
    for at in each(stack):
        expected = oracle.factors(matrices[at], None if rms is None else rms[at], lists[at])
        np.testing.assert_allclose(smooth[at][0], expected, rtol=oracle.FACTOR_ERROR)
        inside = oracle.into_coordinates(matrices[at], smooth[at][0], config.rotate, lists[at])
        over = (1,) if granularity == "channel" else (0, 1)
        least = np.max(abs(inside.taken), over, keepdims=True, initial=0) / oracle.MOST_STEPS
        integers, near_half, of_scale = oracle.integers_of(
            inside.values, inside.error, over, is_affine, least=least if len(lists[at]) else 0.0
        )
        off = abs((q[at] - zero[at]) - (integers.q - integers.zero))
        assert (abs(scale[at] - integers.scale) <= (of_scale + 4 * oracle.ROUNDING) * integers.scale).all()
        assert (abs(zero[at] - integers.zero) <= 1).all()
        assert (off <= near_half).all(), f"{(off > near_half).sum()} integers differ without a half beside them"
        assert near_half.sum() <= 0.02 * near_half.size + 3  # what may differ is little
    assert (got.zero is not None) == is_affine


def test_hadamard_matrices_are_the_oracles_and_orthogonal():
    for block in (1, 2, 8, 64, 512):
        np.testing.assert_allclose(hadamard(block), oracle.hadamard(block), rtol=1e-7)
        np.testing.assert_allclose(oracle.hadamard(block) @ oracle.hadamard(block), np.eye(block), atol=1e-12)


AXES = {
    "[k,n]": ((128, 13), (0,), ()),
    "[n,k]": ((13, 128), (-1,), ()),
    "odd k": ((37, 13), (0,), ()),
    "k=1": ((1, 5), (0,), ()),
    "two apart": ((4, 7, 16), (0, 2), ()),
    "two of output": ((32, 4, 6), (0,), ()),
    "experts": ((3, 32, 5), (1,), (0,)),
    "two stacked": ((2, 8, 3, 5, 4), (1, 4), (0, 2)),
}


@functools.partial(cases.jit, static_argnames=("contract_axes", "stack_axes", "config"))
def there_and_back(w, *, contract_axes, stack_axes, **arguments):
    """The int8 weight, and what it stands for in each order that it may be stored in."""
    got = jint8.quantize(w, contract_axes=contract_axes, stack_axes=stack_axes, **arguments)
    last = contract_last(got, contract_axes, stack_axes)
    return got, got.dequantize(), [last.dequantize(), got.T.dequantize().T, last.T.dequantize().T]


@pytest.mark.first_case
@pytest.mark.parametrize("name", AXES)
def test_axes(name):
    """Stored in any order, also transposed; calibrated columns come back in their own coordinates."""
    shape, axes, stack = AXES[name]
    w, k = uneven(*shape, axis=axes[-1]), int(np.prod([shape[a] for a in axes]))
    rms, columns = abs(uneven(*(shape[a] for a in stack), k, axis=-1)), np.unique([0, k // 2])
    options = {"contract_axes": axes, "stack_axes": stack, "config": rotating("llm.int8-zp")}
    got, floats, others = there_and_back(w, rms=rms, outliers=columns, **options)
    check(w, got, axes, stack, rms, columns)
    leaves = (oracle.as_matrices(np.asarray(leaf), axes, stack)[0] for leaf in (got.q, got.scale, got.zero, got.smooth))
    q, scale, zero, smooth = leaves
    want = oracle.rotate(scale * (q - zero), got.config.rotate) * smooth
    matrices, back = oracle.as_matrices(w, axes, stack)
    want[..., columns] = matrices[..., columns]
    np.testing.assert_allclose(floats, back(want), atol=2**-11 * abs(want).max())  # of the columns, in float16
    for other in others:
        np.testing.assert_allclose(other, floats, rtol=1e-5, atol=1e-6 * abs(want).max())
    if name == "experts":  # one list of root mean squares, and of columns, for all
        got, *_ = there_and_back(w, rms=rms[1], outliers=columns, **options)
        check(w, got, axes, stack, rms[1], columns)


@pytest.mark.first_case
@pytest.mark.parametrize("scheme", SCHEMES)
def test_schemes(scheme):
    w, rms = uneven(2, 96, 11, axis=1) + 0.3, abs(uneven(96))
    arguments = {"contract_axes": (1,), "stack_axes": (0,), "config": rotating(scheme)}
    if not oracle.SCHEMES[scheme][3]:
        check(w, quantize(w, rms=rms, **arguments), (1,), (0,), rms)
        return
    columns = np.array([[5, 48, 90], [1, 96, 96]])  # the second has one column, and slots that aren't used
    got = quantize(w, rms=rms, outliers=columns, **arguments)
    check(w, got, (1,), (0,), rms, columns)
    assert (got.config.rotate, got.config.outliers) == (32, "static")
    np.testing.assert_array_equal(got.smooth[0, columns[0], 0], 1)
    rows = np.asarray(got.outlier_rows, np.float64)[0] * np.asarray(got.scale, np.float64)[0]
    np.testing.assert_allclose(rows, w[0, columns[0]], rtol=2**-10, atol=1e-5)


KNOWN = {
    "zero features of x": np.where(np.arange(64) % 3, abs(uneven(64)), 0),
    "no feature of x": np.zeros(64),
    "float16": abs(uneven(64)).astype(np.float16),
    "tiny": 1e-30 * abs(uneven(64)),
    "huge": 1e30 * abs(uneven(64)),
    "float64": abs(uneven(64)).astype(np.float64),
}


@pytest.mark.parametrize("name", KNOWN)
def test_root_mean_squares(name):
    w = uneven(64, 9)
    rms = KNOWN[name]
    check(w, jint8.quantize(w, config=rotating(), rms=rms), (0,), rms=np.asarray(rms, np.float32))


def changed(where, value):
    w = uneven(64, 9)
    w[where] = value
    return w


WEIGHTS = {
    "all zero": 0 * normal(64, 9),
    "one channel zero": changed((slice(None), 4), 0),
    "one feature zero": changed(4, 0),
    "tiny": 1e-30 * uneven(64, 9),
    "huge": 1e30 * uneven(64, 9),
    "one large value": changed((7, 3), 1e4),
}


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("scheme", ["vector", "vector-zp", "absmax"])
def test_weights_alone(name, scheme):
    w = WEIGHTS[name]
    got = jint8.quantize(w, config=rotating(scheme))
    check(w, got, (0,))
    assert np.isfinite(got.smooth).all()
    if name in ("all zero", "one channel zero"):
        np.testing.assert_array_equal(np.asarray(got.q - (0 if got.zero is None else got.zero))[:, 4], 0)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (64, 0)], ids=str)
def test_empty(shape):
    got = jint8.quantize(jnp.ones(shape), config=rotating())
    assert got.dequantize().shape == shape
    np.testing.assert_array_equal(got.smooth, np.ones((shape[0], 1)))


def test_a_channel_of_which_only_a_calibrated_column_is_left():
    """Its other integers are zeros, so that nothing but that column, in float16, decides its scale."""
    w, columns = uneven(64, 9), [17, 3]
    w[:, 5], w[17, 5] = 0, 250.0
    got = jint8.quantize(w, config=rotating("llm.int8"), outliers=columns)
    check(w, got, (0,), columns=columns)
    assert float(got.scale[0, 5]) == pytest.approx(250 / 32_768)
    np.testing.assert_array_equal(got.q[:, 5], 0)
    np.testing.assert_allclose(np.asarray(got.dequantize())[columns], w[columns], rtol=2**-10)
    assert np.isfinite(got.outlier_rows).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=lambda d: np.dtype(d).name)
def test_16_bit_weights(dtype):
    w = uneven(64, 9).astype(dtype)
    got = jint8.quantize(jnp.asarray(w), config=rotating())
    check(w.astype(np.float32), got, (0,))
    assert got.dtype == got.dequantize().dtype == dtype


def test_outside_of_a_jit_and_in_one_the_weight_is_the_same():
    w, rms = uneven(3, 64, 9, axis=1), abs(uneven(64))
    arguments = {"contract_axes": (1,), "stack_axes": (0,), "config": rotating()}
    outside, inside = (
        jint8.quantize(w, **arguments, rms=rms),
        jax.jit(functools.partial(jint8.quantize, **arguments))(w, rms=rms),
    )
    assert jax.tree.structure(outside) == jax.tree.structure(inside)
    np.testing.assert_array_equal(outside.q, inside.q)
    # Also where the root mean squares are known when it is traced: then they are checked.
    closed = functools.partial(jint8.quantize, **arguments, rms=rms)
    assert jax.tree.structure(jax.eval_shape(closed, w)) == jax.tree.structure(outside)
    with pytest.raises(ValueError, match="rms to be finite and at least 0"):
        jax.eval_shape(functools.partial(jint8.quantize, **arguments, rms=-rms), w)


@pytest.mark.parametrize(
    ("largest", "k", "block"), [(64, 192, 64), (64, 96, 32), (512, 1024, 512), (16, 96, 16), (1, 8, 1), (64, 77, 1)]
)
def test_the_block_is_that_of_the_number_of_features(largest, k, block):
    quantized = jax.eval_shape(functools.partial(jint8.quantize, config=rotating(rotate=largest)), normal(k, 2))
    assert quantized.config.rotate == block


def coordinates_of(w, got):
    """The weight as float64 in got's coordinates: `[k, n]`."""
    return oracle.rotate((np.asarray(w, np.float64) / np.asarray(got.smooth, np.float64)).T, got.config.rotate).T


@pytest.mark.first_case
@pytest.mark.parametrize(("k", "scheme"), [(64, "vector"), (64, "absmax"), (77, "vector-zp")])
def test_dequantize_is_within_half_a_step_of_the_rotated_weight(k, scheme):
    w = uneven(k, 9)
    got = jint8.quantize(w, config=rotating(scheme))
    error = abs(coordinates_of(got.dequantize(), got) - coordinates_of(w, got))
    assert (error <= np.asarray(got.scale) * (0.5 + 0.003)).all()
    assert error.max() > 0.4 * np.asarray(got.scale).max()  # where it isn't rotated, it's another coordinate's error


def test_layers_that_are_sliced_out_have_their_own_factors():
    w = uneven(3, 32, 5, axis=1) * np.array([1, 10, 0.1], np.float32)[:, None, None]
    whole = contract_last(jint8.quantize(w, contract_axes=1, stack_axes=(0,), config=rotating()), (1,), (0,))
    for i in range(3):
        layer = jax.tree.map(lambda leaf, i=i: leaf[i], whole)
        alone = jint8.quantize(w[i], config=rotating())
        np.testing.assert_allclose(layer.dequantize(), alone.dequantize(), rtol=1e-4, atol=1e-4 * abs(w[i]).max())


def test_a_weight_with_large_features_loses_less():
    x, w = normal(32, 256, seed=1), normal(256, 64)
    w[[3, 100]] *= 100
    x[:, [3, 100]] /= 100
    errors = [
        cases.relative_error(x @ np.asarray(jint8.quantize(w, config=config).dequantize()), x @ w)
        for config in (jint8.Config(scheme="vector"), rotating())
    ]
    assert errors[1] < errors[0] / 10


@pytest.mark.parametrize("scheme", ["vector", "vector-zp", "absmax"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite(bad, scheme):
    w = uneven(64, 9)
    w[60, 1] = bad
    with pytest.raises(ValueError, match="Expected finite weights, got NaN or infinity"):
        jint8.quantize(w, config=rotating(scheme))


def test_a_calibrated_column_that_is_not_finite():
    w = uneven(64, 9)
    w[10, 1] = np.nan
    with pytest.raises(ValueError, match="Expected finite weights, got NaN or infinity"):
        jint8.quantize(w, config=rotating("llm.int8"), outliers=[10, 3])


def with_rms(rms, **kwargs):
    return lambda: jint8.quantize(jnp.ones((3, 4, 5)), contract_axes=1, stack_axes=(0,), rms=rms, **kwargs)


ROTATED = {"config": jint8.Config(scheme="vector", rotate=64)}
SHAPES = r"Expected rms of shape \(4,\) or \(3, 4\), got "


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (with_rms(np.ones(5, "f4"), **ROTATED), ValueError, SHAPES + r"\(5,\)"),
        (with_rms(np.ones((3, 1), "f4"), **ROTATED), ValueError, SHAPES + r"\(3, 1\)"),
        (with_rms(np.float32(1), **ROTATED), ValueError, SHAPES + r"\(\)"),
        (with_rms(np.array([1, 1, -1, 1], "f4"), **ROTATED), ValueError, "rms to be finite and at least 0"),
        (with_rms(np.array([1, 1, np.nan, 1], "f4"), **ROTATED), ValueError, "rms to be finite and at least 0"),
        (with_rms(np.array([1, 1, np.inf, 1], "f4"), **ROTATED), ValueError, "rms to be finite and at least 0"),
        (with_rms(np.ones(4, int), **ROTATED), TypeError, "Expected rms to be floats, got int64"),
        (with_rms("large", **ROTATED), TypeError, "Expected rms to be floats, got"),
        (with_rms(np.ones(4, "f4")), ValueError, "Expected rms of activations with rotate, got it with rotate=0"),
        (lambda: jint8.quantize(jnp.ones((4, 5)), rms=np.ones(5), **ROTATED), ValueError, r"shape \(4,\), got \(5,\)"),
        (
            lambda: jint8.quantize(jnp.ones((4, 5)), outliers=[1], **ROTATED),
            ValueError,
            "Expected a scheme with decomposition for outlier columns, got 'vector'",
        ),
        (lambda: jint8.Config(scheme="vector", rotate=True), TypeError, "Expected rotate to be an integer, got True"),
        (lambda: jint8.Config(scheme="vector", rotate=64.0), TypeError, "Expected rotate to be an integer, got 64.0"),
        (lambda: jint8.Config(scheme="vector", rotate=48), ValueError, "0 or a power of two up to 512, got 48"),
        (lambda: jint8.Config(scheme="vector", rotate=-2), ValueError, "0 or a power of two up to 512, got -2"),
        (lambda: jint8.Config(scheme="vector", rotate=1024), ValueError, "0 or a power of two up to 512, got 1024"),
        (lambda: jint8.Config(rotate=64), ValueError, "rotate with calibrated outlier columns .* got outliers='batch'"),
        (lambda: jint8.Config(rotate=64, outliers="token"), ValueError, "calibrated .* got outliers='token'"),
        (lambda: jint8.Config(scheme="row+dec", rotate=64), ValueError, "calibrated .* got outliers='batch'"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_configs_that_rotate():
    assert jint8.Config(rotate=64, threshold=0.0).rotate == 64
    assert jint8.Config(rotate=np.int64(64), outliers="static").rotate == 64
    assert jint8.Config.preset("rotated") == jint8.Config(scheme="vector", rotate=64)


def test_nan_among_root_mean_squares_is_not_lost_under_jit():
    rms = np.where(np.arange(64) == 3, np.nan, 1).astype(np.float32)
    got = quantize(normal(64, 5), config=rotating(), rms=rms)
    assert np.isnan(got.scale).all()


def test_calibrations_are_copied_and_joined_with_their_root_mean_squares():
    def calibration(name):
        run = lambda params, x: jint8.matmul(x, params[name])
        return jint8.calibrate(run, {name: normal(8, 4)}, [normal(3, 8)], plan={name: (0,)})

    one, other = map(calibration, "ab")
    for both in (one | other, other.copy() | one, dict(other) | one):
        assert set(both) == {"a", "b"}
        assert "a" in both.rms
    assert set((one | other).rms) == {"a", "b"}
    doubled = jax.tree.map(lambda leaf: 2 * leaf, one)
    np.testing.assert_array_equal(doubled.rms["a"], 2 * one.rms["a"])
