"""Which leaves of a tree become int8, and what the tree weighs before and after."""

import typing
from contextlib import nullcontext

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jint8
from jint8._core.qtensor import is_qtensor
from jint8._trees.params import OUTPUT_HEADS


def normal(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


class Pair(typing.NamedTuple):
    kernel: typing.Any
    bias: typing.Any


def quantized(tree, **options):
    """Names of the leaves that became int8."""
    leaves = jax.tree_util.tree_leaves_with_path(jint8.quantize_params(tree, **options), is_leaf=is_qtensor)
    return ["/".join(str(getattr(key, "key", key)) for key in path) for path, leaf in leaves if is_qtensor(leaf)]


TREE = {
    "embed": {"embedding": normal(11, 6)},
    "layers_0": {"up": {"kernel": normal(6, 5), "bias": normal(5)}, "norm": {"scale": normal(6)}},
    "layers_1": {"up": {"kernel": normal(6, 5)}, "down": {"weight": normal(6, 5)}},
    "lm_head": {"kernel": normal(6, 11)},
}
PROJECTIONS = ["layers_0/up/kernel", "layers_1/down/weight", "layers_1/up/kernel"]


WHICH = {  # options, names of the leaves that become int8
    "default": ({}, PROJECTIONS),
    "skip_a_layer": ({"skip": "layers_0"}, PROJECTIONS[1:]),
    "skip_two_names": ({"skip": ("up", "down")}, []),
    "skip_by_wildcard": ({"skip": "layers_*"}, []),
    "skip_a_path": ({"skip": "layers_1/up"}, PROJECTIONS[:2]),
    "skip_is_of_whole_segments": ({"skip": "layers"}, PROJECTIONS),
    "skip_predicate": ({"skip": lambda path: path.endswith("weight")}, [PROJECTIONS[0], PROJECTIONS[2]]),
    "include_head": ({"include": "lm_head"}, [*PROJECTIONS, "lm_head/kernel"]),
    "include_embedding": ({"include": "embed"}, ["embed/embedding", *PROJECTIONS]),
    "include_predicate_wins": ({"include": lambda path: "layers_1" in path, "skip": "*"}, PROJECTIONS[1:]),
    "scheme_none": ({"config": jint8.Config(scheme="none")}, []),
    "plan_alone_decides": ({"plan": {"embed/embedding": (1,)}}, ["embed/embedding"]),
    "plan_skips_head_too": ({"plan": {"embed/embedding": 1, "lm_head/kernel": (0,)}}, ["embed/embedding"]),
    "plan_with_included_head": ({"plan": {"lm_head/kernel": (0,)}, "include": "lm_head"}, ["lm_head/kernel"]),
    "plan_with_skip": ({"plan": {"layers_0/up/kernel": (0,)}, "skip": "up"}, []),
}


@pytest.mark.parametrize(("options", "expected"), WHICH.values(), ids=WHICH)
def test_which(options, expected):
    assert quantized(TREE, **options) == expected
    assert quantized({"params": TREE}, **options) == [f"params/{name}" for name in expected]


NOTHING = "jint8.quantize_params: nothing becomes int8: "
STAYS = "jint8.quantize_params: these weights stay in floating point: "
UNKNOWN = r"its name and its shape \({}\) don't say over which axes it is contracted"

SAID = {  # tree, options, what is said
    "haiku's names": (
        {f"linear_{i}": {"w": normal(6, 5), "b": normal(5)} for i in range(3)}, {},
        NOTHING + r"linear_\*/w \(3 times\): " + UNKNOWN.format("6, 5"),
    ),
    "scanned layers": (
        {"layers": {"up": {"kernel": normal(3, 6, 5)}}, "down": {"kernel": normal(6, 5)}}, {},
        STAYS + "layers/up/kernel: " + UNKNOWN.format("3, 6, 5"),
    ),
    "a head alone": (
        {"lm_head": {"kernel": normal(6, 5)}}, {},
        NOTHING + r"output heads stay in floating point unless include= names them \(lm_head/kernel\)",
    ),
    "include of what isn't known": (
        {"a": {"table": normal(6, 5)}, "b": {"kernel": normal(6, 5)}}, {"include": "a/table"},
        STAYS + "a/table: " + UNKNOWN.format("6, 5"),
    ),
    "include of what the plan skips": (
        {"a": normal(6, 5), "b": normal(6, 5)},
        {"plan": jint8.Plan({"b": (0,)}, skipped={"a": "not used"}), "include": "a"},
        STAYS + "a: not used",
    ),
    "an empty plan": (TREE, {"plan": {}}, NOTHING + "the plan names none of the weights"),
    "nothing with two axes": ({"scale": normal(6)}, {}, NOTHING + "no weight has the name and the shape of a"),
}  # fmt: skip


@pytest.mark.parametrize(("tree", "options", "expected"), SAID.values(), ids=SAID)
def test_what_is_left_out_is_said_once(tree, options, expected):
    with pytest.warns(UserWarning, match=expected) as said:
        jint8.quantize_params(tree, **options)
    assert len(said) == 1
    assert said[0].filename == __file__


SILENT = {  # what the user wanted, what no user would miss, and what is int8 already
    "all skipped": (TREE, {"skip": "*"}),
    "an unknown name skipped": ({"w": normal(6, 5), "kernel": normal(6, 5)}, {"skip": "w"}),
    "the scheme none": ({"w": normal(6, 5)}, {"config": jint8.Config(scheme="none")}),
    "embeddings, convolutions and norms": (
        {**TREE, "conv": {"kernel": normal(3, 3, 4, 6)}, "pos": normal(7, 6), "norm": {"scale": normal(6)}},
        {},
    ),
    "a cache beside the parameters": (
        {"params": TREE, "state": {"past": normal(2, 3, 4)}}, {},
    ),
    "int8 already": (jint8.quantize_params(TREE), {}),
    "integers": ({**TREE, "table": np.ones((6, 5), np.int32)}, {}),
}  # fmt: skip


@pytest.mark.parametrize(("tree", "options"), SILENT.values(), ids=SILENT)
def test_what_nobody_misses_is_not_said(tree, options):
    """Every warning is an error in these tests."""
    jint8.quantize_params(tree, **options)


@pytest.mark.parametrize("head", OUTPUT_HEADS)
def test_output_heads_are_skipped(head):
    assert quantized({"model": {head: {"kernel": normal(3, 4)}, "other": {"kernel": normal(3, 4)}}}) == [
        "model/other/kernel"
    ]


@pytest.mark.parametrize(
    ("path", "shape", "contracted"),
    [
        ("dense/kernel", (6, 4), (0,)),
        ("attn/query/kernel", (6, 2, 4), (0,)),
        ("attn/key/kernel", (6, 2, 4), (0,)),
        ("attn/value/kernel", (6, 2, 4), (0,)),
        ("attn/out/kernel", (2, 4, 6), (0, 1)),
        ("dense/weight", (4, 6), (1,)),
        ("scanned/weight", (3, 4, 6), (2,)),
        ("conv/kernel", (3, 4, 6), None),
        ("conv/kernel", (3, 3, 4, 6), None),
        ("norm/weight", (6,), None),
        ("dense/bias", (6,), None),
    ],
    ids=str,
)
def test_standard_layers(path, shape, contracted):
    *parents, name = path.split("/")
    tree = {name: jnp.asarray(normal(*shape))}
    for parent in reversed(parents):
        tree = {parent: tree}
    with nullcontext() if contracted is not None else pytest.warns(UserWarning, match=NOTHING):
        (leaf,) = jax.tree.leaves(jint8.quantize_params(tree), is_leaf=is_qtensor)
    assert is_qtensor(leaf) == (contracted is not None)
    assert leaf.shape == shape
    if contracted is not None:
        expected = jint8.quantize(normal(*shape), contract_axes=contracted)
        np.testing.assert_array_equal(leaf.dequantize(), expected.dequantize())
        ones = len(contracted)
        assert leaf.scale.shape[-ones:] == (1,) * ones  # contracted axes are stored last
        assert leaf.q.shape[-ones:] == tuple(shape[a] for a in contracted)


def test_a_plan_with_stacked_axes():
    stacked = {"layers/kernel": (1,), "experts/kernel": (0,)}
    plan = jint8.Plan({"layers/kernel": (0,), "experts/kernel": (1,)}, stacked)
    tree = {"layers": {"kernel": normal(6, 3, 4)}, "experts": {"kernel": normal(3, 6, 4)}}
    config = jint8.Config(scheme="row")  # one scale per tensor: of each layer, not of all
    got = jint8.quantize_params(tree, plan=plan, config=config)
    layers, experts = got["layers"]["kernel"], got["experts"]["kernel"]
    assert (layers.shape, layers.q.shape, layers.stack) == ((6, 3, 4), (4, 3, 6), (1,))
    assert (experts.shape, experts.q.shape, experts.stack) == ((3, 6, 4), (3, 4, 6), (0,))
    expected = abs(tree["layers"]["kernel"]).max((0, 2)) / np.float32(127)
    np.testing.assert_array_equal(layers.scale, np.broadcast_to(expected[None, :, None], (4, 3, 1)))


def test_a_plain_mapping_says_nothing_of_stacked_axes():
    kernels = {"layers": normal(6, 3, 4), "dense": normal(6, 4)}
    plan = jint8.Plan({"layers": (0,), "dense": (0,)}, {"layers": (1,), "dense": ()})
    known, unknown = (jint8.quantize_params(kernels, plan=p) for p in (plan, dict(plan)))
    assert (known["layers"].q.shape, known["dense"].q.shape) == ((4, 3, 6), (4, 6))
    # Any of the other axes may be scanned: the order given is right for each of them. A matrix has none.
    assert (unknown["layers"].q.shape, unknown["dense"].q.shape) == ((6, 3, 4), (4, 6))
    for name in kernels:
        np.testing.assert_array_equal(unknown[name].dequantize(), known[name].dequantize())
    for axis in (1, 2):
        layer = jax.tree.map(lambda leaf, axis=axis: jnp.take(leaf, 1, axis=axis), unknown["layers"])
        np.testing.assert_array_equal(layer.dequantize(), jnp.take(known["layers"].dequantize(), 1, axis=axis))


@pytest.mark.parametrize("scheme", ["absmax", "zeropoint", "row", "row+dec"])
def test_one_scale_per_tensor_needs_the_stacked_axes(scheme):
    config, kernels = jint8.Config(scheme=scheme), {"a": {"w": normal(3, 6, 4)}, "dense": normal(6, 4)}
    plan = jint8.Plan({"a/w": (1,), "dense": (0,)}, {"a/w": (0,), "dense": ()})
    scale = jint8.quantize_params(kernels, plan=plan, config=config)["a"]["w"].scale
    assert len(np.unique(scale)) == 3
    without = jint8.Plan({"a/w": (1,)}).without("dense")
    for unknown in (dict(plan), without):
        with pytest.raises(ValueError, match=r"^a/w: Expected a plan .* got a plain mapping, .* jint8\.Plan itself"):
            jint8.quantize_params(kernels, plan=unknown, config=config)
    dense = jint8.quantize_params(kernels, plan={"dense": 0}, config=config)["dense"]
    np.testing.assert_array_equal(dense.q, jint8.quantize(kernels["dense"], config=config).q.T)


def test_everything_else_is_the_same_object():
    other = {
        "bias": jnp.ones(3),
        "none": None,
        "ids": {"kernel": jnp.ones((3, 4), jnp.int32)},
        "name": {"kernel": "text"},
        "number": {"kernel": 3.5},
        "key": {"kernel": jax.random.key(0)},
        "done": {"kernel": jint8.quantize(normal(3, 4))},
    }
    got = jint8.quantize_params(other)
    assert jax.tree.structure(got) == jax.tree.structure(other)
    assert all(a is b for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(other), strict=True))


