"""`dot_general` and `einsum` against the same product of dequantized weights, and against `matmul`.

Activations are integers up to 127 with a 127 in every row, so that quantizing them loses nothing and what is compared
is which axes meet, to float32 rounding.
"""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import jint8
from jint8._core.qtensor import contract_last

EXACT = jint8.Config(threshold=0)
ORDERS = pytest.mark.parametrize("last", [False, True], ids=["as_given", "contract_last"])


def activations(shape, contract):
    x = np.random.default_rng(0).integers(-127, 128, shape).astype(np.float32)
    x[tuple(0 if a in contract else slice(None) for a in range(len(shape)))] = 127
    return x


def weight(shape, contract, *, last=False, stack=(), config=EXACT):
    w = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    qt = jint8.quantize(w, contract_axes=contract, stack_axes=stack, config=config)
    return contract_last(qt, contract, stack) if last else qt


def assert_close(got, expected, terms, k):
    assert got.shape == expected.shape
    assert (abs(np.asarray(got, np.float64) - expected) <= oracle.ROUNDING * (8 + k) * terms).all()


DOTS = {  # x shape, w shape, (contracted axes of x, of w), (batch axes of x, of w)
    "plain": ((3, 5), (5, 4), ((1,), (0,)), ((), ())),
    "w_is_n_k": ((3, 5), (4, 5), ((1,), (1,)), ((), ())),
    "vector": ((5,), (5, 4), ((0,), (0,)), ((), ())),
    "contracts_all_of_w": ((3, 5), (5,), ((1,), (0,)), ((), ())),
    "x_contracted_first": ((5, 3, 2), (5, 4), ((0,), (0,)), ((), ())),
    "two_axes": ((3, 5, 2), (5, 2, 4), ((1, 2), (0, 1)), ((), ())),
    "two_axes_permuted": ((3, 5, 2), (2, 5, 4), ((1, 2), (1, 0)), ((), ())),
    "two_axes_apart": ((5, 3, 2), (2, 4, 5), ((0, 2), (2, 0)), ((), ())),
    "two_free_axes_of_w": ((3, 5), (5, 4, 2), ((1,), (0,)), ((), ())),
    "free_axes_around": ((3, 5), (4, 5, 2), ((1,), (1,)), ((), ())),
    "experts": ((2, 3, 5), (2, 5, 4), ((2,), (1,)), ((0,), (0,))),
    "experts_last": ((3, 5, 2), (5, 4, 2), ((1,), (0,)), ((2,), (2,))),
    "two_batch_axes": ((2, 3, 4, 5), (3, 5, 2, 6), ((3,), (1,)), ((0, 1), (2, 0))),
    "one_row_per_expert": ((2, 5), (2, 5, 4), ((1,), (1,)), ((0,), (0,))),
    "size_one": ((3, 1), (1, 4), ((1,), (0,)), ((), ())),
    "empty": ((0, 5), (5, 4), ((1,), (0,)), ((), ())),
}


@pytest.mark.first_case
@ORDERS
@pytest.mark.parametrize("left", [False, True], ids=["w_right", "w_left"])
@pytest.mark.parametrize("name", DOTS)
def test_dot_general(name, left, last):
    x_shape, w_shape, contract, batch = DOTS[name]
    x, w = activations(x_shape, contract[0]), weight(w_shape, contract[1], last=last, stack=batch[1])
    if left:
        contract, batch = contract[::-1], batch[::-1]
    swap = lambda x, w: (w, x) if left else (x, w)
    reference = lambda x, w: jax.lax.dot_general(*swap(x, w), (contract, batch), precision="highest")
    float_w = w.dequantize()
    got = jint8.dot_general(*swap(x, w), (contract, batch))
    assert_close(got, reference(x, float_w), reference(abs(x), abs(float_w)), x.size)


