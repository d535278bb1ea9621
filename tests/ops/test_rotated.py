"""Products with a weight that was smoothed and rotated, against the float64 oracle."""

import functools
from pathlib import Path

import cases
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from matmul_cases import SHAPES, VALUES
from virtual_devices import run_on_eight_devices

import jint8
from jint8._core.qtensor import contract_last
from jint8._core.rotation import into_coordinates, rotate
from jint8._ops.layers import attend, lookup

ROTATED = jint8.Config.preset("rotated")
matmul = cases.jit(jint8.matmul, static_argnames=("config", "implementation"))


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def rms_of(x):
    """What a calibration on these rows would find; of rows that aren't finite, nothing."""
    x = np.where(np.isfinite(x), x, 0).astype(np.float64)
    return np.sqrt(np.sum(x**2, tuple(range(x.ndim - 1))) / max(x[..., :1].size, 1)).astype(np.float32)


@functools.cache
def quantized(where, name, config=ROTATED, columns=()):
    """The weight of a case, in its own order and with its contracted axis last."""
    case = CASES[where][name]
    return _both_orders(case.w, rms=rms_of(case.x), outliers=np.array(columns) if columns else None, config=config)


@functools.partial(cases.jit, static_argnames="config")
def _both_orders(*arguments, **named):
    w = jint8.quantize(*arguments, **named)
    return w, contract_last(w, (0,))


def of_64(case):
    """The case with features that are all rotated together."""
    return case._replace(x=case.x[:, :64], w=case.w[:64])


CASES = {"shapes": SHAPES, "k=77": VALUES, "k=64": {name: of_64(case) for name, case in VALUES.items()}}


def check(where, name, implementation, *, config=ROTATED, columns=(), n_k=True, dtype=jnp.float32, bias=None, shift=0):
    """The library's product against the oracle's of the same integers, which tests/core holds against it, too."""
    case = CASES[where][name]
    w, last = quantized(where, name, config, columns)
    x = jnp.asarray(case.x + np.float32(shift), dtype)
    bias = None if bias is None else jnp.asarray(bias, dtype)
    got = matmul(x, last if n_k else w, bias=bias, implementation=implementation)
    assert (got.shape, got.dtype) == ((*case.x.shape[:-1], case.w.shape[1]), dtype)
    scale, zero = (np.asarray(leaf, np.float64) for leaf in (w.scale, 0.0 if w.zero is None else w.zero))
    integers = oracle.Quantized(np.asarray(w.q, np.float64), scale, np.broadcast_to(zero, scale.shape))
    rows = case._replace(x=np.asarray(x, np.float32)).rows
    exact, bound = oracle.rotated_matmul(
        rows,
        integers,
        np.asarray(w.smooth, np.float64)[:, 0],
        w.config.rotate,
        "none" if implementation == "dequantize" else config.scheme,
        bias,
        digits=config.digits,
        columns=columns,
        rows=oracle.outlier_rows(case.w, integers, columns) if columns else None,
    )
    oracle.assert_close(np.asarray(got).reshape(exact.shape), exact, bound, case.bad_rows)


@pytest.mark.first_case
@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name):
    check("shapes", name, None)


@pytest.mark.parametrize("implementation", ["xla_digits", "xla_gather", "dequantize"])
@pytest.mark.parametrize("name", VALUES)
def test_values(name, implementation):
    check("k=64", name, implementation)


@pytest.mark.parametrize("name", VALUES)
def test_values_of_odd_k_are_smoothed(name):
    check("k=77", name, "xla_digits")


COLUMNS = (20, 3)
WITH_COLUMNS = jint8.Config(rotate=64, outliers="static")


@pytest.mark.parametrize("name", VALUES)
def test_values_with_calibrated_columns(name):
    check("k=64", name, "xla_gather", config=WITH_COLUMNS, columns=COLUMNS)


@pytest.mark.first_case
@pytest.mark.parametrize("name", ["rows=1", "leading=()"])
@pytest.mark.parametrize("config", [ROTATED, WITH_COLUMNS], ids=["vector", "columns"])
def test_one_row(name, config):
    check("shapes", name, "xla_row", config=config, columns=(3, 19) if config is WITH_COLUMNS else ())


@pytest.mark.parametrize(("name", "config"), [("nan_row", ROTATED), ("few_outliers", WITH_COLUMNS)])
def test_kernels(name, config):
    check("k=64", name, "triton", config=config, columns=COLUMNS if config is WITH_COLUMNS else ())  # interpreted


