"""Models in four bits from a checkpoint to text: loaded, saved, generated with."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from tiny_model import make_llama_directory

import jint8
from jint8._inference import load_four_bits
from jint8.cli import main

CONFIGS = {
    "oc": jint8.Config(scheme="int4", group=16, grouping="oc"),
    "ic": jint8.Config(scheme="int4", group=16, grouping="ic"),
    "ada": jint8.Config(scheme="int4", group=16),
    "columns": jint8.Config(scheme="int4", group=16, outliers="static"),
    "rotated": jint8.Config(scheme="int4", group=16, rotate=64, outliers="static"),
}
TEXT = "Jackdaws love my big sphinx of quartz. " * 3
TOKENS = np.arange(24)[None] * 7 % 250
DOWN = "layers_0/mlp/down/weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_llama_directory(tmp_path_factory.mktemp("four") / "llama", seed=2)


@pytest.fixture(scope="module")
def floats(source):
    return jint8.load(source, dtype="float32", quantize=False)


@pytest.fixture(scope="module")
def found(floats):
    return floats.calibrate(TEXT)


@pytest.fixture(scope="module", params=CONFIGS)
def model(request, source, found):
    return jint8.load(source, config=CONFIGS[request.param], outliers=found, dtype="float32")


def weights(model):
    leaves = jax.tree_util.tree_leaves(model.params, is_leaf=lambda leaf: isinstance(leaf, jint8.QTensor))
    return [leaf for leaf in leaves if isinstance(leaf, jint8.QTensor)]


@pytest.mark.first_case
def test_loaded_as_the_parameters_are_quantized(model, floats, found):
    expected = jint8.quantize_params(floats.params, config=model.quant, outliers=found)
    assert jax.tree.structure(model.params) == jax.tree.structure(expected)
    for got, want in zip(jax.tree.leaves(model.params), jax.tree.leaves(expected), strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, want)
    assert {w.q.dtype for w in weights(model)} == {np.dtype("uint8")}
    assert any(w.outlier_index is not None for w in weights(model)) == (model.quant.outliers == "static")


@pytest.mark.first_case
def test_logits_are_those_of_the_dequantized_weights(model, floats):
    exact = np.asarray(jint8.dequantize_params(model.params)["layers_0"]["mlp"]["down"]["weight"])
    assert np.abs(exact - floats.params["layers_0"]["mlp"]["down"]["weight"]).mean() > 0.001
    want = floats.model.apply({"params": jint8.dequantize_params(model.params)}, TOKENS)[0]
    np.testing.assert_allclose(model.logits(TOKENS), want, rtol=1e-3, atol=1e-3 * np.abs(want).max())


@pytest.mark.first_case
def test_generates_by_decoding_as_by_whole_sequences(model):
    ids = next(iter(model.generate_tokens([[5, 9, 11, 3]], max_tokens=6, temperature=0.0)))
    row = [5, 9, 11, 3]
    for token in np.asarray(ids).reshape(-1):
        logits = np.asarray(model.logits(np.array([row])))[0, -1]
        assert logits[token] >= logits.max() - 0.02 * np.abs(logits).max()  # one row has 16-bit activations
        row.append(int(token))


@pytest.mark.first_case
def test_saved_every_bit(model, tmp_path):
    jint8.save(tmp_path / "saved", model)
    assert json.loads((tmp_path / "saved" / "jint8.json").read_text())["version"] == 4
    after = jint8.load(tmp_path / "saved", verify=True)
    assert (after.quant, jax.tree.structure(after.params)) == (model.quant, jax.tree.structure(model.params))
    for got, want in zip(jax.tree.leaves(after.params), jax.tree.leaves(model.params), strict=True):
        assert np.asarray(got).tobytes() == np.asarray(want).tobytes()
    with pytest.raises(ValueError, match=r"runs on weights quantized by 'int4' .*, got 'vector'"):
        jint8.load(tmp_path / "saved", config=jint8.Config(scheme="vector"))
    with pytest.raises(ValueError, match=r"Expected one symmetric scale per row|Expected a weight as the model has it"):
        jint8.save(tmp_path / "other", model, format="bitsandbytes")


def test_a_saved_weight_whose_arrays_do_not_fit(source, tmp_path):
    model = jint8.load(source, config=CONFIGS["oc"], dtype="float32")
    jint8.save(tmp_path / "saved", model)
    file = tmp_path / "saved" / "jint8.json"
    text = json.loads(file.read_text())
    for change, message in (
        ({"features": None}, "Expected q in int8, got .*uint8"),
        ({"features": 40}, "40 features in bytes of two"),
        ({"config": {"scheme": "int4", "group": 32, "grouping": "oc"}}, "groups of 32"),
        ({"config": {"scheme": "int4", "group": 16, "grouping": "ada"}}, "in groups 'oc' or 'ic'"),
    ):
        changed = json.loads(json.dumps(text))
        changed["weights"][DOWN]["fields"].update(change)
        file.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=message):
            jint8.load(tmp_path / "saved")


@pytest.mark.slow
def test_an_embedding_is_looked_up_and_a_head(source, floats):
    for grouping in ("oc", "ic"):
        config = jint8.Config(scheme="int4", group=16, grouping=grouping)
        model = jint8.load(source, config=config, dtype="float32", include=("embedding", "lm_head"))
        assert isinstance(model.params["embedding"], jint8.QTensor)
        want = floats.model.apply({"params": jint8.dequantize_params(model.params)}, TOKENS)[0]
        np.testing.assert_allclose(model.logits(TOKENS), want, rtol=1e-3, atol=1e-3 * np.abs(want).max())


@pytest.mark.slow
def test_from_the_command_line(source, tmp_path, capsys):
    (tmp_path / "text").write_text(TEXT * 4)
    arguments = ["quantize", str(source), str(tmp_path / "saved"), "--scheme", "int4", "--json", "--quiet"]
    assert main([*arguments, "--calibrate", str(tmp_path / "text")]) == 0
    done = json.loads(capsys.readouterr().out)
    assert done["bytes_out"] < done["bytes_in"]
    assert main(["generate", str(tmp_path / "saved"), "--prompt", "A", "--max-tokens", "3", "--json", "--quiet"]) == 0
    assert json.loads(capsys.readouterr().out)["new_tokens"] <= 3
    measure = [
        "eval",
        str(source),
        "--scheme",
        "int4",
        "--text",
        str(tmp_path / "text"),
        "--seq-len",
        "32",
        "--compare",
    ]
    assert main([*measure, "--json", "--quiet"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["scheme"] == "int4"
    assert found["threshold"] == 0
    assert 0 < found["kl"] < 1


def test_a_mesh_is_refused_when_quantizing(source):
    mesh = jax.make_mesh((1,), ("model",))
    with pytest.raises(ValueError, match="scheme of int8 with a mesh, got 'int4'"):
        jint8.load(source, config=CONFIGS["oc"], mesh=mesh)


BY_LAYER = {
    "gptq": jint8.Config(scheme="int4", group=16, rotate=64, outliers="static", rounding="gptq"),
    "nearest": jint8.Config(scheme="int4", group=16, outliers="static"),
}


@pytest.mark.slow
@pytest.mark.parametrize("config", BY_LAYER.values(), ids=BY_LAYER)
def test_each_layer_by_what_the_layers_before_it_have_made_of_the_text(config, source, floats):
    """The second layer's weights are what they are by the moments behind the first layer's, dequantized."""
    model = jint8.load(source, config=config, calibrate=TEXT, dtype="float32")
    before = floats.params | {"layers_0": jint8.dequantize_params(model.params["layers_0"])}
    for name, params in (("layers_0", floats.params), ("layers_1", before)):
        other = dataclasses.replace(floats, params=params)
        found = jint8.calibrate(other.run, {"params": params}, other.batches(TEXT), budget=8, moments=True)
        path = f"{name}/attention/qkv/weight"
        known = {"outliers": found[path], "rms": found.rms[path], "moments": found.moments[path]}
        float_weight = params[name]["attention"]["qkv"]["weight"]
        want = jint8.quantize(float_weight, contract_axes=1, config=config, **known)
        got = model.params[name]["attention"]["qkv"]["weight"]
        assert got.config == want.config
        np.testing.assert_array_equal(got.outlier_index, want.outlier_index)
        apart = np.abs(got.dequantize() - want.dequantize()) > 1e-3 * np.abs(float_weight).max()
        assert apart.mean() < 0.02  # ties, which float32 may decide otherwise


@pytest.mark.slow
def test_gptq_is_calibrated_on_what_the_model_writes(source, monkeypatch):
    monkeypatch.setattr(load_four_bits, "OWN_SEQUENCES", 3)
    monkeypatch.setattr(load_four_bits, "CALIBRATION_LENGTH", 64)
    config = jint8.Config(scheme="int4", group=16, grouping="oc", rounding="gptq")
    counted = []
    model = jint8.load(source, config=config, dtype="float32", progress=lambda *of: counted.append(of))
    again = jint8.load(source, config=config, dtype="float32")
    for got, want in zip(jax.tree.leaves(model.params), jax.tree.leaves(again.params), strict=True):
        np.testing.assert_array_equal(got, want)
    assert counted[-1][0] == counted[-1][1]
    calls = load_four_bits.own_tokens(model)
    assert [call.shape for call in calls] == [(1, 64)] * 3
    assert len({call.tobytes() for call in calls}) == 3
    with pytest.raises(ValueError, match=r"rounding='nearest' without calibration, got calibrate=False"):
        jint8.load(source, config=config, calibrate=False)
    with pytest.raises(ValueError, match=r"Expected second moments of the activations for rounding='gptq'"):
        jint8.load(source, config=config, outliers=model.calibrate(TEXT))


@pytest.mark.slow
def test_gptq_from_the_command_line(source, tmp_path, capsys):
    (tmp_path / "text").write_text(TEXT * 4)
    arguments = ["quantize", str(source), str(tmp_path / "saved"), "--preset", "w4-best", "--json", "--quiet"]
    assert main([*arguments, "--calibrate", "none"]) == 2
    assert "without calibration" in capsys.readouterr().err
    assert main([*arguments, "--calibrate", str(tmp_path / "text")]) == 0
    saved = jint8.load(tmp_path / "saved")
    assert saved.quant == jint8.Config.preset("w4-best")
    assert all(w.outlier_index is not None for w in weights(saved))
