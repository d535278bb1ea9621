"""Text and logits through an int8 key-value cache, and that decoding reads it as it is."""

import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_files import find_smollm2
from family_files import DIRECTORY, expected

import jint8
from jint8._inference import generate as _generate
from jint8._inference import generation
from jint8._inference.evaluate import chunks
from jint8._inference.sampling import Sampling
from jint8.models import Decoder, Int8Cache, LayerCache, context, make_cache, model_config

# What is special: nothing; a window; a softcap on scores; ALiBi; key biases; a window on some layers, a part of each
# head is rotated, learned positions.
FAMILIES = ["llama", "mistral", "gemma2"]
MORE = [pytest.param(name, marks=pytest.mark.slow) for name in ("bloom", "qwen2", "gemma3", "gpt_neox", "opt")]
LENGTH, SHORT, SLOTS = 20, 11, 32
CHUNKS = (0, 8, 30, 31, SLOTS)  # the second row's first token is in the second; steps of one token as in decoding
RNG = np.random.default_rng(3)
PROMPTS = [RNG.integers(3, 96, n).tolist() for n in (30, 17)]
RELATIVE_ERROR = 0.03  # of logits, by norm: an 8-bit step is 0.4 % of the largest entry of a head of 8


@pytest.fixture(scope="module", params=[*FAMILIES, *MORE])
def family(request):
    return request.param, jint8.load(DIRECTORY / request.param, quantize=False, dtype="float32")


def relative(got, want):
    return np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want)


def in_chunks(model, tokens, first, kind):
    """Logits of `tokens`, padded on the left, and the cache."""
    cache, found = make_cache(model.config, len(tokens), SLOTS, kind), []
    first = jnp.asarray(first)
    for slot, end in itertools.pairwise(CHUNKS):
        chunk = tokens[:, slot:end]
        slot = jnp.int32(slot) if slot else None
        out, cache = _run(model.model, {"params": model.params}, chunk, slot, first, cache)
        found.append(out)
    return np.concatenate(found, axis=1), cache


@functools.partial(jax.jit, static_argnums=0)
def _run(module, params, tokens, slot, first, cache):
    return module.apply(params, tokens, context(tokens, slot, first), cache)


@pytest.mark.first_case
def test_logits_in_chunks(family):
    """Two rows with different padding against what PyTorch's transformers computes without a cache."""
    name, model = family
    want = expected(name)
    rows = [
        np.append(want["tokens"][0, :n], greedy[:-1]) for n, greedy in zip((LENGTH, SHORT), want["greedy"], strict=True)
    ]
    tokens, first = (
        jnp.asarray([np.pad(row, (SLOTS - len(row), 0)) for row in rows]),
        [SLOTS - len(row) for row in rows],
    )
    found, cache = in_chunks(model, tokens, first, "int8")
    got = found[0, first[0] :][:LENGTH]
    assert 0 < relative(got, want["logits"][0]) < RELATIVE_ERROR
    assert relative(found[1, first[1] :][:SHORT], want["logits"][0, :SHORT]) < RELATIVE_ERROR
    for layer in cache:
        assert isinstance(layer, Int8Cache)
        assert (layer.shift is None) is bool(model.config.attention_softcap)
        assert np.all(layer.key_scale[1, :, first[1] :] > 0)


@pytest.mark.first_case
def test_rows_do_not_depend_on_their_neighbours(family):
    name, model = family
    row = np.pad(expected(name)["tokens"][0], (SLOTS - LENGTH, 0))
    others = [np.full(SLOTS, 5), np.pad(row[-3:], (SLOTS - 3, 0))]
    paddings = [[SLOTS - LENGTH, 0], [SLOTS - LENGTH, SLOTS - 3]]
    found = [
        in_chunks(model, jnp.asarray([row, other]), first, "int8")[0][0]
        for other, first in zip(others, paddings, strict=True)
    ]
    np.testing.assert_array_equal(*found)


@pytest.mark.first_case
@pytest.mark.parametrize("tokens", [LENGTH, 5], ids=["many", "few"])
def test_logits_through_the_cache(family, tokens):
    name, model = family
    tokens = expected(name)["tokens"][:1, :tokens]
    want = np.asarray(model.logits(tokens), np.float64)
    got = np.asarray(model.logits(tokens, cache="int8"))
    assert got.shape == want.shape
    assert 0 < relative(got, want) < RELATIVE_ERROR


