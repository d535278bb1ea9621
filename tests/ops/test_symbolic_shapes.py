"""Programs exported with a symbolic number of rows: each path, at several numbers, against the product itself."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import export

import jint8

K, N = 96, 24
W = cases.normal(K, N)
X = cases.normal(40, K, seed=1).at[:, 7].multiply(20)
CONFIGS = {
    "vector": {},
    "by token": {"outliers": "token"},
    "without decomposition": {"threshold": 0.0},
    "zero points": {"scheme": "vector-zp"},
    "two digits": {"digits": 2},
    "rotated": {"rotate": 32, "threshold": 0.0},
    "float activations": {"scheme": "none"},
}


def symbolic(*names):
    return export.symbolic_shape(", ".join(names))


def exported(function, *args):
    return export.export(jax.jit(function))(*args)


@pytest.mark.first_case
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("implementation", ["xla", "xla_gather", "xla_digits"])
def test_number_of_rows(implementation, name):
    config = jint8.Config(**CONFIGS[name])
    w = jint8.quantize(W, config=config if config.quantizes_weights else jint8.Config())
    (b,) = symbolic("b")
    run = lambda x: jint8.matmul(x, w, implementation=implementation, config=config)
    program = exported(run, jax.ShapeDtypeStruct((b, K), jnp.float32))
    path = "xla_gather" if implementation == "xla" else implementation
    for rows in (1, 3, 40):
        want = jint8.matmul(X[:rows], w, implementation=path, config=config)
        np.testing.assert_allclose(program.call(X[:rows]), want, rtol=1e-5, atol=1e-4)


def test_batch_and_length():
    w = jint8.quantize(W)
    b, s = symbolic("b", "s")
    x = X.reshape(4, 10, K)
    for function in (
        jint8.matmul,
        lambda x, w: jint8.einsum("bsk,kn->bsn", x, w),
        lambda x, w: jint8.dot_general(x, w, (((2,), (0,)), ((), ()))),
    ):
        program = exported(lambda x, f=function: f(x, w), jax.ShapeDtypeStruct((b, s, K), jnp.float32))
        assert program.call(x[:1, :2]).shape == (1, 2, N)
        np.testing.assert_allclose(program.call(x), jint8.matmul(x, w), rtol=1e-5, atol=1e-4)


def test_calibrated_columns():
    w = jint8.quantize(W, outliers=[7, 30])
    (b,) = symbolic("b")
    program = exported(lambda x: jint8.matmul(x, w), jax.ShapeDtypeStruct((b, K), jnp.float32))
    np.testing.assert_allclose(program.call(X), jint8.matmul(X, w), rtol=1e-5, atol=1e-4)


@pytest.mark.slow
def test_a_model():
    model = nn.Sequential([nn.Embed(50, K), nn.Dense(N), nn.gelu, nn.Dense(K)])
    tokens = jnp.arange(12).reshape(3, 4)
    params = model.init(jax.random.key(0), tokens)
    int8, run = jint8.quantize_params(params), jint8.apply(model.apply)
    b, s = symbolic("b", "s")
    shape = jax.ShapeDtypeStruct((b, s), jnp.int32)
    for program in (exported(run, int8, shape), jint8.export(run, platforms=("cpu",))(int8, shape)):
        np.testing.assert_allclose(program.call(int8, tokens), run(int8, tokens), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", ["triton", "xla_row"])
def test_paths_that_need_the_number(implementation):
    (b,) = symbolic("b")
    run = lambda x: jint8.matmul(x, jint8.quantize(W), implementation=implementation)
    with pytest.raises(NotImplementedError, match="rows"):
        exported(run, jax.ShapeDtypeStruct((b, K), jnp.float32))
