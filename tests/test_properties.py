"""Properties of quantizing and of products, over shapes, dtypes, values, schemes, implementations and transformations.

A few examples in the default suite (products are slow); 10,000 of each by

    pytest -m "" -n0 tests/test_properties.py --hypothesis-profile=nightly

Shapes are of a few sizes, 0 and 1 among them, because each one is compiled.
"""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jint8

SCHEMES = [name for name in oracle.SCHEMES if name != "none"]
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
SHAPES = [(0, 4, 3), (1, 1, 1), (1, 32, 6), (3, 0, 2), (3, 32, 6), (2, 5, 0), (17, 32, 6), (5, 7, 3)]
TINY = float(np.finfo(np.float32).tiny)

# What an array's entries are drawn from: a scale and what else there may be.
KINDS = {
    "normal": lambda rng, n: rng.standard_normal(n),
    "zeros": lambda rng, n: rng.choice([0.0, -0.0], n),
    "small": lambda rng, n: rng.standard_normal(n) * 1e-4,
    "outliers": lambda rng, n: rng.uniform(6, 300, n) * rng.choice([-1, 1], n),
    "equal": lambda rng, n: np.full(n, rng.choice([6.0, -6.0, 5.999, 127.0])),
    "large": lambda rng, n: rng.standard_normal(n) * 1e4,
    "subnormal": lambda rng, n: rng.standard_normal(n) * TINY,
    "near_the_smallest_normal": lambda rng, n: rng.uniform(-400, 400, n) * TINY,
}
HUGE = {"huge": lambda rng, n: rng.uniform(-3e38, 3e38, n)}
NOT_FINITE = {"nan": lambda rng, n: np.full(n, np.nan), "infinity": lambda rng, n: rng.choice([np.inf, -np.inf], n)}


@st.composite
def arrays(draw, shape, dtype="float32", kinds=KINDS, most=3):
    """An array whose entries are of up to `most` kinds, of which each has a share of its own."""
    names = draw(st.lists(st.sampled_from(sorted(kinds)), min_size=1, max_size=most, unique=True))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    size = int(np.prod(shape))
    shares = rng.dirichlet(np.ones(len(names)))
    each = np.stack([kinds[name](rng, size) for name in names])
    chosen = each[rng.choice(len(names), size, p=shares), np.arange(size)]
    return chosen.reshape(shape).astype(DTYPES[dtype])


shapes, schemes, dtypes = st.sampled_from(SHAPES), st.sampled_from(SCHEMES), st.sampled_from(sorted(DTYPES))


def exact(a):
    return np.asarray(a, np.float64)


# Quantizing


@given(st.data(), shapes, schemes, dtypes)
def test_integers_and_scales_are_those_of_the_oracle(data, shape, scheme, dtype):
    w = data.draw(arrays(shape[1:], dtype, KINDS | HUGE if dtype != "float16" else KINDS))
    got = jint8.quantize(w, config=jint8.Config(scheme=scheme))
    wide = w.astype(np.float32)
    wide = np.where(abs(wide) < TINY, np.float32(0), wide)  # XLA's CPU backend takes subnormal numbers as 0
    expected = oracle.quantize(wide, scheme=scheme)
    np.testing.assert_array_equal(got.scale, np.broadcast_to(expected.scale, got.scale.shape))
    np.testing.assert_array_equal(got.q, expected.q)
    if got.zero is not None:
        np.testing.assert_array_equal(got.zero, np.broadcast_to(expected.zero, got.zero.shape))


@given(st.data(), shapes, schemes, dtypes)
def test_dequantized_within_half_a_step(data, shape, scheme, dtype):
    """But where the step would be subnormal: then all is 0."""
    w = data.draw(arrays(shape[1:], dtype, KINDS | HUGE if dtype != "float16" else KINDS))
    got = jint8.quantize(w, config=jint8.Config(scheme=scheme))
    half = exact(got.scale) / 2
    error = abs(exact(got.dequantize(jnp.float32)) - exact(w))
    flushed = np.where(half == 0, 255 * TINY, TINY)
    assert (error <= half + 4 * oracle.ROUNDING * (abs(exact(w)) + 255 * half) + flushed).all()


