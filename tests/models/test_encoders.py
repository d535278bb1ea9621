"""Encoders against what PyTorch's transformers computes; see tests/fixtures/make_encoders.py."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family_files import DIRECTORY, rewrite
from tiny_model import byte_tokenizer

import jint8

BERT = DIRECTORY.parent / "encoders" / "bert"
EXPECTED = np.load(BERT / "expected.npz")
TOKENS = EXPECTED["tokens"][0].tolist()


@pytest.fixture(scope="module")
def float_model():
    return jint8.load_encoder(BERT, quantize=False, dtype="float32")


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.slow
def test_features(float_model):
    got = np.asarray(float_model.model.apply({"params": float_model.params}, jnp.asarray([TOKENS])))
    want = EXPECTED["hidden"]
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * np.abs(want).max())


def test_means_of_texts_of_different_lengths(float_model):
    want = np.stack([EXPECTED["hidden"][0].mean(0), EXPECTED["short"][0].mean(0)])
    got = float_model.embed_tokens([TOKENS, TOKENS[:9]], normalize=False)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * np.abs(want).max())
    np.testing.assert_allclose(float_model.embed_tokens([TOKENS]), unit(want[:1]), atol=1e-4)


def test_int8_vectors_are_close_and_independent_of_their_neighbours():
    model = jint8.load_encoder(BERT, config=jint8.Config(outliers="token"), dtype="float32")
    got = model.embed_tokens([TOKENS, TOKENS[:9]])
    want = unit(np.stack([EXPECTED["hidden"][0].mean(0), EXPECTED["short"][0].mean(0)]))
    assert np.sum(got * want, axis=-1).min() > 0.999
    np.testing.assert_allclose(model.embed_tokens([TOKENS[:9]])[0], got[1], atol=1e-5)


def test_long_texts_are_cut(float_model):
    long = [*TOKENS, *TOKENS]
    np.testing.assert_array_equal(float_model.embed_tokens([long]), float_model.embed_tokens([[*long[:31], long[-1]]]))


def test_texts(tmp_path):
    path = shutil.copytree(BERT, tmp_path / "bert")
    byte_tokenizer().save(str(path / "tokenizer.json"))
    model = jint8.load_encoder(path, dtype="float32")
    ids = [model.tokenizer.encode(text) for text in ("one", "another")]
    np.testing.assert_array_equal(model.embed(["one", "another"]), model.embed_tokens(ids))
    assert model.embed("one").shape == (32,)
    with pytest.raises(ValueError, match="at least one token, got an empty one"):
        model.embed(["one", ""])
    with pytest.raises(ValueError, match="Expected a checkpoint with a tokenizer"):
        jint8.load_encoder(BERT).embed("one")
    with pytest.raises(ValueError, match=r"token ids in \[0, 260\), got 0 to 260"):
        model.embed_tokens([[260]])


@pytest.mark.parametrize("format", ["jint8", "bitsandbytes"])
def test_saved(format, tmp_path):
    model = jint8.load_encoder(BERT)
    jint8.save(tmp_path / "dst", model, format=format)
    again = jint8.load_encoder(tmp_path / "dst", verify=True)
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
    assert (again.quant, again.model) == (model.quant, model.model)


def test_checkpoint_of_a_model_with_heads(tmp_path):
    path = rewrite(BERT, tmp_path, lambda name: f"bert.{name}", **{"cls.predictions.bias": np.zeros(9, np.float32)})
    got, want = jint8.load_encoder(path).params, jint8.load_encoder(BERT).params
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_encoders_and_decoders_are_told_apart():
    with pytest.raises(ValueError, match=r"bert: Expected a decoder, got 'bert': jint8\.load_encoder"):
        jint8.load(BERT)
    with pytest.raises(ValueError, match="Expected a model_type among bert, got 'llama'"):
        jint8.load_encoder(DIRECTORY / "llama")
