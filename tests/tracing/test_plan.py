import math
import re
import time
from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AxisType, Mesh, PartitionSpec

import jint8


def arrays(*shapes, dtype=jnp.float32):
    return [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]


def plan_one(fn, shape, *args):
    """Plans `fn(w, *args)` for one parameter; returns its contracted and stacked axes, or the reason to skip it."""
    found = jint8.plan(lambda params, *args: fn(params["w"], *args), {"w": arrays(shape)[0]}, *args)
    return (found["w"], found.stacked["w"]) if "w" in found else found.skipped["w"]


X = jnp.ones((2, 3, 4))  # (b, s, d)
ROW = jnp.ones((3, 4))
TOKENS = jnp.zeros((2, 3), jnp.int32)


@jax.custom_jvp
def with_jvp(w, x):
    return x @ w


with_jvp.defjvp(lambda primals, tangents: (with_jvp(*primals), tangents[1]))


@jax.custom_vjp
def with_vjp(w, x):
    return x @ w


with_vjp.defvjp(lambda w, x: (with_vjp(w, x), None), lambda _, g: (g, g))


def in_shard_map(w, x):
    mesh = Mesh(np.array(jax.devices()[:1]), ("d",))
    specs = PartitionSpec(), PartitionSpec("d")
    return jax.shard_map(lambda w, x: x @ w, mesh=mesh, in_specs=specs, out_specs=specs[1])(w, x)


def loop(w, x):
    return lax.fori_loop(0, jnp.int32(5), lambda i, x: x @ w[i], x)


def carried(w, x):
    return lax.while_loop(lambda c: c[1].sum() > 0, lambda c: (c[0], c[1] @ c[0]), (w, x))


def scan(axis):
    return lambda w, x: lax.scan(lambda x, w: (x @ w, None), x, jnp.moveaxis(w, axis, 0))[0]


