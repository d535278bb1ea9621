"""`jint8.evaluate` against NumPy, and what it refuses; the command has more (`tests/cli/test_eval.py`)."""

import dataclasses

import numpy as np
import pytest
from family_files import DIRECTORY, expected

import jint8


@pytest.fixture(scope="module")
def models():
    return [jint8.load(DIRECTORY / "llama", dtype="float32", quantize=quantize) for quantize in (True, False)]


def test_numbers(models):
    int8, plain = models
    tokens = np.asarray(expected("llama")["tokens"])
    found = jint8.evaluate(int8, tokens, batch_size=len(tokens), reference=plain)
    logits = [np.asarray(model.logits(tokens), np.float64)[:, :-1] for model in (int8, plain)]
    log_q, log_p = (x - np.log(np.sum(np.exp(x), axis=-1, keepdims=True)) for x in logits)
    loss = lambda log: -np.take_along_axis(log, tokens[:, 1:, None], axis=-1).mean()
    assert found.tokens == tokens[:, 1:].size
    assert found.perplexity == pytest.approx(np.exp(loss(log_q)), rel=1e-4)
    assert found.reference_perplexity == pytest.approx(np.exp(loss(log_p)), rel=1e-4)
    assert found.kl == pytest.approx(np.sum(np.exp(log_p) * (log_p - log_q), axis=-1).mean(), rel=1e-2, abs=1e-6)
    assert found.top1 == np.mean(np.argmax(log_p, axis=-1) == np.argmax(log_q, axis=-1))
    alone = jint8.evaluate(int8, tokens, batch_size=len(tokens))
    assert alone == jint8.evaluate(int8, tokens.tolist(), batch_size=len(tokens))
    assert alone.perplexity == pytest.approx(found.perplexity)
    assert (alone.reference_perplexity, alone.kl, alone.top1) == (None, None, None)


@pytest.mark.slow
def test_progress(models):
    seen = []
    tokens = np.ones((3, 4), np.int32)
    jint8.evaluate(models[0], tokens, batch_size=2, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(2, 3), (3, 3)]


REFUSED = {
    "one_row": ([3, 4, 5], {}, ValueError, r"shape \(n, s\)"),
    "one_token": ([[3]], {}, ValueError, r"shape \(n, s\)"),
    "floats": ([[3.0, 4.0]], {}, TypeError, "integer tokens"),
    "too_large": ([[3, 10**6]], {}, ValueError, "token ids in"),
    "batch_size": ([[3, 4]], {"batch_size": 0}, ValueError, "batch_size to be at least 1"),
}


@pytest.mark.parametrize(("tokens", "options", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_input(tokens, options, error, message, models):
    with pytest.raises(error, match=f"Expected .*{message}"):
        jint8.evaluate(models[0], tokens, **options)


def test_another_vocabulary(models):
    int8, plain = models
    other = dataclasses.replace(plain, config=dataclasses.replace(plain.config, vocab_size=7))
    with pytest.raises(ValueError, match=r"Expected a reference with the model's .* tokens, got one with 7"):
        jint8.evaluate(int8, [[3, 4]], reference=other)
