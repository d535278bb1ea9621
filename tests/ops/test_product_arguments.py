"""`bias`, `precision`, `out_sharding` and `implementation` of the products: each works, or is refused by name.

Activations are integers up to 127 with a 127 in every row, so that quantizing them loses nothing.
"""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jint8

EXACT = jint8.Config(threshold=0)
PLAIN = (((1,), (0,)), ((), ()))


def integers(*shape):
    x = np.random.default_rng(0).integers(-127, 128, shape).astype(np.float32)
    x[..., 0] = 127
    return x


def normal(*shape, seed=1):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def assert_product(got, x, w, bias, subscripts):
    """`einsum(subscripts, x, w) + bias` of dequantized weights, where bias broadcasts over the result."""
    x, w, bias = (np.asarray(a, np.float64) for a in (x, w, bias))
    want = np.einsum(subscripts, x, w) + bias
    terms = np.einsum(subscripts, abs(x), abs(w)) + abs(bias)
    assert got.shape == want.shape
    assert (abs(np.asarray(got, np.float64) - want) <= oracle.ROUNDING * (8 + x.shape[-1]) * terms).all()


def test_bias_of_dot_general():
    w = jint8.quantize(normal(5, 4, 2), config=EXACT)
    x, bias = integers(3, 5), normal(4, 2, seed=2)
    got = jint8.dot_general(x, w, PLAIN, bias=bias)
    assert_product(got, x, w.dequantize(), bias, "bk,knh->bnh")
    left = jint8.dot_general(w, x, (((0,), (1,)), ((), ())), bias=bias)
    np.testing.assert_array_equal(left, np.transpose(got, (1, 2, 0)))


def test_bias_of_dot_general_with_experts():
    w = jint8.quantize(normal(2, 5, 4), contract_axes=(1,), stack_axes=(0,), config=EXACT)
    x, bias = integers(2, 3, 5), normal(2, 4, seed=2)
    got = jint8.dot_general(x, w, (((2,), (1,)), ((0,), (0,))), bias=bias)
    assert_product(got, x, w.dequantize(), bias[:, None], "ebk,ekn->ebn")


@pytest.mark.parametrize("flipped", [False, True], ids=["as_given", "result_permuted"])
def test_bias_of_einsum(flipped):
    """The bias has the result's order of axes, not the weight's."""
    w = jint8.quantize(normal(5, 4, 2), config=EXACT)
    x, bias = integers(3, 5), normal(4, 2, seed=2)
    subscripts = "bk,knh->bhn" if flipped else "bk,knh->bnh"
    bias = bias.T if flipped else bias
    assert_product(jint8.einsum(subscripts, x, w, bias=bias), x, w.dequantize(), bias, subscripts)


def test_bias_of_einsum_between_the_axes_of_x():
    w = jint8.quantize(normal(2, 5, 4), contract_axes=(1,), stack_axes=(0,), config=EXACT)
    x, bias = integers(3, 2, 5), normal(4, 2, seed=2)
    got = jint8.einsum("bek,ekn->nbe", x, w, bias=bias)
    assert_product(got, x, w.dequantize(), bias[:, None], "bek,ekn->nbe")


@pytest.mark.slow
def test_bias_of_ragged_dot():
    w = jint8.quantize(normal(3, 5, 4), contract_axes=(1,), stack_axes=(0,), config=EXACT)
    x, bias = integers(6, 5), normal(3, 4, seed=2)
    got = jint8.ragged_dot(x, w, jnp.array([2, 0, 3]), bias=bias)
    expert = [0, 0, 2, 2, 2]
    assert_product(got[:5], x[:5], np.asarray(w.dequantize())[expert], bias[expert], "bk,bkn->bn")
    assert not np.any(got[5])  # of no expert


def test_a_bias_is_added_before_the_only_rounding():
    w = jint8.quantize(normal(64, 8), config=EXACT)
    x = jnp.asarray(integers(4, 64), jnp.bfloat16)
    bias = jnp.full(8, 1e4, jnp.float32)
    products = jint8.matmul(x.astype(jnp.float32), w) + 1e4
    for got in (
        jint8.dot_general(x, w, PLAIN, bias=bias),
        jint8.einsum("bk,kn->bn", x, w, bias=bias),
        jint8.matmul(x, w, bias=bias),
    ):
        np.testing.assert_array_equal(got, products.astype(jnp.bfloat16))