# name: function of the parameter, its shape, other arguments, contracted axes, stacked axes
CONTRACTED = {
    "matmul": (lambda w, x: x @ w, (4, 8), X, (0,), ()),
    "weight on the left": (lambda w, x: w @ x, (8, 2), jnp.ones((2, 5)), (1,), ()),
    "transposed": (lambda w, x: x @ w.T, (8, 4), X, (1,), ()),
    "cast": (lambda w, x: x.astype(jnp.bfloat16) @ jnp.asarray(w, jnp.bfloat16), (4, 8), X, (0,), ()),
    "merged outputs": (lambda w, x: x @ w.reshape(4, -1), (4, 2, 8), X, (0,), ()),
    "merged inputs": (lambda w, x: x @ w.reshape(-1, 8), (2, 2, 8), X, (0, 1), ()),
    "merged then split": (
        lambda w, x: jnp.einsum("bsd,dhk", x, w.reshape(-1).reshape(4, 2, 3)), (4, 2, 3), X, (0,), ()
    ),
    "split output": (lambda w, x: jnp.einsum("bsd,dhk", x, w.reshape(4, 2, 3)), (4, 6), X, (0,), ()),
    "split input": (
        lambda w, x: jnp.einsum("bij,ijf", x.reshape(6, 2, 2), w.reshape(2, 2, 8)), (4, 8), X, (0,), ()
    ),
    "expanded and squeezed": (lambda w, x: x @ w[None, :, None].squeeze((0, 2)), (4, 8), X, (0,), ()),
    "broadcast over the batch": (lambda w, x: x @ jnp.broadcast_to(w, (2, 4, 8)), (4, 8), X, (0,), ()),
    "one input": (lambda w, x: x @ w, (1, 8), jnp.ones((2, 1)), (0,), ()),
    "one output": (lambda w, x: x @ w[:, 0], (4, 1), X, (0,), ()),
    "part of the outputs": (lambda w, x: x @ w[:, 2:4], (4, 8), X, (0,), ()),
    "split outputs": (lambda w, x: [x @ part for part in jnp.split(w, 2, axis=1)], (4, 8), X, (0,), ()),
    "static layer": (lambda w, x: x @ w[1], (5, 4, 8), X, (1,), (0,)),
    "traced layer": (lambda w, x, i: x @ w[i], (5, 4, 8), (X, jnp.int32(1)), (1,), (0,)),
    "layer by take": (lambda w, x, i: x @ jnp.take(w, i, axis=1), (4, 5, 8), (X, jnp.int32(1)), (0,), (1,)),
    "looked-up experts": (
        lambda w, x, i: jnp.einsum("bsd,bsdf->bsf", x, w[i]), (5, 4, 8), (X, TOKENS), (1,), (0,)
    ),
    "stop_gradient": (lambda w, x: x @ lax.stop_gradient(w), (4, 8), X, (0,), ()),
    "optimization_barrier": (lambda w, x: x @ lax.optimization_barrier(w), (4, 8), X, (0,), ()),
    "copy": (lambda w, x: x @ jnp.array(w, copy=True), (4, 8), X, (0,), ()),
    "device_put": (lambda w, x: x @ jax.device_put(w), (4, 8), X, (0,), ()),
    "reduce_precision": (lambda w, x: x @ lax.reduce_precision(w, 8, 7), (4, 8), X, (0,), ()),
    "reversed": (lambda w, x: x @ w[:, ::-1], (4, 8), X, (0,), ()),
    "checkpoint_name": (lambda w, x: x @ checkpoint_name(w, "w"), (4, 8), X, (0,), ()),
    "layout constraint": (
        lambda w, x: x @ with_layout_constraint(w, Layout(major_to_minor=(1, 0))), (4, 8), X, (0,), ()
    ),
    "sharding constraint": (
        lambda w, x: x @ lax.with_sharding_constraint(w, jax.sharding.SingleDeviceSharding(jax.devices()[0])),
        (4, 8), X, (0,), (),
    ),
    "used twice": (lambda w, x: (x @ w) @ w, (4, 4), X, (0,), ()),
    "jit": (lambda w, x: jax.jit(lambda x, w: x @ w)(x, w), (4, 8), X, (0,), ()),
    "jit of a transpose": (lambda w, x: x @ jax.jit(jnp.transpose)(w), (8, 4), X, (1,), ()),
    "remat": (lambda w, x: jax.checkpoint(lambda x, w: x @ w)(x, w), (4, 8), X, (0,), ()),
    "custom_jvp": (with_jvp, (4, 8), X, (0,), ()),
    "custom_vjp": (with_vjp, (4, 8), X, (0,), ()),
    "shard_map": (in_shard_map, (4, 8), ROW, (0,), ()),
    "vmap over experts": (jax.vmap(lambda w, x: x @ w), (2, 4, 8), X, (1,), (0,)),
    "vmap over the last axis": (jax.vmap(lambda w, x: x @ w, (-1, 0)), (4, 8, 2), X, (0,), (2,)),
    "vmap over experts, one input": (jax.vmap(lambda w, x: x @ w, (0, None)), (5, 4, 8), X, (1,), ()),
    "vmap over layers with an index": (
        jax.vmap(lambda w, x, i: x @ w[i], (0, 0, None)), (2, 6, 4, 8), (X, jnp.int32(1)), (2,), (0, 1)
    ),
    "vmap over layers with an index each": (
        jax.vmap(lambda w, x, i: x @ w[i]), (2, 6, 4, 8), (X, jnp.array([1, 0])), (2,), (0, 1)
    ),
    "scan axis 0": (scan(0), (5, 4, 4), X, (1,), (0,)),
    "scan axis 1": (scan(1), (4, 5, 4), X, (0,), (1,)),
    "scan axis 2": (scan(2), (4, 4, 5), X, (0,), (2,)),
    "scan with a shared weight": (
        lambda w, x: lax.scan(lambda x, _: (x @ w, x), x, None, length=3), (4, 4), X, (0,), ()
    ),
    "scan in a scan": (
        lambda w, x: lax.scan(lambda x, w: (scan(0)(w, x), None), x, w), (2, 5, 4, 4), X, (2,), (0, 1)
    ),
    "scan that carries the weight": (
        lambda w, x: lax.scan(lambda c, _: ((c[0], c[1] @ c[0]), None), (w, x), None, length=3), (4, 4), X, (0,), ()
    ),
    "scan that returns the weight": (
        lambda w, x: X @ lax.scan(lambda x, w: (x, w), x, w)[1][2], (5, 4, 8), X, (1,), (0,)
    ),
    "map": (lambda w, x: lax.map(lambda w: x @ w, w), (5, 4, 8), X, (1,), (0,)),
    "fori_loop": (loop, (5, 4, 4), X, (1,), (0,)),
    "while that carries the weight": (carried, (4, 4), X, (0,), ()),
    "cond": (lambda w, x: lax.cond(x.sum() > 0, lambda w: x @ w, lambda w: -x @ w, w), (4, 4), X, (0,), ()),
    "cond in which one branch uses it": (
        lambda w, x: lax.cond(x.sum() > 0, lambda w: x @ w, lambda w: x, w), (4, 4), X, (0,), ()
    ),
    "unstacked": (lambda w, x: [x @ layer for layer in w], (5, 4, 8), X, (1,), (0,)),
    "cond that returns the weight": (
        lambda w, x: x @ lax.cond(x.sum() > 0, lambda w: w.T, lambda w: jnp.transpose(w), w), (8, 4), X, (1,), ()
    ),
    "gradient of the input": (
        lambda w, x: jax.vjp(lambda x: x, x @ w)[1](x @ w), (4, 8), X, (0,), ()
    ),
    "expert einsum": (lambda w, x: jnp.einsum("ECD,EDF->ECF", x, w), (2, 4, 8), X, (1,), (0,)),
    "ragged_dot": (
        lambda w, x, sizes: lax.ragged_dot(x, w, sizes), (5, 4, 8), (jnp.ones((10, 4)), jnp.full(5, 2)), (1,), (0,)
    ),
    "gemma q": (lambda w, x: jnp.einsum("BTD,NDH->BTNH", x, w), (2, 4, 8), X, (1,), ()),
    "gemma kv": (lambda w, x: jnp.einsum("BSD,CKDH->CBSKH", x, w), (2, 1, 4, 8), X, (2,), ()),
    "gemma out": (lambda w, x: jnp.einsum("BTNH,NHD->BTD", x, w), (3, 4, 8), jnp.ones((2, 5, 3, 4)), (0, 1), ()),
    "gemma gating": (lambda w, x: jnp.einsum("...F,NFH->...NH", x, w), (2, 4, 8), X, (1,), ()),
    "gemma gate by slices": (lambda w, x: (x @ w[0]) * (x @ w[1]), (2, 4, 8), X, (1,), (0,)),
    "ellipsis einsum": (lambda w, x: jnp.einsum("...d,dhk->...hk", x, w), (4, 2, 8), X, (0,), ()),
    "einsum with the weight first": (lambda w, x: jnp.einsum("fd,bsd->bsf", w, x), (8, 4), X, (1,), ()),
    "padded batch of one": (lambda w, x: jnp.einsum("bsd,hdk->bhsk", x, w.reshape(1, 4, 8)), (4, 8), X, (0,), ()),
}  # fmt: skip


