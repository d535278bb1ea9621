"""A layer's `precision` reaches what its int8 product computes in floating point, in linen, nnx and foreign code."""

import cases
import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax

import jint8

X = cases.normal(2, 3, 8)
NONE = jint8.Config(scheme="none")  # how to multiply: with weights dequantized
HIGHEST = (lax.Precision.HIGHEST,) * 2


class OwnCode(nn.Module):
    """A layer that the library has no handler for."""

    @nn.compact
    def __call__(self, x):
        w = self.param("weight", nn.initializers.lecun_normal(), (8, 4))
        return jnp.matmul(x, w, precision="highest")


LINEN = {
    "Dense": nn.Dense(4, precision="highest"),
    "DenseGeneral": nn.DenseGeneral((2, 4), precision="highest"),
    "Einsum": nn.Einsum((8, 4), "btd,dn->btn", precision="highest"),
    "own code": OwnCode(),
}
NNX = {
    "Linear": lambda: nnx.Linear(8, 4, precision="highest", rngs=nnx.Rngs(0)),
    "LinearGeneral": lambda: nnx.LinearGeneral(8, (2, 4), precision="highest", rngs=nnx.Rngs(0)),
    "Einsum": lambda: nnx.Einsum("btd,dn->btn", (8, 4), precision="highest", rngs=nnx.Rngs(0)),
}


def precisions(function, *args):
    equations = cases.equations(jax.make_jaxpr(function)(*args).jaxpr)
    return [eqn.params["precision"] for eqn in equations if eqn.primitive.name == "dot_general"]


@pytest.mark.first_case
@pytest.mark.parametrize("name", LINEN)
def test_linen(name):
    module = LINEN[name]
    params = module.init(jax.random.key(1), X)
    int8 = jint8.quantize_params(params, plan=jint8.plan(module.apply, params, X))
    assert precisions(jint8.apply(module.apply, config=NONE), int8, X) == [HIGHEST]


@pytest.mark.parametrize("name", NNX)
def test_nnx(name):
    model = jint8.nnx.quantize(NNX[name]())
    model.kernel.set_value(jint8.with_config(model.kernel.get_value(), NONE))
    assert precisions(model, X) == [HIGHEST]
