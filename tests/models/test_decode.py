"""A decoder's layer as one call of the compiled library, against float64 and against XLA."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jint8
from jint8._ops.cpu import native
from jint8.models._attention import Context
from jint8.models._cache import LayerCache, empty_layer
from jint8.models._config import ModelConfig, Rope
from jint8.models._decoder import Block
from jint8.models._rope import rotary

pytestmark = pytest.mark.skipif(native.kernels() is None, reason="jint8 was installed without a C++ compiler")

SIZES = {"vocab_size": 8, "hidden_size": 40, "intermediate_size": 48, "num_layers": 1, "num_heads": 4, "head_dim": 16}
LLAMA = ModelConfig(family="a", **SIZES, num_kv_heads=2, rope=Rope(frequencies=tuple(0.7**i for i in range(8))))
GEMMA = dataclasses.replace(
    LLAMA, norm_offset=1.0, norm_place="around", qk_norm=True, activation="gelu_tanh", attention_scale=0.3
)
OPT = ModelConfig(
    family="a", **SIZES, num_kv_heads=4, norm="layer", activation="relu", gated=False, qkv_bias=True, out_bias=True,
    mlp_bias=True,
)  # fmt: skip
PHI = dataclasses.replace(  # a part of each head is rotated
    OPT, parallel=True, norm_bias=False, activation="gelu_tanh", rope=Rope(frequencies=(1.0, 0.3), scale=1.1)
)
GEMMA2 = dataclasses.replace(GEMMA, qk_norm=False, attention_softcap=1.5)
BLOOM = dataclasses.replace(OPT, alibi=True, num_heads=6, num_kv_heads=6, activation="gelu", attention_softcap=0.0)
CONFIGS = {"llama": LLAMA, "gemma": GEMMA, "gemma2": GEMMA2, "opt": OPT, "phi": PHI, "bloom": BLOOM}
LENGTH, SLOT, FIRST = 37, 20, np.array([0, 4, 19], np.int32)


def layer(config, quantization=jint8.Config(), columns=None):
    """Parameters with int8 weights, a token of three rows, and a cache of those before it."""
    rng = np.random.default_rng(0)
    at = Context(jnp.int32(SLOT), jnp.asarray(FIRST), jnp.asarray(SLOT - FIRST)[:, None], None)
    like = jax.eval_shape(lambda: Block(config).init(jax.random.key(0), jnp.zeros((3, 1, 40)), at, None, None))
    params = jax.tree.map(lambda a: rng.standard_normal(a.shape).astype(np.float32) / np.sqrt(a.shape[-1]), like)
    int8 = lambda a: jint8.quantize(a, contract_axes=(1,), config=quantization, outliers=columns)
    weight = lambda path, a: int8(a) if path[-1].key == "weight" else a
    tree = jax.tree_util.tree_map_with_path(weight, params["params"])
    x = rng.standard_normal((3, 1, config.hidden_size)).astype(np.float32)
    x[:, :, 5] *= 30  # an outlier dimension
    empty = jax.eval_shape(lambda: empty_layer(config, 3, LENGTH, jnp.float32))
    cache = LayerCache(*(jnp.asarray(rng.standard_normal(a.shape), jnp.float32) for a in empty))
    angles = None if config.rope is None else rotary(at.positions, config.rope)
    return tree, (jnp.asarray(x), at, angles, cache)


def run(config, tree, args, window=0, **options):
    block = Block(config, window, **options)
    return jax.jit(lambda tree, *args: block.apply({"params": tree}, *args))(tree, *args)


def is_one_call(config, tree, args, window=0):
    step = jax.jit(lambda tree, *args: Block(config, window).apply({"params": tree}, *args))
    return native.LAYER_TARGET in step.lower(tree, *args).as_text()


def in_float64(config, tree, args, window):
    """The layer of dequantized weights, in NumPy."""
    c, group = config, config.num_heads // config.num_kv_heads
    x, _, angles, cache = args
    x = np.asarray(x, np.float64)[:, 0]

    def get(*path):
        at = tree
        for name in path:
            at = at.get(name, {})
        return at if len(at) else None

    def product(x, *path):
        part = get(*path)
        w = part["weight"]
        plain = w.zero is None and w.smooth is None and w.features is None
        weight = w.dequantize(jnp.float32) if not plain else np.asarray(w.q, np.float64) * np.asarray(w.scale)
        weight = np.asarray(weight, np.float64)
        return x @ weight.T + np.asarray(part.get("bias", 0.0), np.float64)

    def norm(x, *path):
        part = get(*path)
        if part is None:
            return x
        x = x - x.mean(-1, keepdims=True) if c.norm == "layer" else x
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + c.norm_eps)
        return x * (c.norm_offset + np.asarray(part["scale"], np.float64)) + np.asarray(part.get("bias", 0.0))

    def turned(x, row):
        if angles is None:
            return x
        half = len(c.rope.frequencies)
        angle = np.float64(SLOT - FIRST[row]) * np.array(c.rope.frequencies)
        cos, sin = c.rope.scale * np.cos(angle), c.rope.scale * np.sin(angle)
        first, second = x[..., :half], x[..., half : 2 * half]
        return np.concatenate([first * cos - second * sin, second * cos + first * sin, x[..., 2 * half :]], axis=-1)

    qkv = product(norm(x, "attention_norm"), "attention", "qkv").reshape(3, c.num_kv_heads, group + 2, 16)
    key, value = (np.array(a, np.float64) for a in cache)
    heads = np.zeros((3, c.num_kv_heads, group, 16))
    for row in range(3):
        begin = max(FIRST[row], SLOT + 1 - window if window else 0)
        for h in range(c.num_kv_heads):
            q = turned(norm(qkv[row, h, :group], "attention", "q_norm"), row)
            key[row, h, :, SLOT] = turned(norm(qkv[row, h, group], "attention", "k_norm"), row)
            value[row, h, SLOT] = qkv[row, h, group + 1]
            scores = q @ key[row, h, :, begin : SLOT + 1] * (c.attention_scale or 16**-0.5)
            if c.attention_softcap:
                scores = c.attention_softcap * np.tanh(scores / c.attention_softcap)
            if c.alibi:  # of six heads: those of four, then every second of those of eight
                slopes = np.array([2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3])[h * group : (h + 1) * group]
                scores = scores - slopes[:, None] * (SLOT - np.arange(begin, SLOT + 1))
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            heads[row, h] = weights / weights.sum(-1, keepdims=True) @ value[row, h, begin : SLOT + 1]
    attended = norm(product(heads.reshape(3, -1), "attention", "out"), "attention_out_norm")
    inner = norm(x if c.parallel else x + attended, "mlp_norm")
    if c.gated:
        both = product(inner, "mlp", "gate_up").reshape(3, 16, 2, -1)
        hidden = (ACTIVATIONS[c.activation](both[:, :, 0]) * both[:, :, 1]).reshape(3, -1)
    else:
        hidden = ACTIVATIONS[c.activation](product(inner, "mlp", "up"))
    return x + attended + norm(product(hidden, "mlp", "down"), "mlp_out_norm"), key, value


ACTIVATIONS = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu_tanh": lambda x: x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: np.maximum(x, 0),
    "gelu": lambda x: x / 2 * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
}


@pytest.mark.parametrize("window", [0, 9])
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_float64_where_no_activation_is_rounded(name, window):
    config = CONFIGS[name]
    tree, args = layer(config, jint8.Config(threshold=1e-30))  # every value is an outlier
    assert is_one_call(config, tree, args, window)
    y, cache = run(config, tree, args, window)
    expected = in_float64(config, tree, args, window)
    for got, exact in zip((y[:, 0], *cache), expected, strict=True):
        np.testing.assert_allclose(got, exact, rtol=2e-5, atol=2e-5 * np.abs(exact).max())


QUANTIZATIONS = {
    "llm.int8": (jint8.Config(), None),
    "zero points": (jint8.Config(scheme="llm.int8-zp"), None),
    "columns": (jint8.Config(outliers="static"), (5, 9)),
    "columns unused": (jint8.Config(outliers="token"), (5, 9)),
    "rotated": (jint8.Config(scheme="vector", rotate=16), None),  # in blocks of 8 of 40 features, of 16 of 64 and 48
    "smoothed": (jint8.Config(scheme="vector", rotate=1), None),
    "four bits": (jint8.Config(scheme="int4", grouping="oc"), None),
    "four bits, rotated": (jint8.Config(scheme="int4", grouping="oc", rotate=16, outliers="static"), (5, 9)),
}


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("name", CONFIGS)
def test_close_to_its_parts(name, quantization):
    """Rounded alike but for a few activations, which sums in another order move to the next integer."""
    config = CONFIGS[name]
    tree, args = layer(config, *QUANTIZATIONS[quantization])
    assert is_one_call(config, tree, args)
    y, cache = run(config, tree, args)
    expected, expected_cache = run(config, tree, args, by_parts=True)
    tolerance = 1e-3 if "four bits" in quantization else 2e-2  # activations of 16 bits, or of 8
    for got, other in zip((y, *cache), (expected, *expected_cache), strict=True):
        np.testing.assert_allclose(got, other, atol=tolerance * np.abs(other).max())
    exact, *_ = in_float64(config, tree, args, 0)
    assert np.abs(y[:, 0] - exact).max() < 1.5 * np.abs(expected[:, 0] - exact).max()


def test_programs_for_other_machines_gradients_and_vmap_are_those_of_its_parts():
    tree, args = layer(LLAMA)
    block = Block(LLAMA)
    call = lambda x, at, angles, cache: block.apply({"params": tree}, x, at, angles, cache)[0]
    exported = jax.export.export(jax.jit(call), platforms=["cpu"])(*args)
    assert native.LAYER_TARGET not in exported.mlir_module()
    np.testing.assert_allclose(exported.call(*args), call(*args), atol=0.1)
    slope = jax.grad(lambda x: jnp.sum(call(x, *args[1:])))(args[0])
    parts = Block(LLAMA, by_parts=True)
    other = jax.grad(lambda x: jnp.sum(parts.apply({"params": tree}, x, *args[1:])[0]))(args[0])
    np.testing.assert_allclose(slope, other, rtol=1e-3, atol=1e-3)
    many = jax.vmap(lambda x: call(x, *args[1:]))(jnp.stack([args[0], 2 * args[0]]))
    np.testing.assert_array_equal(many[1], call(2 * args[0], *args[1:]))


def test_a_symbolic_number_of_rows():
    """Of an exported program, which is for any: it has XLA's form."""
    tree, args = layer(LLAMA)
    (b,) = jax.export.symbolic_shape("b")
    symbolic = jax.tree.map(lambda a: jax.ShapeDtypeStruct((b, *a.shape[1:]) if a.ndim else (), a.dtype), args)
    call = jax.jit(lambda *args: Block(LLAMA).apply({"params": tree}, *args)[0])
    exported = jax.export.export(call, platforms=["cpu"])(*symbolic)
    np.testing.assert_allclose(exported.call(*args), call(*args), atol=0.1)