@pytest.mark.parametrize("case", CONTRACTED)
def test_contracted(case):
    fn, shape, args, axes, stacked = CONTRACTED[case]
    args = args if isinstance(args, tuple) else (args,)
    assert plan_one(fn, shape, *args) == (axes, stacked)


def test_explicit_sharding():
    with jax.set_mesh(jax.make_mesh((1,), ("d",), axis_types=(AxisType.Explicit,))):
        assert plan_one(lambda w, x: x @ jax.sharding.reshard(w, PartitionSpec(None, "d")), (4, 8), ROW) == ((0,), ())


TWICE = "used in two ways: "

# name: function of the parameter, its shape, other arguments, reason
SKIPPED = {
    "lookup by index": (lambda w, i: w[i], (7, 4), TOKENS, "embedding lookup"),
    "lookup by take": (lambda w, i: jnp.take(w, i, axis=0) * 2, (7, 4), TOKENS, "embedding lookup"),
    "lookup of one token": (lambda w, i: jnp.take(w, i, axis=0), (7, 4), TOKENS[:1, :1], "embedding lookup"),
    "lookup in stacked tables": (
        lambda w, i: jax.vmap(lambda w: w[i])(w).sum(0), (5, 7, 4), TOKENS, "embedding lookup"
    ),
    "lookup of matrices": (lambda w, i: w[i] + 1, (7, 4, 2), TOKENS, "embedding lookup"),
    "lookup in a scan": (lambda w, i: lax.map(lambda w: w[i], w), (5, 7, 4), TOKENS, "embedding lookup"),
    "bias": (lambda w, x: x + w, (4,), X, "elementwise (add)"),
    "norm": (lambda w, x: x * (1 + w), (4,), X, "elementwise (add)"),
    "masked": (lambda w, x: x @ (w * jnp.tri(4)), (4, 4), X, "elementwise (mul)"),
    "scalar": (lambda w, x: x * w, (), X, "elementwise (mul)"),
    "scanned bias": (lambda w, x: lax.scan(lambda x, w: (x + w, None), x, w), (5, 4), X, "elementwise (add)"),
    "sum": (lambda w, x: w.sum() + x, (4, 4), X, "used by reduce_sum"),
    "concatenated": (lambda w, x: x @ jnp.concatenate([w, w], 1), (4, 4), X, "used by concatenate"),
    "convolution": (
        lambda w, x: lax.conv_general_dilated(x, w, (1,), "SAME"), (5, 3, 3), X, "convolution"
    ),
    "vector": (lambda w, x: x @ w, (4,), X, "contracted over all its axes: not a projection"),
    "scanned vector": (
        lambda w, x: lax.map(lambda w: x @ w, w), (5, 4), X, "contracted over all its axes: not a projection"
    ),
    "outer product": (lambda w, x: jnp.einsum("bsd,n->bsdn", x, w), (6,), X, "multiplied without a contraction"),
    "unused": (lambda w, x: x, (4, 4), X, "not used"),
    "returned": (lambda w, x: (w, x), (4, 4), X, "not used"),
    "lookup and head": (
        lambda w, i: w[i] @ w.T, (7, 4), TOKENS, TWICE + "embedding lookup; contracted over axes (1,)"
    ),
    "product and norm": (
        lambda w, x: (x @ w, (w**2).sum()), (4, 4), X, TWICE + "contracted over axes (0,); elementwise (integer_pow)"
    ),
    "two directions": (lambda w, x: x @ w + x @ w.T, (4, 4), X, "contracted over different axes in two places"),
    "forward and backward": (
        lambda w, x: jax.grad(lambda x: (x @ w).sum())(x), (4, 8), X, "contracted over different axes in two places"
    ),
    "with itself": (lambda w, x: w @ w.T, (4, 8), X, "contracted with another parameter"),
    "a part of an axis": (
        lambda w, x: jnp.einsum("bsd,idf->bsif", x, w.reshape(2, 4, 3)), (8, 3), X,
        "reshape can't be followed: only a part of axis 0 is contracted",
    ),
    "axes that a reshape mixes": (
        lambda w, x: x @ w.reshape(4, 6), (3, 8), X, "reshape can't be followed: only a part of axis 0 is contracted"
    ),
    "axes that a permutation mixes": (
        lambda w, x: x @ w.reshape(2, 2, 6).swapaxes(1, 2).reshape(24).reshape(4, 6), (4, 6), X,
        "reshape can't be followed: only a part of axis 0 is contracted",
    ),
    "blocks of a scanned axis": (
        lambda w, x: lax.scan(lambda y, w: (y + x @ w, None), jnp.zeros((2, 3, 8)), w.reshape(2, 4, 8)), (8, 8), X,
        "reshape can't be followed: only a part of axis 0 is contracted",
    ),
    "changed by a scan": (
        lambda w, x: lax.scan(lambda w, _: (w.T, None), w, None, length=3), (4, 4), X, "changed by a loop"
    ),
    "changed by a while": (
        lambda w, x: lax.while_loop(lambda w: False, lambda w: w[::-1].T, w), (4, 4), X, "changed by a loop"
    ),
    "chosen by a condition": (
        lambda w, x: x @ lax.cond(x.sum() > 0, lambda: w, lambda: w.T), (4, 4), X, "chosen by a condition"
    ),
    "an index": (lambda w, x: lax.dynamic_slice(x[0, 0], (w.astype(jnp.uint32),), (1,)), (), X, "used as an index"),
    "two elementwise uses": (lambda w, x: (x + w) * w, (4,), X, "elementwise (add); elementwise (mul)"),
    "three uses": (
        lambda w, x: (x @ w + w, w.sum()), (4, 4), X[0, :1],
        "used in 3 ways: contracted over axes (0,); elementwise (add); used by reduce_sum",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SKIPPED)
def test_skipped(case):
    """With the reason, which a warning says too where nothing else is multiplied; tied embeddings aren't left out."""
    fn, shape, args, reason = SKIPPED[case]
    said = f"nothing becomes int8: {f'w: {reason}' if len(shape) > 1 else 'no parameter is a matrix'}. Plan.skipped"
    with nullcontext() if case == "lookup and head" else pytest.warns(UserWarning, match=re.escape(said)):
        assert plan_one(fn, shape, args) == reason


def test_weights_that_are_multiplied_and_skipped_are_said_once():
    """With their reasons, those of several layers together; what isn't multiplied is nothing to speak of."""

    def apply(p, x):
        for layer in p["layers"]:
            x = x @ layer["both"] + x @ layer["both"].T + layer["bias"]
        return (x + p["position"]) @ p["head"]

    layer = {"both": jnp.ones((4, 4)), "bias": jnp.ones(4)}
    params = {"layers": [layer] * 3, "position": jnp.ones((3, 4)), "head": jnp.ones((4, 8))}
    with pytest.warns(UserWarning, match=r"jint8\.plan") as said:
        found = jint8.plan(apply, params, X)
    assert found == {"head": (0,)}
    assert [str(warning.message) for warning in said] == [
        "jint8.plan: these weights stay in floating point: layers/*/both (3 times): contracted over different axes in "
        "two places. Plan.skipped has all reasons; Plan.with_ adds weights."
    ]
    assert said[0].filename == __file__


@pytest.mark.parametrize("path", ["embed/w", "a/lora_b", "cache/keys", "pos_emb", "Conv_0/kernel"])
def test_names_of_what_is_no_projection_are_nothing_to_speak_of(path):
    def apply(p, x):
        return x @ p["head"] + x @ p[path] + x @ p[path].T

    assert jint8.plan(apply, {path: jnp.ones((4, 4)), "head": jnp.ones((4, 4))}, X) == {"head": (0,)}


def test_tied_embedding_keeps_its_contracted_axes():
    found = jint8.plan(lambda p, i: p["embed"][i] @ p["embed"].T, {"embed": jnp.ones((7, 4))}, TOKENS)
    assert "embed" not in found
    assert found.tied == {"embed": (1,)}
    assert found.stacked == {"embed": ()}


def test_merged_lora_and_query_parameters():
    params = {"w": jnp.ones((4, 8)), "a": jnp.ones((4, 2)), "b": jnp.ones((2, 8)), "query": jnp.ones((6, 8))}

    def apply(p, x):
        hidden = x @ (p["w"] + p["a"] @ p["b"])
        return hidden @ p["w"].T, jnp.broadcast_to(p["query"], (2, 6, 8)) @ p["w"].T

    with pytest.warns(UserWarning, match="a: contracted with another parameter; b: contracted"):
        found = jint8.plan(apply, params, X)
    assert found.skipped == {
        "a": "contracted with another parameter",
        "b": "contracted with another parameter",
        "query": "an input that is multiplied by another parameter",
        "w": TWICE + "elementwise (add); contracted over axes (1,)",
    }


def test_unmerged_lora():
    params = {"w": jnp.ones((4, 8)), "a": jnp.ones((4, 2)), "b": jnp.ones((2, 8))}
    assert jint8.plan(lambda p, x: x @ p["w"] + x @ p["a"] @ p["b"], params, X) == {"a": (0,), "b": (0,), "w": (0,)}


def test_embedding_that_meets_a_weight_is_an_input():
    params = {"embed": jnp.ones((7, 4)), "w": jnp.ones((4, 8))}
    for tokens in (TOKENS, jnp.int32(3)):
        found = jint8.plan(lambda p, i: p["embed"][i] @ p["w"], params, tokens)
        assert found == {"w": (0,)}
        assert set(found.skipped) == {"embed"}


def test_static_arguments_and_keywords():
    def apply(params, x, mode, *, train, rngs, scale, dtype):
        assert (mode, train, type(scale), dtype) == ("wide", False, float, np.float32)
        return {"y": x @ params["w"], "noise": jax.random.normal(rngs["dropout"]), "mode": mode}

    params, rngs = {"w": np.ones((4, 8), np.float32)}, {"dropout": jax.random.key(0)}
    found = jint8.plan(apply, params, *arrays((2, 4)), "wide", train=False, rngs=rngs, scale=0.5, dtype=np.float32)
    assert found == {"w": (0,)}


def test_leaves_that_are_no_floats():
    params = {
        "count": jnp.int32(0),
        "key": jax.random.key(0),
        "mask": jnp.ones((4, 8), bool),
        "name": "block",
        "none": None,
    }
    with pytest.warns(UserWarning, match=r"mask: not floating point \(bool\)"):
        found = jint8.plan(lambda p, x: x @ p["mask"] + p["count"], params, X)
    assert found == {}
    assert found.skipped == {
        "count": "not floating point (int32)",
        "key": "not floating point (key<fry>)",
        "mask": "not floating point (bool)",
    }


def test_planning_175b_parameters_takes_no_memory():
    layers, width, vocab = 96, 12288, 50257
    shapes = {"qkv": (width, 3 * width), "out": (width, width), "up": (width, 4 * width), "down": (4 * width, width)}
    params = {
        "embed": jax.ShapeDtypeStruct((vocab, width), jnp.bfloat16),
        **{
            f"layer_{i}": {name: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for name, shape in shapes.items()}
            for i in range(layers)
        },
    }
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) > 174e9

    def apply(params, tokens):
        x = params["embed"][tokens]
        for i in range(layers):
            layer = params[f"layer_{i}"]
            q, _, _ = jnp.split(x @ layer["qkv"], 3, axis=-1)
            x = x + q @ layer["out"]
            x = x + jax.nn.gelu(x @ layer["up"]) @ layer["down"]
        return x @ params["embed"].T

    start = time.perf_counter()
    found = jint8.plan(apply, params, jax.ShapeDtypeStruct((1, 2048), jnp.int32))
    assert time.perf_counter() - start < 10
    assert dict(found) == {f"layer_{i}/{name}": (0,) for i in range(layers) for name in shapes}
    assert found.tied == {"embed": (1,)}


