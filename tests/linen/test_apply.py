"""`jint8.apply`: every standard layer under every transform of linen and jax."""

import functools

import cases
import jax
import jax.numpy as jnp
import oracle
import pytest
from flax import linen as nn
from marks import slow_but

import jint8
from jint8._ops.layers import lookup

X = cases.normal(2, 3, 32, seed=1)
TOKENS = jnp.array([[1, 2, 3], [4, 5, 6]])
EXACT = jint8.Config(threshold=0.0)  # one int8 product per layer on every path


class Block(nn.Module):
    """Residual feed-forward block, with the signature that nn.scan wants."""

    @nn.compact
    def __call__(self, x, _=None):
        return x + nn.Dense(32, name="down")(nn.gelu(nn.Dense(64, name="up")(x))), None


class BoxedBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        box = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
        return x + nn.Dense(32, kernel_init=box)(x), None


class Tied(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(40, 32, name="embed")
        return embed.attend(embed(tokens))


class TiedByHand(nn.Module):
    """A head with the transposed embedding as its kernel."""

    def setup(self):
        self.embed, self.head = nn.Embed(40, 32), nn.Dense(40, use_bias=False)

    def __call__(self, tokens):
        x = self.embed(tokens)
        kernel = self.embed.variables["params"]["embedding"].T
        return self.head.apply({"params": {"kernel": kernel}}, x)


class Shared(nn.Module):
    def setup(self):
        self.inner = nn.Dense(8)
        nn.share_scope(self, self.inner)

    def __call__(self, x):
        return self.inner(x)


class InSetup(nn.Module):
    def setup(self):
        self.inner = nn.Dense(8)

    def __call__(self, x):
        return self.inner(x)


class Scaled(nn.Dense):
    """Overrides the method that has a handler, and calls it."""

    @nn.compact
    def __call__(self, inputs):
        return 2.0 * super().__call__(inputs)


class RematMethod(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.remat(lambda module, x: nn.Dense(8, name="dense")(x))(self, x)


def scanned(block=Block, axis=0, **kwargs):
    return nn.scan(block, variable_axes={"params": axis}, split_rngs={"params": True}, length=5, **kwargs)()


def vmapped(axis):
    return nn.vmap(nn.Dense, in_axes=0, variable_axes={"params": axis}, split_rngs={"params": True})(8)


def boxed(box):
    return nn.Dense(8, kernel_init=box(nn.initializers.lecun_normal(), ("in", "out")))


# name: module, argument, int8 products in the program
LAYERS = {
    "Dense": (nn.Dense(8), X, 1),
    "Dense without bias": (nn.Dense(8, use_bias=False), X, 1),
    "Dense subclass": (type("Mine", (nn.Dense,), {})(8), X, 1),
    "Dense subclass that calls super": (Scaled(8), X, 1),
    "DenseGeneral": (nn.DenseGeneral((2, 4)), X, 1),
    "DenseGeneral, two input axes": (nn.DenseGeneral(8, axis=(-2, -1)), X, 1),
    "DenseGeneral, first axis": (nn.DenseGeneral(8, axis=0), X, 1),
    "DenseGeneral, batch axis": (nn.DenseGeneral((2, 4), batch_dims=(0,)), X, 1),
    "Einsum": (nn.Einsum((2, 32, 4), "bsd,ndh->bsnh"), X, 1),
    "Einsum with ellipsis": (nn.Einsum((2, 32, 4), "...d,ndh->...nh", use_bias=False), X, 1),
    "Einsum, bias in the middle": (nn.Einsum((2, 32, 4), "bsd,ndh->bnsh"), X, 1),
    "attention": (nn.MultiHeadDotProductAttention(4), X, 4),
    "attention, normalized": (nn.MultiHeadDotProductAttention(4, normalize_qk=True), X, 4),
    "tied Embed": (Tied(), TOKENS, 1),
    "tied by hand": (TiedByHand(), TOKENS, 1),
    "scan": (scanned(), X, 2),
    "scan, axis 1": (scanned(axis=1), X, 2),
    "scan, last axis": (scanned(axis=-1), X, 2),
    "scan of remat": (scanned(nn.remat(Block)), X, 2),
    "scan of boxes": (scanned(BoxedBlock, metadata_params={nn.PARTITION_NAME: "layers"}), X, 1),
    "scan of boxes, axis 1": (scanned(BoxedBlock, 1, metadata_params={nn.PARTITION_NAME: "layers"}), X, 1),
    "remat_scan": (
        nn.remat_scan(type("B", (Block,), {"__call__": lambda s, x: Block.__call__(s, x)[0]}), (2, 2))(),
        X,
        2,
    ),
    "remat": (nn.remat(nn.Dense)(8), X, 1),
    "remat of a method": (RematMethod(), X, 1),
    "jit": (nn.jit(nn.Dense)(8), X, 1),
    "vmap": (vmapped(0), X, 1),
    "vmap, last axis": (vmapped(-1), X, 1),
    "share_scope": (Shared(), X, 1),
    "layer in setup": (InSetup(), X, 1),
    "Partitioned": (boxed(nn.with_partitioning), X, 1),
    "LogicallyPartitioned": (boxed(nn.with_logical_partitioning), X, 1),
    "Sequential": (nn.Sequential([nn.Dense(64), nn.gelu, nn.Dense(8)]), X, 2),
}


EVERY_LAYER = pytest.mark.parametrize(
    "name",
    slow_but(
        LAYERS,
        "Dense",
        "DenseGeneral",
        "DenseGeneral, batch axis",
        "Einsum",
        "attention",
        "tied Embed",
        "scan",
        "scan of boxes, axis 1",
        "remat_scan",
        "remat",
        "vmap, last axis",
        "share_scope",
        "Partitioned",
    ),
)


@functools.cache
def float_result(name):
    module, x, _ = LAYERS[name]
    return cases.jit(module.apply)(cases.quantize_linen(module, x)[0], x)


def outputs(module):
    return lambda variables, x: jax.tree.leaves(jint8.apply(module.apply)(variables, x))[0]


@pytest.mark.first_case
@EVERY_LAYER
def test_output_is_close_to_float(name):
    """Under jit, and in there under vmap and checkpoint."""
    module, x, _ = LAYERS[name]
    _, int8, plan = cases.quantize_linen(module, x)
    assert len(plan) > 0
    function, want = outputs(module), float_result(name)

    def transformed(variables, x):
        batched = jax.vmap(function, in_axes=(None, 0))(variables, x[None])[0]
        return {"jit": function(variables, x), "vmap": batched, "checkpoint": jax.checkpoint(function)(variables, x)}

    for transform, got in cases.jit(transformed)(int8, x).items():
        assert cases.relative_error(got, want) < 0.02, transform
        assert got.dtype == jax.tree.leaves(want)[0].dtype


@pytest.mark.first_case
@pytest.mark.parametrize("name", ["Dense", "attention", "tied Embed", "scan of remat", "jit", "share_scope"])
def test_without_jit(name):
    module, x, _ = LAYERS[name]
    floats, int8, _ = cases.quantize_linen(module, x)
    assert cases.relative_error(outputs(module)(int8, x), module.apply(floats, x)) < 0.02


@pytest.mark.first_case
@EVERY_LAYER
def test_one_int8_product_per_layer(name):
    """Counted without decomposition, where no path adds products for outliers; a loop's body counts once."""
    module, x, products = LAYERS[name]
    floats, int8, _ = cases.quantize_linen(module, x, config=EXACT)
    assert cases.count_int8_products(outputs(module), int8, x) == products
    in_float = cases.count_float_products(module.apply, floats, x)
    assert cases.count_float_products(outputs(module), int8, x) == in_float - products


@pytest.mark.first_case
@pytest.mark.parametrize(
    "name",
    [
        *("attention", "tied Embed", "tied by hand", "scan, axis 1", "scan of remat", "vmap, last axis"),
    ],
)
def test_int8_dots_in_the_compiled_program(name, monkeypatch):
    monkeypatch.setenv("JINT8_NATIVE", "named")
    compiled_products = pytest.importorskip("hlo", reason="needs the benchmarks").compiled_products
    module, x, products = LAYERS[name]
    floats, int8, _ = cases.quantize_linen(module, x, config=EXACT)
    in_int8, in_float = compiled_products(outputs(module), int8, x), compiled_products(module.apply, floats, x)
    assert (in_int8.s8, in_float.s8) == (products, 0)
    assert in_int8.other == in_float.other - products


@pytest.mark.first_case
@pytest.mark.parametrize("name", ["Dense", "DenseGeneral, batch axis", "Einsum", "attention", "scan of remat"])
def test_planted_outliers(name):
    module, x, _ = LAYERS[name]
    x = cases.plant(x)
    floats, int8, _ = cases.quantize_linen(module, x)
    want = cases.jit(module.apply)(floats, x)
    errors = {
        threshold: cases.relative_error(
            cases.jit(jint8.apply(module.apply, config=jint8.Config(threshold=threshold)))(int8, x), want
        )
        for threshold in (6.0, 0.0)
    }
    assert errors[6.0] < 0.02
    assert errors[6.0] < errors[0.0]


@pytest.mark.first_case
@pytest.mark.parametrize(
    "name",
    [
        "Dense",
        "DenseGeneral, batch axis",
        "Einsum",
        "attention",
        "scan of remat",
        "remat",
        "jit",
        "vmap, last axis",
        "LogicallyPartitioned",
    ],
)
def test_gradient_with_respect_to_inputs_and_biases(name):
    module, x, _ = LAYERS[name]
    _, int8, _ = cases.quantize_linen(module, x, config=jint8.Config(scheme="vector"))
    is_qtensor = lambda leaf: isinstance(leaf, jint8.QTensor)
    leaves, tree = jax.tree.flatten(int8, is_leaf=is_qtensor)
    frozen = [leaf if is_qtensor(leaf) else None for leaf in leaves]
    trained = [None if is_qtensor(leaf) else leaf for leaf in leaves]

    def loss(apply_fn, weights, trained, x):
        merged = jax.tree.unflatten(tree, [w if t is None else t for w, t in zip(weights, trained, strict=True)])
        return jnp.sum(jnp.sin(jax.tree.leaves(apply_fn(merged, x))[0]))

    dequantized = [None if w is None else w.dequantize() for w in frozen]
    gradient = cases.jit(jax.grad(loss, (2, 3)), static_argnums=0)
    got = gradient(jint8.apply(module.apply), frozen, trained, x)
    want = gradient(module.apply, dequantized, trained, x)
    flat = lambda tree: jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)])
    assert cases.relative_error(flat(got[1]), flat(want[1])) < 0.12  # five layers deep, and the forward pass is int8
    if jax.tree.leaves(got[0]):
        assert cases.relative_error(flat(got[0]), flat(want[0])) < 0.12


