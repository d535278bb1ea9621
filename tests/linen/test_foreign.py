"""Models that others wrote, run from their own packages: int8 without a changed line, and no silent dequantization.

Skipped where a package isn't installed; benchmarks/foreign_models.py says how to install them and measures more.
"""

import warnings

import cases
import jax
import numpy as np
import pytest

import jint8

foreign = pytest.importorskip("foreign", reason="needs the benchmarks, which aren't in the wheel")
compiled_products = pytest.importorskip("hlo").compiled_products
pytestmark = pytest.mark.filterwarnings("ignore")  # theirs
WITHOUT = jint8.Config(threshold=0.0)

# Embeddings that are also the output head: they stay in floating point unless they are asked for.
TIED = {
    "gemma.gm.nn.Transformer": "embedder/input_embedding",
    "tunix Gemma3": "embedder/input_embedding",
    "FlaxGPT2LMHeadModel": "transformer/wte/embedding",
    "FlaxOPTForCausalLM": "model/decoder/embed_tokens/embedding",
    "FlaxBloomForCausalLM": "transformer/word_embeddings/embedding",
}
EXPERTS = "tunix Qwen3, experts"
MINILM = "FlaxBertModel, all-MiniLM-L6-v2"


@pytest.fixture(scope="module", params=foreign.MODELS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def model(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return foreign.load(name)
        except ImportError as error:
            pytest.skip(str(error))


@pytest.fixture(scope="module")
def plan(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.plan()


def errors(model, plan, *configs):
    """Relative error against the float model, under each config, of the same int8 weights."""
    want = cases.jit(model.apply)(model.params, model.inputs)
    function, params = model.quantize(model.params, plan, jint8.Config())
    run = cases.jit(function)
    return [cases.relative_error(run(jint8.with_config(params, config), model.inputs), want) for config in configs]


def test_everything_multiplied_is_quantized(name, model, plan):
    """But for the output head, and for embeddings that are also the head."""
    _, params = model.quantize(model.params, plan, WITHOUT)
    quantized = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, jint8.QTensor))
    heads = [path for path in plan if path.split("/")[0] in jint8.OUTPUT_HEADS]
    assert sum(isinstance(leaf, jint8.QTensor) for leaf in quantized) == len(plan) - len(heads) > 0
    assert list(plan.tied) == ([TIED[name]] if name in TIED else [])
    assert not any("can't be followed" in reason for reason in plan.skipped.values())


@pytest.mark.first_case
def test_int8_products_in_the_compiled_program(name, model, plan):
    function, params = model.quantize(model.params, plan, WITHOUT)
    in_int8 = compiled_products(function, params, model.inputs)
    in_float = compiled_products(model.apply, model.params, model.inputs)
    assert in_float.s8 == 0
    assert in_int8.s8 + in_int8.other == in_float.other
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, jint8.QTensor))
    layers = sum(isinstance(leaf, jint8.QTensor) for leaf in leaves)
    if name == EXPERTS:  # each of four experts is sliced out and multiplied by itself: 3 leaves, 2 layers
        layers += 3 * 3 * 2
    if name == MINILM:  # the pooler isn't used by the sentence embedding
        layers -= 1
    assert in_int8.s8 == layers


def test_tied_embeddings_too(name, model, plan):
    """However the model writes its head, it is one more int8 product where the plan names the embedding."""
    if name not in TIED:
        pytest.skip("no tied embedding")
    counts = [
        cases.count_int8_products(*model.quantize(model.params, chosen, WITHOUT), model.inputs)
        for chosen in (plan, plan.with_(plan.tied))
    ]
    assert counts[1] == counts[0] + 1


@pytest.mark.first_case
def test_error(name, model, plan):
    assert errors(model, plan, jint8.Config())[0] < 0.08


def test_planted_outliers(name, model, plan):
    """They cost no more than int8 weights cost by themselves, with float activations."""
    if foreign.MODELS[name].real:
        pytest.skip("real weights have outliers of their own")
    planted = foreign.planted(model)
    if planted is model:
        pytest.skip("no norms")
    error, floor = errors(planted, plan, jint8.Config(), jint8.Config(scheme="none"))
    assert error < 1.1 * floor + 0.002


def test_minilm_embeddings():
    try:
        model = foreign.load(MINILM)
    except ImportError as error:
        pytest.skip(str(error))
    want = np.asarray(cases.jit(model.apply)(model.params, model.inputs))
    function, params = model.quantize(model.params, model.plan(), jint8.Config())
    cosine = (np.asarray(cases.jit(function)(params, model.inputs)) * want).sum(-1)
    *sentences, one_word = cosine
    assert min(sentences) > 0.999
    assert one_word > 0.99  # int8 weights alone cost 0.004 of it