def test_rejects_what_is_no_function():
    with pytest.raises(TypeError, match="callable, got dict"):
        jint8.plan({}, {"w": jnp.ones(3)})


@pytest.mark.parametrize("params", [{}, {"name": "block"}], ids=["empty", "no arrays"])
def test_rejects_trees_without_arrays(params):
    with pytest.raises(ValueError, match="array leaves"):
        jint8.plan(lambda params: 0, params)


def test_rejects_ambiguous_paths():
    w = jnp.ones((4, 8))
    with pytest.raises(ValueError, match="'a/w'"):
        jint8.plan(lambda p, x: x, {"params": {"a": {"w": w}}, "a": {"w": w}}, X)


def test_errors_of_the_function_pass_through():
    with pytest.raises(ZeroDivisionError):
        jint8.plan(lambda p: 1 / 0, {"w": jnp.ones((4, 8))})


def test_a_weight_that_the_model_quantizes():
    product = lambda w, x: jint8.dot_general(x, jint8.quantize(w, contract_axes=(1,)), (((2,), (1,)), ((), ())))
    for wrap in (lambda f: f, jax.jit, jax.checkpoint):
        assert plan_one(wrap(product), (8, 4), X) == ((1,), ())
    assert plan_one(lambda w, x: product(w[1], x), (5, 8, 4), X) == ((2,), (0,))