CONTAINERS = {
    "list": lambda kernel: [{"kernel": kernel}, []],
    "tuple": lambda kernel: ({"kernel": kernel}, ()),
    "named_tuple": lambda kernel: Pair(kernel, None),
    "frozen_dict": lambda kernel: flax.core.freeze({"a": {"kernel": kernel}}),
    "partitioned": lambda kernel: {"kernel": flax.linen.Partitioned(kernel, ("a", "b"))},
    "nnx_state": lambda kernel: nnx.State({"a": {"kernel": nnx.Param(kernel)}}),
}


@pytest.mark.parametrize("container", CONTAINERS.values(), ids=CONTAINERS)
def test_containers(container):
    tree = container(jnp.asarray(normal(6, 4)))
    got = jint8.quantize_params(tree)
    (leaf,) = jax.tree.leaves(got, is_leaf=is_qtensor)
    assert is_qtensor(leaf)
    back = jint8.dequantize_params(got)
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    np.testing.assert_allclose(jax.tree.leaves(back)[0], normal(6, 4), atol=0.02)


@pytest.mark.parametrize("tree", [{}, [], (), None, {"a": {}}, {"kernel": None}], ids=str)
def test_empty_trees(tree):
    with pytest.warns(UserWarning, match=NOTHING):
        assert jint8.quantize_params(tree) == jint8.dequantize_params(tree) == tree
    assert jint8.memory_report(tree).bytes == 0


