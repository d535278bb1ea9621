"""Every public function under jit, vmap, scan, eval_shape and checkpoint; what `matmul` refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jint8
from jint8._core.qtensor import contract_last

TOKEN = jint8.Config(outliers="token")  # a row's result is the same in any batch
LAYERS, K, N = 3, 80, 5


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# so many outlier columns that they are gathered in two blocks
X = normal(LAYERS, 4, K) * np.where(np.arange(K) % 2 == 1, 60, 1).astype(np.float32)
KERNELS = normal(LAYERS, K, N, seed=1)


def stacked(layer_axis, last, scheme="llm.int8"):
    """All layers in one QTensor, and each alone."""
    config = jint8.Config(scheme=scheme, outliers="token")
    contract = (1,) if layer_axis == 0 else (0,)
    w = jint8.quantize(
        np.moveaxis(KERNELS, 0, layer_axis), contract_axes=contract, stack_axes=(layer_axis,), config=config
    )
    w = contract_last(w, contract, (layer_axis,)) if last else w
    return w, [jax.tree.map(lambda leaf, i=i: jnp.take(leaf, i, layer_axis), w) for i in range(LAYERS)]


def assert_equal(got, expected):
    """Equal but for how XLA fuses the final float32 operations."""
    assert got.dtype == expected.dtype
    np.testing.assert_allclose(np.asarray(got, np.float32), np.asarray(expected, np.float32), rtol=1e-6, atol=1e-6)


FUNCTIONS = {  # arrays only in and out
    "quantize": (lambda w: jint8.quantize(w, config=TOKEN), (KERNELS[0],)),
    "quantize_affine": (lambda w: jint8.quantize(w, config=jint8.Config(scheme="vector-zp")), (KERNELS[0],)),
    "dequantize": (lambda w: jint8.dequantize(jint8.quantize(w)), (KERNELS[0],)),
    "find_outliers": (lambda x: jint8.find_outliers(x, 6.0), (X[0],)),
    "matmul": (lambda x, w: jint8.matmul(x, jint8.quantize(w), config=TOKEN), (X[0], KERNELS[0])),
    "matmul_digits": (
        lambda x, w: jint8.matmul(x, jint8.quantize(w), config=TOKEN, implementation="xla_digits"),
        (X[0], KERNELS[0]),
    ),
    "dot_general": (
        lambda x, w: jint8.dot_general(x, jint8.quantize(w), (((1,), (0,)), ((), ())), config=TOKEN),
        (X[0], KERNELS[0]),
    ),
    "einsum": (lambda x, w: jint8.einsum("bd,dn->nb", x, jint8.quantize(w), config=TOKEN), (X[0], KERNELS[0])),
    "quantize_params": (lambda w: jint8.quantize_params({"kernel": w}), (KERNELS[0],)),
    "dequantize_params": (lambda w: jint8.dequantize_params(jint8.quantize_params({"kernel": w})), (KERNELS[0],)),
    "with_config": (lambda w: jint8.with_config({"a": jint8.quantize(w)}, TOKEN), (KERNELS[0],)),
}


@pytest.mark.first_case
@pytest.mark.parametrize("name", FUNCTIONS)
def test_transforms(name):
    function, args = FUNCTIONS[name]
    expected = function(*args)
    structure = jax.tree.structure(expected)

    def same(got):
        assert jax.tree.structure(got) == structure
        jax.tree.map(assert_equal, got, expected)

    same(jax.jit(function)(*args))
    same(jax.jit(jax.checkpoint(function))(*args))
    batch = [jnp.stack([a, 2 * a]) for a in map(jnp.asarray, args)]
    same(jax.tree.map(lambda leaf: leaf[0], jax.jit(jax.vmap(function))(*batch)))
    same(jax.tree.map(lambda leaf: leaf[0], jax.lax.map(lambda a: function(*a), tuple(batch))))
    shapes = jax.eval_shape(function, *args)
    assert jax.tree.structure(shapes) == structure
    jax.tree.map(lambda a, b: np.testing.assert_equal((a.shape, a.dtype), (b.shape, b.dtype)), shapes, expected)


def test_memory_report_of_an_abstract_tree():
    tree = {"kernel": KERNELS[0]}
    abstract = jax.eval_shape(jint8.quantize_params, tree)
    assert jint8.memory_report(abstract) == jint8.memory_report(jint8.quantize_params(tree))


@pytest.mark.first_case
@pytest.mark.parametrize("implementation", ["xla_digits", "xla_gather"])
def test_vmap_over_either_side(implementation):
    matmul = lambda x, w: jint8.matmul(x, w, implementation=implementation)
    w, layers = stacked(0, last=True)
    of_x = jax.jit(jax.vmap(matmul, (0, None)))(X, layers[0])
    of_w = jax.jit(jax.vmap(matmul, (None, 0)))(X[0], w)
    of_both = jax.jit(jax.vmap(matmul))(X, w)
    for i in range(LAYERS):
        assert_equal(of_x[i], matmul(X[i], layers[0]))
        assert_equal(of_w[i], matmul(X[0], layers[i]))
        assert_equal(of_both[i], matmul(X[i], layers[i]))


def test_vmap_in_batch_mode_decides_within_each_entry():
    w = jint8.quantize(KERNELS[0])
    x = X.copy()
    x[1, 2, 4] = 50  # makes column 4 an outlier of entry 1 only
    got = jax.vmap(jint8.matmul, (0, None))(x, w)
    for i in range(LAYERS):
        assert_equal(got[i], jint8.matmul(x[i], w))
    assert (np.asarray(got[0]) != np.asarray(jint8.matmul(x, w))[0]).any()


@pytest.mark.first_case
@pytest.mark.parametrize("layer_axis", [0, 1])
@pytest.mark.parametrize(
    ("scheme", "last"), [("row", True), ("llm.int8-zp", True), ("llm.int8-zp", False)], ids=["row", "zp", "zp_as_given"]
)
def test_layers(scheme, last, layer_axis):
    w, layers = stacked(layer_axis, last, scheme)
    got = jax.jit(lambda x, w: jax.vmap(jint8.matmul, (None, layer_axis))(x, w))(X[0], w)
    expected = jnp.stack([jint8.matmul(X[0], layer) for layer in layers])
    assert_equal(got, expected)
    if layer_axis == 0:
        scan = jax.jit(lambda x, w: jax.lax.scan(lambda carry, layer: (carry, jint8.matmul(carry, layer)), x, w)[1])
        assert_equal(scan(X[0], w), expected)


@pytest.mark.first_case
@pytest.mark.parametrize("implementation", ["xla_digits", "xla_gather", "dequantize"])
def test_strict_promotion_and_64_bits(implementation):
    bias = jnp.ones(N, jnp.bfloat16)
    for scheme in ("llm.int8", "llm.int8-zp", "absmax"):
        with jax.numpy_dtype_promotion("strict"), jax.enable_x64(True):
            w = jint8.quantize(KERNELS[0], config=jint8.Config(scheme=scheme))
            run = lambda x, w=w: jint8.matmul(x, w, bias=bias, implementation=implementation)
            y, pull = jax.vjp(run, jnp.asarray(X[0], jnp.bfloat16))
            assert y.dtype == pull(y)[0].dtype == jnp.bfloat16
            assert {leaf.dtype for leaf in jax.tree.leaves(w)} == {np.dtype("int8"), np.dtype("float32")}


W = jint8.quantize(jnp.ones((4, 5)))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: jint8.matmul(jnp.ones(4, int), W), TypeError, "Expected x to be bfloat16, float16 or .*, got int32"),
        (lambda: jint8.matmul(np.ones(4), W), TypeError, "got float64"),
        (lambda: jint8.matmul([1.0], W), TypeError, "got list"),
        (lambda: jint8.matmul(jnp.ones(4), jnp.ones((4, 5))), TypeError, "Expected w to be a QTensor, got"),
        (lambda: jint8.matmul(jnp.ones(5), W), ValueError, r"Expected x of shape \(..., 4\) .* \(4, 5\), got \(5,\)"),
        (lambda: jint8.matmul(jnp.float32(1), W), ValueError, r"got \(\)"),
        (lambda: jint8.matmul(jnp.ones(4), W, bias=jnp.ones(4)), ValueError, r"Expected bias of shape \(5,\), got"),
        (lambda: jint8.matmul(jnp.ones(4), W, bias=jnp.ones(5, int)), TypeError, "Expected bias to be .* got int32"),
        (lambda: jint8.matmul(jnp.ones(4), W, config="row"), TypeError, "Expected config .* got str"),
        (lambda: jint8.matmul(jnp.ones(4), W, implementation="gpu"), ValueError, "Expected implementation.* got 'gpu'"),
        (lambda: jint8.matmul(jnp.ones((0, 4)), W, implementation="gpu"), ValueError, "got 'gpu'"),
        (lambda: jint8.matmul(jnp.ones(4), jint8.quantize(jnp.ones((4, 2, 2)))), ValueError, "2 dimensions, got shape"),
        (
            lambda: jint8.matmul(jnp.ones(4), jint8.quantize(jnp.ones((4, 5)), contract_axes=(0, 1))),
            ValueError,
            "Expected w to be quantized over one axis",
        ),
        (
            lambda: jint8.matmul(jnp.ones(4), jint8.quantize(jnp.ones((4, 5)), contract_axes=())),
            ValueError,
            "Expected w to be quantized over one axis",
        ),
    ],
)
def test_matmul_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
