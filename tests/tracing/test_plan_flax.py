"""`jint8.plan` on the layers of linen and nnx."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import jint8
from jint8.linen import Int8Dense, Int8DenseGeneral

# Some models have nothing but a lookup, a norm or a convolution; test_plan.py tests that this is said.
pytestmark = pytest.mark.filterwarnings("ignore:jint8.plan. nothing becomes int8")

X = jax.ShapeDtypeStruct((2, 3, 8), jnp.float32)
TOKENS = jax.ShapeDtypeStruct((2, 3), jnp.int32)


def plan_linen(module, *args, **kwargs):
    params = jax.eval_shape(module.init, jax.random.key(0), *args, **kwargs)
    return jint8.plan(module.apply, params, *args, **kwargs)


def plan_nnx(make, *args):
    graphdef, state = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    return jint8.plan(lambda state, *args: nnx.merge(graphdef, state)(*args), state, *args)


class Block(nn.Module):
    """Residual feed-forward block, with the signature that nn.scan wants."""

    @nn.compact
    def __call__(self, x, _=None):
        h = nn.Dense(16, name="up")(nn.LayerNorm(name="norm")(x))
        return x + nn.Dense(8, name="down")(nn.gelu(h)), None


class TiedModel(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(11, 8, name="embed")
        return embed.attend(nn.Dense(8, name="dense")(embed(tokens)))


class AttendOnly(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Embed(11, 8, name="embed").attend(x)


class Shared(nn.Module):
    """The inner layer's parameters lie directly below the outer module."""

    def setup(self):
        self.inner = nn.Dense(8)
        nn.share_scope(self, self.inner)

    def __call__(self, x):
        return self.inner(x)


class Masked(nn.Module):
    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.ones, (8, 8))
        return x @ (kernel * jnp.tri(8))


class Setup(nn.Module):
    def setup(self):
        self.w = self.param("w", nn.with_logical_partitioning(nn.initializers.ones, ("out", "in")), (4, 8))

    def __call__(self, x):
        return x @ self.w.T


def scanned(axis, **kwargs):
    return nn.scan(Block, variable_axes={"params": axis}, split_rngs={"params": True}, length=5, **kwargs)()


def partitioned(box):
    return nn.Dense(4, kernel_init=box(nn.initializers.ones, ("in", "out")))


# name: module, argument, contracted axes, stacked axes
LINEN = {
    "Dense": (nn.Dense(4), X, {"kernel": (0,)}, {"kernel": ()}),
    "Dense in bfloat16": (nn.Dense(4, dtype=jnp.bfloat16), X, {"kernel": (0,)}, {"kernel": ()}),
    "DenseGeneral, two output axes": (nn.DenseGeneral((2, 4)), X, {"kernel": (0,)}, {"kernel": ()}),
    "DenseGeneral, two input axes": (nn.DenseGeneral(4, axis=(-2, -1)), X, {"kernel": (0, 1)}, {"kernel": ()}),
    "DenseGeneral, batch axis": (nn.DenseGeneral(4, batch_dims=(0,)), X, {"kernel": (1,)}, {"kernel": (0,)}),
    "Einsum": (nn.Einsum((2, 8, 4), "bsd,ndh->bsnh"), X, {"kernel": (1,)}, {"kernel": ()}),
    "attention": (
        nn.MultiHeadDotProductAttention(2), X,
        {"query/kernel": (0,), "key/kernel": (0,), "value/kernel": (0,), "out/kernel": (0, 1)}, None,
    ),
    "Embed": (nn.Embed(11, 8), TOKENS, {}, {}),
    "Embed.attend": (AttendOnly(), X, {"embed/embedding": (1,)}, None),
    "tied Embed": (TiedModel(), TOKENS, {"dense/kernel": (0,)}, {"dense/kernel": (), "embed/embedding": ()}),
    "Conv": (nn.Conv(4, (3,)), X, {}, {}),
    "masked kernel": (Masked(), X, {}, {}),
    "scan axis 0": (
        scanned(0), X, {"up/kernel": (1,), "down/kernel": (1,)}, {"up/kernel": (0,), "down/kernel": (0,)}
    ),
    "scan axis 1": (
        scanned(1), X, {"up/kernel": (0,), "down/kernel": (0,)}, {"up/kernel": (1,), "down/kernel": (1,)}
    ),
    "scan of remat": (
        nn.scan(nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=5)(), X,
        {"up/kernel": (1,), "down/kernel": (1,)}, {"up/kernel": (0,), "down/kernel": (0,)},
    ),
    "scan with shared parameters": (
        nn.scan(Block, variable_broadcast="params", split_rngs={"params": False}, length=5)(), X,
        {"up/kernel": (0,), "down/kernel": (0,)}, {"up/kernel": (), "down/kernel": ()},
    ),
    "remat": (nn.remat(nn.Dense)(4), X, {"kernel": (0,)}, {"kernel": ()}),
    "jit": (nn.jit(nn.Dense)(4), X, {"kernel": (0,)}, {"kernel": ()}),
    "vmap": (
        nn.vmap(nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True})(4), X,
        {"kernel": (1,)}, {"kernel": (0,)},
    ),
    "vmap on the last axis": (
        nn.vmap(nn.Dense, variable_axes={"params": -1}, split_rngs={"params": True})(4), X,
        {"kernel": (0,)}, {"kernel": (2,)},
    ),
    "share_scope": (Shared(), X, {"kernel": (0,)}, {"kernel": ()}),
    "setup, transposed": (Setup(), X, {"w": (1,)}, {"w": ()}),
    "Partitioned": (partitioned(nn.with_partitioning), X, {"kernel": (0,)}, {"kernel": ()}),
    "LogicallyPartitioned": (partitioned(nn.with_logical_partitioning), X, {"kernel": (0,)}, {"kernel": ()}),
}  # fmt: skip


