"""What a long prompt takes; more is in `tests/cli/test_fit.py`, against a whole model on a mesh."""

from family_files import config

import jint8
from jint8._inference.capacity import layers, measure, model_mesh
from jint8._inference.generate import CHUNK
from jint8.models import model_config


def test_the_last_chunk_attends_to_the_whole_prompt():
    model = layers(model_config(config("llama")), 1)
    mesh = model_mesh(model, 1)
    short, long = (measure(model, mesh, context=n, batch=1, quant=jint8.Config()) for n in (CHUNK, 8 * CHUNK))
    more_scores = 4 * model.num_heads * CHUNK * 7 * CHUNK  # float32, of each query and key
    assert long["prefill"] - short["prefill"] >= more_scores
    assert long["cache"] == 8 * short["cache"]