@pytest.mark.first_case
@pytest.mark.parametrize("scheme", [s for s in oracle.SCHEMES if s != "none"])
def test_schemes(scheme):
    """Off the centre, so that zero points matter; with decomposition, the columns are taken out."""
    columns = COLUMNS if oracle.SCHEMES[scheme][3] else ()
    config = jint8.Config(scheme=scheme, rotate=64, outliers="static")
    check("k=64", "few_outliers", None, config=config, columns=columns, shift=1.5, n_k=not columns)


OPTIONS = {
    "[k,n]": {"n_k": False},
    "bias": {"bias": np.linspace(-3, 3, 13)},
    "bfloat16": {"dtype": jnp.bfloat16, "bias": np.linspace(-3, 3, 13)},
    "float16": {"dtype": jnp.float16},
    "two_digits": {"config": jint8.Config(scheme="vector", rotate=64, digits=2)},
    "two_digits_and_columns": {"config": jint8.Config(rotate=64, digits=2, outliers="static"), "columns": COLUMNS},
    "block_of_16": {"config": jint8.Config(scheme="vector", rotate=16)},
    "threshold_0": {"config": jint8.Config(rotate=64, threshold=0.0)},
}


@pytest.mark.first_case
@pytest.mark.parametrize("name", OPTIONS)
def test_options(name):
    check("k=64", "few_outliers", None, **OPTIONS[name])


X = VALUES["few_outliers"].x[:, :64]
FLOATS = VALUES["few_outliers"].w[:64]
W = contract_last(jint8.quantize(FLOATS, config=ROTATED, rms=rms_of(X)), (0,))


@pytest.mark.parametrize("k", [64, 77])
def test_the_smoothed_and_rotated_floats_have_the_products_of_the_floats(k):
    """The change of coordinates is exact: in floats, with factors and a block of the library, nothing is lost."""
    case, block = VALUES["few_outliers"], oracle.block_of(k)
    x, w = case.x[:, :k], case.w[:k]

    @cases.jit
    def product(x, w, rms):
        inside = into_coordinates(w, rms, None, contract_axes=(0,), stack_axes=(), block=block)
        return rotate(x * inside.smooth[0], block) @ inside.values.T

    y = product(x, w, rms_of(x))
    assert cases.relative_error(y, x.astype(np.float64) @ w) < 1e-6


def test_columns_that_nothing_else_would_hold():
    """What is calibrated is exact to 16 bits, whatever it is beside; and the rest is as if it weren't there."""
    x = X.copy()
    x[:, 3] = 1e5
    w = jint8.quantize(FLOATS, config=WITH_COLUMNS, outliers=[3], rms=rms_of(X))
    error = lambda x, w: abs(np.asarray(matmul(x, w), np.float64) - x.astype(np.float64) @ FLOATS).max()
    x_zero = np.where(np.arange(64) == 3, 0, X)
    assert error(x, w) <= error(x_zero, w) + 1e5 * abs(FLOATS[3]).max() * 2**-11
    assert error(x, w) < error(x, W) / 10


def test_any_neighbours():
    """A row's result is the same bits beside any other rows of one shape."""
    _, w = quantized("k=64", "few_outliers", WITH_COLUMNS, COLUMNS)
    for weight, implementation in ((W, "xla_digits"), (W, "xla_gather"), (w, "xla_digits")):
        alone = np.asarray(matmul(np.tile(X[2], (6, 1)), weight, implementation=implementation))
        for neighbour in (0, 1e30, -1e-30, np.nan, np.inf, 700):
            x = np.full_like(X, neighbour)
            x[4] = X[2]
            np.testing.assert_array_equal(matmul(x, weight, implementation=implementation)[4], alone[4])


def test_vmap_over_rows_is_one_product():
    """Of one row, `vmap` has a rule of its own, which multiplies all rows at once."""
    want = matmul(X, W, implementation="xla_digits")
    for implementation in ("xla_row", "xla_digits"):
        rows = cases.jit(jax.vmap(functools.partial(jint8.matmul, implementation=implementation), (0, None)))
        np.testing.assert_allclose(rows(X, W), want, rtol=1e-5, atol=1e-5)
    one = functools.partial(jint8.matmul, implementation="xla_row")
    assert cases.count_int8_products(jax.vmap(one, (0, None)), X, W) == 1