def generated(model, **options):
    return np.concatenate(list(model.generate_tokens(PROMPTS, max_tokens=5, every=2, **options)), axis=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "chunk", [pytest.param(_generate.CHUNK, id="at_once", marks=pytest.mark.slow), pytest.param(12, id="in_chunks")]
)
def test_generated_tokens(chunk, monkeypatch):
    """With left padding and a window, the same as with a float cache: their logits are further apart than the error."""
    model = jint8.load(DIRECTORY / "mistral", quantize=False, dtype="float32")
    monkeypatch.setattr(generation, "runs_by_layers", lambda *_: False)
    states = []
    decode = _generate.decode
    monkeypatch.setattr(_generate, "decode", lambda *args: states.append(args[2]) or decode(*args))
    monkeypatch.setattr(_generate, "CHUNK", chunk)
    tokens = generated(model, cache="int8")
    assert {type(layer) for state in states for layer in state.cache} == {Int8Cache}
    states.clear()
    np.testing.assert_array_equal(tokens, generated(model))
    assert {type(layer) for state in states for layer in state.cache} == {LayerCache}


@pytest.mark.slow
def test_the_constant_vector_stays(monkeypatch):
    model = jint8.load(DIRECTORY / "llama", quantize=False, dtype="float32")
    params = {"params": model.params}
    state = _generate.start(model.model, params, PROMPTS, 5, Sampling.of(), 0, "int8")
    before = [np.asarray(layer.shift) for layer in state.cache]
    after = _generate.decode(model.model, params, state, state.slot + 4, Sampling.of())
    for old, layer in zip(before, after.cache, strict=True):
        assert np.all(np.any(old != 0, axis=-1))
        np.testing.assert_array_equal(layer.shift, old)


CALLS = {
    "generate_tokens": lambda model: list(model.generate_tokens([[3]], cache="int4")),
    "logits": lambda model: model.logits([[3, 4]], cache="int4"),
    "evaluate": lambda model: jint8.evaluate(model, [[3, 4]], cache="int4"),
    "empty_cache": lambda model: _generate.empty_cache(model.model, model.params, 1, 16, "int4"),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_an_unknown_kind(call):
    model = jint8.load(DIRECTORY / "llama", dtype="float32")
    with pytest.raises(ValueError, match=r"Expected cache to be None .* or 'int8', got 'int4'"):
        call(model)


def test_evaluate_reads_the_cache():
    model = jint8.load(DIRECTORY / "llama", quantize=False, dtype="float32")
    tokens = expected("llama")["tokens"]
    plain, cached = (jint8.evaluate(model, tokens, reference=model, cache=cache) for cache in (None, "int8"))
    assert plain.kl == 0 < cached.kl < 1e-3
    assert cached.reference_perplexity == plain.perplexity != cached.perplexity


BATCH, LONG, KV_HEADS, HEAD = 4, 4096, 2, 64


@pytest.fixture
def optimized():
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.mark.first_case
@pytest.mark.parametrize("kind", ["int8", None])
def test_decoding_makes_no_copy_of_the_cache(kind, optimized):
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": HEAD}
    config = model_config({"model_type": "llama", **sizes, "num_attention_heads": 4, "num_key_value_heads": KV_HEADS})
    model = Decoder(config)

    def state():
        cache = _generate.empty_cache(model, {}, BATCH, LONG, kind)
        tokens = jnp.zeros((BATCH, LONG), jnp.int32)
        return _generate.State(tokens, jnp.int32(1), None, jnp.zeros(BATCH, bool), cache, jax.random.key(0))

    params = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.ones((1, 2), jnp.int32)))
    args = (params, jax.eval_shape(state), jnp.int32(LONG), Sampling.of())
    program = _generate.decode.lower(model, *args).compile()
    of_a_layer = BATCH * KV_HEADS * LONG * HEAD  # keys or values, which are 4 bytes each in float32
    largest = max(math.prod(map(int, shape.split(","))) for shape in re.findall(r"f32\[([\d,]+)\]", program.as_text()))
    assert (largest >= of_a_layer) is (kind is None)
    assert program.memory_analysis().temp_size_in_bytes < 2 * of_a_layer


@pytest.mark.slow
@pytest.mark.skipif(find_smollm2() is None, reason="needs SmolLM2-135M-Instruct in the cache or at $JINT8_TEST_SMOLLM2")
def test_smollm2():
    model = jint8.load(find_smollm2(), quantize=False, dtype="float32")
    prompt = "The capital of France is"
    texts = [model.generate(prompt, max_tokens=16, cache=cache) for cache in (None, "int8")]
    assert "Paris" in texts[1]
    assert texts[1].split()[:4] == texts[0].split()[:4]
    text = (DIRECTORY.parents[2] / "README.md").read_text()
    tokens = chunks(model.tokenizer.encode(text), 512)[:2]
    found = jint8.evaluate(model, tokens, reference=model, cache="int8")
    assert 0 < found.kl < 8e-4
    assert found.top1 > 0.98
