"""Rotary frequencies that depend on the length of a sequence: generated tokens are those of the whole one, uncached."""

from pathlib import Path

import jax
import jax.numpy as jnp
import llama_oracle
import numpy as np
import pytest
from checkpoint_files import write_directory
from tiny_model import CONFIG, VOCAB, llama_weights
from virtual_devices import run_on_eight_devices

import jint8
from jint8._inference import generate as at_once
from jint8._inference import generation, sizes
from jint8.models import ModelConfig, model_config
from jint8.models._attention import context
from jint8.models._config import Rope
from jint8.models._rope import depends_on_length, rotary, same_until

RNG = np.random.default_rng(7)
TRAINED, NEW = 24, 8
FACTORS = {"short_factor": (1 + RNG.random(4) / 5).tolist(), "long_factor": (4 + 20 * RNG.random(4)).tolist()}
SCALINGS = {
    "longrope": {
        "max_position_embeddings": 4 * TRAINED,
        "original_max_position_embeddings": TRAINED,
        "rope_scaling": {"rope_type": "longrope", **FACTORS},
    },
    "dynamic": {"max_position_embeddings": TRAINED, "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
}
# The first passes the trained length within its prompt, the second while it answers, the third never.
PROMPTS = [RNG.integers(3, VOCAB, n).tolist() for n in (40, 20, 9)]


WEIGHTS = llama_weights(3, outliers=False)
PLAIN = 10000.0 ** (-np.arange(0, 8, 2) / 8)


def longrope(length):
    """Frequencies and the factor of sines and cosines, as in Ding et al., LongRoPE, 2024, and Phi-3's code."""
    factors = FACTORS["long_factor" if length > TRAINED else "short_factor"]
    return PLAIN / np.array(factors), np.sqrt(1 + np.log(4) / np.log(TRAINED))


def dynamic(length):
    """The base grows with the length, as in transformers' `_compute_dynamic_ntk_parameters`."""
    base = 10000.0 * (4.0 * max(length, TRAINED) / TRAINED - 3) ** (8 / (8 - 2))
    return base ** (-np.arange(0, 8, 2) / 8), 1


def oracle(kind, tokens):
    """float64 logits of the last token, of the whole sequence."""
    rope = {"longrope": longrope, "dynamic": dynamic}[kind]
    return llama_oracle.logits(WEIGHTS.__getitem__, CONFIG, np.array(tokens), rope)[-1]


@pytest.fixture(scope="module", params=SCALINGS)
def directory(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param) / "model"
    config = CONFIG | {"vocab_size": VOCAB, "tie_word_embeddings": False} | SCALINGS[request.param]
    path.mkdir()
    write_directory(path, {"model.safetensors": WEIGHTS}, config=config)
    return path


@pytest.fixture(scope="module")
def model(directory):
    return jint8.load(directory, quantize=False, dtype="float32")


@pytest.fixture(scope="module")
def kind(model):
    return "dynamic" if model.config.rope.ntk else "longrope"


@pytest.fixture(scope="module")
def whole(kind):
    """The greedy tokens of each prompt, each from the logits of the whole sequence before it."""
    rows = [list(prompt) for prompt in PROMPTS]
    for row in rows:
        for _ in range(NEW):
            row.append(int(oracle(kind, row).argmax()))
    return np.array([row[-NEW:] for row in rows])


def generated(model, prompts=PROMPTS, **options):
    return np.concatenate(list(model.generate_tokens(prompts, max_tokens=NEW, **options)), axis=1)


@pytest.fixture(params=["by_layers", "at_once", "mesh"])
def in_pieces(request, directory, model, monkeypatch):
    """The model, that generates by each of the ways, with prompts of several pieces."""
    monkeypatch.setattr(sizes, "PIECES", (16,))
    monkeypatch.setattr(at_once, "CHUNK", 16)
    if request.param == "at_once":
        monkeypatch.setattr(generation, "runs_by_layers", lambda *_: False)
    if request.param == "mesh":
        return jint8.load(directory, quantize=False, dtype="float32", mesh=jax.make_mesh((1,), ("model",)))
    return model


def test_logits(model, kind):
    for prompt in PROMPTS:
        np.testing.assert_allclose(np.asarray(model.logits([prompt]))[0, -1], oracle(kind, prompt), atol=1e-4)


@pytest.mark.first_case
def test_tokens_of_the_whole_sequence(in_pieces, whole):
    np.testing.assert_array_equal(generated(in_pieces), whole)
    np.testing.assert_array_equal(generated(in_pieces, PROMPTS[1:2], every=3), whole[1:2])


@pytest.mark.first_case
def test_an_int8_cache(in_pieces, kind):
    """Each token is one of the likeliest, whose logits an int8 cache may swap."""
    got = generated(in_pieces, cache="int8")
    for prompt, row in zip(PROMPTS, got.tolist(), strict=True):
        for i, token in enumerate(row):
            logits = oracle(kind, [*prompt, *row[:i]])
            assert logits.max() - logits[token] < 0.1 * logits.std()


@pytest.mark.slow
def test_on_a_mesh():
    script = Path(__file__).parent / "rope_lengths_on_a_mesh.py"
    assert run_on_eight_devices(script, optimized=False) == dict.fromkeys(SCALINGS, True)


@pytest.mark.first_case
def test_by_a_loop_over_tokens(model, whole):
    model.warm(prompt=len(PROMPTS[1]), max_tokens=NEW)
    np.testing.assert_array_equal(generated(model, PROMPTS[1:2]), whole[1:2])


@pytest.mark.first_case
def test_rows_that_end(model, whole, monkeypatch):
    end = int(whole[0, 2])
    assert end not in whole[1]  # the others go on
    monkeypatch.setattr(type(model), "_end_tokens", (end,))
    got = generated(model)
    np.testing.assert_array_equal(got[1], whole[1])
    first = whole[0].tolist().index(end)
    np.testing.assert_array_equal(got[0], [*whole[0, :first], *[end] * (NEW - first)])


def test_draws_differ_from_token_to_token(model):
    drawn = generated(model, PROMPTS[:1], temperature=100.0, seed=1)[0]
    assert len(set(drawn.tolist())) > NEW // 2
    np.testing.assert_array_equal(generated(model, PROMPTS[:1], temperature=100.0, seed=1)[0], drawn)
    assert (generated(model, PROMPTS[:1], temperature=100.0, seed=2)[0] != drawn).any()


@pytest.mark.parametrize("kind", SCALINGS)
def test_angles_of_each_row(kind):
    rope = model_config(CONFIG | {"vocab_size": VOCAB} | SCALINGS[kind]).rope
    lengths = np.array([40, TRAINED, TRAINED + 1, 9])
    at = context(jnp.zeros((4, 5), jnp.int32), jnp.int32(4), jnp.zeros(4, jnp.int32), jnp.asarray(lengths))
    sin, cos = rotary(at.positions, rope, at.length)
    for i, length in enumerate(lengths):
        frequencies, scale = {"longrope": longrope, "dynamic": dynamic}[kind](length)
        angle = np.arange(4, 9)[:, None] * frequencies
        np.testing.assert_allclose(sin[i, :, 0, 0, 4:], scale * np.sin(angle), atol=1e-5)
        np.testing.assert_allclose(cos[i, :, 0, 0, :4], scale * np.cos(angle), atol=1e-5)


def test_until_when_frequencies_stay():
    def until(length, **rope):
        sizes = dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "num_layers"), 8)
        heads = dict.fromkeys(("num_heads", "num_kv_heads", "head_dim"), 2)
        config = ModelConfig(family="llama", **sizes, **heads, rope=Rope(frequencies=(1.0,), **rope))
        assert depends_on_length(config) == bool(rope)
        return same_until(config, length)

    assert until(5) is None
    assert [until(n, trained=8, long=(0.5,)) for n in (5, 8, 9)] == [8, 8, None]
    assert [until(n, trained=8, ntk=2.0) for n in (5, 8, 9, 10)] == [8, 8, 9, 10]
