"""Calibration of layers whose own code rearranges weights before it multiplies, and what is done with the result."""

import cases
import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx

import jint8

INIT = nn.initializers.lecun_normal()
X = cases.plant(jax.random.normal(jax.random.key(0), (4, 8)), columns=(3,), factor=20.0)


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


class Heads(nnx.Module):
    def __init__(self):
        self.w = nnx.Param(jax.random.normal(jax.random.key(2), (8, 2, 4)))

    def __call__(self, x):
        return x @ self.w[...].reshape(8, 8)


class Stacked(nnx.Module):
    """Two layers in one parameter, behind the axis of features."""

    def __init__(self):
        self.w = nnx.Param(jax.random.normal(jax.random.key(2), (8, 2, 8)))

    def __call__(self, x):
        return x @ self.w[:, 0] + x[:, ::-1] @ self.w[:, 1]


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