@pytest.mark.first_case
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", ["Dense", "DenseGeneral", "Einsum", "attention", "tied Embed"])
def test_module_dtype(name, dtype):
    modules = {
        "Dense": nn.Dense(8, dtype=dtype),
        "DenseGeneral": nn.DenseGeneral((2, 4), dtype=dtype),
        "Einsum": nn.Einsum((2, 32, 4), "bsd,ndh->bsnh", dtype=dtype),
        "attention": nn.MultiHeadDotProductAttention(4, dtype=dtype),
        "tied Embed": nn.Embed(40, 32, dtype=dtype),
    }
    x = TOKENS if name == "tied Embed" else X
    module = modules[name]
    floats = module.init(jax.random.key(0), x)
    plan = {"embedding": (1,)} if name == "tied Embed" else jint8.plan(module.apply, floats, x)
    int8 = jint8.quantize_params(floats, plan=plan)
    got, want = jint8.apply(module.apply)(int8, x), module.apply(floats, x)
    assert got.dtype == want.dtype == dtype
    assert cases.relative_error(got, want) < 0.02


def test_dtype_is_promoted_as_in_float():
    module = nn.Dense(8, param_dtype=jnp.bfloat16)
    for dtype in (jnp.bfloat16, jnp.float16, jnp.float32):
        x = X.astype(dtype)
        floats = module.init(jax.random.key(0), x)
        got = jint8.apply(module.apply)(jint8.quantize_params(floats), x)
        assert got.dtype == module.apply(floats, x).dtype


