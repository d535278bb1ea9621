"""Layers of one's own: handlers, and errors where a layer can't be run in int8."""

import cases
import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

import jint8

X = cases.normal(2, 3, 32, seed=1)


class Heads(nn.Module):
    """A compact layer that calls einsum on a parameter."""

    @nn.compact
    def __call__(self, x):
        w = self.param("w", nn.initializers.lecun_normal(), (4, 32, 8))
        return jnp.einsum("btd,ndh->btnh", x, w)


class SetupHeads(nn.Module):
    """The same, declared in setup()."""

    def setup(self):
        self.w = self.param("w", nn.initializers.lecun_normal(), (32, 8))

    def __call__(self, x):
        return x @ self.w

    def scaled(self, x):
        return 2 * (x @ self.w)


class Model(nn.Module):
    layer: type

    @nn.compact
    def __call__(self, x):
        return self.layer(name="inner")(nn.Dense(32, name="dense")(x))


@pytest.fixture
def registry(monkeypatch):
    """Handlers registered in a test are gone after it."""
    from jint8.linen import _registry

    monkeypatch.setattr(_registry, "_HANDLERS", dict(_registry._HANDLERS))


def quantized(model, **kwargs):
    variables = model.init(jax.random.key(0), X)
    return variables, jint8.quantize_params(variables, plan=jint8.plan(model.apply, variables, X), **kwargs)


def test_handler(registry):
    @jint8.linen.register(Heads)
    def heads(module, x):
        return jint8.einsum("btd,ndh->btnh", x, jint8.linen.param(module, "w"))

    floats, int8 = quantized(Model(Heads))
    assert cases.relative_error(jint8.apply(Model(Heads).apply)(int8, X), Model(Heads).apply(floats, X)) < 0.02


def test_handler_of_another_method_and_setup(registry):
    @jint8.linen.register(SetupHeads, method="scaled")
    def scaled(module, x):
        return 2 * jint8.matmul(x, jint8.linen.param(module, "w"))

    jint8.linen.register(SetupHeads, lambda module, x: jint8.matmul(x, module.w))
    module = SetupHeads()
    floats, int8 = quantized(module, keep_order="w")
    want = module.apply(floats, X)
    assert cases.relative_error(jint8.apply(module.apply)(int8, X), want) < 0.02
    assert cases.relative_error(jint8.apply(module.apply)(int8, X, method="scaled"), 2 * want) < 0.02


class Masked(nn.Module):
    """A layer whose product can't be an int8 one: it changes the weight first."""

    @nn.compact
    def __call__(self, x):
        return x @ (self.param("w", nn.initializers.lecun_normal(), (32, 32)) * jnp.tri(32))


def test_use_of_the_values_names_the_layer():
    variables = Model(Masked).init(jax.random.key(0), X)
    int8 = jint8.quantize_params(variables, plan={"inner/w": (0,)})
    with pytest.raises(TypeError, match=r"inner \(Masked\) with int8 weights \(w\).*got mul.*jint8.linen.register"):
        jint8.apply(Model(Masked).apply)(int8, X)


def test_use_of_the_values_under_scan_names_the_layer():
    class Body(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return Masked(name="inner")(x), None

    model = nn.scan(Body, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)()
    int8 = jint8.quantize_params(model.init(jax.random.key(0), X, None), plan={"inner/w": (1,)})
    with pytest.raises(TypeError, match=r"inner \(Masked\) with int8 weights"):
        jax.jit(jint8.apply(model.apply))(int8, X, None)


def test_product_over_other_axes_names_the_layer():
    variables = Model(Heads).init(jax.random.key(0), X)
    int8 = jint8.quantize_params(variables, plan={"inner/w": (2,)})
    with pytest.raises(ValueError, match="quantized over the contracted axes") as error:
        jint8.apply(Model(Heads).apply)(int8, X)
    assert error.value.__notes__[0] == "jint8: in inner (Heads)"


def test_int8_weights_without_apply_are_an_error():
    """Never a silently dequantized product."""
    _, int8 = quantized(Model(Heads))
    with pytest.raises((TypeError, ValueError, AttributeError)):
        Model(Heads).apply(int8, X)


def test_error_in_a_handler_keeps_its_type_and_names_the_layer():
    floats = Model(nn.Dense).clone(layer=lambda name: nn.Dense(8, name=name)).init(jax.random.key(0), X)
    model = Model(lambda name: nn.Dense(8, name=name))
    int8 = jint8.quantize_params(floats)
    with pytest.raises(ValueError, match="contracted axes of one size") as error:
        jint8.apply(model.apply)(int8, X[..., :16])
    assert error.value.__notes__[0] == "jint8: in dense (Dense)"


@pytest.mark.parametrize("wrapper", [nn.WeightNorm, nn.SpectralNorm])
def test_normalized_weights_stay_in_floating_point(wrapper):
    class Normalized(nn.Module):
        @nn.compact
        def __call__(self, x):
            kwargs = {"update_stats": False} if wrapper is nn.SpectralNorm else {}
            return wrapper(nn.Dense(8, name="dense"))(x, **kwargs)

    variables = Normalized().init(jax.random.key(0), X)
    int8 = jint8.quantize_params(variables)
    with pytest.raises(NotImplementedError, match="rescales"):
        jint8.apply(Normalized().apply)(int8, X)
    skipped = jint8.quantize_params(variables, skip="dense")
    with pytest.warns(UserWarning, match="jint8.apply: nothing becomes int8"):
        assert jint8.apply(Normalized().apply)(skipped, X).shape == (2, 3, 8)


def test_register_checks_its_arguments():
    with pytest.raises(TypeError, match="linen module class"):
        jint8.linen.register(int, lambda module: None)
    with pytest.raises(TypeError, match="callable"):
        jint8.linen.register(Heads, 3)


def test_param_takes_values_out_of_boxes():
    module = nn.Dense(8, kernel_init=nn.with_partitioning(nn.initializers.ones, ("a", None)), use_bias=False)
    bound = module.bind(module.init(jax.random.key(0), X))
    assert jint8.linen.param(bound, "kernel").shape == (32, 8)
    assert jint8.linen.param(bound, "bias") is None
