"""MaxText's own models, at toy sizes, in int8: scanned layers, the linen form, a cache, and sparse experts on a mesh.

Skipped where MaxText isn't installed; docs/maxtext.md says how to install what of it runs a model on a CPU.
"""

import functools
from pathlib import Path

import cases
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from virtual_devices import run_on_eight_devices

import jint8

pytest.importorskip("maxtext", reason="needs MaxText, which takes Python 3.12; see docs/maxtext.md")
import maxtext_models

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # theirs
MODELS = [(name, scan) for name in maxtext_models.DECODERS for scan in (True, False)]


@functools.cache
def made(name, scan):
    return maxtext_models.from_config(name, scan_layers=scan)


@pytest.mark.parametrize(("name", "scan"), MODELS)
def test_as_a_function_of_its_parameters(name, scan):
    run, params = made(name, scan)
    inputs = maxtext_models.INPUTS
    plan = jint8.plan(run, params, *inputs)
    layers = {path: axes for path, axes in plan.stacked.items() if "/layers/" in path}
    assert len(plan) - len(layers) == (1 if scan else len(plan))
    assert all(1 in axes for axes in layers.values())
    int8 = jint8.quantize_params(params, plan=plan)
    kernels = [leaf for leaf in jax.tree.leaves(int8, is_leaf=_is_int8) if _is_int8(leaf)]
    assert len(kernels) == len(plan) - 1  # but for the output head
    got = jax.jit(jint8.apply(run))(int8, *inputs)
    assert cases.count_int8_products(jint8.apply(run), int8, *inputs) >= len(kernels)
    assert cases.relative_error(got, jax.jit(run)(params, *inputs)) < 0.03


@pytest.mark.parametrize("scan", [True, False], ids=["scanned", "unrolled"])
def test_in_their_linen_module(scan):
    model, variables = maxtext_models.as_linen("llama2", scan_layers=scan)
    inputs = maxtext_models.INPUTS
    run = functools.partial(model.apply, enable_dropout=False)
    int8 = jint8.quantize_params(variables, plan=jint8.plan(run, variables, *inputs))
    got = jax.jit(jint8.apply(run))(int8, *inputs)
    assert cases.count_int8_products(jint8.apply(run), int8, *inputs) >= 7
    assert cases.relative_error(got, jax.jit(run)(variables, *inputs)) < 0.03


@pytest.mark.parametrize("scan", [True, False], ids=["scanned", "unrolled"])
def test_decoding_with_their_cache(scan):
    run, params, cache = maxtext_models.with_cache("llama2", scan_layers=scan)
    tokens, positions, segments = (value[:1] for value in maxtext_models.INPUTS)

    def decode(run, params):
        step = jax.jit(run, static_argnums=5)
        logits, state = step(params, cache, tokens, positions, segments, "prefill")
        found = [logits[:, -1]]
        for i in range(4):
            token, position = jnp.array([[7 * i]]), jnp.array([[tokens.shape[1] + i]])
            logits, state = step(params, state, token, position, None, "autoregressive")
            found.append(logits[:, -1])
        return jnp.stack(found)

    plan = jint8.plan(lambda params: run(params, cache, tokens, positions, segments, "prefill"), params)
    got = decode(jint8.apply(run), jint8.quantize_params(params, plan=plan))
    assert cases.relative_error(got, decode(run, params)) < 0.03


def test_their_scanned_module_itself_is_refused_with_the_way_out():
    model = maxtext_models.module("llama2", scan_layers=True)
    call = lambda model, *inputs: model(*inputs, enable_dropout=False)
    with pytest.raises(TypeError, match=r"splits the state of stacked layers by nnx.Param.*jint8.apply"):
        jint8.nnx.quantize(model, *maxtext_models.INPUTS, call=call)


@pytest.mark.parametrize("name", ["llama2", "mixtral, sparse"])
def test_their_module_of_separate_layers(name):
    model = maxtext_models.module(name, scan_layers=False)
    call = lambda model, *inputs: model(*inputs, enable_dropout=False)
    int8 = jint8.nnx.quantize(model, *maxtext_models.INPUTS, call=call)
    got, want = (nnx.jit(call)(m, *maxtext_models.INPUTS) for m in (int8, model))
    assert cases.relative_error(got, want) < 0.03


def test_sparse_experts_on_a_mesh():
    found = run_on_eight_devices(Path(maxtext_models.__file__), optimized=False)
    assert found["devices"] == 8
    assert found["wi_0"] == [4, 3, 128 // 2, 64 // 4]  # a device's part of [experts, layers, n, k]
    assert found["error"] < 0.03


def _is_int8(leaf):
    return isinstance(leaf, jint8.QTensor)