def test_gradient_of_a_bias():
    w = jint8.quantize(normal(5, 4, 2))
    gradient = jax.grad(lambda b: jnp.sum(jint8.einsum("bk,knh->bhn", normal(3, 5), w, bias=b) ** 2) / 2)
    bias = normal(2, 4, seed=2)
    got = jint8.einsum("bk,knh->bhn", normal(3, 5), w, bias=bias)
    np.testing.assert_allclose(gradient(bias), np.sum(got, axis=0), rtol=1e-5)


def float_precisions(function, *args):
    """The precision of every product in floating point of a program."""
    found = []

    def visit(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "dot_general" and eqn.invars[0].aval.dtype != jnp.int8:
                found.append(eqn.params["precision"])
            for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda p: hasattr(p, "eqns")):
                if hasattr(inner, "eqns"):
                    visit(getattr(inner, "jaxpr", inner))

    visit(jax.make_jaxpr(function)(*args).jaxpr)
    return found


DEFAULT, HIGHEST = (lax.Precision.DEFAULT,) * 2, (lax.Precision.HIGHEST,) * 2
CALIBRATED = jint8.quantize(normal(96, 4), outliers=[3], config=jint8.Config(threshold=0.5))


@pytest.mark.parametrize("product", ["dot_general", "einsum"])
def test_precision_governs_products_in_floating_point(product):
    x, w = normal(8, 96), jint8.quantize(normal(96, 4))

    def found(w, precision, **options):
        def run(x):
            if product == "einsum":
                return jint8.einsum("bk,kn->bn", x, w, precision=precision, **options)
            return jint8.dot_general(x, w, PLAIN, precision, **options)

        return float_precisions(run, x)

    assert found(w, "highest", implementation="dequantize") == [HIGHEST]
    assert found(w, None, implementation="dequantize") == [None]
    assert found(w, "default", config=jint8.Config(scheme="none")) == [DEFAULT]
    # Outliers that are found in a call are exact whatever precision says; calibrated columns are not.
    assert {*found(w, "default", implementation="xla_gather")} == {HIGHEST}
    columns = {*found(CALIBRATED, "default", implementation="xla_digits")}
    assert columns == {DEFAULT}
    assert {*found(CALIBRATED, None, implementation="xla_digits")} == {HIGHEST}


def test_precision_of_a_derivative():
    w = jint8.quantize(normal(96, 4))
    gradient = jax.grad(lambda x: jint8.dot_general(x, w, PLAIN, "highest", implementation="xla_digits").sum())
    assert HIGHEST in float_precisions(gradient, normal(8, 96))


@pytest.mark.parametrize("implementation", ["xla_digits", "dequantize"])
def test_a_precision_that_is_none(implementation):
    with pytest.raises(ValueError, match="finest"):
        jint8.dot_general(normal(8, 4), jint8.quantize(normal(4, 4)), PLAIN, "finest", implementation=implementation)


def test_out_sharding_on_explicit_axes():
    mesh = jax.make_mesh((1,), ("model",), axis_types=(AxisType.Explicit,))
    x, w = normal(2, 3, 8), jint8.quantize(normal(8, 4))
    want = jint8.einsum("bsk,kn->bsn", x, w)
    with jax.set_mesh(mesh):
        spec = PartitionSpec(None, None, "model")
        numbers = (((2,), (0,)), ((), ()))
        for got in (
            jax.jit(lambda x: jint8.dot_general(x, w, numbers, out_sharding=spec))(x),
            jax.jit(lambda x: jint8.einsum("bsk,kn->bsn", x, w, out_sharding=NamedSharding(mesh, spec)))(x),
        ):
            assert jax.typeof(got).sharding.spec == spec
            np.testing.assert_array_equal(got, want)


def test_out_sharding_that_the_mesh_has_not():
    x, w = normal(3, 8), jint8.quantize(normal(8, 4))
    with pytest.raises(ValueError, match="mesh"):
        jint8.dot_general(x, w, PLAIN, out_sharding=PartitionSpec("model", None))