def test_dequantize_params_dtype():
    got = jint8.dequantize_params(jint8.quantize_params(TREE), jnp.bfloat16)
    assert got["layers_0"]["up"]["kernel"].dtype == jnp.bfloat16
    assert got["layers_0"]["up"]["bias"] is TREE["layers_0"]["up"]["bias"]


def test_with_config():
    tree, other = jint8.quantize_params(TREE), jint8.Config(outliers="token")
    got = jint8.with_config(tree, other)
    assert got["layers_0"]["up"]["kernel"].config == other
    assert got["layers_0"]["up"]["kernel"].q is tree["layers_0"]["up"]["kernel"].q
    assert tree["layers_0"]["up"]["kernel"].config == jint8.Config()
    assert got["embed"]["embedding"] is TREE["embed"]["embedding"]


BAD = {"a": [{"kernel": normal(3, 4)}, {"kernel": np.full((3, 4), np.nan, np.float32)}]}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: jint8.quantize_params(BAD), ValueError, "^a/1/kernel: Expected finite weights, got NaN or infinity"),
        (lambda: jint8.quantize_params({"kernel": normal(2, 2) * np.inf}), ValueError, "^kernel: Expected finite"),
        (lambda: jint8.quantize_params(TREE, plan={"no/such": (0,)}), ValueError, "paths to be in .* got no/such"),
        (lambda: jint8.quantize_params(TREE, plan={"embed/embedding": (2,)}), ValueError, "^embed/embedding: .* got 2"),
        (lambda: jint8.quantize_params(TREE, plan=[("embed", 1)]), TypeError, "Expected a plan to be a map.* got list"),
        (lambda: jint8.quantize_params(TREE, skip=3), TypeError, "Expected a path pattern, .* got 3"),
        (lambda: jint8.quantize_params(TREE, config="row"), TypeError, "Expected config .* got str"),
        (lambda: jint8.with_config(TREE, "row"), TypeError, "Expected config .* got str"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_memory_report_counts_every_byte():
    n, k = 200, 512
    params = {"a": {"kernel": normal(k, n)}, "b_0": {"bias": normal(n)}, "b_1": {"bias": normal(n)}}
    report = jint8.memory_report(jint8.quantize_params(params))
    assert report.groups == {"a/kernel": (4 * n * k, n * k + 4 * n), "b_*/bias": (8 * n, 8 * n)}
    assert (report.float_bytes, report.bytes) == (4 * n * k + 8 * n, n * k + 12 * n)
    before, after = report.groups["a/kernel"]
    assert after <= 0.27 * before
    assert after - 4 * n <= 1.01 * n * k
    assert jint8.memory_report(params).bytes == report.float_bytes
    assert "0.252" in str(report)


def test_memory_report_of_shapes_keys_and_other_leaves():
    tree = {"kernel": normal(8, 4), "n": 3, "key": jax.random.key(0), "half": jnp.ones(3, jnp.bfloat16)}
    report = jint8.memory_report(tree)
    assert report.bytes == 8 * 4 * 4 + 8 + 6
    assert jint8.memory_report(jax.eval_shape(lambda: {k: v for k, v in tree.items() if k != "n"})) == report