@given(st.data(), st.sampled_from([s for s in SHAPES if 0 not in s]), schemes, dtypes)
def test_weights_that_are_not_finite_are_refused(data, shape, scheme, dtype):
    w = data.draw(arrays(shape[1:], dtype))
    w[tuple(data.draw(st.integers(0, size - 1)) for size in w.shape)] = data.draw(st.sampled_from([np.nan, np.inf]))
    with pytest.raises(ValueError, match="Expected finite weights"):
        jint8.quantize(w, config=jint8.Config(scheme=scheme))


# Products

IMPLEMENTATIONS = [None, "xla_digits", "xla_gather", "xla_row", "dequantize"]
configs = st.builds(
    jint8.Config,
    scheme=schemes,
    threshold=st.sampled_from([6.0, 0.5, 0.0]),
    outliers=st.sampled_from(["batch", "token"]),
)


def computes(implementation, shape, config, k_last):
    """Whether a path takes the product; `test_product_arguments` has those that are refused."""
    plain = oracle.SCHEMES[config.scheme][:3] == ("token", "channel", False)
    return implementation != "xla_row" or (shape[0] == 1 and 0 not in shape and plain and k_last)


def quantized(w, config, k_last):
    """A weight `[k, n]`, which is stored `[n, k]` where `k_last`."""
    w = w.astype(np.float32)
    if not k_last:
        return jint8.quantize(w, config=config)
    return jint8.quantize(w.T, contract_axes=(1,), config=config).T


@pytest.mark.slow  # Most examples compile a program.
@given(st.data(), shapes, configs, dtypes, st.booleans(), st.booleans(), st.sampled_from(IMPLEMENTATIONS))
def test_product(data, shape, config, dtype, k_last, has_bias, implementation):
    m, k, n = shape
    if not computes(implementation, shape, config, k_last):
        implementation = None
    kinds = {name: kind for name, kind in KINDS.items() if dtype != "float16" or name != "large"}
    x = data.draw(arrays((m, k), dtype, kinds | NOT_FINITE if data.draw(st.booleans()) else kinds))
    w = data.draw(arrays((k, n), kinds={name: KINDS[name] for name in ("normal", "zeros", "small")}))
    bias = data.draw(arrays((n,), kinds={"normal": KINDS["normal"]})) if has_bias else None
    weight = oracle.quantize(w, scheme=config.scheme)
    got = jint8.matmul(x, quantized(w, config, k_last), bias=bias, implementation=implementation)
    assert got.dtype == x.dtype
    bad = np.flatnonzero(~np.isfinite(x.astype(np.float32)).all(axis=1)) if k else []
    per_tensor = oracle.SCHEMES[config.scheme][0] == "tensor" and implementation != "dequantize"
    if len(bad) and per_tensor:  # one scale for all rows: none of them has a result
        bad = np.arange(m)
    x = np.where(np.isin(np.arange(m), bad)[:, None], 0, x.astype(np.float32))
    x = np.where(abs(x) < TINY, 0, x)
    scheme = "none" if implementation == "dequantize" else config.scheme
    wanted, bound = oracle.matmul(x, weight, scheme, config.threshold, config.outliers, bias)
    oracle.assert_close(np.asarray(got), wanted, bound + 2 * TINY, list(bad) if n else [])


