"""NF4 and FP4 checkpoints of bitsandbytes; see tests/fixtures/make_four_bits.py."""

import json
import warnings

import jax
import numpy as np
import pytest
import safetensors.numpy
from checkpoint_files import write_directory
from family_files import DIRECTORY

import jint8
from jint8._core.qtensor import is_qtensor
from jint8.checkpoints import open_checkpoint

SAVED = DIRECTORY.parent / "four_bits"
NAMES = {"nf4": 14, "nf4_nested": 14, "fp4": 8}  # and how many weights are in four bits
NF4, DOWN = SAVED / "nf4", "model.layers.0.mlp.down_proj.weight"
STATE = f"{DOWN}.quant_state.bitsandbytes__nf4"


def load(path, **options):
    return jint8.load(path, dtype="float32", **options)


def tensors(path):
    return safetensors.numpy.load_file(path / "model.safetensors")


@pytest.mark.parametrize("name", NAMES)
def test_values_are_those_that_bitsandbytes_dequantizes(name):
    expected = np.load(SAVED / name / "expected.npz")
    weights = [each for each in expected.files if each.endswith("/weight")]
    assert len(weights) == NAMES[name]
    with open_checkpoint(SAVED / name) as checkpoint:
        for each in weights:
            at = each.replace("/", ".")
            assert checkpoint.tensors[at].dtype == name[:3].upper()
            got = checkpoint.read(at)
            assert got.dtype == np.float32
            np.testing.assert_allclose(got, expected[each], rtol=1e-6, atol=1e-7)
            np.testing.assert_array_equal(checkpoint.read_rows(at, 3, 8), got[3:8])


