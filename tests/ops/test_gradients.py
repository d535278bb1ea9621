"""Derivatives are those of the product with the dequantized weight."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from matmul_cases import VALUES

import jint8
from jint8._core.qtensor import contract_last

CASE = VALUES["few_outliers"]
X, W = jnp.asarray(CASE.x), contract_last(jint8.quantize(CASE.w), (0,))
FLOAT_W = oracle.quantize(CASE.w).dequantize()
COTANGENT = np.random.default_rng(7).standard_normal((len(CASE.x), CASE.w.shape[1])).astype(np.float32)
BIAS = jnp.zeros(CASE.w.shape[1])


def assert_product(got, a, b):
    """`got` is `a @ b` up to float32 rounding of each term."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert (abs(np.asarray(got, np.float64) - a @ b) <= oracle.ROUNDING * (a.shape[-1] + 8) * (abs(a) @ abs(b))).all()


def loss(x, bias, w=W, cotangent=COTANGENT, **options):
    return jnp.sum(jint8.matmul(x, w, bias=bias, **options) * cotangent)


def per_row(x, bias):
    return jax.vmap(loss, in_axes=(0, None, None, 0))(x, bias, W, COTANGENT).sum()


@pytest.mark.first_case
@pytest.mark.parametrize("implementation", ["xla_digits", "xla_gather", "dequantize"])
@pytest.mark.parametrize("transform", [jax.jit, jax.checkpoint, lambda f: jax.jit(jax.checkpoint(f))])
def test_grad(transform, implementation):
    grad = jax.grad(transform(lambda x, b: loss(x, b, implementation=implementation)), (0, 1))
    x_grad, bias_grad = grad(X, BIAS)
    assert_product(x_grad, COTANGENT, FLOAT_W.T)
    assert_product(bias_grad, np.ones(len(COTANGENT)), COTANGENT)


def test_grad_under_vmap():
    x_grad, bias_grad = jax.jit(jax.grad(per_row, (0, 1)))(X, BIAS)
    assert_product(x_grad, COTANGENT, FLOAT_W.T)
    assert_product(bias_grad, np.ones(len(COTANGENT)), COTANGENT)


@pytest.mark.parametrize("scheme", ["vector-zp", "row", "zeropoint", "llm.int8-zp"])
def test_grad_with_other_schemes(scheme):
    w = jint8.quantize(CASE.w, config=jint8.Config(scheme=scheme))
    x_grad = jax.jit(jax.grad(lambda x: loss(x, None, w)))(X)
    assert_product(x_grad, COTANGENT, oracle.quantize(CASE.w, scheme=scheme).dequantize().T)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=lambda d: np.dtype(d).name)
def test_grad_in_16_bits(dtype):
    x_grad = jax.jit(jax.grad(lambda x: loss(x, None).astype(jnp.float32)))(X.astype(dtype))
    assert x_grad.dtype == dtype
    eps = float(jnp.finfo(dtype).eps)
    # cotangent, weight and result are rounded once each
    allowed = 2 * eps * (abs(COTANGENT.astype(np.float64)) @ abs(FLOAT_W.T))
    assert (abs(np.asarray(x_grad, np.float64) - COTANGENT @ FLOAT_W.T) <= allowed).all()


def test_jvp():
    tangent = np.random.default_rng(8).standard_normal(X.shape).astype(np.float32)
    y, y_dot = jax.jit(lambda x, t: jax.jvp(lambda x: jint8.matmul(x, W), (x,), (t,)))(X, tangent)
    np.testing.assert_array_equal(y, jax.jit(jint8.matmul)(X, W))
    assert_product(y_dot, tangent, FLOAT_W)


def test_linear_in_x_so_second_derivatives_are_zero():
    square = lambda x: jnp.sum(jint8.matmul(x, W) ** 2)
    hessian_product = jax.jvp(jax.grad(square), (X,), (jnp.ones_like(X),))[1]
    assert_product(hessian_product, 2 * np.ones(X.shape) @ FLOAT_W, FLOAT_W.T)


def test_through_dot_general():
    w = jint8.quantize(CASE.w)
    product = lambda x: jint8.dot_general(w, x, (((0,), (1,)), ((), ())))
    x_grad = jax.jit(jax.grad(lambda x: jnp.sum(product(x) * COTANGENT.T)))(X)
    assert_product(x_grad, COTANGENT, FLOAT_W.T)


def test_through_einsum_with_experts():
    rng = np.random.default_rng(0)
    x, float_w, cotangent = (rng.standard_normal(s).astype(np.float32) for s in [(2, 3, 5), (2, 5, 4), (2, 3, 4)])
    w = jint8.quantize(float_w, contract_axes=(1,))
    x_grad = jax.jit(jax.grad(lambda x: jnp.sum(jint8.einsum("ebd,edn->ebn", x, w) * cotangent)))(x)
    expected = oracle.quantize(float_w, (1,)).dequantize()
    for e in range(2):
        assert_product(x_grad[e], cotangent[e], expected[e].T)


def test_empty_batches_have_empty_gradients():
    assert jax.grad(lambda x: jint8.matmul(x, W).sum())(X[:0]).shape == (0, X.shape[1])
