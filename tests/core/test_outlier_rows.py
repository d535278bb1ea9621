"""Calibrated outlier columns, whose weight rows are kept in 16 bits; two digits; thresholds relative to a token."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx
from matmul_cases import VALUES
from tiny_model import make_llama_directory

import jint8
from jint8._core.qtensor import contract_last
from jint8._tracing.substitute import with_int8

IMPLEMENTATIONS = ("xla_digits", "xla_gather")
quick = {"xla_backend_optimization_level": 0}  # small programs that run once
matmul = jax.jit(jint8.matmul, static_argnames=("config", "implementation"), compiler_options=quick)
COLUMNS = (20, 3)
STATIC = jint8.Config(outliers="static")


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def check(name, config, columns=COLUMNS, *, n_k=True, implementation=None):
    """The library's product against the oracle's, for a case of `matmul_cases`."""
    case = VALUES[name]
    w = jint8.quantize(case.w, config=config, outliers=columns)
    got = matmul(case.x, contract_last(w, (0,)) if n_k else w, implementation=implementation)
    integers = oracle.quantize(case.w, scheme=config.scheme)
    exact, bound = oracle.matmul(
        case.x,
        integers,
        config.scheme,
        config.threshold,
        "token",
        relative=config.relative,
        digits=config.digits,
        columns=columns,
        rows=oracle.outlier_rows(case.w, integers, columns),
    )
    oracle.assert_close(got, exact, bound, case.bad_rows)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", VALUES)
def test_values(name, implementation):
    check(name, STATIC, implementation=implementation)


CONFIGS = {
    "[k,n]": ({}, COLUMNS, "xla_digits"),
    "zero_points": ({"scheme": "llm.int8-zp"}, COLUMNS, "xla_gather"),
    "zero_points_[k,n]": ({"scheme": "llm.int8-zp"}, COLUMNS, "xla_digits"),
    "per_tensor_weights": ({"scheme": "row+dec"}, COLUMNS, "xla_digits"),
    "two_digits": ({"digits": 2}, COLUMNS, "xla_gather"),
    "two_digits_zero_points": ({"digits": 2, "scheme": "llm.int8-zp"}, COLUMNS, "xla_digits"),
    "relative": ({"relative": True, "threshold": 2.5}, COLUMNS, "xla_gather"),
    "one_column": ({}, (3,), "xla_digits"),
    "all_columns": ({}, tuple(range(77)), "xla_digits"),
    "columns_without_outliers": ({}, (0, 1, 36), "xla_gather"),
}


@pytest.mark.first_case
@pytest.mark.parametrize("name", CONFIGS)
def test_configs(name):
    options, columns, implementation = CONFIGS[name]
    config = jint8.Config(outliers="static", **options)
    check("few_outliers", config, columns, n_k="[k,n]" not in name, implementation=implementation)


def test_kernels():
    check("few_outliers", STATIC, implementation="triton")  # interpreted


def test_what_kernels_cannot_compute():
    w = jint8.quantize(normal(32, 16))
    for config, what in ((jint8.Config(digits=2), "2 digits"), (jint8.Config(relative=True), "relative to the token")):
        with pytest.raises(NotImplementedError, match=f"Expected what the GPU kernels can compute, got .*{what}"):
            jint8.matmul(normal(4, 32), w, config=config, implementation="triton")


@pytest.mark.slow
def test_a_calibrated_row_carries_16_bits_where_int8_has_8():
    case = VALUES["few_outliers"]
    w = jint8.quantize(case.w, outliers=COLUMNS)
    x = np.zeros((2, len(case.w)), np.float32)
    x[:, 3] = 1000
    error = lambda w: abs(np.asarray(matmul(x, w)) - 1000 * case.w[3]).max()
    assert error(w) <= 1000 * 127 * float(w.scale.max()) * 2.0**-11
    assert error(w) < error(jint8.quantize(case.w)) / 20


def test_giving_columns_makes_a_weight_static_and_other_configs_do_without():
    case = VALUES["few_outliers"]
    plain, w = jint8.quantize(case.w), jint8.quantize(case.w, outliers=COLUMNS)
    assert w.config == STATIC
    for config in (jint8.Config(), jint8.Config(scheme="vector")):
        np.testing.assert_array_equal(matmul(case.x, w, config=config), matmul(case.x, plain, config=config))


def test_leaves():
    w = jint8.quantize(normal(5, 6, 7), contract_axes=(0, 1), outliers=[29, 0, 30])
    assert (w.outlier_rows.shape, w.outlier_rows.dtype) == ((1, 3, 7), jnp.float16)
    assert (w.outlier_index.shape, w.outlier_index.dtype) == ((1, 3, 1), jnp.int32)
    assert w.nbytes == 5 * 6 * 7 + 4 * 7 + 2 * 3 * 7 + 4 * 3
    assert jint8.quantize(normal(5, 6), outliers=[]).outlier_rows is None
    assert "outlier_rows=float16[1, 3, 7]" in repr(w)


@pytest.mark.first_case
@pytest.mark.parametrize(
    ("shape", "axes", "stack", "last"),
    [
        ((7, 5), (0,), (), True),
        ((7, 5), (0,), (), False),
        ((5, 7), (1,), (), True),
        ((3, 7, 5), (1,), (0,), True),
        ((7, 3, 5), (0,), (1,), True),
        ((4, 2, 5), (0, 1), (), True),
        ((4, 5, 2), (0, 2), (), True),
        ((4, 5, 2), (0, 2), (), False),
        ((1, 5), (0,), (), True),
        ((7, 1), (0,), (), True),
        ((4, 5, 1), (0, 2), (), True),
    ],
    ids=str,
)
def test_dequantize_knows_the_rows(shape, axes, stack, last):
    scheme = "llm.int8-zp"
    float_w = normal(*shape)
    k = int(np.prod([shape[a] for a in axes]))
    columns = [k - 1, k]  # and a slot that isn't used
    w = jint8.quantize(
        float_w, contract_axes=axes, stack_axes=stack, config=jint8.Config(scheme=scheme), outliers=columns
    )
    w = contract_last(w, axes, stack) if last else w
    integers = oracle.quantize(float_w, axes, scheme, stack)
    mask = np.zeros(k, bool)
    mask[k - 1] = True
    mask = mask.reshape([size if a in axes else 1 for a, size in enumerate(shape)])
    with np.errstate(all="ignore"):
        rows = (float_w / integers.scale.astype(np.float32)).astype(np.float16).astype(np.float64) * integers.scale
    expected = np.where(mask, rows, integers.dequantize())
    assert w.shape == shape
    np.testing.assert_allclose(w.dequantize(), expected, rtol=1e-6, atol=1e-7)


def layers(layer_axis):
    """A stack of layers `[k, n]` with lists of columns of different lengths, and each layer alone."""
    kernels, columns = normal(3, 16, 5, seed=1), np.array([[7, 16], [2, 7], [16, 16]])
    contract = 1 if layer_axis == 0 else 0
    stack = jint8.quantize(
        np.moveaxis(kernels, 0, layer_axis), contract_axes=contract, stack_axes=(layer_axis,), outliers=columns
    )
    alone = [
        jint8.quantize(kernel, outliers=found[found < 16], config=STATIC)
        for kernel, found in zip(kernels, columns, strict=True)
    ]
    return contract_last(stack, (contract,), (layer_axis,)), alone


@pytest.mark.parametrize("layer_axis", [0, 1])
def test_layers_under_vmap_and_scan(layer_axis):
    x = normal(4, 16) * np.where(np.arange(16) == 7, 20, 1).astype(np.float32)
    stack, alone = layers(layer_axis)
    expected = np.stack([matmul(x, w) for w in alone])
    got = jax.jit(jax.vmap(jint8.matmul, (None, layer_axis)), compiler_options=quick)(x, stack)
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)
    if layer_axis == 0:
        got = jax.jit(lambda x, w: jax.lax.scan(lambda c, layer: (c, jint8.matmul(c, layer)), x, w)[1])(x, stack)
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_einsum_with_heads_and_with_experts():
    einsum = jax.jit(jint8.einsum, static_argnums=0, compiler_options=quick)
    x, w = normal(3, 4, 6), normal(4, 6, 5, seed=1)
    x[:, 2, 1] = 30
    q = jint8.quantize(w, contract_axes=(0, 1), outliers=[2 * 6 + 1])
    q = contract_last(q, (0, 1))
    got = einsum("bhd,hdn->bn", x, q)
    flat = matmul(x.reshape(3, 24), jint8.quantize(w.reshape(24, 5), outliers=[13]))
    np.testing.assert_allclose(got, flat, rtol=1e-6)

    columns = np.array([[5], [0], [6], [3]])
    q = jint8.quantize(w, contract_axes=(1,), stack_axes=(0,), outliers=columns)
    got = einsum("bed,edn->ben", x, q)
    for e in range(4):
        alone = matmul(x[:, e], jint8.quantize(w[e], outliers=columns[e]))
        np.testing.assert_allclose(got[:, e], alone, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="Expected one list of outlier columns for all output channels"):
        jint8.einsum("bd,edn->ben", x[:, 0], q)

    sizes = jnp.array([1, 0, 2, 0])
    got = jax.jit(jint8.ragged_dot, compiler_options=quick)(x[:, 2], q, sizes)
    for row, e in enumerate((0, 2, 2)):
        alone = matmul(x[row, 2], jint8.quantize(w[e], outliers=columns[e]))
        np.testing.assert_allclose(got[row], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", ["xla_gather", "dequantize"])
def test_gradient_is_that_of_the_dequantized_weight(implementation):
    case = VALUES["few_outliers"]
    w = contract_last(jint8.quantize(case.w, outliers=COLUMNS), (0,))
    cotangent = normal(len(case.x), case.w.shape[1], seed=2)
    loss = lambda x: jnp.sum(jint8.matmul(x, w, implementation=implementation) * cotangent)
    got = jax.jit(jax.grad(loss), compiler_options=quick)(jnp.asarray(case.x))
    np.testing.assert_allclose(got, cotangent @ np.asarray(w.dequantize()).T, rtol=1e-4, atol=1e-4)


def test_quantize_params():
    tree = {"a": {"kernel": normal(6, 5)}, "b": {"weight": normal(2, 5, 6)}, "lm_head": {"kernel": normal(6, 5)}}
    found = {"a/kernel": [3], "b/weight": [[0, 6], [4, 5]], "lm_head/kernel": [1]}
    int8 = jint8.quantize_params(tree, outliers=found)
    assert int8["a"]["kernel"].outlier_index.reshape(-1).tolist() == [3]
    assert int8["b"]["weight"].outlier_index[:, 0].tolist() == [[0, 6], [4, 5]]
    assert int8["lm_head"]["kernel"] is tree["lm_head"]["kernel"]
    plain = jint8.memory_report(jint8.quantize_params(tree)).bytes
    assert jint8.memory_report(int8).bytes == plain + (5 * 2 + 4) + 2 * (2 * 5 * 2 + 2 * 4)
    np.testing.assert_allclose(jint8.dequantize_params(int8)["a"]["kernel"][3], tree["a"]["kernel"][3], rtol=2**-10)


@pytest.mark.parametrize(
    ("outliers", "error", "message"),
    [
        ([0.5], TypeError, "a/kernel: Expected outliers to be integers, got float"),
        ([7], ValueError, "a/kernel: Expected outliers from 0 to 6, got 7 to 7"),
        ([-1, 2], ValueError, "got -1 to 2"),
        ([2, 1, 2], ValueError, "Expected each outlier column once, got 2 twice"),
        ([[1], [2]], ValueError, r"Expected outliers of shape \(c,\), got \(2, 1\)"),
    ],
)
def test_bad_columns(outliers, error, message):
    with pytest.raises(error, match=message):
        jint8.quantize_params({"a": {"kernel": normal(6, 5)}}, outliers={"a/kernel": outliers})


def test_other_errors():
    with pytest.raises(ValueError, match="Expected the outliers's paths to be in the parameters, got b"):
        jint8.quantize_params({"a": {"kernel": normal(6, 5)}}, outliers={"b": [1]})
    with pytest.raises(ValueError, match="Expected a scheme with decomposition for outlier columns, got 'vector'"):
        jint8.quantize(normal(6, 5), config=jint8.Config(scheme="vector"), outliers=[1])
    with pytest.raises(ValueError, match="Expected digits to be 1 or 2, got 3"):
        jint8.Config(digits=3)
    with pytest.raises(TypeError, match="Expected relative to be True or False, got 1"):
        jint8.Config(relative=1)


@pytest.mark.first_case
@pytest.mark.parametrize(
    ("scheme", "implementation"),
    [*((name, "xla_digits") for name, (x, *_) in oracle.SCHEMES.items() if x), ("llm.int8-zp", "xla_gather")],
)
def test_two_digits_in_every_scheme(scheme, implementation):
    case = VALUES["few_outliers"]
    config = jint8.Config(scheme=scheme, digits=2)
    got = matmul(case.x, jint8.quantize(case.w, config=config), implementation=implementation)
    integers = oracle.quantize(case.w, scheme=scheme)
    exact, bound = oracle.matmul(case.x, integers, scheme, digits=2)
    oracle.assert_close(got, exact, bound)


@pytest.mark.first_case
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("mode", ["batch", "token"])
@pytest.mark.parametrize("name", ["few_outliers", "huge_row", "zero_rows", "nan_and_inf_rows"])
def test_relative_threshold(name, mode, implementation):
    case = VALUES[name]
    config = jint8.Config(relative=True, threshold=3.0, outliers=mode)
    got = matmul(case.x, jint8.quantize(case.w, config=config), implementation=implementation)
    exact, bound = oracle.matmul(case.x, oracle.quantize(case.w), threshold=3.0, mode=mode, relative=True)
    oracle.assert_close(got, exact, bound, case.bad_rows)


def test_relative_threshold_is_of_the_token():
    case, config = VALUES["few_outliers"], jint8.Config(relative=True, threshold=3.0, outliers="token")
    w = jint8.quantize(case.w, config=config)
    np.testing.assert_allclose(matmul(64 * case.x, w), 64 * matmul(case.x, w), rtol=1e-5)


REARRANGED = {
    "transpose": lambda x, w: x @ jnp.transpose(w.T),
    "heads": lambda x, w: jnp.einsum("bd,dnh->bnh", x, w.reshape(6, 4, 2)).reshape(3, 8),
    "split_contraction": lambda x, w: jnp.einsum("bch,chn->bn", x.reshape(3, 2, 3), w.reshape(2, 3, 8)),
    "slices": lambda x, w: jnp.concatenate([x @ w[:, :3], x @ w[:, 3:]], axis=1),
}


@pytest.mark.first_case
@pytest.mark.parametrize("name", REARRANGED)
def test_columns_follow_a_weight_that_is_rearranged(name):
    x, w = 9 * normal(3, 6), contract_last(jint8.quantize(normal(6, 8, seed=1), outliers=[4, 1]), (0,))
    got = with_int8(lambda floats: REARRANGED[name](x, floats["w"]), {"w": w})
    np.testing.assert_allclose(got, matmul(x, w), rtol=1e-5, atol=1e-5)


CALIBRATED = r"Expected outliers to map paths to columns, as jint8.calibrate returns them .*, got "


@pytest.mark.parametrize("outliers", ["batch", "static", [3], np.array([3])], ids=str)
def test_outliers_of_a_tree_are_a_mapping(outliers, tmp_path):
    """`outliers="batch"` is an option of Config: as an argument it was a mapping's absence of every path."""
    with pytest.raises(TypeError, match=CALIBRATED):
        jint8.quantize_params({"kernel": normal(6, 8)}, outliers=outliers)
    with pytest.raises(TypeError, match=CALIBRATED):
        jint8.nnx.quantize(nnx.Linear(6, 8, rngs=nnx.Rngs(0)), outliers=outliers)
    with pytest.raises(TypeError, match=CALIBRATED):
        jint8.load(make_llama_directory(tmp_path / "llama", seed=0), outliers=outliers)