def test_layers_in_a_scan_and_a_vmap():
    w = jnp.stack([FLOATS[:, :8], 30 * FLOATS[:, 5:]])
    stacked = contract_last(jint8.quantize(w, contract_axes=1, stack_axes=(0,), config=ROTATED), (1,), (0,))
    assert stacked.smooth.shape == (2, 1, 64)
    step = lambda carry, layer: (carry, jint8.matmul(X, layer))
    of_scan = cases.jit(lambda w: jax.lax.scan(step, 0, w)[1])(stacked)
    of_vmap = cases.jit(jax.vmap(jint8.matmul, (None, 0)))(X, stacked)
    for i in range(2):
        want = matmul(X, jax.tree.map(lambda leaf, i=i: leaf[i], stacked))
        np.testing.assert_allclose(of_scan[i], want, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(of_vmap[i], want, rtol=1e-5, atol=1e-5)
        assert cases.relative_error(want, X @ w[i]) < 0.02


@pytest.mark.parametrize("columns", [(), COLUMNS], ids=["", "columns"])
@pytest.mark.parametrize("implementation", ["xla_digits", "dequantize"])
def test_gradients_are_those_of_the_dequantized_weight(implementation, columns):
    _, w = quantized("k=64", "few_outliers", WITH_COLUMNS if columns else ROTATED, columns)
    cotangent, bias = normal(6, 13, seed=7), np.zeros(13, np.float32)
    loss = lambda x, bias: jnp.sum(jint8.matmul(x, w, bias=bias, implementation=implementation) * cotangent)
    of_x, of_bias = cases.jit(jax.grad(loss, (0, 1)))(X, bias)
    floats = np.asarray(w.dequantize(), np.float64)
    np.testing.assert_allclose(of_x, cotangent @ floats.T, atol=1e-5 * (abs(cotangent) @ abs(floats).T).max())
    np.testing.assert_allclose(of_bias, cotangent.sum(0), rtol=1e-5)


def test_jvp_in_bfloat16():
    x, tangent = jnp.asarray(X, jnp.bfloat16), jnp.asarray(normal(6, 64, seed=3), jnp.bfloat16)
    y, y_dot = cases.jit(lambda x, t: jax.jvp(lambda x: jint8.matmul(x, W), (x,), (t,)))(x, tangent)
    assert y.dtype == y_dot.dtype == jnp.bfloat16
    assert cases.relative_error(y_dot, np.asarray(tangent, np.float32) @ W.dequantize()) < 0.01


@pytest.mark.parametrize("config", [ROTATED, WITH_COLUMNS], ids=["vector", "columns"])
def test_strict_promotion_and_64_bits(config):
    columns = COLUMNS if config is WITH_COLUMNS else None
    with jax.numpy_dtype_promotion("strict"), jax.enable_x64(True):
        rms = rms_of(X).astype(np.float64)

        def run(w, x):
            w = jint8.quantize(w, config=config, rms=rms, outliers=columns)
            y, pull = jax.vjp(lambda x: jint8.matmul(x, w, bias=jnp.ones(13, jnp.float16)), x)
            return w, w.dequantize(), y, pull(y)[0]

        w, *floats = jax.eval_shape(run, *(jnp.asarray(a, jnp.bfloat16) for a in (FLOATS, X)))
        assert {a.dtype for a in floats} == {np.dtype(jnp.bfloat16)}
        assert {leaf.dtype for leaf in (w.q, w.scale, w.smooth)} == {np.dtype("int8"), np.dtype("float32")}


CONTRACTIONS = {  # subscripts, shape of x and of the weight, contracted axes, stacked ones
    "heads": ("btd,dnh->btnh", (2, 3, 48), (48, 2, 5), (0,), ()),
    "out of heads": ("btnh,nhd->btd", (2, 3, 4, 16), (4, 16, 7), (0, 1), ()),
    "heads that each contract": ("btnh,nhd->btnd", (2, 3, 4, 16), (4, 16, 7), (1,), (0,)),
    "experts": ("etd,edf->etf", (3, 4, 32), (3, 32, 6), (1,), (0,)),
    "all experts": ("td,edf->etf", (4, 32), (3, 32, 6), (1,), ()),
    "axes swapped": ("bhn,nhd->bd", (3, 16, 4), (4, 16, 7), (0, 1), ()),
    "weight first": ("nd,btd->tbn", (2, 3, 64), (5, 64), (1,), ()),
}


@pytest.mark.first_case
@pytest.mark.parametrize(
    ("name", "last"), [*((name, True) for name in CONTRACTIONS), ("heads that each contract", False)]
)
def test_einsum(name, last):
    subscripts, x_shape, w_shape, contract, stack = CONTRACTIONS[name]
    spread = 10 ** np.random.default_rng(3).uniform(-1, 1, w_shape)
    floats = (normal(*w_shape, seed=1) * spread).astype(np.float32)
    x = normal(*x_shape)
    x[..., 3] *= 30

    def operands(w, x=x):
        return (w, x) if name == "weight first" else (x, w)

    @cases.jit
    def run(floats, x):
        w = jint8.quantize(floats, contract_axes=contract, stack_axes=stack, config=ROTATED)
        w = contract_last(w, contract, stack) if last else w
        in_floats = jint8.einsum(subscripts, *operands(w, x), implementation="dequantize")
        return jint8.einsum(subscripts, *operands(w, x)), in_floats, w.dequantize()

    got, in_floats, dequantized = run(floats, x)
    exact = np.einsum(subscripts, *(np.asarray(a, np.float64) for a in operands(dequantized)))
    assert cases.relative_error(in_floats, exact) < 1e-6
    assert cases.relative_error(got, exact) < 0.02
    assert cases.relative_error(got, np.einsum(subscripts, *operands(floats))) < 0.03


def test_dot_general_with_the_weight_first():
    w = jint8.quantize(FLOATS, config=ROTATED, rms=rms_of(X))
    got = cases.jit(lambda x: jint8.dot_general(w, x, (((0,), (1,)), ((), ()))))(X)
    np.testing.assert_allclose(got, np.asarray(matmul(X, W)).T, rtol=1e-5, atol=1e-5)


def test_one_x_for_experts_that_have_factors_of_their_own_is_refused():
    """It would be as many products; with the experts as further channels, they share one list."""
    quantize = functools.partial(jint8.quantize, contract_axes=1, stack_axes=(0,), config=ROTATED)
    w = jax.eval_shape(quantize, normal(3, 32, 6))
    with pytest.raises(ValueError, match="and one of smoothing factors, got one for each entry of an axis that isn't"):
        jax.eval_shape(functools.partial(jint8.einsum, "td,edf->etf"), normal(4, 32), w)


SIZES = jnp.array([4, 0, 5])  # the last row belongs to no expert
EXPERT_COLUMNS = np.array([[3, 7], [1, 64], [5, 40]])


AFFINE = jint8.Config(scheme="llm.int8-zp", rotate=64, outliers="static")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "last"),
    [
        pytest.param(ROTATED, True, id="contracted last", marks=pytest.mark.slow),
        pytest.param(AFFINE, False, id="columns"),
    ],
)
def test_ragged_dot(config, last):
    """Each expert has factors and columns of its own."""
    floats = normal(3, 64, 8, seed=2) * (10 ** np.random.default_rng(3).uniform(-1, 1, (3, 64, 1))).astype("f4")
    x, rms = normal(10, 64), abs(normal(3, 64, seed=4)) + 0.1
    columns = EXPERT_COLUMNS if config is not ROTATED else None
    if columns is not None:
        x[:4, [3, 7]] *= 1000
        x[4:9, 5] *= 1000
    w = jint8.quantize(floats, contract_axes=1, stack_axes=(0,), config=config, rms=rms, outliers=columns)
    w = contract_last(w, (1,), (0,)) if last else w
    got, in_floats, of_x = cases.jit(
        lambda x: (
            jint8.ragged_dot(x, w, SIZES),
            jint8.ragged_dot(x, w, SIZES, implementation="dequantize"),
            jax.grad(lambda x: jnp.sum(jint8.ragged_dot(x, w, SIZES)))(x),
        )
    )(x)
    dequantized = np.asarray(w.dequantize(), np.float64)
    for rows, expert in ((slice(0, 4), 0), (slice(4, 9), 2)):
        alone = jint8.quantize(
            floats[expert], config=config, rms=rms[expert], outliers=None if columns is None else columns[expert]
        )
        np.testing.assert_array_equal(alone.q, w.q[expert].T if last else w.q[expert])
        want = np.asarray(matmul(x, alone))[rows]
        in_float64, gradient = x[rows] @ dequantized[expert], dequantized[expert].sum(1)
        np.testing.assert_allclose(got[rows], want, atol=1e-5 * abs(want).max())
        np.testing.assert_allclose(in_floats[rows], in_float64, atol=1e-5 * abs(want).max())
        np.testing.assert_allclose(of_x[rows] - gradient, 0 * x[rows], atol=1e-5 * abs(gradient).max())
    assert (np.asarray(got)[9:] == 0).all()
    assert (np.asarray(of_x)[9:] == 0).all()