@pytest.mark.parametrize("case", LINEN)
def test_linen(case):
    module, x, contracted, stacked = LINEN[case]
    found = plan_linen(module, x)
    assert found == contracted
    assert stacked is None or found.stacked == stacked


LINEN_SKIPPED = {
    "Embed": (nn.Embed(11, 8), TOKENS, {"embedding": "embedding lookup"}),
    "tied Embed": (
        TiedModel(), TOKENS,
        {
            "embed/embedding": "used in two ways: embedding lookup; contracted over axes (1,)",
            "dense/bias": "elementwise (add)",
        },
    ),
    "Conv": (nn.Conv(4, (3,)), X, {"kernel": "convolution", "bias": "elementwise (add)"}),
    "LayerNorm": (nn.LayerNorm(), X, {"scale": "elementwise (mul)", "bias": "elementwise (add)"}),
    "masked kernel": (Masked(), X, {"kernel": "elementwise (mul)"}),
    "scan": (
        scanned(1), X,
        {
            "up/bias": "elementwise (add)", "down/bias": "elementwise (add)",
            "norm/scale": "elementwise (mul)", "norm/bias": "elementwise (add)",
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LINEN_SKIPPED)
def test_linen_skipped(case):
    module, x, skipped = LINEN_SKIPPED[case]
    assert plan_linen(module, x).skipped == skipped


def test_linen_dropout_and_batch_statistics():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.BatchNorm(use_running_average=not train, name="norm")(nn.Dense(8, name="dense")(x))
            return nn.Dropout(0.5, deterministic=not train)(x)

    module = Model()
    variables = jax.eval_shape(lambda key, x: module.init(key, x, train=False), jax.random.key(0), X)
    rngs = {"dropout": jax.random.key(0)}
    found = jint8.plan(module.apply, variables, X, train=True, rngs=rngs, mutable=["batch_stats"])
    assert found == {"dense/kernel": (0,)}
    assert found.skipped["batch_stats/norm/mean"] == "elementwise (mul)"


class NnxStack(nnx.Module):
    def __init__(self, axis, rngs):
        @nnx.split_rngs(splits=5)
        @nnx.vmap(in_axes=0, out_axes=axis)
        def make(rngs):
            return nnx.Linear(8, 8, rngs=rngs)

        self.axis = axis
        self.layers = make(rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(self.axis, nnx.Carry), out_axes=nnx.Carry)
        def forward(layer, x):
            return layer(x)

        return forward(self.layers, x)


class NnxTied(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(11, 8, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(8, 8, use_bias=False, rngs=rngs) for _ in range(2)])

    def __call__(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.embed.attend(x)


# name: constructor, argument, contracted axes
NNX = {
    "Linear": (lambda rngs: nnx.Linear(8, 4, rngs=rngs), X, {"kernel": (0,)}),
    "LinearGeneral": (lambda rngs: nnx.LinearGeneral((3, 8), 4, axis=(-2, -1), rngs=rngs), X, {"kernel": (0, 1)}),
    "Einsum": (lambda rngs: nnx.Einsum("bsd,ndh->bsnh", (2, 8, 4), rngs=rngs), X, {"kernel": (1,)}),
    "attention": (
        lambda rngs: nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs), X,
        {"query/kernel": (0,), "key/kernel": (0,), "value/kernel": (0,), "out/kernel": (0, 1)},
    ),
    "Embed": (lambda rngs: nnx.Embed(11, 8, rngs=rngs), TOKENS, {}),
    "tied Embed": (NnxTied, TOKENS, {"layers/0/kernel": (0,), "layers/1/kernel": (0,)}),
    "LoRALinear": (
        lambda rngs: nnx.LoRALinear(8, 4, lora_rank=2, rngs=rngs), X,
        {"kernel": (0,), "lora/lora_a": (0,), "lora/lora_b": (0,)},
    ),
    "scan axis 0": (lambda rngs: NnxStack(0, rngs), X, {"layers/kernel": (1,)}),
    "scan axis 1": (lambda rngs: NnxStack(1, rngs), X, {"layers/kernel": (0,)}),
}  # fmt: skip


@pytest.mark.parametrize("case", NNX)
def test_nnx(case):
    make, x, contracted = NNX[case]
    assert plan_nnx(make, x) == contracted


def test_nnx_scan_axis_is_stacked():
    assert plan_nnx(lambda rngs: NnxStack(1, rngs), X).stacked == {"layers/kernel": (1,)}


def test_nnx_tied_embedding():
    assert plan_nnx(NnxTied, TOKENS).tied == {"embed/embedding": (1,)}


@pytest.mark.first_case
@pytest.mark.parametrize("scheme", ["llm.int8", "absmax", "zeropoint", "vector-zp"])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_vmapped_int8_dense_is_planned_like_a_float_one(axis, scheme):
    x = cases.normal(3, 5, 8, seed=1) * jnp.array([1.0, 10.0, 1e3])[:, None, None]

    def mapped(layer, **kwargs):
        mapped = nn.vmap(layer, variable_axes={"params": axis}, split_rngs={"params": True})
        return mapped(8, use_bias=False, **kwargs)

    config = jint8.Config(scheme=scheme)
    model, floats = mapped(Int8Dense, config=config), mapped(nn.Dense)
    params = floats.init(jax.random.key(0), x)
    scales = jnp.array([1.0, 100.0, 1e-3]).reshape([-1 if a == axis else 1 for a in range(3)])
    params = jax.tree.map(lambda w: w * scales, params)
    plan = jint8.plan(model.apply, params, x)
    assert plan == jint8.plan(floats.apply, params, x)
    int8 = jint8.quantize_params(params, plan=plan, config=config)
    kernel = np.moveaxis(np.asarray(params["params"]["kernel"], np.float64), axis, 0)
    expected = np.asarray(x, np.float64) @ kernel
    error = np.linalg.norm(np.asarray(model.apply(int8, x)) - expected, axis=(1, 2))
    assert (error < 0.05 * np.linalg.norm(expected, axis=(1, 2))).all()


def test_int8_dense_general_with_batch_dims_is_planned_like_a_float_one():
    x = jnp.ones((3, 5, 8))
    int8, floats = (layer(4, batch_dims=(0,), use_bias=False) for layer in (Int8DenseGeneral, nn.DenseGeneral))
    params = floats.init(jax.random.key(0), x)
    plan = jint8.plan(int8.apply, params, x)
    assert plan == jint8.plan(floats.apply, params, x)
    assert (dict(plan), plan.stacked) == ({"kernel": (1,)}, {"kernel": (0,)})
