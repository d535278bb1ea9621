"""Calibration of layers whose own code rearranges weights before it multiplies, and what is done with the result."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import jint8

INIT = nn.initializers.lecun_normal()
X = cases.plant(cases.normal(4, 8), columns=(3,), factor=20.0)


class Reshaped(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return x @ self.param("w", INIT, (8, 2, 4)).reshape(8, 8), None


class Transposed(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return x @ self.param("w", INIT, (8, 8)).T, None


class Sliced(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        w = self.param("w", INIT, (8, 8))
        return jnp.concatenate([x @ w[:, :2], x @ w[:, 2:]], -1), None


class Split(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        a, b = jnp.split(self.param("w", INIT, (8, 4, 4)), 2, axis=1)
        return x @ a.reshape(8, 8) + x @ b.reshape(8, 8), None


class Rows(nn.Module):
    """Multiplies parts of the features by their own rows of the weight."""

    @nn.compact
    def __call__(self, x, _=None):
        w = self.param("w", INIT, (8, 8))
        return x[:, :2] @ w[:2] + x[:, 2:] @ w[2:], None


def kept(layer):
    """The layer as the body of a scan, whose outliers stay in their feature dimension."""

    class Kept(nn.Module):
        @nn.compact
        def __call__(self, x, _=None):
            return x + layer(name="inner")(x)[0] / 100, None

    return Kept


LAYERS = [Reshaped, Transposed, Sliced, Split, Rows]


@pytest.mark.first_case
@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize("axis", [None, 0, 1], ids=["alone", "scan", "scan_axis_1"])
@pytest.mark.parametrize("layer", LAYERS)
def test_columns_of_rearranged_weights(layer, axis, int8):
    module, path = layer(), "w"
    if axis is not None:
        scan = nn.scan(kept(layer), variable_axes={"params": axis}, split_rngs={"params": True}, length=3)
        module, path = scan(), "inner/w"
    floats = cases.jit(module.init)(jax.random.key(1), X, None)
    plan = jint8.plan(module.apply, floats, X, None)
    plain = jint8.quantize_params(floats, plan=plan)
    found = jint8.calibrate(module.apply, plain if int8 else floats, [(X, None)], plan=plan)
    assert found[path].tolist() == [3]
    static = jint8.quantize_params(floats, plan=plan, outliers=found)
    want = module.apply(floats, X, None)[0]
    run = cases.jit(lambda params: jint8.apply(module.apply)(params, X, None)[0])
    # Decomposition is off, so that only calibrated columns take the outliers out of the int8 product.
    vector = jint8.with_config(plain, jint8.Config(scheme="vector"))
    assert cases.relative_error(run(static) - X, want - X) < cases.relative_error(run(vector) - X, want - X) / 2


def test_skip_holds_for_int8_weights():
    params = jint8.quantize_params({"a": {"kernel": jnp.ones((8, 8))}, "b": {"kernel": jnp.ones((8, 8))}})
    apply = lambda params, x: jint8.matmul(jint8.matmul(x, params["a"]["kernel"]), params["b"]["kernel"])
    assert set(jint8.calibrate(apply, params, [X])) == {"a/kernel", "b/kernel"}
    assert set(jint8.calibrate(apply, params, [X], skip="b")) == {"a/kernel"}
    assert set(jint8.calibrate(apply, params, [X], skip=["a", "b"], include="b")) == {"b/kernel"}


def ragged(params, x, sizes):
    return jint8.ragged_dot(x, params["experts"], sizes)


def einsum(params, x, sizes):
    return jint8.einsum("gmk,gkn->gmn", x.reshape(3, 4, 8), params["experts"])


def mapped(params, x, sizes):
    return jax.vmap(jint8.matmul)(x.reshape(3, 4, 8), params["experts"])


def scanned(params, x, sizes):
    return jax.lax.scan(lambda _, each: (None, jint8.matmul(*each)), None, (x.reshape(3, 4, 8), params["experts"]))[1]


def mixed(params, x, sizes):
    """Needs int8 weights, as `ragged_dot` does, beside a layer that doesn't."""
    return ragged(params, x @ params["up"], sizes)


@pytest.mark.first_case
@pytest.mark.parametrize("stored_last", [False, True], ids=["as given", "contracted axes last"])
@pytest.mark.parametrize("apply_fn", [ragged, einsum, mapped, scanned, mixed])
def test_int8_experts_in_products_of_jint8_need_no_plan(apply_fn, stored_last):
    rng = np.random.default_rng(0)
    x, sizes = rng.normal(size=(12, 8)).astype(np.float32), jnp.array([4, 4, 4])
    for expert, column in enumerate([5, 0, 2]):
        x[4 * expert : 4 * expert + 4, column] *= 50
    floats = {"experts": jnp.asarray(rng.normal(size=(3, 8, 4)), jnp.float32)}
    plan = jint8.Plan({"experts": (1,)}, {"experts": (0,)} if stored_last else {})
    params = {**jint8.quantize_params(floats, plan=plan), "up": jnp.eye(8)}
    means = np.mean(x.astype(np.float64).reshape(3, 4, 8) ** 2, axis=1)
    found = jint8.calibrate(apply_fn, params, [(x, sizes)], budget=2)["experts"]
    want = np.sort(np.argsort(means)[:, -2:]).tolist()
    assert found.tolist() == want
    plain = jint8.calibrate(apply_fn, params, [(x, sizes)], budget=2, plan={"experts": (1,)})
    assert plain["experts"].tolist() == want
    statistics = jint8.analysis.outlier_statistics(apply_fn, params, [(x, sizes)])
    assert statistics.projections["experts"].positions.shape[0] == 3


def test_what_to_pass_where_int8_weights_cannot_be_planned():
    def fails(params, x):
        raise RuntimeError("not traceable")

    params = {"w": jint8.quantize(jnp.ones((3, 8, 4)), contract_axes=(1,))}
    with pytest.raises(RuntimeError, match="not traceable") as caught:
        jint8.calibrate(fails, params, [X])
    assert "a jint8.Plan that has them" in "".join(caught.value.__notes__)


class Heads(nnx.Module):
    def __init__(self):
        self.w = nnx.Param(cases.normal(8, 2, 4, seed=2))

    def __call__(self, x):
        return x @ self.w[...].reshape(8, 8)


class Stacked(nnx.Module):
    """Two layers in one parameter, behind the axis of features."""

    def __init__(self):
        self.w = nnx.Param(cases.normal(8, 2, 8, seed=2))

    def __call__(self, x):
        return x @ self.w[:, 0] + x[:, ::-1] @ self.w[:, 1]


@pytest.mark.first_case
@pytest.mark.parametrize(("make", "columns"), [(Heads, [3]), (Stacked, [[3], [4]])])
def test_nnx(make, columns):
    model = make()
    graphdef, state = nnx.split(model)
    plan = jint8.plan(lambda state, x: nnx.merge(graphdef, state)(x), state, X)
    int8 = jint8.nnx.quantize(model, plan=plan)
    for watched in (model, int8):
        found = jint8.nnx.calibrate(watched, [X], plan=plan, budget=1)
        assert found["w"].tolist() == columns
    static = jint8.nnx.quantize(model, plan=plan, outliers=found)
    assert cases.relative_error(static(X), model(X)) < 0.02
