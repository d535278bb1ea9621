"""Rotated models from a checkpoint to logits: loaded, saved, sharded."""

import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
from family_files import DIRECTORY, expected
from tiny_model import make_llama_directory
from virtual_devices import run_on_eight_devices

import jint8

ROTATED = jint8.Config.preset("rotated")
COLUMNS = jint8.Config(outliers="static", rotate=64)
DOWN = "layers_0/mlp/down/weight"
TOKENS = np.arange(24)[None] * 7 % 250


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_llama_directory(tmp_path_factory.mktemp("rotated") / "llama", seed=2)


@pytest.fixture(scope="module")
def found(source):
    return jint8.load(source, dtype="float32", quantize=False).calibrate("Jackdaws love my big sphinx of quartz. " * 3)


@pytest.fixture(scope="module")
def model(source, found):
    return jint8.load(source, config=ROTATED, outliers=found, dtype="float32")


@pytest.fixture
def saved(model, tmp_path):
    jint8.save(tmp_path / "saved", model)
    return tmp_path / "saved"


def weight(model, path=DOWN):
    leaf = model.params
    for key in path.split("/"):
        leaf = leaf[key]
    return leaf


def logits(model):
    return np.asarray(model.logits(TOKENS))


def error(got, want):
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def assert_same_bits(got, expected):
    got_leaves, got_structure = jax.tree.flatten(got)
    leaves, structure = jax.tree.flatten(expected)
    assert got_structure == structure
    for a, b in zip(got_leaves, leaves, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.slow
def test_nearer_to_float_than_int8_with_decomposition(source, model):
    want = logits(jint8.load(source, dtype="float32", quantize=False))
    rotated, paper = (error(logits(m), want) for m in (model, jint8.load(source, dtype="float32")))
    assert 1e-4 < rotated < paper
    assert model.quant == ROTATED


@pytest.mark.slow
def test_load_calibrates_by_itself(source, model):
    own = jint8.load(source, config=ROTATED, dtype="float32")
    w, given = weight(own), weight(model)
    assert jax.tree.structure(own.params) == jax.tree.structure(model.params)
    correlation = np.corrcoef(np.log(w.smooth).ravel(), np.log(given.smooth).ravel())[0, 1]
    assert 0.8 < correlation < 1 - 1e-6  # another text, and activations of an int8 model


@pytest.mark.slow
def test_calibrated_on_no_more_tokens_than_there_are_positions():
    """GPT-2's fixture has 48 learned positions: behind them there would be NaN."""
    model = jint8.load(DIRECTORY / "gpt2", config=COLUMNS, dtype="float32")
    want = expected("gpt2")["logits"]
    got = model.model.apply({"params": model.params}, expected("gpt2")["tokens"])[0]
    assert error(np.asarray(got), want) < 0.06


def test_calibrate_false_smooths_by_the_weights(source, model):
    alone = jint8.load(source, config=ROTATED, calibrate=False, dtype="float32")
    kernel = jint8.load(source, dtype="float32", quantize=False).params["layers_0"]["mlp"]["down"]["weight"]
    np.testing.assert_allclose(
        weight(alone).smooth, jint8.quantize(kernel, contract_axes=1, config=ROTATED).smooth, rtol=3e-6
    )
    assert not np.allclose(weight(alone).smooth, weight(model).smooth, rtol=0.05)


def test_same_bits(source, found, model, saved, tmp_path):
    both = jint8.load(source, config=COLUMNS, outliers=found, dtype="bfloat16", include="embedding")
    jint8.save(tmp_path / "columns", both)
    for before, path in ((model, saved), (both, tmp_path / "columns")):
        after = jint8.load(path, verify=True)
        assert_same_bits(after.params, before.params)
        assert (after.quant, after.model) == (before.quant, before.model)
    assert weight(both, "layers_0/attention/qkv/weight").outlier_index.ravel().tolist() == [3, 17]


def test_format_versions(source, saved, tmp_path):
    """Version 3 only where there are factors; without, not even their names, which jint8 0.1.0 would refuse."""
    assert json.loads((saved / "jint8.json").read_text())["version"] == 3
    jint8.save(tmp_path / "plain", jint8.load(source))
    text = (tmp_path / "plain" / "jint8.json").read_text()
    assert json.loads(text)["version"] == 2
    assert "smooth" not in text
    assert "rotate" not in text


def test_config_of_the_caller(saved, model):
    after = jint8.load(saved, config=jint8.Config(scheme="vector", digits=2, rotate=16))
    assert after.quant == jint8.Config(scheme="vector", digits=2, rotate=64)  # rotated as it was
    assert weight(after).config == jint8.Config(scheme="vector", digits=2, rotate=16)
    assert weight(model).config.rotate == 16  # of 48 features
    for config in (jint8.Config(), jint8.Config(scheme="vector")):
        with pytest.raises(
            ValueError, match=r"Expected a config with rotate=64, as the model was saved with \(.*\), got .*=0"
        ):
            jint8.load(saved, config=config)


def test_a_saved_model_that_is_not_rotated(source, tmp_path):
    jint8.save(tmp_path / "plain", jint8.load(source, config=jint8.Config(scheme="vector")))
    with pytest.raises(
        ValueError, match=r"Expected a config with rotate=0, as the model was saved with \(.*\), got rotate=64"
    ):
        jint8.load(tmp_path / "plain", config=ROTATED)


def arrays(change):
    def fault(path):
        tensors = dict(safetensors.numpy.load_file(path / "model.safetensors"))
        name = f"{DOWN}#smooth"
        tensors[name] = change(tensors[name])
        safetensors.numpy.save_file(tensors, path / "model.safetensors")

    return fault


def metadata(edit):
    def fault(path):
        value = json.loads((path / "jint8.json").read_text())
        edit(value["weights"][DOWN])
        (path / "jint8.json").write_text(json.dumps(value))

    return fault


def without_factors(path):
    tensors = dict(safetensors.numpy.load_file(path / "model.safetensors"))
    del tensors[f"{DOWN}#smooth"]
    safetensors.numpy.save_file(tensors, path / "model.safetensors")
    metadata(lambda w: w["arrays"].remove("smooth"))(path)


def rotate(block):
    return metadata(lambda w: w["fields"]["config"].update(rotate=block))


FAULTS = {
    "shape": (
        arrays(lambda x: x[:, 1:].copy()),
        r"Expected a smoothing factor for each feature of q of shape \(32, 48\)",
    ),
    "one for all": (arrays(lambda x: x[:, :1].copy()), "Expected a smoothing factor for each feature"),
    "rank": (arrays(lambda x: x.reshape(-1)), "Expected arrays of 2 dimensions"),
    "dtype": (arrays(lambda x: x.astype(np.float64)), "Expected smooth in float32"),
    "missing": (without_factors, "Expected smoothing factors of a weight with rotate=16, got .*q int8"),
    "rotate=0": (rotate(0), r"Expected none with rotate=0, got .*smooth float32\(1, 48\)"),
    "block": (rotate(32), "Expected features in blocks of rotate=32, got 48"),
    "not a block": (rotate(3), "Expected rotate to be 0 or a power of two"),
}


@pytest.mark.parametrize(("fault", "message"), FAULTS.values(), ids=FAULTS)
def test_faults_in_a_saved_model(fault, message, saved):
    fault(saved)
    with pytest.raises(ValueError, match=rf"tensor '{DOWN}': {message}"):
        jint8.load(saved)


@pytest.mark.slow
def test_a_saved_block_that_does_not_fit_the_mesh():
    """The error names the weight, and what to quantize it with."""
    refused = on_devices(2)["refused"]
    assert refused.startswith("layers_0/attention/out/weight: Expected devices to have whole blocks of the 32 features")
    assert refused.endswith("got runs of 16 features each: quantize it with rotate=16.")


@pytest.mark.slow
def test_an_adapter_beside_rotated_weights():
    adapter = DIRECTORY.parent / "adapters" / "llama"
    model = jint8.load(DIRECTORY / "llama", adapter=adapter, config=ROTATED, calibrate=False, dtype="float32")
    in_float = jint8.with_config(model.params, jint8.Config(scheme="none"))

    @jax.jit
    def run(*trees):
        return [model.model.apply({"params": tree}, expected("llama")["tokens"])[0] for tree in trees]

    got, exact, dequantized = run(model.params, in_float, jint8.dequantize_params(model.params))
    assert error(exact, dequantized) < 1e-5
    assert 1e-4 < error(got, dequantized) < 0.05
    want = np.load(adapter / "expected.npz")["logits"]
    assert error(got, want) < 0.08 < 0.2 < error(expected("llama")["logits"], want)


@pytest.mark.slow
def test_an_encoder():
    path = DIRECTORY.parent / "encoders" / "bert"
    tokens = np.load(path / "expected.npz")["tokens"][0].tolist()
    model = jint8.load_encoder(path, config=ROTATED, dtype="float32")
    want = jint8.load_encoder(path, quantize=False, dtype="float32").embed_tokens([tokens])
    assert np.sum(model.embed_tokens([tokens]) * want) > 0.999


@functools.cache
def on_devices(*counts):
    script = Path(__file__).parent / "rotated_on_a_mesh.py"
    return run_on_eight_devices(script, *map(str, counts), optimized=False)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 4])
def test_on_a_mesh(devices):
    """Row-parallel weights are rotated in blocks of one device's features; `jint8 fit` counts the same bytes."""
    got = on_devices(devices)[str(devices)]
    column = {"attention/qkv/weight": 32, "mlp/gate_up/weight": 32}
    row = {2: {"attention/out/weight": 16, "mlp/down/weight": 8}, 4: {"attention/out/weight": 8, "mlp/down/weight": 4}}
    assert got["blocks"] == column | row[devices]
    assert got["shards"] == {
        "attention/out": [1, 32 // devices], "mlp/down": [1, 48 // devices], "mlp/gate_up": [1, 32]
    }  # fmt: skip
    assert got["error"] < 1e-5
    assert 1e-4 < got["of_float"] < 0.06
    assert got["same"]
    assert got["bytes"] == got["fit"]
