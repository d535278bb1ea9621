"""What a long prompt takes; more is in `tests/cli/test_fit.py`, against a whole model on a mesh."""

import pytest
from family_files import config

import jint8
from jint8._inference.capacity import capacity, layers, measure, model_mesh
from jint8._inference.generate import CHUNK
from jint8.models import model_config


def test_the_last_chunk_attends_to_the_whole_prompt():
    model = layers(model_config(config("llama")), 1)
    mesh = model_mesh(model, 1)
    short, long = (measure(model, mesh, context=n, batch=1, quant=jint8.Config()) for n in (CHUNK, 8 * CHUNK))
    more_scores = 4 * model.num_heads * CHUNK * 7 * CHUNK  # float32, of each query and key
    assert long["prefill"] - short["prefill"] >= more_scores
    assert long["cache"] == 8 * short["cache"]


@pytest.mark.slow
def test_int8_cache():
    model = layers(model_config(config("llama")), 2)
    values = 2 * model.num_kv_heads * 256 * model.head_dim  # keys and values of a layer
    scales, shift = 2 * model.num_kv_heads * 256 * 4, model.num_kv_heads * model.head_dim * 4
    found = {
        cache: capacity(model, 1, context=256, batch=3, dtype="bfloat16", quant=jint8.Config(), cache=cache)
        for cache in (None, "int8")
    }
    assert found[None].cache == 2 * 3 * 2 * values
    assert found["int8"].cache == 2 * 3 * (values + scales + shift)
    assert found["int8"].weights == found[None].weights
    assert found["int8"].needed == found["int8"].weights + found["int8"].cache + found["int8"].prefill