W, EXPERTS = jint8.quantize(normal(5, 4)), jint8.quantize(normal(2, 5, 4), contract_axes=(1,))
X, SIZES = normal(3, 5), jnp.array([1, 2])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: jint8.dot_general(X, W, PLAIN, bias=jnp.ones(5)), ValueError, r"Expected bias of shape \(4,\), got"),
        (lambda: jint8.dot_general(X, W, PLAIN, bias=jnp.ones(4, int)), TypeError, "Expected bias to be bfloat16"),
        (lambda: jint8.einsum("bk,kn->bn", X, W, bias=jnp.ones((1, 4))), ValueError, "Expected a bias of the axes n"),
        (lambda: jint8.ragged_dot(X, EXPERTS, SIZES, bias=jnp.ones(4)), ValueError, r"bias of shape \(2, 4\)"),
        (lambda: jint8.ragged_dot(X, EXPERTS, SIZES, implementation="best"), ValueError, "Expected implementation"),
        (
            lambda: jint8.ragged_dot(X, EXPERTS, SIZES, implementation="triton"),
            NotImplementedError,
            "Expected an implementation with a ragged product, got 'triton'",
        ),
        (lambda: jint8.ragged_dot(X, EXPERTS, SIZES, config="best"), TypeError, "Expected config to be a jint8.Config"),
        (lambda: jint8.dot_general(X, X.T, PLAIN, bias=X[0]), TypeError, "Expected a QTensor beside bias, config or"),
        (lambda: jint8.einsum("bk,kn->bn", X, X.T, config=EXACT), TypeError, "Expected a QTensor beside bias, config"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_ragged_dot_with_activations_in_floating_point():
    got = jint8.ragged_dot(X, EXPERTS, SIZES, implementation="dequantize")
    want = np.einsum("bk,bkn->bn", X, np.asarray(EXPERTS.dequantize())[[0, 1, 1]])
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_a_pair_of_precisions_is_in_the_order_of_the_operands():
    x, w = normal(3, 5), jint8.quantize(normal(5, 4))
    pair = ("highest", "default")
    run = lambda x: jint8.dot_general(w, x, (((0,), (1,)), ((), ())), pair, implementation="dequantize")
    assert float_precisions(run, x) == [(lax.Precision.DEFAULT, lax.Precision.HIGHEST)]  # activations first
    run = lambda x: jint8.einsum("kn,bk->bn", w, x, precision=pair, implementation="dequantize")
    assert float_precisions(run, x) == [(lax.Precision.DEFAULT, lax.Precision.HIGHEST)]
    run = lambda x: jint8.einsum("bk,kn->bn", x, w, precision=pair, implementation="dequantize")
    assert float_precisions(run, x) == [(lax.Precision.HIGHEST, lax.Precision.DEFAULT)]


def test_results_in_integers_are_refused():
    for call in (
        lambda: jint8.dot_general(X, W, PLAIN, preferred_element_type=jnp.int32),
        lambda: jint8.einsum("bk,kn->bn", X, W, preferred_element_type=jnp.int8),
    ):
        with pytest.raises(TypeError, match="Expected preferred_element_type to be a float dtype"):
            call()


def test_no_features():
    """Sums of nothing, and the bias."""
    bias, nothing = normal(2, 4), jint8.QTensor(jnp.zeros((2, 0, 4), jnp.int8), jnp.ones((2, 1, 4)))
    np.testing.assert_array_equal(jint8.ragged_dot(X[:, :0], nothing, SIZES, bias=bias), bias[[0, 1, 1]])
    w = jint8.QTensor(jnp.zeros((0, 4), jnp.int8), jnp.ones((1, 4)))
    np.testing.assert_array_equal(jint8.matmul(X[:, :0], w, bias=bias[0]), [bias[0]] * 3)


def test_no_rows():
    assert jint8.ragged_dot(X[:0], EXPERTS, jnp.array([0, 0])).shape == (0, 4)
    assert jint8.ragged_dot(X, jax.tree.map(lambda leaf: leaf[:0], EXPERTS), SIZES[:0]).tolist() == [[0] * 4] * 3
    experts = jint8.quantize(normal(3, 5, 4), contract_axes=(1,), stack_axes=(0,), outliers=[1])
    none = jax.tree.map(lambda leaf: leaf[:0], experts)
    assert jint8.einsum("gmk,gkn->gmn", jnp.ones((0, 2, 5)), none).shape == (0, 2, 4)