@pytest.mark.parametrize("outliers", ["batch", {"kernel": [3]}], ids=str)
def test_outliers_of_one_weight_are_columns(outliers):
    with pytest.raises(TypeError, match="Expected outliers to be the columns of one weight, integers"):
        jint8.quantize(normal(6, 8), outliers=outliers)


@pytest.mark.first_case
@pytest.mark.parametrize("columns", [[4], [1], [4, 1, 5]], ids=str)
def test_columns_of_a_slice_of_the_contracted_axis(columns):
    """Those that it has stay in 16 bits, the others leave slots that aren't used."""
    x, floats = 9 * normal(3, 3), normal(6, 8)
    w = contract_last(jint8.quantize(floats, outliers=columns), (0,))
    got = with_int8(lambda floats: x @ floats["w"][:3], {"w": w})
    want = matmul(x, jint8.quantize(floats[:3], outliers=[c for c in columns if c < 3]))
    np.testing.assert_allclose(got, want, atol=0.5)  # the scale of the slice is that of all rows
    of_columns = [c for c in columns if c < 3]
    x_columns = np.zeros_like(x)
    x_columns[:, of_columns] = x[:, of_columns]
    exact = with_int8(lambda floats: x_columns @ floats["w"][:3], {"w": w})
    np.testing.assert_allclose(exact, x_columns.astype(np.float64) @ floats[:3], atol=0.01)
