"""Int8 weights in code that was written for float ones: rearrangements, both storage orders, and what is refused."""

import cases
import jax
import jax.numpy as jnp
import pytest
from jax import lax

import jint8
from jint8._core.qtensor import contract_last
from jint8._tracing.substitute import UnsupportedUse, with_int8

X = cases.normal(2, 3, 8, seed=1)
TOKENS = jnp.array([[1, 2, 5], [0, 5, 3]])


def slices(w, x):
    return (x @ w[0]) * (x @ w[1])


def picked(w, x):
    return x @ lax.dynamic_index_in_dim(w, jnp.argmax(x[0, 0]) % 2, 1, keepdims=False)


def parts(w, x):
    return jnp.concatenate([x @ part for part in jnp.split(w, 2, axis=1)], -1)


def ragged(w, x):
    return lax.ragged_dot(x.reshape(6, 8), w, jnp.array([2, 4]))


# name: function of the weight, its shape, contracted and stacked axes, int8 products
CASES = {
    "product": (lambda w, x: x @ w, (8, 4), (0,), (), 1),
    "transposed": (lambda w, x: x @ w.T, (4, 8), (1,), (), 1),
    "weight on the left": (lambda w, x: jnp.einsum("nd,bsd->bns", w, x), (4, 8), (1,), (), 1),
    "einsum": (lambda w, x: jnp.einsum("bsd,ndh->bsnh", x, w), (2, 8, 4), (1,), (), 1),
    "stacked in one product": (lambda w, x: jnp.einsum("bsd,ckdh->cbskh", x, w), (2, 1, 8, 4), (2,), (), 1),
    "batched": (lambda w, x: jnp.einsum("bsd,bdh->bsh", x, w), (2, 8, 4), (1,), (0,), 1),
    "slices": (slices, (2, 8, 4), (1,), (0,), 2),
    "every second column": (lambda w, x: x @ w[:, ::2], (8, 6), (0,), (), 1),
    "picked by an index": (picked, (8, 2, 4), (0,), (1,), 1),
    "parts": (parts, (8, 6), (0,), (), 2),
    "reshaped outputs": (lambda w, x: jnp.einsum("bsd,dnh->bsnh", x, w.reshape(8, 2, 3)), (8, 6), (0,), (), 1),
    "reshaped inputs": (
        lambda w, x: jnp.einsum("bsnh,nhd->bsd", x.reshape(2, 3, 2, 4), w.reshape(2, 4, 6)), (8, 6), (0,), (), 1
    ),
    "merged": (lambda w, x: x @ w.reshape(8, 4), (2, 4, 4), (0, 1), (), 1),
    "transposed and merged": (
        lambda w, x: x @ w.transpose(0, 2, 1).reshape(8, 4), (2, 4, 4), (0, 2), (), 1
    ),
    "further axis": (lambda w, x: jnp.einsum("bsd,hdk->bhsk", x, w[None]), (8, 4), (0,), (), 1),
    "cast": (lambda w, x: x @ w.astype(jnp.bfloat16).astype(jnp.float32), (8, 4), (0,), (), 1),
    "in jit": (lambda w, x: jax.jit(lambda w, x: jnp.sin(x @ w))(w, x), (8, 4), (0,), (), 1),
    "in checkpoint": (lambda w, x: jax.checkpoint(lambda w, x: jnp.sin(x @ w))(w, x), (8, 4), (0,), (), 1),
    "used twice": (lambda w, x: x @ w + jnp.cos(x) @ w, (8, 4), (0,), (), 2),
    "ragged": (ragged, (2, 8, 4), (1,), (0,), 1),
    "lookup": (lambda w, x: w[TOKENS], (6, 8), (1,), (), 0),
    "lookup in a tied head": (lambda w, x: w[TOKENS] @ w.T, (6, 8), (1,), (), 1),
}  # fmt: skip


def weight(shape, contracted, stacked=(), last=True, **config):
    w = jax.random.normal(jax.random.key(0), shape)
    w = jint8.quantize(w, contract_axes=contracted, config=jint8.Config(**config))
    return contract_last(w, contracted, stacked) if last else w


@pytest.mark.first_case
@pytest.mark.parametrize("case", CASES)
def test_result_is_close_to_float(case):
    function, shape, contracted, stacked, _ = CASES[case]
    variants = {
        (scheme, last): weight(shape, contracted, stacked, last, scheme=scheme)
        for scheme, last in (("vector", True), ("vector-zp", False))
    }

    @cases.jit
    def run(variants):
        return {
            name: (with_int8(lambda floats: function(floats["w"], X), {"w": w}), function(w.dequantize(), X))
            for name, w in variants.items()
        }

    for got, want in run(variants).values():
        assert (got.shape, got.dtype) == (want.shape, want.dtype)
        assert cases.relative_error(got, want) < (1e-6 if case == "lookup" else 0.02)


@pytest.mark.parametrize("case", CASES)
def test_int8_products(case):
    function, shape, contracted, stacked, products = CASES[case]
    w = weight(shape, contracted, stacked, threshold=0.0)
    run = lambda w: with_int8(lambda floats: function(floats["w"], X), {"w": w})
    assert cases.count_int8_products(run, w) == products
    assert cases.count_float_products(run, w) == 0