@pytest.mark.first_case
@pytest.mark.parametrize("keep_order", [(), "kernel"], ids=["contracted last", "order kept"])
@pytest.mark.parametrize("name", ["Dense", "DenseGeneral, two input axes", "Einsum", "attention", "scan, axis 1"])
def test_both_orders(name, keep_order):
    module, x, _ = LAYERS[name]
    floats, int8, plan = cases.quantize_linen(module, x, keep_order=keep_order)
    orders = [
        w.order
        for w in jax.tree.leaves(int8, is_leaf=lambda w: isinstance(w, jint8.QTensor))
        if isinstance(w, jint8.QTensor)
    ]
    assert len(orders) == len(plan)
    assert all((order is None) == bool(keep_order) for order in orders)
    assert cases.relative_error(jint8.apply(module.apply)(int8, x), module.apply(floats, x)) < 0.02


@pytest.mark.first_case
@pytest.mark.parametrize("scheme", [name for name in oracle.SCHEMES if name != "none"])
def test_schemes(scheme):
    module, x, _ = LAYERS["attention"]
    floats, int8, _ = cases.quantize_linen(module, x, config=jint8.Config(scheme=scheme))
    assert cases.relative_error(cases.jit(jint8.apply(module.apply))(int8, x), module.apply(floats, x)) < 0.05


def test_explicit_config_is_traced_again():
    """Neither an outer jit nor nn.jit may return what was compiled for another config."""
    x = cases.plant(X)
    for module in (nn.Dense(8), nn.jit(nn.Dense)(8)):
        floats, int8, _ = cases.quantize_linen(module, x)
        want, jitted = module.apply(floats, x), jax.jit(module.apply)
        errors = [
            cases.relative_error(jint8.apply(jitted, config=config)(int8, x), want)
            for config in (EXACT, jint8.Config(), EXACT)
        ]
        assert errors[1] < errors[0] == errors[2]


