"""Rearranged weights keep what they say about columns: calibrated outliers, and taps that watch activations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jint8
from jint8._core.config import Config
from jint8._core.qtensor import contract_last
from jint8._tracing.substitute import with_int8
from jint8.analysis._calibrate import statistics

M, K = 10, 6


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# name: function, shape of the weight, contracted axes, stacked axes
WEIGHTS = {
    "outputs_merged": (lambda w: w.reshape(6, 8), (6, 4, 2), (0,), ()),
    "outputs_split": (lambda w: w.reshape(6, 2, 4), (6, 8), (0,), ()),
    "contracted_merged": (lambda w: w.reshape(6, 4), (2, 3, 4), (0, 1), ()),
    "contracted_split": (lambda w: w.reshape(2, 3, 4), (6, 4), (0,), ()),
    "contracted_swapped_and_merged": (lambda w: w.transpose(1, 0, 2).reshape(6, 4), (2, 3, 4), (0, 1), ()),
    "contracted_swapped_behind": (lambda w: w.transpose(3, 2, 1, 0).reshape(2, 2, 6), (2, 3, 2, 2), (0, 1), ()),
    "one_of_a_stack_merged": (lambda w: w[1].reshape(6, 8), (3, 6, 4, 2), (1,), (0,)),
    "stacks_merged": (lambda w: w.reshape(6, 6, 4), (3, 2, 6, 4), (2,), (0, 1)),
    "stack_split": (lambda w: w.reshape(2, 3, 6, 2, 2), (6, 6, 4), (1,), (0,)),
    "new_axes": (lambda w: w[None, :, None], (6, 4), (0,), ()),
    "slice_of_outputs": (lambda w: w[:, 1:4], (6, 8), (0,), ()),
    "slice_of_contracted": (lambda w: w[1:4], (6, 8), (0,), ()),
    "every_second_of_two_contracted": (lambda w: w[:, ::2], (2, 3, 4), (0, 1), ()),
    "one_of_the_last_contracted": (lambda w: w[:, 1:2], (2, 3, 4), (0, 1), ()),
    "dynamic_slice_of_contracted": (lambda w: lax.dynamic_slice(w, (jnp.int32(2), 0), (3, 8)), (6, 8), (0,), ()),
    "slice_and_merge": (lambda w: w[:, 1:].transpose(1, 0, 2).reshape(4, 4), (2, 3, 4), (0, 1), ()),
}  # fmt: skip


@pytest.mark.first_case
@pytest.mark.parametrize("last", [True, False], ids=["contracted_last", "order_kept"])
@pytest.mark.parametrize("case", WEIGHTS)
def test_calibrated_columns_stand_for_the_same_values(case, last):
    function, shape, contracted, stacked = WEIGHTS[case]
    outliers = np.array([1, 4, K, 2])  # K: a slot that isn't used
    if stacked:  # another list for each
        size = [shape[a] for a in stacked]
        outliers = (outliers[:2] + np.arange(np.prod(size))[:, None]).reshape(*size, 2) % K
    config = Config(scheme="llm.int8-zp")
    w = jint8.quantize(normal(*shape), contract_axes=contracted, stack_axes=stacked, outliers=outliers, config=config)
    w = contract_last(w, contracted, stacked) if last else w
    got = with_int8(lambda floats: function(floats["w"]), {"w": w})
    assert isinstance(got, jint8.QTensor)
    assert got.outlier_rows is not None
    np.testing.assert_array_equal(got.dequantize(), function(w.dequantize()))


def halves(w, x):
    a, b = jnp.split(w, 2, axis=1)
    return x @ a.reshape(6, 4) + x @ b.reshape(6, 4)


def picked(w, x):
    start = jnp.argmax(x[0]) * 0 + 3
    return x[:, 3:] @ lax.dynamic_slice(w, (start, 0), (3, 8)) + x[:, :3] @ w[:3]


def two_layers(w, x):
    return x @ w[0].reshape(6, 8) + 2 * x @ w[1].reshape(6, 8)


SWAPPED = np.arange(K).reshape(3, 2).T.ravel()  # column (a, b) of the weight meets column (b, a) of x

# name: function, shape of the weight, contracted axes, stacked axes, and the activations that each column meets, in the
# order of the weight's own contracted axes
PRODUCTS = {
    "outputs_merged": (lambda w, x: x @ w.reshape(6, 8), (6, 4, 2), (0,), (), lambda x: x),
    "transposed": (lambda w, x: x @ w.T, (8, 6), (1,), (), lambda x: x),
    "contracted_merged": (lambda w, x: x @ w.reshape(6, 4), (2, 3, 4), (0, 1), (), lambda x: x),
    "contracted_split": (
        lambda w, x: jnp.einsum("mab,abn->mn", x.reshape(M, 2, 3), w.reshape(2, 3, 4)), (6, 4), (0,), (), lambda x: x
    ),
    "contracted_swapped": (
        lambda w, x: x @ w.transpose(1, 0, 2).reshape(6, 4), (2, 3, 4), (0, 1), (), lambda x: x[:, SWAPPED]
    ),
    "halves_of_heads": (halves, (6, 4, 2), (0,), (), lambda x: np.concatenate([x, x])),
    "halves_of_columns": (lambda w, x: x[:, :2] @ w[:2] + x[:, 2:] @ w[2:], (6, 8), (0,), (), lambda x: x),
    "picked_columns": (picked, (6, 8), (0,), (), lambda x: x),
    "two_layers": (two_layers, (2, 6, 4, 2), (1,), (0,), lambda x: np.stack([x, 2 * x])),
    "stacks_merged": (
        lambda w, x: jnp.einsum("emk,ekn->emn", x * jnp.arange(1, 5)[:, None, None], w.reshape(4, 6, 8)),
        (2, 2, 6, 8), (2,), (0, 1),
        lambda x: np.stack([x, 2 * x, 3 * x, 4 * x]).reshape(2, 2, M, K),
    ),
}  # fmt: skip


@pytest.mark.first_case
@pytest.mark.parametrize("int8", [True, False], ids=["int8", "float"])
@pytest.mark.parametrize("case", PRODUCTS)
def test_statistics_are_of_the_right_columns(case, int8):
    function, shape, contracted, stacked, met = PRODUCTS[case]
    x = 2 * normal(M, K, seed=1) * np.arange(1, K + 1, dtype=np.float32) / 3
    plan = jint8.Plan({"w": contracted}, {"w": stacked})

    def apply(params, x):
        w = params["w"]
        return with_int8(lambda floats: function(floats["w"], x), {"w": w})

    params = {"w": jnp.asarray(normal(*shape) / 4)}
    params = jint8.quantize_params(params, plan=plan) if int8 else params
    got = statistics(apply, params, [x], counted=Config(threshold=2.0), plan=plan)["w"]
    want = np.abs(np.asarray(met(x), np.float64))
    assert got.outliers.shape == (*want.shape[:-2], K)
    np.testing.assert_array_equal(got.outliers, (want >= 2).sum(-2))
    np.testing.assert_array_equal(got.positions, np.full(got.positions.shape, want.shape[-2]))
    np.testing.assert_allclose(got.square_sum, (want**2).sum(-2), rtol=1e-5)
    np.testing.assert_allclose(got.largest, want.max(-2), rtol=1e-6)


def test_statistics_of_layers_that_a_reshape_merges_with_outputs_are_refused():
    plan = jint8.Plan({"w": (1,)}, {"w": (0,)})
    params = jint8.quantize_params({"w": normal(2, 6, 4)}, plan=plan)
    merged = lambda w, x: x @ w.transpose(1, 0, 2).reshape(6, 8)
    apply = lambda params, x: with_int8(lambda floats: merged(floats["w"], x), params)
    with pytest.raises(ValueError, match="Expected one list of outlier columns for all output channels"):
        statistics(apply, params, [normal(M, K)], plan=plan)
    assert jax.jit(apply)(params, normal(M, K)).shape == (M, 8)
