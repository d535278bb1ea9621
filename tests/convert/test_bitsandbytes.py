"""int8 checkpoints to and from bitsandbytes; see tests/fixtures/make_bitsandbytes.py."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy
from family_files import DIRECTORY
from tiny_model import make_llama_directory

import jint8
from jint8._core.qtensor import is_qtensor
from jint8._trees.paths import leaf_paths

# GPT-2's fixture has a weight in floating point, as llm_int8_skip_modules names it; two tests read what is said.
pytestmark = pytest.mark.filterwarnings("ignore:.*the quantization_config of the checkpoint:UserWarning")

SAVED = DIRECTORY.parent / "bitsandbytes"
NAMES = sorted(path.name for path in SAVED.iterdir())


def load(path, **options):
    return jint8.load(path, dtype="float32", **options)


def tensors(path):
    return safetensors.numpy.load_file(path / "model.safetensors")


def error(got, want):
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def quantized(model):
    return {path for path, leaf in leaf_paths(model.params, is_leaf=is_qtensor) if is_qtensor(leaf)}


@pytest.mark.first_case
@pytest.mark.parametrize("name", NAMES)
def test_no_further_from_the_float_model_than_bitsandbytes(name):
    theirs = np.load(SAVED / name / "expected.npz")
    int8, plain = load(SAVED / name), load(DIRECTORY / name, quantize=False)
    got = np.concatenate([int8.logits(row[None]) for row in theirs["tokens"]])
    assert error(got, np.asarray(plain.logits(theirs["tokens"]))) <= theirs["error"] * 1.01
    assert error(got[:1], theirs["logits"]) < 0.03


def test_values_as_stored():
    params, stored = load(SAVED / "llama").params, tensors(SAVED / "llama")
    qkv = params["layers_1"]["attention"]["qkv"]["weight"]

    def by_group(what):  # of two key-value heads: the rows of two query heads, the key's, the value's
        q, k, v = (stored[f"model.layers.1.self_attn.{name}_proj.{what}"] for name in "qkv")
        return np.concatenate([q[:16], k[:8], v[:8], q[16:], k[8:], v[8:]])

    np.testing.assert_array_equal(qkv.q, by_group("weight"))
    np.testing.assert_array_equal(qkv.scale[:, 0], by_group("SCB") / np.float32(127))


def test_values_of_interleaved_heads():
    qkv = load(SAVED / "bloom").params["layers_0"]["attention"]["qkv"]["weight"]
    name = "transformer.h.0.self_attention.query_key_value"
    np.testing.assert_array_equal(qkv.q, tensors(SAVED / "bloom")[f"{name}.weight"])


SKIPPED = (
    "these weights stay in floating point: layers_1/mlp/up/weight: the quantization_config of the checkpoint's "
    "config.json keeps it so"
)


def test_options_of_the_checkpoint():
    with pytest.warns(UserWarning, match=rf"gpt2: {SKIPPED}\. They become int8 when") as said:
        model = load(SAVED / "gpt2")
    assert len(said) == 1
    assert model.quant == jint8.Config(threshold=4.0)
    assert {f"layers_0/mlp/{name}/weight" for name in ("up", "down")} <= quantized(model)
    assert "layers_1/mlp/up/weight" not in quantized(model)
    assert load(SAVED / "gpt2", config=jint8.Config(scheme="vector")).quant.scheme == "vector"


def test_options_of_a_checkpoint_in_floating_point(tmp_path):
    asked = json.loads((SAVED / "gpt2" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(asked))
    (tmp_path / "model.safetensors").write_bytes((DIRECTORY / "gpt2" / "model.safetensors").read_bytes())
    with pytest.warns(UserWarning, match=rf"{SKIPPED}\. include= \(--include\) quantizes them"):
        model = load(tmp_path)
    assert model.quant == jint8.Config(threshold=4.0)
    assert quantized(model) == quantized(load(SAVED / "gpt2"))
    assert quantized(load(tmp_path, include="layers_1/mlp/up")) == quantized(load(DIRECTORY / "gpt2"))


@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_written_as_bitsandbytes_writes(name, tmp_path):
    jint8.save(tmp_path / "dst", load(DIRECTORY / name), format="bitsandbytes")
    got, want = tensors(tmp_path / "dst"), tensors(SAVED / name)
    assert {k: (v.dtype, v.shape) for k, v in got.items()} == {k: (v.dtype, v.shape) for k, v in want.items()}
    for key, value in want.items():
        if value.dtype == np.int8:  # ties between two values may fall either way
            assert np.abs(got[key].astype(int) - value).max() <= 1
            assert np.mean(got[key] != value) < 0.02
        else:
            np.testing.assert_allclose(got[key], value, rtol=2e-7)
    configs = [json.loads((path / "config.json").read_text()) for path in (tmp_path / "dst", SAVED / name)]
    ours, theirs = (config.pop("quantization_config") for config in configs)
    assert ours | {"llm_int8_skip_modules": None} == theirs
    assert ours["llm_int8_skip_modules"] == ["lm_head"]
    assert configs[0] == configs[1] | {"dtype": "float32"}


@pytest.mark.parametrize("name", NAMES)
def test_there_and_back(name, tmp_path):
    model = load(SAVED / name)
    jint8.save(tmp_path / "dst", model, format="bitsandbytes")
    again = load(tmp_path / "dst")
    assert again.quant == model.quant
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
    jint8.save(tmp_path / "ours", model)
    jax.tree.map(np.testing.assert_array_equal, jint8.load(tmp_path / "ours").params, model.params)


def test_shards_and_tokenizer(tmp_path):
    source = make_llama_directory(tmp_path / "src", seed=2)
    jint8.save(tmp_path / "dst", load(source), format="bitsandbytes", shard_bytes=20_000)
    index = json.loads((tmp_path / "dst" / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 2
    got, want = jint8.load(tmp_path / "dst", dtype="float32", verify=True), load(source)
    jax.tree.map(np.testing.assert_array_equal, got.params, want.params)
    assert got.tokenizer.encode("Hi") == want.tokenizer.encode("Hi")
    assert (got.tokenizer.eos_ids, got.tokenizer.pad_id) == (want.tokenizer.eos_ids, want.tokenizer.pad_id)
    assert got.tokenizer.chat_template == want.tokenizer.chat_template


def test_a_part_of_a_product_in_floating_point(tmp_path):
    """It is multiplied in floating point then, with the int8 values of the other parts."""
    stored, name = tensors(SAVED / "llama"), "model.layers.0.self_attn.q_proj"
    original = tensors(DIRECTORY / "llama")[f"{name}.weight"].astype(np.float32)
    kept = {k: v for k, v in stored.items() if not k.startswith(f"{name}.")} | {f"{name}.weight": original}
    safetensors.numpy.save_file(kept, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((SAVED / "llama" / "config.json").read_text())
    stays = "layers_0/attention/qkv/weight: the checkpoint has it in floating point beside int8 weights"
    with pytest.warns(UserWarning, match=stays):
        qkv = load(tmp_path).params["layers_0"]["attention"]["qkv"]["weight"]
    groups = qkv.reshape(2, 32, 32)  # each with the rows of two query heads above those of its key and its value
    np.testing.assert_array_equal(groups[:, :16].reshape(32, 32), original)
    int8 = load(SAVED / "llama").params["layers_0"]["attention"]["qkv"]["weight"].dequantize()
    np.testing.assert_array_equal(groups[:, 16:], int8.reshape(2, 32, 32)[:, 16:])


def change(name, value):
    module = "model.layers.0.mlp.down_proj."

    def fault(stored, asked):
        stored[module + name] = value(stored.get(module + name))
        if stored[module + name] is None:
            del stored[module + name]

    return fault


def ask(**options):
    return lambda stored, asked: asked.update(options)


DOWN = r"model\.safetensors: tensor 'model\.layers\.0\.mlp\.down_proj\.weight': "
FAULTS = {
    "no_scales": (change("SCB", lambda x: None), "down_proj.weight_format': Expected only tensors of"),
    "short_scales": (change("SCB", lambda x: x[1:]), DOWN + r"Expected .*SCB as float32 \(32,\), got float32 \(31,\)"),
    "half_scales": (change("SCB", lambda x: x.astype(np.float16)), DOWN + "Expected .*SCB as float32"),
    "nan": (change("SCB", lambda x: x * np.nan), DOWN + "Expected finite scales"),
    "order": (change("weight_format", lambda x: np.array(2, np.uint8)), DOWN + "Expected .*weight_format 0 .*, got 2"),
    "shape": (change("weight", lambda x: x[:, 1:]), DOWN + r"Expected shape \(n, 48\), got \(32, 47\)"),
    "unknown": (change("absmax", lambda x: np.zeros(3, np.float32)), "Expected only tensors of a llama model"),
    "4 bits": (ask(load_in_8bit=False, load_in_4bit=True), "Expected weights in nf4 or fp4, .*, got none"),
    "neither": (ask(load_in_8bit=False), "in 8 or 4 bits, got bitsandbytes in none"),
    "another_method": (ask(quant_method="gptq"), "Expected a quantization_config of bitsandbytes, .*, got .gptq"),
}


@pytest.mark.parametrize(("fault", "message"), FAULTS.values(), ids=FAULTS)
def test_fault(fault, message, tmp_path):
    stored, config = tensors(SAVED / "llama"), json.loads((SAVED / "llama" / "config.json").read_text())
    fault(stored, config["quantization_config"])
    stored = {k: np.ascontiguousarray(v) for k, v in stored.items()}
    safetensors.numpy.save_file(stored, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


@pytest.mark.parametrize(
    "options",
    [{"quantize": False}, {"skip": "mlp"}, {"include": ["lm_head"]}, {"config": jint8.Config(scheme="absmax")}],
    ids=str,
)
def test_weights_stay_as_they_are(options):
    with pytest.raises(ValueError, match=r"llama: Expected a (checkpoint in floating point|scheme that runs on)"):
        load(SAVED / "llama", **options)


WRITE = {
    "embedding": ({"include": "embedding"}, "embedding: Expected no int8 embeddings"),
    "affine": ({"config": jint8.Config(scheme="llm.int8-zp")}, "one symmetric scale per row, .* 'llm.int8-zp'"),
}


@pytest.mark.parametrize(("options", "message"), WRITE.values(), ids=WRITE)
def test_what_bitsandbytes_has_not(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        jint8.save(tmp_path / "dst", load(DIRECTORY / "llama", **options), format="bitsandbytes")
    assert not (tmp_path / "dst").exists()


def test_experts_and_unknown_formats(tmp_path):
    with pytest.raises(ValueError, match=r"mlp/.*/weight: Expected no int8 experts"):
        jint8.save(tmp_path / "dst", load(DIRECTORY / "mixtral"), format="bitsandbytes")
    jint8.save(tmp_path / "dst", load(DIRECTORY / "mixtral", skip="mlp"), format="bitsandbytes")
    assert tensors(tmp_path / "dst")["model.layers.0.block_sparse_moe.experts.3.w1.weight"].shape == (32, 32)
    with pytest.raises(ValueError, match="format to be one of jint8, bitsandbytes, got 'awq'"):
        jint8.save(tmp_path / "other", load(DIRECTORY / "llama"), format="awq")
