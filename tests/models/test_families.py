"""Every family against what PyTorch's transformers computes; see tests/fixtures/make_families.py.

Without `jit` where it isn't the point: most operations are then compiled once for all families.
"""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from family_files import DIRECTORY, NAMES, config, expected

import jint8
from jint8.models import FAMILIES, _attention, context, make_cache, model_config
from jint8.models.families import _opt, _registry

# their rotary positions depend on the length of the sequence, which differs from call to call
BY_LENGTH = ["llama_dynamic", "phi3_longrope"]
LENGTH, SHORT, SLOTS = 20, 11, 32
CHUNKS = (0, 16, 24, SLOTS)


def load(name, **options):
    return jint8.load(DIRECTORY / name, dtype="float32", **options)


def logits(model, tokens):
    return np.asarray(model.model.apply({"params": model.params}, jnp.asarray(tokens))[0])


def test_every_family_has_a_fixture():
    kinds = {config(name)["model_type"] for name in NAMES}
    assert kinds == set(FAMILIES)


@pytest.mark.parametrize("name", NAMES)
def test_a_config_names_its_family(name):
    assert model_config(config(name)).family == config(name)["model_type"]


def test_a_family_in_two_files(monkeypatch):
    monkeypatch.setitem(_opt.FAMILIES, "llama", _opt.FAMILIES["opt"])
    with pytest.raises(ValueError, match="each model_type in one file, got llama again in _opt"):
        _registry._find_families()


@pytest.mark.first_case
@pytest.mark.parametrize("name", [name for name in NAMES if name not in BY_LENGTH])
def test_float_logits(name, monkeypatch):
    """Two rows with different padding, through the cache in chunks; then the most likely token is greedy's next.

    The first chunk attends to itself, in parts.
    """
    monkeypatch.setattr(_attention, "PART", 4)
    model, want = load(name, quantize=False), expected(name)
    lengths, new = (LENGTH, SHORT), want["greedy"].shape[1]
    rows = [np.append(want["tokens"][0, :n], greedy[:-1]) for n, greedy in zip(lengths, want["greedy"], strict=True)]
    tokens = jnp.asarray([np.pad(row, (SLOTS - len(row), 0)) for row in rows])
    first = jnp.asarray([SLOTS - len(row) for row in rows])
    cache, chunks = make_cache(model.config, 2, SLOTS), []
    for slot, end in itertools.pairwise(CHUNKS):
        chunk = tokens[:, slot:end]
        out, cache = model.model.apply({"params": model.params}, chunk, context(chunk, slot or None, first), cache)
        chunks.append(out)
    found = np.concatenate(chunks, axis=1)
    for row, n, greedy in zip(found, lengths, want["greedy"], strict=True):
        got = row[-(n + new - 1) :]
        limit = 1e-4 * np.abs(want["logits"]).max()
        np.testing.assert_allclose(got[:n], want["logits"][0, :n], rtol=0, atol=limit)
        np.testing.assert_array_equal(got[n - 1 :].argmax(-1), greedy)


@pytest.mark.parametrize("s", [1, 255, 256, 300, 512, 1000])
@pytest.mark.parametrize("window", [0, 1, 100, 256])
def test_parts_of_attention_leave_out_nothing_visible(s, window):
    parts = _attention.parts_of(s, s, window)
    query, key = np.arange(s)[:, None], np.arange(s)[None, :]
    visible = (key <= query) & ((key > query - window) | (window == 0))
    for queries, seen in parts:
        assert not visible[queries, : seen.start].any()
        assert not visible[queries, seen.stop :].any()
    assert np.concatenate([np.arange(s)[queries] for queries, _ in parts]).tolist() == list(range(s))
    multiplied = sum((queries.stop - queries.start) * (seen.stop - seen.start) for queries, seen in parts)
    assert multiplied <= (0.75 if s >= 2 * _attention.PART else 1) * s * s
    assert _attention.parts_of(s, 2 * s, None) == [(slice(0, s), slice(0, 2 * s))]


@pytest.mark.first_case
@pytest.mark.parametrize("name", BY_LENGTH)
def test_float_logits_by_length(name):
    want = expected(name)
    got = logits(load(name, quantize=False), want["tokens"])
    np.testing.assert_allclose(got, want["logits"], rtol=0, atol=1e-4 * np.abs(want["logits"]).max())


@pytest.mark.first_case
@pytest.mark.parametrize("name", [*BY_LENGTH, "gemma3", "bloom"])
def test_generated_tokens(name):
    model, (tokens,), want = load(name, quantize=False), expected(name)["tokens"].tolist(), expected(name)["greedy"]
    chunks = model.generate_tokens([tokens, tokens[:SHORT]], max_tokens=want.shape[1], every=want.shape[1])
    np.testing.assert_array_equal(np.concatenate(list(chunks), axis=1), want)


@pytest.mark.first_case
@pytest.mark.parametrize("name", NAMES)
def test_int8_logits(name):
    want = expected(name)
    got = logits(load(name), want["tokens"])
    # with experts, a rounding may send a token to another one
    assert np.linalg.norm(got - want["logits"]) / np.linalg.norm(want["logits"]) < (0.15 if name == "mixtral" else 0.05)


@pytest.mark.first_case
@pytest.mark.parametrize("name", ["gemma2", "gpt_neox", "opt_350m"])
def test_embeddings_and_head_in_int8(name):
    model, want = load(name, include=["embedding", "lm_head"]), expected(name)
    assert isinstance(model.params["embedding"], jint8.QTensor)
    assert model.config.tie_embeddings or isinstance(model.params["lm_head"]["weight"], jint8.QTensor)
    got = logits(model, want["tokens"])
    assert np.linalg.norm(got - want["logits"]) / np.linalg.norm(want["logits"]) < 0.05