@jax.custom_jvp
def doubled(x):
    return 2 * x


doubled.defjvp(lambda primals, tangents: (2 * primals[0], 2 * tangents[0]))


@jax.custom_vjp
def tripled(x):
    return 3 * x


tripled.defvjp(lambda x: (3 * x, None), lambda _, g: (3 * g,))


def calls(x):
    x = jax.jit(jnp.sin)(x) + jax.checkpoint(jnp.cos)(x) + doubled(x) + tripled(x) + jax.nn.logsumexp(x)
    x = lax.scan(lambda c, y: (c + y, c), x[0], x)[1]
    x = lax.cond(x.sum() > 0, lambda x: x, lambda x: -x, x)
    return lax.custom_linear_solve(lambda x: 2 * x, x, lambda matvec, b: b / 2, symmetric=True)


@pytest.mark.slow
def test_code_beside_the_weights_runs_as_it_is():
    """Every kind of equation that holds a function goes through `get_bind_params`, which JAX doesn't document."""
    w = weight((8, 4), (0,))
    beside = lambda function: lambda x: with_int8(lambda floats: (function(x), X @ floats["w"])[0], {"w": w})
    loop = lambda x: lax.fori_loop(0, jnp.int32(3), lambda _, x: calls(x) / 2, x)
    assert jnp.allclose(beside(loop)(X), loop(X), rtol=1e-6)
    for transform in (lambda f: jax.grad(lambda x: f(x).sum()), jax.vmap, jax.jit):
        assert jnp.allclose(transform(beside(calls))(X), transform(calls)(X), rtol=1e-5)
    bits = lambda x: jax.random.bits(jax.random.fold_in(jax.random.key(0), x[0, 0, 0].astype(int)))
    assert jnp.array_equal(beside(bits)(X), bits(X))


def test_equals_matmul_bit_for_bit():
    w = weight((4, 8), (1,))
    got = with_int8(lambda floats: X @ floats["w"].T, {"w": w})
    assert jnp.array_equal(got, jint8.matmul(X, w))


@pytest.mark.parametrize("last", [True, False], ids=["contracted last", "order kept"])
def test_fill_value_of_a_lookup(last):
    w = weight((6, 8), (1,), last=last, scheme="vector-zp")
    take = lambda w: jnp.take(w, jnp.array([2, 9]), axis=0, mode="fill", fill_value=3.0)
    assert jnp.array_equal(with_int8(lambda floats: take(floats["w"]), {"w": w}), take(w.dequantize()))


def test_results_may_hold_anything():
    w = weight((8, 4), (0,))
    result = with_int8(
        lambda floats: {"y": X @ floats["w"], "name": "dense", "none": None, "w": floats["w"].T}, {"w": w}
    )
    assert (result["name"], result["none"], result["y"].shape) == ("dense", None, (2, 3, 4))
    assert jnp.array_equal(result["w"].dequantize(), w.dequantize().T)


def test_under_transforms():
    w = weight((8, 4), (0,), threshold=0.0)

    @cases.jit
    def run(x):
        one = lambda x: with_int8(lambda floats: jnp.sin(x @ floats["w"]), {"w": w})
        in_float = lambda x: jnp.sin(x @ w.dequantize())
        gradients = [jax.grad(lambda x, f=f: f(x).sum())(x) for f in (one, in_float)]
        return one(x), jax.vmap(one)(x), gradients

    plain, mapped, (got, want) = run(X)
    assert jnp.array_equal(plain, mapped)
    assert cases.relative_error(got, want) < 0.05


@pytest.mark.parametrize(
    ("function", "message"),
    [
        pytest.param(lambda w: X @ (w * jnp.tri(8)), "got mul", id="elementwise"),
        pytest.param(lambda w: w.sum(), "got reduce_sum", id="sum"),
        pytest.param(lambda w: w.astype(int), "stay floating point, got int", id="cast to integers"),
        pytest.param(lambda w: jnp.broadcast_to(w, (3, 8, 8)), "repeated", id="broadcast"),
        pytest.param(lambda w: jnp.pad(w, 1)[1:-1, 1:-1], "got pad", id="padded"),
    ],
)
def test_refuses_what_needs_the_values(function, message):
    w = weight((8, 8), (0,))
    with pytest.raises(UnsupportedUse, match=message):
        with_int8(lambda floats: function(floats["w"]), {"w": w})


@pytest.mark.parametrize(
    ("function", "message"),
    [
        pytest.param(lambda w: X @ w.T, "quantized over the contracted axes", id="other axes"),
        pytest.param(lambda w: w.reshape(16, 4), "keeps contracted axes apart", id="mixed reshape"),
        pytest.param(lambda w: w[:1].reshape(4, 2), "keeps a contracted axis", id="reshape of a single column"),
        pytest.param(lambda w: w[TOKENS], "lookup of whole rows", id="lookup of parts"),
    ],
)
def test_refuses_other_axes(function, message):
    w = weight((8, 8), (0,))
    with pytest.raises(ValueError, match=message):
        with_int8(lambda floats: function(floats["w"]), {"w": w})