def oracle(stored, name):
    """float64 values of a weight, one after the other."""
    state = json.loads(stored[next(each for each in stored if each.startswith(f"{name}.quant_state"))].tobytes())
    get = lambda what: stored[f"{name}.{what}"].astype(np.float64)
    n, k = state["shape"]
    values = np.zeros(n * k)
    for i in range(n * k):
        byte = int(stored[name].reshape(-1)[i // 2])
        block = i // state["blocksize"]
        largest = get("absmax")[block]
        if "nested_blocksize" in state:
            of_block = get("nested_absmax")[block // state["nested_blocksize"]]
            largest = get("nested_quant_map")[int(largest)] * of_block + state["nested_offset"]
        values[i] = get("quant_map")[byte // 16 if i % 2 == 0 else byte % 16] * largest
    return values.reshape(n, k)


@pytest.mark.parametrize("name", NAMES)
def test_values_by_the_oracle(name):
    stored = tensors(SAVED / name)
    weight = next(each for each in stored if f"{each}.absmax" in stored)
    with open_checkpoint(SAVED / name) as checkpoint:
        np.testing.assert_allclose(checkpoint.read(weight), oracle(stored, weight), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("width", [7, 64, 65])
def test_rows_that_begin_within_a_byte_and_a_block(tmp_path, width):
    rng = np.random.default_rng(width)
    n, block = 9, 32
    state = {"quant_type": "nf4", "blocksize": block, "dtype": "float16", "shape": [n, width]}
    name = "w.weight"
    stored = {
        name: rng.integers(0, 256, ((n * width + 1) // 2, 1)).astype(np.uint8),
        f"{name}.absmax": rng.random(-(-n * width // block)).astype(np.float32),
        f"{name}.quant_map": np.sort(rng.standard_normal(16)).astype(np.float32),
        f"{name}.quant_state.bitsandbytes__nf4": np.frombuffer(json.dumps(state).encode(), np.uint8),
    }
    write_directory(tmp_path / "m", {"model.safetensors": stored})
    with open_checkpoint(tmp_path / "m") as checkpoint:
        assert list(checkpoint.tensors) == [name]
        for start, stop in ((0, n), (1, 2), (3, 8), (n, n), (8, 9)):
            got = checkpoint.read_rows(name, start, stop)
            np.testing.assert_allclose(got, oracle(stored, name)[start:stop], rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_logits_in_floating_point_are_those_of_bitsandbytes(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = load(SAVED / name, quantize=False)
    expected = np.load(SAVED / name / "expected.npz")
    np.testing.assert_allclose(model.logits(expected["tokens"]), expected["logits"], rtol=2e-3, atol=2e-3)
    assert not any(map(is_qtensor, jax.tree.leaves(model.params, is_leaf=is_qtensor)))


def test_rounded_again_to_int8_which_is_said():
    expected = np.load(SAVED / "nf4_nested" / "expected.npz")
    with pytest.warns(UserWarning, match=r"nf4_nested: 14 weights .* four bits .* second time \(scheme='llm\.int8'\)"):
        model = load(SAVED / "nf4_nested")
    assert model.quant == jint8.Config()
    got = np.asarray(model.logits(expected["tokens"]))
    assert 0 < np.linalg.norm(got - expected["logits"]) < 0.06 * np.linalg.norm(expected["logits"])


def test_rounded_again_to_four_bits_which_is_said():
    config = jint8.Config(scheme="int4", group=16, grouping="oc")
    with pytest.warns(UserWarning, match=r"nf4: 14 weights .* four bits .* second time \(scheme='int4'\)"):
        model = load(NF4, config=config)
    expected = jint8.quantize_params(load(NF4, quantize=False).params, config=config)
    for got, want in zip(jax.tree.leaves(model.params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(got, want)


def state(**changes):
    def change(stored):
        found = json.loads(stored[STATE].tobytes())
        stored[STATE] = np.frombuffer(json.dumps(found | changes).encode(), np.uint8)

    return change


def put(what, function):
    def change(stored):
        value = function(stored.pop(f"{DOWN}{what}"))
        if value is not None:
            stored[f"{DOWN}{what}"] = np.ascontiguousarray(value)

    return change


FAULTS = {
    "no_absmax": (put(".absmax", lambda x: None), "Expected beside it absmax, quant_map, got quant_map"),
    "short_absmax": (put(".absmax", lambda x: x[1:]), r"Expected absmax as F32 \(24,\), got F32 \(23,\)"),
    "no_map": (put(".quant_map", lambda x: None), "Expected beside it absmax, quant_map, got absmax"),
    "half_of_the_bytes": (put("", lambda x: x[1:]), r"Expected 768 bytes for the shape \[32, 48\], got 767"),
    "no_weight": (put("", lambda x: None), "Expected it beside one weight in nf4 or fp4"),
    "shape": (state(shape=[32]), r"Expected a shape \[n, k\], got \[32\]"),
    "block": (state(blocksize=0), "Expected a positive blocksize, got 0"),
    "kind": (state(quant_type="fp4"), "with quant_type 'nf4'"),
    "field": (state(unknown=1), "Expected the fields blocksize, dtype, quant_type, shape"),
    "no_json": (lambda stored: stored.update({STATE: np.array([1, 2], np.uint8)}), "Expected JSON, got something"),
    "nested": (state(nested_blocksize=256, nested_dtype="float32", nested_offset=0.1), "Expected beside it .*nested"),
}


@pytest.mark.parametrize(("fault", "message"), FAULTS.values(), ids=FAULTS)
def test_fault(fault, message, tmp_path):
    stored = tensors(NF4)
    fault(stored)
    safetensors.numpy.save_file(stored, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((NF4 / "config.json").read_bytes())
    with pytest.raises(ValueError, match=message) as error:
        load(tmp_path)
    assert DOWN in str(error.value)


def test_a_configuration_that_says_otherwise(tmp_path):
    (tmp_path / "model.safetensors").write_bytes((NF4 / "model.safetensors").read_bytes())
    config = json.loads((NF4 / "config.json").read_text())
    config["quantization_config"] |= {"load_in_4bit": False, "load_in_8bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"a quantization_config of bitsandbytes in 4 bits, .* got 8 bits"):
        load(tmp_path)
