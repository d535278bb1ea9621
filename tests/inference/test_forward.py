"""A few layers at a time give what all give at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family_files import DIRECTORY

import jint8
from jint8._inference import forward as _forward
from jint8._inference.programs import Programs
from jint8.models import context, make_cache

TOKENS = np.random.default_rng(0).integers(3, 96, (2, 11)).astype(np.int32)
FIRST = jnp.array([0, 4])  # the second row begins with padding


# positions of a table and projections around the layers; layers with a window between others; experts
@pytest.mark.first_case
@pytest.mark.parametrize("family", ["opt_350m", "gemma3", "mixtral"])
@pytest.mark.parametrize(
    "quantize", [pytest.param(False, marks=pytest.mark.slow, id="float"), pytest.param(True, id="int8")]
)
def test_equals_apply(family, quantize, monkeypatch):
    monkeypatch.setattr(_forward, "GROUP", 1 if family == "mixtral" else 2)
    model = jint8.load(DIRECTORY / family, quantize=quantize, dtype="float32")
    params = {"params": model.params}
    apply = jax.jit(
        lambda params, cache: model.model.apply(params, TOKENS, context(TOKENS, None, FIRST), cache, last=True)
    )
    expected = apply(params, make_cache(model.config, 2, 16))
    got = _forward.forward(model.model, params, TOKENS, None, FIRST, make_cache(model.config, 2, 16), last=True)
    tolerance = 2e-2 if quantize else 1e-5  # sums of floats in another order may move a value by one int8 step
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance * np.abs(b).max())


def test_layers_share_a_program(monkeypatch):
    monkeypatch.setattr(_forward, "GROUP", 1)
    model = jint8.load(DIRECTORY / "llama", dtype="float32")
    programs = Programs()
    monkeypatch.setattr(_forward, "PROGRAMS", programs)
    logits = model.logits(TOKENS)
    assert model.config.num_layers > 1
    assert len(programs) == programs.made == 3  # the embedding, one for all layers, the head
    np.testing.assert_array_equal(logits, model.logits(TOKENS))
    assert programs.made == 3