@pytest.mark.first_case
@pytest.mark.parametrize("config", [ROTATED, AFFINE], ids=["vector", "columns"])
def test_embedding(config):
    floats = normal(20, 64) * (10 ** np.random.default_rng(3).uniform(-1, 1, 64)).astype("f4")
    w = jint8.quantize(floats, contract_axes=1, config=config, outliers=None if config is ROTATED else [9, 2])
    tokens = jnp.array([[3, 0, 19], [-1, 3, 20]])
    rows, logits = cases.jit(lambda tokens, x: (lookup(w, tokens), attend(x, w)))(tokens, X)
    dequantized = np.asarray(w.dequantize())
    np.testing.assert_allclose(rows[:, :2], dequantized[[[3, 0], [-1, 3]]], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(rows[0, 2], dequantized[19], rtol=1e-5, atol=1e-5)
    assert np.isnan(rows[1, 2]).all()
    np.testing.assert_allclose(logits, matmul(X, w), rtol=1e-5, atol=1e-4)
    assert cases.relative_error(logits, X @ floats.T) < 0.02


def test_the_config_of_a_call():
    """It can't undo a rotation; another block is the weight's, and a scheme without rotation needs none."""
    plain = jint8.quantize(FLOATS)
    with pytest.raises(ValueError, match="Expected a config with rotate=64, as the weight was quantized, got rotate=0"):
        matmul(X, W, config=jint8.Config(scheme="vector"))
    with pytest.raises(ValueError, match="Expected a config with rotate=0, as the weight was quantized, got rotate=64"):
        matmul(X, plain, config=ROTATED)
    with pytest.raises(ValueError, match="rotate=64, as the weight was quantized, got rotate=0"):
        jint8.einsum("bk,kn->bn", X, W, config=jint8.Config())
    want = matmul(X, W)
    for config in (jint8.Config(scheme="vector", rotate=16), jint8.Config(rotate=512, outliers="static")):
        np.testing.assert_array_equal(matmul(X, W, config=config), want)
    two_digits = matmul(X, W, config=jint8.Config(scheme="vector", rotate=64, digits=2))
    in_floats = matmul(X, W, config=jint8.Config(scheme="none"))
    exact = X.astype(np.float64) @ np.asarray(W.dequantize())
    assert cases.relative_error(in_floats, exact) < 1e-6
    assert cases.relative_error(two_digits, exact) < 1e-4 < cases.relative_error(want, exact)


@pytest.fixture(scope="module")
def on_meshes():
    return run_on_eight_devices(Path(__file__).parent / "rotated_on_meshes.py", optimized=False)


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "block"), [("2", 32), ("4", 16)])
def test_features_over_devices(on_meshes, devices, block):
    """192 of them: a block that divides each device's, and nothing of x or of the weight is sent around."""
    found = dict(on_meshes[devices])
    assert found.pop("block") == found.pop("explicit block") == block
    assert found.pop("integers that differ") < 0.005
    assert found.pop("largest difference") <= 1
    assert found.pop("smooth is sharded") == [None, "model"]
    assert found.pop("gathered") == []
    assert found.pop("gathered for blocks over two devices") != []  # so it would be seen
    assert found.pop("shard_map") < 0.02  # each device rounds its own features of a row
    assert max(found.values()) < 1e-5, found


