"""Long prompts in chunks give what they give at once."""

import numpy as np
import pytest
from family_files import DIRECTORY

import jint8
from jint8._inference import generate as _generate
from jint8._inference import generation, sizes

RNG = np.random.default_rng(3)
PROMPTS = [RNG.integers(3, 96, n).tolist() for n in (30, 17)]


def generated(model, prompts, **options):
    return np.concatenate(list(model.generate_tokens(prompts, max_tokens=5, every=5, **options)), axis=1)


@pytest.mark.first_case
@pytest.mark.parametrize("quantize", [False, True], ids=["float", "int8"])
def test_same_tokens(quantize, monkeypatch):
    monkeypatch.setattr(generation, "runs_by_layers", lambda *_: False)
    model = jint8.load(DIRECTORY / "mistral", quantize=quantize, dtype="float32")
    at_once = generated(model, PROMPTS)
    calls = []
    extend = _generate.extend
    monkeypatch.setattr(_generate, "extend", lambda *args: calls.append(args[2].shape) or extend(*args))
    monkeypatch.setattr(_generate, "CHUNK", 12)
    np.testing.assert_array_equal(generated(model, PROMPTS), at_once)
    assert calls == [(2, 8), (2, 12)]  # 32 columns with padding, of which prefill runs the last 12


@pytest.mark.slow
def test_outliers_of_a_long_prompt_are_decided_by_token(monkeypatch):
    model = jint8.load(DIRECTORY / "llama", config=jint8.Config(threshold=1.0), dtype="float32")
    seen = []
    way = generation.ByLayers
    leaf = lambda params: params["params"]["layers_0"]["mlp"]["down"]["weight"]
    spy = lambda m, p, *args, **options: seen.append(leaf(p).config.outliers) or way(m, p, *args, **options)
    monkeypatch.setattr(generation, "ByLayers", spy)
    list(model.generate_tokens(PROMPTS[:1], max_tokens=1))
    monkeypatch.setattr(sizes, "PIECES", (16,))
    list(model.generate_tokens(PROMPTS[:1], max_tokens=1))
    assert seen == ["batch", "token"]