EINSUMS = {  # subscripts, x shape, w shape, contracted axes of w
    "plain": ("bd,dn->bn", (3, 5), (5, 4), (0,)),
    "implicit": ("bd,dn", (3, 5), (5, 4), (0,)),
    "implicit_is_alphabetical": ("zd,da", (3, 5), (5, 4), (0,)),
    "spaces": (" b d , d n -> n b ", (3, 5), (5, 4), (0,)),
    "heads_in": ("btd,dnh->btnh", (2, 3, 5), (5, 4, 2), (0,)),
    "heads_out": ("btnh,nhd->btd", (2, 3, 4, 2), (4, 2, 5), (0, 1)),
    "gemma_attention": ("BTD,NDH->BTNH", (2, 3, 5), (4, 5, 2), (1,)),
    "gemma_kv": ("BSD,CKDH->CBSKH", (2, 3, 5), (2, 4, 5, 2), (2,)),
    "permuted_contraction": ("bxy,yxn->bn", (3, 2, 5), (5, 2, 4), (0, 1)),
    "permuted_result": ("bd,dnh->hbn", (3, 5), (5, 4, 2), (0,)),
    "experts": ("ebd,edn->ebn", (2, 3, 5), (2, 5, 4), (1,)),
    "experts_in_the_middle": ("bed,edn->bne", (3, 2, 5), (2, 5, 4), (1,)),
    "ellipsis": ("...d,dn->...n", (2, 3, 5), (5, 4), (0,)),
    "ellipsis_of_nothing": ("...d,dn->...n", (5,), (5, 4), (0,)),
    "ellipsis_inside": ("b...d,dn->n...b", (2, 3, 4, 5), (5, 4), (0,)),
    "ellipsis_implicit": ("...d,dn", (2, 3, 5), (5, 4), (0,)),
    "sum_over_a_label_of_x": ("abd,dn->bn", (1, 3, 5), (5, 4), (0,)),
    "vector": ("d,dn->n", (5,), (5, 4), (0,)),
}


@pytest.mark.first_case
@ORDERS
@pytest.mark.parametrize("left", [False, True], ids=["w_right", "w_left"])
@pytest.mark.parametrize("name", EINSUMS)
def test_einsum(name, left, last):
    subscripts, x_shape, w_shape, contract = EINSUMS[name]
    terms, arrow, result = subscripts.replace(" ", "").partition("->")
    x_term, w_term = terms.split(",")
    dims = len(x_shape)
    labels = x_term.replace("...", "." * (dims - len(x_term) + 3)) if "..." in x_term else x_term
    x = activations(x_shape, [i for i, label in enumerate(labels) if label in {w_term[a] for a in contract}])
    w = weight(w_shape, contract, last=last)
    swap = lambda x, w: (w, x) if left else (x, w)
    subscripts = ",".join(swap(x_term, w_term)) + arrow + result
    got = jint8.einsum(subscripts, *swap(x, w))
    float_w = np.asarray(w.dequantize(), np.float64)
    expected = np.einsum(subscripts, *swap(x.astype(np.float64), float_w))
    assert_close(got, expected, np.einsum(subscripts, *swap(abs(x), abs(float_w))), math.prod(w_shape))


def test_sum_over_a_label_of_x_comes_before_quantizing():
    x = np.array([[[1.0, 3.0]], [[4.0, 124.0]]], np.float32)  # sums: 5, 127
    w = weight((2, 4), (0,))
    np.testing.assert_allclose(jint8.einsum("abd,dn->bn", x, w), x.sum(0) @ w.dequantize(), rtol=1e-5)


@pytest.mark.parametrize("name", ["two_axes", "two_axes_permuted", "two_axes_apart"])
def test_weights_that_are_stored_contracted_last_are_not_transposed(name):
    x_shape, w_shape, contract, batch = DOTS[name]
    x, w = activations(x_shape, contract[0]), weight(w_shape, contract[1], last=True)
    text = jax.jit(lambda x, w: jint8.dot_general(x, w, (contract, batch))).lower(x, w).as_text()
    assert re.search(r"stablehlo\.transpose.*xf32", text) or name == "two_axes"
    assert not re.search(r"stablehlo\.transpose.*xi8", text)


@pytest.mark.parametrize("implementation", ["xla_digits", "xla_gather", "dequantize"])
def test_equal_to_matmul(implementation):
    x = np.random.default_rng(0).standard_normal((2, 3, 64)).astype(np.float32)
    x[..., [3, 50]] *= 30
    w = weight((64, 8), (0,), config=jint8.Config(outliers="token"))
    expected = jint8.matmul(x, w, implementation=implementation)
    einsum = jint8.einsum("abd,dn->abn", x, w, implementation=implementation)
    dot = jint8.dot_general(x, w, (((2,), (0,)), ((), ())), implementation=implementation)
    np.testing.assert_array_equal(einsum, expected)
    np.testing.assert_array_equal(dot, expected)


def test_outlier_columns_are_decided_per_expert():
    x = np.random.default_rng(0).standard_normal((2, 4, 16)).astype(np.float32)
    x[1, 2, 5] = 100
    w = weight((2, 16, 4), (1,), stack=(0,), config=jint8.Config())
    got = jint8.einsum("ebd,edn->ebn", x, w, implementation="xla_gather")
    for e in range(2):
        one = jax.tree.map(lambda leaf, e=e: leaf[e], w)
        expected = jint8.matmul(x[e], one, implementation="xla_gather")
        np.testing.assert_allclose(got[e], expected, rtol=1e-6, atol=1e-6)