def test_quantized_within_shard_map():
    """Where arrays are shards already, as in data-parallel code with layers that quantize at each call."""
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    run = lambda x, w: jint8.matmul(x, jint8.quantize(w, config=ROTATED))
    rows, replicated = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()
    sharded = jax.shard_map(run, mesh=mesh, in_specs=(rows, replicated), out_specs=rows)
    w = normal(64, 13)
    np.testing.assert_allclose(jax.jit(sharded)(X, w), run(X, w), rtol=1e-5, atol=1e-4)


def test_derivative_in_float16_where_factors_are_large():
    """In the weight's coordinates the tangent would be beyond float16."""
    w = normal(64, 3)
    w[7] *= 1000
    rotated = jint8.quantize(w, config=ROTATED, rms=np.where(np.arange(64) == 7, 0.0, 1.0).astype(np.float32))
    x, tangent = jnp.zeros((1, 64), jnp.float16), jnp.zeros((1, 64), jnp.float16).at[0, 7].set(20)
    assert 20 * float(rotated.smooth[7, 0]) > 65504 / 20
    _, got = jax.jvp(lambda x: jint8.matmul(x, rotated), (x,), (tangent,))
    assert cases.relative_error(np.asarray(got, np.float32), 20 * w[7]) < 0.02


def test_a_part_of_a_block_is_refused():
    w = jint8.quantize(normal(64, 5), config=ROTATED)
    half = jax.tree.map(lambda leaf: leaf[:32] if leaf.shape[0] == 64 else leaf, w)
    with pytest.raises(ValueError, match="Expected a weight with whole blocks of the 64 features"):
        jint8.matmul(X[:, :32], half)