@pytest.mark.slow  # Most examples compile a program.
@given(st.data(), st.sampled_from([(0, 0), (0, 3), (5, 0), (7, 32)]), configs, dtypes)
def test_ragged_product(data, shape, config, dtype):
    """Each group's rows are those of a product with its expert alone, where outliers are the rows' own."""
    m, k = shape
    experts, n = 3, 4
    x = data.draw(arrays((m, k), dtype, {name: KINDS[name] for name in ("normal", "zeros", "small", "outliers")}))
    w = data.draw(arrays((experts, k, n), kinds={"normal": KINDS["normal"], "zeros": KINDS["zeros"]}))
    cuts = sorted(data.draw(st.lists(st.integers(0, m), min_size=experts, max_size=experts)))
    sizes = np.diff([0, *cuts])
    config = jint8.Config(scheme=config.scheme, threshold=config.threshold, outliers="token")
    if oracle.SCHEMES[config.scheme][0] == "tensor":
        return
    got = jint8.ragged_dot(x, jint8.quantize(w, contract_axes=(1,), stack_axes=(0,), config=config), sizes)
    start = 0
    for expert, size in enumerate(sizes):
        rows = slice(start, start + size)
        weight = oracle.quantize(w[expert], scheme=config.scheme)
        wanted, bound = oracle.matmul(x[rows].astype(np.float32), weight, config.scheme, config.threshold, "token")
        oracle.assert_close(np.asarray(got[rows]), wanted, bound + 2 * TINY)
        start += size
    np.testing.assert_array_equal(exact(got[start:]), 0)


# Transformations


@pytest.mark.slow  # Most examples compile a program.
@given(st.data(), st.sampled_from([(1, 4), (3, 32), (0, 4), (3, 0)]), configs)
def test_transformations_composed(data, shape, config):
    """jit, vmap and scan over stacked weights, in each other and in remat, are the products one by one."""
    (m, k), layers = shape, 3
    few = {name: KINDS[name] for name in ("normal", "zeros", "small", "outliers")}
    x = jnp.asarray(data.draw(arrays((layers, m, k), kinds=few)))
    w = jint8.quantize(
        data.draw(arrays((layers, k, k), kinds={"normal": KINDS["normal"]})),
        contract_axes=(1,),
        stack_axes=(0,),
        config=config,
    )
    one = lambda x, w: jint8.matmul(x, w)
    each = [one(x[i], jax.tree.map(lambda leaf, i=i: leaf[i], w)) for i in range(layers)]
    ways = {
        "vmap": jax.vmap(one),
        "jit(vmap)": jax.jit(jax.vmap(one)),
        "scan": lambda x, w: jax.lax.scan(lambda _, xw: (0, one(*xw)), 0, (x, w))[1],
        "jit(scan(remat))": jax.jit(lambda x, w: jax.lax.map(lambda xw: jax.checkpoint(one)(*xw), (x, w))),
        "vmap(jit)": jax.vmap(jax.jit(one)),
        "einsum": lambda x, w: jint8.einsum("lmk,lkn->lmn", x, w),
    }
    name = data.draw(st.sampled_from(sorted(ways)))
    got = ways[name](x, w)
    for i in range(layers):
        wanted = exact(each[i])
        np.testing.assert_allclose(got[i], wanted, rtol=0, atol=1e-5 * abs(wanted).max(initial=1e-30), err_msg=name)


@pytest.mark.slow  # Most examples compile a program.
@given(st.data(), st.sampled_from([(1, 5, 3), (3, 32, 6), (3, 0, 2), (0, 4, 3)]), configs)
def test_gradients_are_those_of_the_dequantized_weight(data, shape, config):
    m, k, n = shape
    few = {name: KINDS[name] for name in ("normal", "zeros", "outliers")}
    x, g = data.draw(arrays((m, k), kinds=few)), data.draw(arrays((m, n), kinds={"normal": KINDS["normal"]}))
    w = jint8.quantize(data.draw(arrays((k, n), kinds={"normal": KINDS["normal"]})), config=config)
    product = lambda x: jnp.sum(jint8.matmul(x, w) * g)
    run = data.draw(st.sampled_from([jax.grad(product), jax.jit(jax.grad(product)), jax.grad(jax.checkpoint(product))]))
    wanted = exact(g) @ exact(w.dequantize()).T
    terms = abs(exact(g)) @ abs(exact(w.dequantize())).T
    assert (abs(exact(run(x)) - wanted) <= 1e-5 * terms + TINY).all()