def test_config_and_result_type():
    x = np.random.default_rng(0).standard_normal((4, 16)).astype(np.float32) * 5
    w = weight((16, 4), (0,), config=jint8.Config())
    other = jint8.Config(scheme="vector-zp")
    for call in (
        lambda **kw: jint8.dot_general(x, w, (((1,), (0,)), ((), ())), **kw),
        lambda **kw: jint8.einsum("bd,dn->bn", x, w, **kw),
    ):
        np.testing.assert_array_equal(call(config=other), jint8.matmul(x, w, config=other))
        assert (call(config=other) != call()).any()
        assert call(preferred_element_type=jnp.bfloat16).dtype == jnp.bfloat16


def test_without_a_qtensor_they_are_jax():
    x, y = jnp.ones((3, 4)), jnp.ones((4, 2))
    np.testing.assert_array_equal(jint8.dot_general(x, y, (((1,), (0,)), ((), ()))), x @ y)
    np.testing.assert_array_equal(jint8.einsum("ij,jk", x, y), x @ y)
    assert jint8.einsum("i->", x[0]) == 4


X, W = jnp.ones((3, 5)), jint8.quantize(jnp.ones((5, 4)))
PLAIN = (((1,), (0,)), ((), ()))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: jint8.dot_general(W, W, PLAIN), TypeError, "Expected at most one QTensor, got two"),
        (lambda: jint8.dot_general(X.astype(int), W, PLAIN), TypeError, "Expected activations to be .* got int32"),
        (lambda: jint8.dot_general([1.0], W, PLAIN), TypeError, "got list"),
        (lambda: jint8.dot_general(X, W, PLAIN, config="x"), TypeError, "Expected config .* got str"),
        (lambda: jint8.dot_general(X, W, PLAIN, implementation="x"), ValueError, "Expected implementation .* got 'x'"),
        (lambda: jint8.dot_general(X.T, W, PLAIN), ValueError, r"got 3 \(axis 1 of \(5, 3\)\) and 5"),
        (lambda: jint8.dot_general(X, W, (((2,), (0,)), ((), ()))), ValueError, "Expected contracted axes within"),
        (lambda: jint8.dot_general(X, W, (((0, 1), (0,)), ((), ()))), ValueError, "as many contracted axes"),
        (lambda: jint8.dot_general(X, W, (((1, 1), (0, 0)), ((), ()))), ValueError, "contracted or batched once"),
        (lambda: jint8.dot_general(X, W, (((1,), (0,)), ((1,), (0,)))), ValueError, "contracted or batched once"),
        (lambda: jint8.dot_general(X, W, (((), ()), ((), ()))), ValueError, "at least one contracted axis, got none"),
        (lambda: jint8.dot_general(X[:, :4], W, (((1,), (1,)), ((), ()))), ValueError, "quantized over the contracted"),
        (lambda: jint8.einsum("bd,dn->bn", W, W), TypeError, "Expected at most one QTensor, got two"),
        (lambda: jint8.einsum("bd,dn->bn", X.astype(int), W), TypeError, "got int32"),
        (lambda: jint8.einsum("bd,dn,nm->bm", X, W, X), NotImplementedError, "Expected two operands .* got 3"),
        (lambda: jint8.einsum("bd,...n->bn", X, W), NotImplementedError, "no ellipsis for the QTensor"),
        (lambda: jint8.einsum("dd,dn->dn", X, W), NotImplementedError, "each label once in an operand"),
        (lambda: jint8.einsum("bd,dn->b", X, W), NotImplementedError, "no sum over the weight's own axes"),
        (lambda: jint8.einsum("bd->bd", X, W), ValueError, "Expected subscripts for two operands"),
        (lambda: jint8.einsum("bd,dn->bz", X, W), ValueError, "a result made of the operands' labels"),
        (lambda: jint8.einsum("bd,dn->bnn", X, W), ValueError, "a result made of the operands' labels"),
        (lambda: jint8.einsum("bcd,dn->bn", X, W), ValueError, r"Expected 3 dimensions .* got shape \(3, 5\)"),
        (lambda: jint8.einsum("bd,dnm->bn", X, W), ValueError, "Expected 3 dimensions of the weight"),
        (lambda: jint8.einsum("b0,0n->bn", X, W), ValueError, "Expected labels to be letters"),
        (lambda: jint8.einsum("..d,dn->n", X, W), ValueError, "Expected labels to be letters"),
        (lambda: jint8.einsum("...d,dn->n", X, W), ValueError, "Expected the ellipsis in the result too"),
        (lambda: jint8.einsum("bd,nd->bn", X[:, :4], W), ValueError, "quantized over the contracted"),
        (lambda: jint8.einsum("bd,dn->bn", X[:, :4], W), ValueError, "Expected contracted axes of one size"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
