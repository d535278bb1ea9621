"""An output head beside `tie_word_embeddings`: used where it differs from the embedding."""

import json
import warnings

import llama_oracle
import numpy as np
import pytest
from checkpoint_files import write_directory
from tiny_model import CONFIG, VOCAB, llama_weights

import jint8
from jint8._convert import tied

WEIGHTS = llama_weights(5, outliers=False)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TOKENS = np.random.default_rng(0).integers(3, VOCAB, (1, 9))


def directory(path, weights):
    config = CONFIG | {"vocab_size": VOCAB, "tie_word_embeddings": True}
    return write_directory(path / "model", {"model.safetensors": weights}, config=config)


def relative_error(model, weights, **config):
    want = llama_oracle.logits(weights.__getitem__, CONFIG | config, TOKENS[0])
    return np.linalg.norm(np.asarray(model.logits(TOKENS))[0] - want) / np.linalg.norm(want)


def test_a_head_that_differs(tmp_path, monkeypatch):
    monkeypatch.setattr(tied, "ROWS", 100)
    weights = WEIGHTS | {HEAD: WEIGHTS[EMBEDDING].copy()}
    weights[HEAD][-1, -1] += 1
    path = directory(tmp_path, weights)
    with pytest.warns(UserWarning, match=r"model\.safetensors: tensor 'lm_head.weight' differs from 'model.embed"):
        model = jint8.load(path, quantize=False, dtype="float32")
    assert relative_error(model, weights) < 1e-5
    assert relative_error(model, weights, tie_word_embeddings=True) > 1e-4
    assert not model.config.tie_embeddings


def test_saved(tmp_path):
    path = directory(tmp_path, WEIGHTS)  # whose head is another one
    with pytest.warns(UserWarning, match="differs"):
        model = jint8.load(path)
    for format in ("jint8", "bitsandbytes"):
        jint8.save(tmp_path / format, model, format=format)
        assert json.loads((tmp_path / format / "config.json").read_text())["tie_word_embeddings"] is False
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            again = jint8.load(tmp_path / format)
        np.testing.assert_array_equal(again.logits(TOKENS), model.logits(TOKENS))
    assert relative_error(model, WEIGHTS) < 0.05


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_head_of_the_same_values(dtype, tmp_path):
    weights = {name: x.astype(np.float16).astype(dtype) for name, x in WEIGHTS.items()}
    weights[HEAD] = weights[EMBEDDING].astype(np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = jint8.load(directory(tmp_path, weights), quantize=False, dtype="float32")
    assert model.config.tie_embeddings
    assert relative_error(model, weights, tie_word_embeddings=True) < 1e-5


def test_a_head_of_another_shape(tmp_path):
    path = directory(tmp_path, WEIGHTS | {HEAD: WEIGHTS[HEAD][:-1]})
    with pytest.warns(UserWarning, match="differs"), pytest.raises(ValueError, match=r"Expected \d+ rows.*lm_head"):
        jint8.load(path)