def test_an_axis_that_vmap_or_the_product_stacks():
    """Whichever axis is mapped, the plan is that of the float product, though vmap moves it to the front."""
    x, weights = jnp.ones((3, 6, 4)), {0: (3, 4, 8), 1: (4, 3, 8), 2: (4, 8, 3)}
    for axis, shape in weights.items():
        entry = lambda w, x: jint8.matmul(x, jint8.quantize(w))
        found = plan_one(jax.vmap(entry, in_axes=(axis, 0)), shape, x)
        assert found == plan_one(jax.vmap(lambda w, x: x @ w, in_axes=(axis, 0)), shape, x)
        assert found == ((1 if axis == 0 else 0,), (axis,))
    twice = jax.vmap(jax.vmap(entry, in_axes=(2, 0)), in_axes=(1, 0))
    assert plan_one(twice, (4, 5, 8, 3), jnp.ones((5, 3, 6, 4))) == ((0,), (1, 3))
    sizes = jnp.array([2, 2, 2])
    ragged = lambda w, x: jint8.ragged_dot(x[0], jint8.quantize(w, contract_axes=(1,)), sizes)
    assert plan_one(ragged, (3, 4, 8), x) == ((1,), (0,))
    outputs = lambda w, x: jint8.einsum("bmk,gkn->bgmn", x, jint8.quantize(w, contract_axes=(1,)))
    assert plan_one(outputs, (3, 4, 8), x) == ((1,), ())


