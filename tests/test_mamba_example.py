"""The Mamba of examples/mamba.py: its forward against NumPy, in int8, and with the weights of typeseg's wheel."""

import importlib
import os
import runpy
from pathlib import Path

import jax
import numpy as np
import pytest

import jint8

EXAMPLE = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "mamba.py"))
WHEEL = os.environ.get("JINT8_TEST_TYPESEG")  # typeseg-0.2.7-py3-none-any.whl; the example says how to get it
SMALL = {"layers": 2, "width": 32, "state": 4, "rank": 2, "classes": 5}
TEXT = b"def f(x):\n\treturn {'a': x} # caf\xc3\xa9\r\n<p class=\"b\">SELECT 1;</p>\x00\x7f"


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def normalized(x, params):
    spread = x - x.mean(-1, keepdims=True)
    return spread / np.sqrt((spread**2).mean(-1, keepdims=True) + 1e-6) * params["scale"] + params["bias"]


def dense(x, params):
    return x @ params["kernel"] + params["bias"]


def state_space(u, step, b, c, a):
    """One position after the other, with a state [inner, state]."""
    h, y = np.zeros(a.shape), []
    for t in range(len(u)):
        h = np.exp(np.outer(step[t], np.ones(a.shape[1])) * a) * h + np.outer(step[t] * u[t], b[t])
        y.append(h @ c[t])
    return np.array(y)


def oracle(params, tokens, *, layers, width, state, rank, classes):
    """float64 logits [time, classes] of tokens [time]."""
    x = params["Embed_0"]["embedding"][tokens]
    for layer in range(layers):
        p = params[f"CheckpointMambaBlock1D_{layer}"]
        h = dense(normalized(x, p["LayerNorm_0"]), p["Dense_0"])
        u, gate = h[:, :width], h[:, width:]
        padded = np.concatenate([np.zeros((1, width)), u, np.zeros((2, width))])
        kernel = p["Conv_0"]["kernel"][:, 0]
        u = sum(padded[j : j + len(u)] * kernel[j] for j in range(4)) + p["Conv_0"]["bias"]
        u = u * sigmoid(u)
        selected = dense(u, p["Dense_1"])
        b, c = selected[:, rank : rank + state], selected[:, rank + state :]
        step = np.log1p(np.exp(dense(selected[:, :rank], p["Dense_2"]))) + 1e-4
        a = -np.exp(p["A_log"])
        forward = state_space(u, step, b, c, a)
        backward = state_space(u[::-1], step[::-1], b[::-1], c[::-1], a)[::-1]
        y = (forward + backward + 2 * p["D"] * u) * gate * sigmoid(gate)
        x = x + dense(y, p["Dense_3"])
    return dense(normalized(x, params["LayerNorm_0"]), params["Dense_0"])


@pytest.fixture(scope="module")
def small():
    """A model with random values in all of its parameters, also in those that begin as zeros or ones."""
    model, tokens = EXAMPLE["Model"](**SMALL), EXAMPLE["tokens_of"](TEXT)
    leaves, tree = jax.tree.flatten(model.init(jax.random.key(0), tokens[None]))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noise = [leaf + 0.3 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    return model, jax.tree.unflatten(tree, noise), tokens


def test_tokens():
    tokens = EXAMPLE["tokens_of"](TEXT)
    assert tokens[:10].tolist() == list(TEXT[:10])  # with a line end and a tab
    assert tokens[-2:].tolist() == [128, 128]
    assert np.sum(tokens == 128) == 4
    assert len(tokens) == len(TEXT)


@pytest.mark.slow
def test_forward(small):
    model, params, tokens = small
    want = oracle(jax.tree.map(np.float64, params)["params"], tokens, **SMALL)
    got = model.apply(params, tokens[None])[0]
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_all_projections_become_int8(small):
    model, params, tokens = small
    plan = jint8.plan(model.apply, params, tokens[None])
    assert len(plan) == 4 * SMALL["layers"] + 1
    assert all("Dense" in path and path.endswith("kernel") for path in plan)


@pytest.mark.slow
def test_errors_are_measured(small):
    model, params, tokens = small
    configs = {
        "static": jint8.Config.preset("static"),
        "absmax": jint8.Config(scheme="absmax"),
        "none": jint8.Config(scheme="none"),
    }
    results = EXAMPLE["measure"](model, params, [tokens[None]], [tokens[None, ::-1]], configs)
    assert 0 < results["static"]["kl"] < 0.05
    assert results["absmax"]["kl"] > results["static"]["kl"]
    assert results["none"]["kl"] < 1e-10
    assert results["none"]["top1"] == 1
    assert results["static"]["bytes"] < results["none"]["bytes"]


def test_divergence():
    logits = np.log([[[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]])
    other = np.log([[[0.8, 0.1, 0.1], [0.5, 0.4, 0.1]]]) + 7.0  # a constant doesn't matter
    row = EXAMPLE["compare"]([EXAMPLE["log_probabilities"](logits)], [EXAMPLE["log_probabilities"](other)])
    want = 0.5 * np.log(0.5 / 0.8) + 2 * 0.25 * np.log(2.5) + 0.1 * np.log(0.1 / 0.5) + 0.8 * np.log(2)
    np.testing.assert_allclose(row["kl"], want / 2)
    assert row["top1"] == 0.5


@pytest.mark.slow
@pytest.mark.skipif(WHEEL is None, reason="needs the wheel of typeseg 0.2.7 at $JINT8_TEST_TYPESEG")
def test_forward_of_the_published_model(monkeypatch):
    monkeypatch.syspath_prepend(WHEEL)
    theirs, tokenize, runtime = (
        importlib.import_module(f"typeseg.{name}") for name in ("_numpy_backend", "_tokenize", "_runtime")
    )
    model, params = EXAMPLE["Model"](), EXAMPLE["read_weights"](WHEEL)
    run = jax.jit(model.apply)
    files, length = [Path(os.__file__), Path(os.__file__).parent / "LICENSE.txt", Path(__file__)], 384
    texts = [*(path.read_text()[:length] for path in files), ("naïve café – " * length)[:length]]
    for text in texts:
        want = theirs.mamba_forward(runtime._weights("mamba_al.npz"), tokenize.text_to_bytes(text))
        got = run(params, EXAMPLE["tokens_of"](text.encode())[None])[0]
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


@pytest.mark.slow
@pytest.mark.skipif(WHEEL is None, reason="needs the wheel of typeseg 0.2.7 at $JINT8_TEST_TYPESEG")
def test_published_model_in_int8():
    model, params = EXAMPLE["Model"](), EXAMPLE["read_weights"](WHEEL)
    inputs, calibration = EXAMPLE["pieces"]([__file__], 256)
    configs = {name: EXAMPLE["CONFIGS"][name] for name in ("vector", "llm.int8, calibrated columns")}
    results = EXAMPLE["measure"](model, params, inputs, calibration, configs)
    assert all(0 < row["kl"] < 0.01 and row["top1"] > 0.97 for row in results.values())
