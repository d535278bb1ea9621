"""Products of int8 activations and weights of four bits, the scheme `int4-a8`, against float64."""

import four_bit_oracle
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import jint8
from jint8._core.platform import on_one_cpu
from jint8._core.qtensor import contract_last
from jint8._ops.xla import groups

SHAPES = {
    "whole_blocks": (64, 48),
    "odd_last_group": (80, 40),
    "odd": (77, 31),
    "n=1": (9, 1),
}
CONFIGS = {
    "no_threshold": {"threshold": 0.0},
    "batch": {"threshold": 2.0},
    "token": {"threshold": 2.0, "outliers": "token"},
    "two_digits": {"threshold": 0.0, "digits": 2},
}
GROUP = 16
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
every_grouping = pytest.mark.parametrize("grouping", ["oc", "ic"])


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def config_of(grouping, **options):
    return jint8.Config(scheme="int4-a8", group=GROUP, grouping=grouping, **options)


def expected(x, w, config):
    parts = four_bit_oracle.quantize(w, GROUP, config.grouping)
    options = {"threshold": config.threshold, "mode": config.outliers, "digits": config.digits}
    return four_bit_oracle.int8_matmul(x, parts, GROUP, config.grouping, **options)


@pytest.mark.first_case
@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
@every_grouping
@every_shape
def test_rows(shape, grouping, options):
    config, w = config_of(grouping, **options), normal(*shape)
    q = contract_last(jint8.quantize(w, config=config), (0,))
    for m in (1, 5):
        x = normal(m, shape[0], seed=m)
        oracle.assert_close(jax.jit(jint8.matmul)(x, q), *expected(x, w, config))


@every_grouping
def test_groups_that_take_turns_and_weights_stored_k_first(grouping, monkeypatch):
    w, x = normal(77, 31), normal(5, 77, seed=1)
    config = config_of(grouping, threshold=2.0)
    q = jint8.quantize(w, config=config)
    together = jint8.matmul(x, q)
    oracle.assert_close(together, *expected(x, w, config))
    monkeypatch.setattr(groups, "MOST_AT_ONCE", 0)
    monkeypatch.setattr(groups, "MOST_AT_ONCE_ON_CPU", 0)
    oracle.assert_close(jint8.matmul(x, q), *expected(x, w, config))


@pytest.mark.first_case
@every_grouping
def test_one_row_by_blocks_and_by_groups(grouping):
    w, x = jint8.quantize(normal(80, 40), config=config_of(grouping, threshold=3.0)), normal(1, 80, seed=1)
    w = contract_last(w, (0,))
    for largest in (1.0, 100.0):  # without an outlier and with one
        x[0, 3] = largest
        by_blocks, by_groups = (jint8.matmul(x, w, implementation=name) for name in ("xla_blocks", "xla_groups"))
        np.testing.assert_allclose(by_blocks, by_groups, rtol=0, atol=2e-6 * largest * abs(by_groups).max())


@every_grouping
def test_an_outlier_is_nearer_than_int8_has_it(grouping):
    w, x = jint8.quantize(normal(64, 48), config=config_of(grouping)), normal(3, 64, seed=1)
    x[1, 5] = 300
    exact = x.astype(np.float64) @ np.asarray(w.dequantize(), np.float64)
    split, whole = (
        abs(jint8.matmul(x, w, config=config_of(grouping, threshold=threshold)) - exact).max()
        for threshold in (6.0, 0.0)
    )
    assert 0 < split < whole / 10


@pytest.mark.first_case
@pytest.mark.parametrize("columns", [None, (1, 7)], ids=["no_columns", "columns"])
@every_grouping
def test_smoothed_and_rotated(grouping, columns):
    """The product is that of int8 activations in the weight's own coordinates."""
    config = config_of(grouping, rotate=16, outliers="static")
    w = normal(80, 40)
    x = normal(4, 80, seed=1)
    x[:, 1] *= 50
    q = jint8.quantize(w, config=config, outliers=columns, rms=np.sqrt(np.mean(x**2, axis=0)))
    exact = x.astype(np.float64) @ np.asarray(q.dequantize(), np.float64)
    for rows in (x, x[:1]):
        got = jint8.matmul(rows, q)
        off = np.linalg.norm(got - exact[: len(rows)]) / np.linalg.norm(exact[: len(rows)])
        assert 1e-5 < off < 0.01
        np.testing.assert_allclose(
            jint8.matmul(rows, q, implementation="dequantize"), exact[: len(rows)], atol=2e-5 * abs(exact).max()
        )


@pytest.mark.first_case
@every_grouping
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_rows_that_are_not_finite(bad, grouping):
    for threshold in (0.0, 6.0):
        w = contract_last(jint8.quantize(normal(64, 48), config=config_of(grouping, threshold=threshold)), (0,))
        for m in (1, 3):
            x = normal(m, 64, seed=1)
            x[0, 5] = bad
            got = np.asarray(jint8.matmul(x, w, config=config_of(grouping, threshold=threshold, outliers="token")))
            assert not np.isfinite(got[0]).any()
            assert np.isfinite(got[1:]).all()


AXES = {
    "two_contracted": ((6, 40, 35), (0, 1), ()),
    "two_free": ((50, 6, 20), (0,), ()),
    "experts": ((3, 40, 36), (1,), (0,)),
}