def test_of_int8_values_in_an_unknown_product_the_stacked_axes_stay_unknown():
    def unseen(p, x):
        w = jint8.quantize(p["w"], contract_axes=(1,))
        return jnp.sort(w.q) * w.scale

    plan = jint8.plan(unseen, {"w": jnp.ones((3, 4, 8))}, X)
    assert (dict(plan), plan.stack_axes("w", 3)) == ({"w": (1,)}, None)
    plan = jint8.plan(lambda p, x: unseen({"w": p["w"][None, 0]}, x), {"w": jnp.ones((3, 4, 8))}, X)
    assert (dict(plan), plan.stacked) == ({"w": (1,)}, {"w": (0,)})


@pytest.mark.filterwarnings("ignore:jint8.plan. nothing becomes int8")
def test_functions_of_a_users_with_the_name_of_ours():
    @jax.jit
    def _quantize(w):
        return jnp.round(w)

    assert plan_one(lambda w, x: x @ _quantize(w), (4, 8), X) == "elementwise (round)"

    @jax.jit
    def quantize(w):
        scale = jnp.max(jnp.abs(w), axis=0, keepdims=True)
        return jnp.round(w / scale), scale

    quantize.__name__ = "_quantize"

    def summed(w, x):
        q, scale = quantize(w)
        return x * jnp.sum(q * scale)

    assert plan_one(summed, (4, 8), X) == "elementwise (abs); elementwise (div)"


def test_products_that_the_compiled_library_computes(monkeypatch):
    """They are one operation, which may be XLA's product on other machines."""
    monkeypatch.setenv("JINT8_NATIVE", "1")

    def run(params, x):
        w = jint8.quantize(params["w"], contract_axes=(1,))
        return jint8.matmul(x, w) + x @ params["other"]

    params = {"w": jnp.ones((8, 16)), "other": jnp.ones((16, 8))}
    plan = jint8.plan(run, params, jnp.ones((2, 16)))
    assert dict(plan) == {"w": (1,), "other": (0,)}