@pytest.mark.parametrize("quantization", ["llm.int8", "rotated", "four bits, rotated"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_stay_in_their_row(bad, quantization):
    config, columns = QUANTIZATIONS[quantization]
    tree, (x, at, angles, cache) = layer(LLAMA, config, columns)
    spoiled = run(LLAMA, tree, (x.at[1, 0, 7].set(bad), at, angles, cache))[0]
    assert not np.isfinite(spoiled[1]).any()
    expected = run(LLAMA, tree, (x.at[1].set(0.0), at, angles, cache))[0]
    np.testing.assert_array_equal(spoiled[::2], expected[::2])


def test_the_last_slot_is_the_furthest():
    """As an update of a slice does, it moves a slot that lies outside."""
    tree, (x, at, angles, cache) = layer(LLAMA)
    _, held = run(LLAMA, tree, (x, at._replace(slot=jnp.int32(LENGTH + 5)), angles, cache))
    np.testing.assert_array_equal(held.key[..., :-1], cache.key[..., :-1])
    assert (np.asarray(held.key[..., -1]) != np.asarray(cache.key[..., -1])).any()


@pytest.mark.parametrize("change", [{"norm_place": "after"}, {"causal": False}], ids=str)
def test_what_goes_by_parts(change):
    config = dataclasses.replace(LLAMA, **change)
    assert not is_one_call(config, *layer(config))


def test_other_parameters_go_by_parts(monkeypatch):
    tree, args = layer(LLAMA)
    assert is_one_call(LLAMA, tree, args)
    lora = {**tree, "mlp": {**tree["mlp"], "down": {**tree["mlp"]["down"], "lora_a": np.zeros((2, 48), np.float32)}}}
    lora["mlp"]["down"]["lora_b"] = np.zeros((40, 2), np.float32)
    assert not is_one_call(LLAMA, lora, args)
    floats = {**tree, "mlp": {**tree["mlp"], "down": {"weight": np.zeros((40, 48), np.float32)}}}
    assert not is_one_call(LLAMA, floats, args)
    for other in (
        {"relative": True},
        {"scheme": "int4", "grouping": "ic"},
        {"scheme": "int4-a8", "grouping": "oc"},
        {"digits": 2},
    ):
        assert not is_one_call(LLAMA, *layer(LLAMA, jint8.Config(**other)))
    x, at, angles, _ = args
    assert not is_one_call(LLAMA, tree, (x, at, angles, empty_layer(LLAMA, 3, LENGTH, jnp.int8)))
    assert not is_one_call(LLAMA, tree, (x.astype(jnp.bfloat16), *args[1:]))
    monkeypatch.setenv("JINT8_NATIVE", "named")
    assert not is_one_call(LLAMA, tree, args)
