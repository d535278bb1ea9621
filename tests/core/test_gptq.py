"""GPTQ: what it rounds to, against a NumPy oracle, and that the output's error is smaller for it."""

import functools

import gptq_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jint8
from jint8._core.calibration import Calibration, of_weight

every_grouping = pytest.mark.parametrize("grouping", ["oc", "ic"])


def four_bits(grouping="oc", rounding="gptq", **options):
    return jint8.Config(scheme="int4", group=16, grouping=grouping, rounding=rounding, **options)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@functools.cache
def activations(k, seed=1):
    """float64 `[400, k]` of which features depend on each other, and some are large."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((400, k)) @ (np.eye(k) + 0.4 * rng.standard_normal((k, k)))
    x *= np.exp(0.5 * rng.standard_normal(k))
    return x


def moments_of(x):
    return (x.T @ x / len(x)).astype(np.float32)


def output_error(x, off):
    return float(np.square(x @ np.asarray(off, np.float64)).sum() / len(x))


@pytest.mark.first_case
@every_grouping
@pytest.mark.parametrize(("shape", "kept"), [((40, 24), 0), ((67, 33), 3)], ids=["plain", "odd_with_3_columns"])
def test_as_the_oracle_rounds(shape, kept, grouping):
    k, n = shape
    w, x = normal(k, n), activations(k)
    columns = np.arange(kept) * 7 + 2
    config = four_bits(grouping, outliers="static" if kept else "batch")
    got = jint8.quantize(w, config=config, moments=moments_of(x), outliers=columns if kept else None)
    # In the groups, columns that are kept are 0; they come last, by themselves.
    rounded, kept_x = x.copy(), x[:, columns]
    rounded[:, columns] = 0
    within = np.where(np.isin(np.arange(k), columns)[:, None], 0, w)
    every = moments_of(np.concatenate([rounded, kept_x], axis=1))
    exact, error = oracle.gptq(np.concatenate([within, w[columns]]), every, 16, grouping, kept)
    want = exact[:k].copy()
    want[columns] = exact[k:]
    # A value at a tie may be rounded the other way in float32, and then others are, too: few, and the error stays.
    back = np.asarray(got.dequantize(), np.float64)
    assert (np.abs(back - want) < 2e-3 * np.abs(w).max()).mean() > 0.97
    assert output_error(x, back - w) == pytest.approx(output_error(x, want - w), rel=0.03)
    assert output_error(x, want - w) < error  # which counts the damping as well


LAYOUTS = {
    "stacked": ((3, 64, 24), (1,), (0,), 8, None),
    "two_contracted": ((4, 16, 24), (0, 1), (), 0, [3, 11]),
    "heads": ((64, 4, 24), (0,), (), 8, [3, 11]),
}


@pytest.mark.first_case
@every_grouping
@pytest.mark.parametrize(("shape", "contract_axes", "stack_axes", "rotate", "columns"), LAYOUTS.values(), ids=LAYOUTS)
def test_the_error_of_the_output_is_far_smaller(shape, contract_axes, stack_axes, rotate, columns, grouping):
    w, x = normal(*shape), activations(64)
    order = [*stack_axes, *contract_axes]
    error = {}
    for rounding in ("nearest", "gptq"):
        config = four_bits(grouping, rounding, rotate=rotate, outliers="static" if columns else "batch")
        axes = {"contract_axes": contract_axes, "stack_axes": stack_axes}
        got = jint8.quantize(w, config=config, moments=moments_of(x), outliers=columns, **axes)
        assert (got.shape, got.config) == (shape, config)
        off = np.moveaxis(np.asarray(got.dequantize()) - w, order, range(len(order)))
        stacked = off.reshape(shape[0] if stack_axes else 1, 64, -1)
        error[rounding] = sum(output_error(x, matrix) for matrix in stacked)
    assert error["gptq"] < 0.8 * error["nearest"]


@pytest.mark.slow
def test_adadim_takes_the_smaller_error_of_what_is_rounded():
    x = activations(64)
    for seed in range(2):
        w = normal(64, 48, seed=seed)
        w[:, :: seed + 2] *= 4
        for rounding in ("nearest", "gptq"):
            error = {}
            for grouping in ("oc", "ic"):
                got = jint8.quantize(w, config=four_bits(grouping, rounding), moments=moments_of(x))
                error[grouping] = output_error(x, np.asarray(got.dequantize()) - w)
            chosen = jint8.quantize(w, config=four_bits("ada", rounding), moments=moments_of(x)).config.grouping
            assert error[chosen] <= 1.02 * min(error.values())


def test_features_that_no_activation_has_and_channels_of_zeros():
    x = activations(64).copy()
    x[:, 5] = 0
    w = normal(64, 24)
    w[:, 3] = 0
    for moments in (moments_of(x), np.zeros((64, 64), np.float32)):
        for grouping in ("oc", "ic"):
            back = np.asarray(jint8.quantize(w, config=four_bits(grouping), moments=moments).dequantize())
            assert np.abs(back - w).max() < 1
            assert not back[:, 3].any()


def test_what_is_refused():
    w, moments = normal(64, 24), moments_of(activations(64))
    with pytest.raises(ValueError, match=r"second moments .* for rounding='gptq', got none: jint8.calibrate\(moments="):
        jint8.quantize(w, config=four_bits())
    with pytest.raises(ValueError, match=r"moments of shape \(64, 64\), got \(3, 3\)"):
        jint8.quantize(w, config=four_bits(), moments=np.eye(3))
    with pytest.raises(TypeError, match="moments to be floats, got int"):
        jint8.quantize(w, config=four_bits(), moments=np.eye(64, dtype=int))
    with pytest.raises(ValueError, match="moments to be finite"):
        jint8.quantize(w, config=four_bits(), moments=np.full((64, 64), np.nan, np.float32))
    with pytest.raises(ValueError, match=r"moments with scheme='int4', got them with 'llm\.int8'"):
        jint8.quantize(w, moments=moments)
    with pytest.raises(ValueError, match="rounding='nearest' under jit, got 'gptq'"):
        jax.jit(lambda w: jint8.quantize(w, config=four_bits(), moments=moments))(w)
    with pytest.raises(ValueError, match="rounding with scheme='int4' or 'int4-a8', got rounding='gptq'"):
        jint8.Config(rounding="gptq")


@pytest.mark.slow
def test_moments_of_a_tree():
    """`calibrate` counts products of features, over batches, for plain and stacked weights."""
    params = {"a": {"kernel": normal(12, 8)}, "experts": {"kernel": normal(3, 8, 5)}}

    def run(params, x):
        return jnp.einsum("mk,ekn->emn", jnp.tanh(x @ params["a"]["kernel"]), params["experts"]["kernel"])

    batches = [normal(20, 12, seed=2), normal(30, 12, seed=3)]
    plan = jint8.plan(run, params, batches[0])
    found = jint8.calibrate(run, params, batches, plan=plan, moments=True)
    x = np.concatenate(batches).astype(np.float64)
    np.testing.assert_allclose(found.moments["a/kernel"], x.T @ x / 50, rtol=1e-5, atol=1e-6)
    hidden = np.tanh(x @ params["a"]["kernel"])
    for of_expert in found.moments["experts/kernel"].reshape(-1, 8, 8):
        np.testing.assert_allclose(of_expert, hidden.T @ hidden / 50, rtol=1e-4, atol=1e-5)
    tree = jint8.quantize_params(params, config=four_bits("ada"), plan=plan, outliers=found)
    for path, axes in (("a", (0,)), ("experts", (1,))):
        known = of_weight(found, f"{path}/kernel", four_bits("ada"))
        stacked = {"stack_axes": (0,)} if path == "experts" else {}
        want = jint8.quantize(params[path]["kernel"], contract_axes=axes, config=four_bits("ada"), **known, **stacked)
        np.testing.assert_array_equal(tree[path]["kernel"].dequantize(), want.dequantize())
    without = jint8.calibrate(run, params, batches, plan=plan)
    assert without.moments == {}
    with pytest.raises(ValueError, match="a/kernel: Expected second moments"):
        jint8.quantize_params(params, config=four_bits("ada"), plan=plan, outliers=without)
    copied = jax.tree.map(lambda a: a, found)
    assert isinstance(copied, Calibration)
    assert copied.moments.keys() == found.moments.keys()