def test_config_of_a_keyword_argument():
    model = nn.Dense(8)
    floats, int8, _ = cases.quantize_linen(model, X)

    def call(x, *, params):
        return model.apply(params, x)

    got = jint8.apply(call, config=jint8.Config(scheme="none"))(X, params=int8)
    assert cases.count_int8_products(lambda: got) == 0
    assert cases.relative_error(got, model.apply(floats, X)) < 0.01


def test_parameters_in_floating_point_run_as_they_are():
    module = nn.Dense(8)
    floats = module.init(jax.random.key(0), X)
    nothing = "jint8.apply: nothing becomes int8: there is no int8 weight among the arguments of"
    with pytest.warns(UserWarning, match=f"{nothing} apply. Give it what jint8.quantize_params returns"):
        assert jnp.array_equal(jint8.apply(module.apply)(floats, X), module.apply(floats, X))
    with pytest.warns(UserWarning, match=f"{nothing} init"):
        made = jint8.apply(module.init)(jax.random.key(0), X)
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, floats)


@pytest.mark.slow
def test_int8_that_isnt_among_the_arguments_is_found():
    """In parameters that the function closes over, and in layers that quantize their kernels themselves."""
    module = nn.Sequential([nn.Dense(8)])
    int8 = jint8.quantize_params(module.init(jax.random.key(0), X))
    assert jint8.apply(lambda x: module.apply(int8, x))(X).shape == (2, 3, 8)
    for own in (jint8.linen.Int8Dense(8), jint8.linen.Int8TransformerBlock(num_heads=4)):
        assert jint8.apply(own.apply)(own.init(jax.random.key(0), X), X).shape[:2] == (2, 3)


def test_intermediates_are_captured():
    module, x, _ = LAYERS["Sequential"]
    _, int8, _ = cases.quantize_linen(module, x)
    y, state = jint8.apply(module.apply)(int8, x, capture_intermediates=True)
    assert jnp.array_equal(state["intermediates"]["layers_2"]["__call__"][0], y)


@pytest.mark.slow
def test_embedding_lookup():
    module = nn.Embed(40, 32)
    floats = module.init(jax.random.key(0), TOKENS)
    for config in (jint8.Config(), jint8.Config(scheme="vector-zp")):
        int8 = jint8.quantize_params(floats, include="embedding", config=config)
        got = jint8.apply(module.apply)(int8, TOKENS)
        assert jnp.array_equal(got, int8["params"]["embedding"].dequantize()[TOKENS])
    assert jnp.isnan(jint8.apply(module.apply)(int8, jnp.array([99]))).all()
    with pytest.raises(TypeError, match="tokens to be integers, got float32"):
        jint8.apply(module.apply)(int8, jnp.ones(3))


def test_a_table_of_one_scale_has_nothing_for_tokens_out_of_range_either():
    table = jint8.quantize(cases.normal(40, 32), contract_axes=0)
    got = lookup(table, jnp.array([3, 99, -41]))
    assert jnp.array_equal(jnp.isnan(got).all(-1), jnp.array([False, True, True]))
    assert jnp.array_equal(got[0], table.dequantize()[3])


def test_a_loop_does_not_convert_the_table_before_it():
    table = jint8.quantize(cases.normal(1000, 64), contract_axes=1)

    @jax.jit
    def walk(table, times):
        step = lambda _, token: jnp.argmax(lookup(table, token)).astype(jnp.int32) * 15
        return jax.lax.fori_loop(0, times, step, jnp.int32(7))

    temporary = walk.lower(table, 5).compile().memory_analysis().temp_size_in_bytes
    assert temporary < table.q.nbytes


def test_convolutions_are_left_alone():
    module = nn.Conv(8, (3,))
    floats = module.init(jax.random.key(0), X)
    with pytest.warns(UserWarning, match="nothing becomes int8: kernel: convolution"):
        assert jint8.plan(module.apply, floats, X) == {}
    int8 = jint8.quantize_params(floats, plan={"kernel": (0, 1)})
    with pytest.raises(
        TypeError, match=r"the outermost module \(Conv\) with int8 weights \(kernel\).*got conv_general"
    ):
        jint8.apply(module.apply)(int8, X)


@pytest.mark.parametrize("bad", [None, nn.Dense(3), 3])
def test_apply_takes_a_function(bad):
    with pytest.raises(TypeError, match=r"Expected a function such as module\.apply"):
        jint8.apply(bad)
