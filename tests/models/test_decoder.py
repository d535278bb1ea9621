"""The decoder against a float64 decoder in NumPy that reads the same checkpoint."""

from pydoc_data.topics import topics

import llama_oracle
import numpy as np
import pytest
from checkpoint_files import find_smollm2
from tiny_model import VOCAB, make_llama_directory

import jint8
from jint8.checkpoints import open_checkpoint

TOKENS = np.random.default_rng(5).integers(3, VOCAB, 23)


@pytest.fixture(scope="module", params=[False, True], ids=["own_head", "tied_head"])
def directory(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    return make_llama_directory(path, seed=7, tie=request.param)


def expected(path, tokens):
    with open_checkpoint(path) as checkpoint:
        return llama_oracle.logits(checkpoint.read, checkpoint.config, np.asarray(tokens))


def test_float_logits(directory):
    want = expected(directory, TOKENS)
    got = np.asarray(jint8.load(directory, quantize=False).logits(TOKENS[None])[0], np.float64)
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())


@pytest.mark.first_case
def test_int8_logits_are_closer_with_decomposition(directory):
    want = expected(directory, TOKENS)

    def error(**config):
        got = np.asarray(jint8.load(directory, config=jint8.Config(**config)).logits(TOKENS[None])[0], np.float64)
        return np.linalg.norm(got - want) / np.linalg.norm(want)

    assert error(threshold=6.0) < 0.05
    assert error(threshold=6.0) < error(threshold=0.0)


@pytest.mark.first_case
def test_generation_picks_the_oracles_tokens(directory):
    model = jint8.load(directory, quantize=False)
    chunks = model.generate_tokens([TOKENS.tolist()], max_tokens=6)
    got = np.concatenate([chunk[0] for chunk in chunks]).tolist()
    ids = TOKENS.tolist()
    for token in got:
        assert token == int(np.argmax(expected(directory, ids)[-1]))
        ids.append(token)


@pytest.mark.slow
@pytest.mark.skipif(find_smollm2() is None, reason="needs SmolLM2-135M-Instruct in the cache or at $JINT8_TEST_SMOLLM2")
def test_perplexity_of_smollm2():
    path = find_smollm2()
    model = jint8.load(path, quantize=False)
    # some hundred tokens of prose: on a sentence or two, int8 differs from float32 by 10 % in either direction
    ids = np.array(model.tokenizer.encode(topics["import"]))[:384]

    def perplexity(logits):
        logits = np.asarray(logits, np.float64)[:-1]
        log_probs = logits - np.log(np.sum(np.exp(logits - logits.max(-1, keepdims=True)), -1, keepdims=True))
        log_probs = log_probs - logits.max(-1, keepdims=True)
        return np.exp(-np.mean(log_probs[np.arange(len(ids) - 1), ids[1:]]))

    want = perplexity(expected(path, ids))
    assert perplexity(model.logits(ids[None])[0]) == pytest.approx(want, rel=1e-3)
    assert perplexity(jint8.load(path).logits(ids[None])[0]) == pytest.approx(want, rel=0.05)