@pytest.mark.first_case
@pytest.mark.parametrize(("shape", "axes", "stack"), AXES.values(), ids=AXES)
@every_grouping
def test_dot_general(shape, axes, stack, grouping):
    w = jint8.quantize(normal(*shape), contract_axes=axes, stack_axes=stack, config=config_of(grouping, threshold=0.0))
    for m in (1, 4):
        x = normal(*(shape[a] for a in stack), m, *(shape[a] for a in axes), seed=1)
        numbers = ((tuple(range(len(stack) + 1, x.ndim)), axes), (tuple(range(len(stack))), stack))
        exact = jax.lax.dot_general(x, w.dequantize(), numbers, precision="highest")
        got = jint8.dot_general(x, w, numbers)
        assert 1e-4 < np.linalg.norm(got - exact) / np.linalg.norm(exact) < 0.02


@pytest.mark.first_case
@every_grouping
def test_transformations(grouping):
    config = config_of(grouping, outliers="token", threshold=2.5)
    w, x = jint8.quantize(normal(64, 48), config=config), normal(3, 64, seed=1)
    floats = np.asarray(w.dequantize(), np.float64)
    gradient = jax.grad(lambda x: jnp.sum(jint8.matmul(x, w)))(x)
    np.testing.assert_allclose(gradient, np.tile(floats.sum(1), (3, 1)), rtol=1e-4, atol=1e-4)
    rows = jint8.matmul(x, w)
    np.testing.assert_allclose(jax.vmap(jint8.matmul, (0, None))(x, w), rows, rtol=0, atol=1e-5 * abs(rows).max())
    layers = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), jint8.quantize(normal(48, 48), config=config))
    y, _ = jax.lax.scan(lambda x, w: (jint8.matmul(x, w), None), x[:, :48], layers)
    one = jax.tree.map(lambda leaf: leaf[0], layers)
    twice = jint8.matmul(jint8.matmul(x[:, :48], one), one)
    np.testing.assert_allclose(y, twice, rtol=0, atol=1e-4 * abs(twice).max())


@pytest.mark.first_case
@pytest.mark.parametrize("rotate", [0, 8])
@pytest.mark.parametrize("columns", [None, [[1, 7], [2, 3], [0, 39]]], ids=["no_columns", "columns"])
@every_grouping
def test_experts_by_ragged_dot(grouping, columns, rotate):
    """As the products of each expert's rows by themselves."""
    config = config_of(grouping, rotate=rotate, threshold=2.5, outliers="static" if rotate else "token")
    w = jint8.quantize(normal(3, 40, 36), contract_axes=(1,), stack_axes=(0,), config=config, outliers=columns)
    x, sizes = normal(7, 40, seed=1), np.array([2, 0, 4])
    got = jint8.ragged_dot(x, w, sizes)
    one = lambda i: jax.tree.map(lambda leaf: leaf[i], w)
    exact = np.concatenate([jint8.matmul(x[:2], one(0)), jint8.matmul(x[2:6], one(2)), np.zeros((1, 36))])
    np.testing.assert_allclose(got, exact, rtol=0, atol=1e-5 * abs(exact).max())
    floats = jint8.ragged_dot(x, w, sizes, implementation="dequantize")
    assert 1e-5 < np.linalg.norm(got - floats) / np.linalg.norm(floats) < 0.02


def test_a_weight_runs_by_both_schemes():
    """How activations are multiplied is the call's; how the weight is stored is its own."""
    x, floats = normal(4, 64, seed=1), normal(64, 48)
    of_int4, of_a8 = (
        jint8.quantize(floats, config=jint8.Config(scheme=name, grouping="oc", group=16))
        for name in ("int4", "int4-a8")
    )
    in_int8 = jint8.matmul(x, of_a8)
    np.testing.assert_array_equal(in_int8, jint8.matmul(x, of_int4, config=jint8.Config(scheme="int4-a8")))
    in_float = jint8.matmul(x, of_int4)
    np.testing.assert_array_equal(in_float, jint8.matmul(x, of_a8, config=jint8.Config(scheme="int4", group=128)))
    np.testing.assert_array_equal(in_float, jint8.matmul(x, of_a8, config=jint8.Config(scheme="none")))
    assert not np.array_equal(in_int8, in_float)
    rotated = jint8.Config(scheme="int4-a8", rotate=16, outliers="static")
    with pytest.raises(ValueError, match="Expected a config with rotate=0, as the weight was quantized, got rotate=16"):
        jint8.matmul(x, of_a8, config=rotated)


def test_paths():
    w, x = jint8.quantize(normal(64, 48).T, contract_axes=(1,), config=config_of("oc")), normal(2, 64)
    with pytest.raises(NotImplementedError, match="'xla_blocks', 'xla_groups' for a weight of four bits"):
        jint8.matmul(x, w, implementation="xla_gather")
    with pytest.raises(NotImplementedError, match="a weight of four bits for 'xla_groups', got one of int8"):
        jint8.matmul(x, jint8.quantize(normal(64, 48)), implementation="xla_groups")
    with pytest.raises(NotImplementedError, match="'xla_blocks' for a weight of four bits and the scheme 'int4', got"):
        jint8.matmul(x, w, config=jint8.Config(scheme="int4"), implementation="xla_groups")
    row = str(jax.make_jaxpr(lambda x: jint8.matmul(x, w))(x[:1]))
    assert ("i16" in row) == on_one_cpu()  # by blocks, in 16-bit integers
