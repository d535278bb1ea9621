"""int8 checkpoints of llm-compressor, Quark and torchao; see tests/fixtures/make_int8.py."""

import copy
import dataclasses
import json

import jax
import llama_oracle
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from family_files import DIRECTORY

import jint8
from jint8._convert.settings import stored_by
from jint8._core.qtensor import is_qtensor
from jint8._trees.paths import leaf_paths

# That of compressed-tensors has a weight in floating point, which it was told to ignore; one test reads what is said.
# What jint8 saves in bitsandbytes' format says the same of it in another way.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*the checkpoint has it in floating point beside int8:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*the quantization_config of the checkpoint's config.json keeps:UserWarning"),
]

SAVED = DIRECTORY.parent / "int8"
FAMILIES = {"compressed_tensors": "llama", "quark": "qwen2", "torchao": "llama"}
WITHOUT_DECOMPOSITION = jint8.Config(scheme="vector")
DOWN = "model.layers.0.mlp.down_proj."


def load(path, **options):
    return jint8.load(path, dtype="float32", **options)


def read_config(name):
    return json.loads((SAVED / name / "config.json").read_text())


def tensors(name):
    """The tensors by the names that compressed-tensors has for them."""
    stored = safetensors.numpy.load_file(SAVED / name / "model.safetensors")
    usual = {
        "._weight_qdata": ".weight",
        "._weight_scale": ".weight_scale",
        "._weight_zero_point": ".weight_zero_point",
    }
    for theirs, ours in usual.items():
        stored = {key.replace(theirs, ours): value for key, value in stored.items()}
    return stored


def write(directory, stored, config):
    safetensors.numpy.save_file(
        {k: np.ascontiguousarray(v) for k, v in stored.items()}, directory / "model.safetensors"
    )
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def error(got, want):
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def oracle(name, tokens):
    """float64 logits with int8 weights, and with activations in int8 by one scale per token."""
    stored = tensors(name)

    def project(x, module):
        weight, scale = stored[f"{module}.weight"].astype(np.float64), stored.get(f"{module}.weight_scale")
        if scale is not None:
            weight = weight * scale.astype(np.float64).reshape(-1, 1)
            step = np.abs(x).max(1, keepdims=True) / 127
            x = step * np.rint(x / step)
        return x @ weight.T + stored.get(f"{module}.bias", np.zeros(1)).astype(np.float64)

    config = read_config(name)
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    return llama_oracle.logits(stored.__getitem__, config, tokens, project=project)


@pytest.mark.parametrize("name", FAMILIES)
def test_integers_and_scales_as_stored(name):
    model, stored = load(SAVED / name), tensors(name)
    assert model.quant == WITHOUT_DECOMPOSITION
    layer = model.params["layers_0"]
    np.testing.assert_array_equal(layer["mlp"]["down"]["weight"].q, stored[f"{DOWN}weight"])
    scale = stored[f"{DOWN}weight_scale"]
    assert scale.dtype == {"compressed_tensors": ml_dtypes.bfloat16}.get(name, np.float32)
    np.testing.assert_array_equal(layer["mlp"]["down"]["weight"].scale[:, 0], scale.reshape(-1).astype(np.float32))
    qkv = layer["attention"]["qkv"]["weight"]

    def by_group(what):  # of two key-value heads: the rows of two query heads, the key's, the value's
        q, k, v = (stored[f"model.layers.0.self_attn.{part}_proj.{what}"].reshape(-1, 1, 1) for part in "qkv")
        q, k, v = (part.reshape(rows, -1) for part, rows in ((q, 32), (k, 16), (v, 16)))
        return np.concatenate([q[:16], k[:8], v[:8], q[16:], k[8:], v[8:]])

    np.testing.assert_array_equal(qkv.q, by_group("weight"))
    np.testing.assert_array_equal(qkv.scale, by_group("weight_scale").astype(np.float32))
    assert qkv.q.min() == -128  # which these tools use, and jint8 doesn't


@pytest.mark.first_case
@pytest.mark.parametrize("name", FAMILIES)
def test_logits(name):
    """As the float64 oracle has them, and no further from the float model than the tool's own."""
    theirs = np.load(SAVED / name / "expected.npz")
    tokens = theirs["tokens"].astype(np.int64)
    got = np.asarray(load(SAVED / name).logits(tokens))
    want = np.stack([oracle(name, row) for row in tokens])
    plain = np.asarray(load(DIRECTORY / FAMILIES[name], quantize=False).logits(tokens))
    assert error(got, want) < 2e-3 < 0.1 * error(want, plain)
    assert error(got, plain) <= theirs["error"] * 1.01


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_mean_what_they_mean_to_the_tool(name):
    theirs, model = np.load(SAVED / name / "expected.npz"), load(SAVED / name)
    floats = dataclasses.replace(model, params=jint8.dequantize_params(model.params))
    assert error(np.asarray(floats.logits(theirs["tokens"][:1].astype(np.int64))), theirs["dequantized"]) < 1e-5


def quantized(model):
    return {path for path, leaf in leaf_paths(model.params, is_leaf=is_qtensor) if is_qtensor(leaf)}


def test_what_was_ignored_stays_in_floating_point():
    stays = (
        "compressed_tensors: these weights stay in floating point: layers_1/mlp/down/weight: the checkpoint has it in"
    )
    with pytest.warns(UserWarning, match=stays):
        paths = quantized(load(SAVED / "compressed_tensors"))
    assert paths == quantized(load(DIRECTORY / "llama")) - {"layers_1/mlp/down/weight"}


@pytest.mark.first_case
@pytest.mark.parametrize("name", FAMILIES)
def test_with_decomposition(name):
    """Where the caller says so: the same weights, nearer to the floats."""
    tokens = np.load(SAVED / name / "expected.npz")["tokens"].astype(np.int64)
    plain = np.asarray(load(DIRECTORY / FAMILIES[name], quantize=False).logits(tokens))
    without, model = load(SAVED / name), load(SAVED / name, config=jint8.Config(threshold=1.5))
    assert model.quant == jint8.Config(threshold=1.5)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(model.params), jax.tree.leaves(without.params))
    assert error(np.asarray(model.logits(tokens)), plain) < 0.8 * error(np.asarray(without.logits(tokens)), plain)


@pytest.mark.parametrize("name", FAMILIES)
def test_saved_and_loaded(name, tmp_path):
    model = load(SAVED / name)
    jint8.save(tmp_path / "ours", model)
    again = jint8.load(tmp_path / "ours")
    assert again.quant == model.quant
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
    assert stored_by(json.loads((tmp_path / "ours" / "config.json").read_text())) is None
    jint8.save(tmp_path / "theirs", model, format="bitsandbytes")
    again = load(tmp_path / "theirs")
    assert again.quant == jint8.Config(threshold=0)
    for got, want in zip(jax.tree.leaves(again.params), jax.tree.leaves(model.params), strict=True):
        # 127 times a scale that isn't the 127th part of a float, as theirs needn't be, is rounded.
        np.testing.assert_allclose(got, want, rtol=2.0**-23 if got.ndim == 2 and got.shape[1] == 1 else 0)


def test_several_files(tmp_path):
    """torchao's names in an index, too."""
    stored = safetensors.numpy.load_file(SAVED / "torchao" / "model.safetensors")
    places = {name: f"model-{i % 2 + 1:05d}-of-00002.safetensors" for i, name in enumerate(stored)}
    for file in set(places.values()):
        safetensors.numpy.save_file({k: v for k, v in stored.items() if places[k] == file}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (tmp_path / "config.json").write_text((SAVED / "torchao" / "config.json").read_text())
    got, want = load(tmp_path), load(SAVED / "torchao")
    jax.tree.map(np.testing.assert_array_equal, got.params, want.params)


def to_int8(stored, module, rng):
    """A tensor in int8 instead of floats, with scales that it would get."""
    scale = np.abs(stored[f"{module}.weight"]).max(1, keepdims=True).astype(np.float32) / 127
    stored[f"{module}.weight"] = rng.integers(-128, 128, stored[f"{module}.weight"].shape).astype(np.int8)
    stored[f"{module}.weight_scale"] = scale


@pytest.mark.parametrize("module", ["lm_head", "model.embed_tokens"])
def test_head_and_embedding_in_int8(module, tmp_path):
    stored, config = tensors("compressed_tensors"), read_config("compressed_tensors")
    to_int8(stored, module, np.random.default_rng(0))
    model = load(write(tmp_path, stored, config))
    leaf = model.params["lm_head"]["weight"] if module == "lm_head" else model.params["embedding"]
    np.testing.assert_array_equal(leaf.q, stored[f"{module}.weight"])
    np.testing.assert_array_equal(leaf.scale, stored[f"{module}.weight_scale"])
    assert np.isfinite(model.logits([[5, 6, 7]])).all()


@pytest.mark.parametrize("equal", [True, False], ids=["equal", "scaled"])
def test_tied_head_in_int8(equal, tmp_path, recwarn):
    """It is the embedding only with the embedding's scales."""
    stored, config = tensors("quark"), read_config("quark")
    to_int8(stored, "model.embed_tokens", np.random.default_rng(0))
    for what in ("weight", "weight_scale"):
        stored[f"lm_head.{what}"] = stored[f"model.embed_tokens.{what}"] * np.asarray(
            1 if equal or what == "weight" else 2, stored[f"model.embed_tokens.{what}"].dtype
        )
    model = load(write(tmp_path, stored, config))
    assert model.config.tie_embeddings == equal
    assert equal == (not [w for w in recwarn if "differs from 'model.embed_tokens.weight'" in str(w.message)])


def test_a_row_of_zeros(tmp_path):
    """Its scale, which the tools keep above 0, is 0: as everywhere else, so that what is saved can be loaded."""
    stored, config = tensors("quark"), read_config("quark")
    stored[f"{DOWN}weight"][:] = 0
    model = load(write(tmp_path, stored, config))
    assert not model.params["layers_0"]["mlp"]["down"]["weight"].scale.any()
    jint8.save(tmp_path / "dst", model)
    jax.tree.map(np.testing.assert_array_equal, jint8.load(tmp_path / "dst").params, model.params)


def test_keys_of_early_versions(tmp_path):
    config = read_config("compressed_tensors")
    dense = {"format": "dense", "global_sparsity": 19.1, "registry_requires_subclass": False}
    early = {"quantization_status": "frozen", "sparsity_config": dense | {"sparsity_structure": "unstructured"}}
    config["compression_config"] = config.pop("quantization_config") | early
    model = load(write(tmp_path, tensors("compressed_tensors"), config))
    assert model.quant == WITHOUT_DECOMPOSITION


def put(path, value):
    """A change of a `quantization_config`: the value at a path of keys."""

    def change(asked):
        *parents, last = path.split("/")
        for key in parents:
            asked = asked[key]
        asked[last] = value

    return change


GROUP, LAYER, KIND = "config_groups/group_0/", "global_quant_config/", "quant_type/default/"
PER_TENSOR = {"_type": "PerTensor", "_version": 1, "_data": {}}
ASYMMETRIC = {"_type": "MappingType", "_data": "ASYMMETRIC"}
ROTATION = {"name": "rotation", "r1": True, "online_r1_rotation": True}
KV = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
# Of weights, and of what isn't in them: whatever config the caller has.
REFUSED = {
    "compressed_tensors": {
        "4 bits": (put(GROUP + "weights/num_bits", 4), r"group_0\.weights\.num_bits to be 8, got 4"),
        "fp8": (put(GROUP + "weights/type", "float"), r'weights\.type to be "int", got "float"'),
        "groups": (put(GROUP + "weights/strategy", "group"), r'weights\.strategy to be "channel", got "group"'),
        "group_size": (put(GROUP + "weights/group_size", 128), r"weights\.group_size to be null or -1, got 128"),
        "tensor": (put(GROUP + "weights/strategy", "tensor"), r'weights\.strategy to be "channel", got "tensor"'),
        "no strategy": (lambda a: a["config_groups"]["group_0"]["weights"].pop("strategy"), r"strategy .*, got null"),
        "block": (put(GROUP + "weights/block_structure", [8, 8]), r"weights\.block_structure to be null, got \[8, 8\]"),
        "asymmetric": (put(GROUP + "weights/symmetric", False), r"weights\.symmetric to be true, got false"),
        "dynamic": (put(GROUP + "weights/dynamic", True), r"weights\.dynamic to be false, got true"),
        "no weights": (put(GROUP + "weights", None), r"group_0\.weights to be an object, got null"),
        "outputs": (put(GROUP + "output_activations", KV), r"group_0\.output_activations to be null, got {"),
        "format": (put("format", "pack-quantized"), r'quantization_config\.format to be "int-quantized" or .*"pack-'),
        "no format": (lambda a: a.pop("format"), r'\.format to be "int-quantized" or .* got "fakequant"'),
        "mixed": (put(GROUP + "format", "float-quantized"), r"group_0\.format to be null or .*float-quantized"),
        "cache": (put("kv_cache_scheme", KV), r"kv_cache_scheme to be null, got {"),
        "sparsity": (
            put("sparsity_config", {"format": "sparse-24-bitmask"}),
            r"sparsity_config\.format to be .*24-bitmask",
        ),
        "rotated": (put("transform_config", {"config_groups": {}}), r"transform_config to be null or {}, got"),
        "status": (put("quantization_status", "initialized"), r'quantization_status to be "compressed" or .*"init'),
        "unknown": (put("zero_points_of", 1), r'quantization_config to have fields among .*, got "zero_points_of"'),
        "unknown of group": (put(GROUP + "bias", {}), r'config_groups\.group_0 to have fields among .*, got "bias"'),
        "unknown of weights": (put(GROUP + "weights/codebook", 1), r'weights to have fields among .*, got "codebook"'),
        "another group": (put("config_groups/group_1", {"weights": {"num_bits": 4}}), r"group_1\.weights\.strategy"),
        "preset": (put("config_groups/W4A16", ["Linear"]), r'config_groups\.W4A16 to be an object, got \["Linear"\]'),
        "no groups": (put("config_groups", {}), r"config_groups to be an object with a group, got none"),
    },
    "quark": {
        "fp8": (put(LAYER + "weight/dtype", "fp8_e4m3"), r'global_quant_config\.weight\.dtype to be "int8", got "fp8'),
        "no dtype": (
            lambda a: a["global_quant_config"]["weight"].pop("dtype"),
            r'weight\.dtype to be "int8", got null',
        ),
        "tensor": (put(LAYER + "weight/qscheme", "per_tensor"), r'weight\.qscheme to be "per_channel", got "per_t'),
        "axis": (put(LAYER + "weight/ch_axis", 1), r"weight\.ch_axis to be 0, got 1"),
        "asymmetric": (put(LAYER + "weight/symmetric", False), r"weight\.symmetric to be true, got false"),
        "groups": (put(LAYER + "weight/group_size", 32), r"weight\.group_size to be null, got 32"),
        "two steps": (put(LAYER + "weight", [{}, {}]), r"global_quant_config\.weight to be an object, got \[{}, {}\]"),
        "outputs": (put(LAYER + "output_tensors", {}), r"global_quant_config\.output_tensors to be null, got {}"),
        "bias": (put(LAYER + "bias", {}), r"global_quant_config\.bias to be null, got {}"),
        "layers": (put("layer_quant_config", {"*v_proj": {}}), r"layer_quant_config to be null or {}, got"),
        "layer types": (put("layer_type_quant_config", {"a": {}}), r"layer_type_quant_config to be null or {}, got"),
        "cache": (put("export/kv_cache_group", ["*v_proj"]), r"export\.kv_cache_group to be null or \[\], got"),
        "softmax": (put("softmax_quant_spec", {}), r"softmax_quant_spec to be null, got {}"),
        "fake": (
            put("export/weight_format", "fake_quantized"),
            r"export\.weight_format to be .*, got \"fake_quantized",
        ),
        "legacy": (lambda a: a.pop("export"), r"quantization_config\.export to be an object, got null"),
        "rotation": (put("algo_config", [ROTATION]), r'algo_config to name algorithms among .*, got "rotation"'),
        "unknown": (put("svd_rank", 8), r'quantization_config to have fields among .*, got "svd_rank"'),
    },
    "torchao": {
        "float8": (put(KIND + "_type", "Float8WeightOnlyConfig"), r"quant_type\.default to be Int8.*, got \"Float8W"),
        "modules": (put(KIND + "_type", "FqnToConfig"), r"quant_type\.default to be Int8.*, got \"FqnToConfig"),
        "static": (
            put(KIND + "_type", "Int8StaticActivationInt8WeightConfig"),
            r"default to be Int8.*, got \"Int8Static",
        ),
        "version": (put(KIND + "_version", 1), r"default\._version to be 2, got 1"),
        "tensor": (put(KIND + "_data/granularity", PER_TENSOR), r"_data\.granularity to be .*, got .*PerTensor"),
        "layout": (put(KIND + "_data/layout", {}), r'default\._data to have fields among .*, got "layout"'),
        "text": (put("quant_type", "int8_weight_only"), r"quant_type to be an object, got \"int8_weight_only"),
        "unknown": (put("autoquant", 1), r'quantization_config to have fields among .*, got "autoquant"'),
    },
}


@pytest.mark.first_case
@pytest.mark.parametrize(
    ("name", "change", "message"),
    [pytest.param(n, *case, id=f"{n}, {i}") for n, cases in REFUSED.items() for i, case in cases.items()],
)
@pytest.mark.parametrize("config", [None, jint8.Config()], ids=["", "with a config"])
def test_refused(name, change, message, config, tmp_path):
    everything = read_config(name)
    change(everything["quantization_config"])
    write(tmp_path, tensors(name), everything)
    with pytest.raises(ValueError, match=message) as e:
        load(tmp_path, config=config)
    assert str(tmp_path) in str(e.value)


INPUT = "input_activations/"
# Of activations: jint8 doesn't quantize them so, unless the caller has it do it in its own way.
OF_ACTIVATIONS = {
    "compressed_tensors": {
        "floats": (put(GROUP + INPUT[:-1], None), r"group_0\.input_activations to be an object, got null"),
        "asymmetric": (put(GROUP + INPUT + "symmetric", False), r"input_activations\.symmetric to be true, got false"),
        "tensor": (
            put(GROUP + INPUT + "strategy", "tensor"),
            r'input_activations\.strategy to be "token", got "tensor',
        ),
        "static": (put(GROUP + INPUT + "dynamic", False), r"input_activations\.dynamic to be true, got false"),
        "groups": (put(GROUP + INPUT + "group_size", 128), r"input_activations\.group_size to be null or -1, got 128"),
        "4 bits": (put(GROUP + INPUT + "num_bits", 4), r"input_activations\.num_bits to be 8, got 4"),
        "unknown": (put(GROUP + INPUT + "clip", 0.9), r'input_activations to have fields among .*, got "clip"'),
    },
    "quark": {
        "floats": (put(LAYER + "input_tensors", None), r"input_tensors to be an object, got null"),
        "static": (put(LAYER + "input_tensors/is_dynamic", False), r"input_tensors\.is_dynamic to be true, got false"),
        "tensor": (put(LAYER + "input_tensors/qscheme", "per_tensor"), r"input_tensors\.qscheme to be .*per_tensor"),
        "asymmetric": (put(LAYER + "input_tensors/symmetric", False), r"input_tensors\.symmetric to be true"),
        "axis": (put(LAYER + "input_tensors/ch_axis", 2), r"input_tensors\.ch_axis to be 1, got 2"),
        "powers": (put(LAYER + "input_tensors/scale_type", "pow2"), r"input_tensors\.scale_type to be \"float\""),
    },
    "torchao": {
        "floats": (
            put(KIND[:-1], {"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {}}),
            r"got Int8WeightOnly",
        ),
        "asymmetric": (put(KIND + "_data/act_mapping_type", ASYMMETRIC), r"_data\.act_mapping_type to be .*ASYMMETRIC"),
        "7 bits": (put(KIND + "_data/reduce_range", True), r"_data\.reduce_range to be false or null, got true"),
        "prefill": (put(KIND + "_data/weight_only_decode", True), r"_data\.weight_only_decode to be false, got true"),
    },
}


@pytest.mark.first_case
@pytest.mark.parametrize(
    ("name", "change", "message"),
    [pytest.param(n, *case, id=f"{n}, {i}") for n, cases in OF_ACTIVATIONS.items() for i, case in cases.items()],
)
def test_activations_refused_without_a_config(name, change, message, tmp_path):
    everything = read_config(name)
    change(everything["quantization_config"])
    write(tmp_path, tensors(name), everything)
    with pytest.raises(ValueError, match=message + r".*give a config, such as jint8\.Config\(\)"):
        load(tmp_path)
    model = load(tmp_path, config=WITHOUT_DECOMPOSITION)
    for got, want in zip(jax.tree.leaves(model.params), jax.tree.leaves(load(SAVED / name).params), strict=True):
        np.testing.assert_array_equal(got, want)


def test_static_scales_of_activations(tmp_path):
    """They are left unread where the caller has activations quantized otherwise, and refused everywhere else."""
    stored, config = tensors("compressed_tensors"), read_config("compressed_tensors")
    stored |= {f"{DOWN}input_scale": np.ones(1, np.float32), f"{DOWN}input_zero_point": np.zeros(1, np.int8)}
    dynamic = copy.deepcopy(config)
    activations = config["quantization_config"]["config_groups"]["group_0"]["input_activations"]
    activations |= {"dynamic": False, "strategy": "tensor"}
    write(tmp_path, stored, config)
    with pytest.raises(ValueError, match=r'input_activations\.strategy to be "token", got "tensor"'):
        load(tmp_path)
    assert load(tmp_path, config=jint8.Config()).quant == jint8.Config()
    write(tmp_path, stored, dynamic)
    for options in ({}, {"config": jint8.Config()}):
        with pytest.raises(ValueError, match=rf"tensor '{DOWN}input_scale': Expected scales of activations only where"):
            load(tmp_path, **options)


def replace(name, value):
    def change(stored):
        stored[DOWN + name] = value(stored.get(DOWN + name))
        if stored[DOWN + name] is None:
            del stored[DOWN + name]

    return change


DAMAGED = rf"model\.safetensors: tensor '{DOWN}weight': Expected .*"
FAULTS = {
    "no scales": (
        replace("weight_scale", lambda x: None),
        r"down_proj\.weight_zero_point': Expected only tensors of a",
    ),
    "short": (
        replace("weight_scale", lambda x: x[1:]),
        DAMAGED + r"weight_scale as F32, .* \(32, 1\), got F32 \(31,\)",
    ),
    "float64": (replace("weight_scale", lambda x: x.astype(np.float64)), DAMAGED + r"got F64 \(32,\)"),
    "nan": (replace("weight_scale", lambda x: x * np.nan), DAMAGED + "finite scales .*, got NaN"),
    "negative": (replace("weight_scale", lambda x: -x), DAMAGED + "scales of at least 0"),
    "zero": (replace("weight_scale", lambda x: x * 0), DAMAGED + "a scale above 0 .* for each row"),
    "subnormal": (replace("weight_scale", lambda x: x * np.float32(1e-37)), DAMAGED + "a scale above 0"),
    "zero points": (
        replace("weight_zero_point", lambda x: x + np.int8(1)),
        DAMAGED + "zero points of 0 .*, got others",
    ),
    "shape": (replace("weight", lambda x: x[:, 1:]), r"down_proj\.weight': Expected shape \(n, 48\), got \(32, 47\)"),
    "floats": (replace("weight", lambda x: x.astype(np.float32)), r"weight_scale': Expected only tensors of a qwen2"),
    "int32": (replace("weight", lambda x: x.astype(np.int32)), r"weight_scale': Expected only tensors of a qwen2"),
    "packed": (replace("weight_packed", lambda x: np.zeros((32, 12), np.int32)), "Expected only tensors of a qwen2"),
    "order": (replace("weight_g_idx", lambda x: np.zeros(48, np.int32)), "Expected only tensors of a qwen2"),
    "outputs": (replace("output_scale", lambda x: np.ones(1, np.float32)), "Expected only tensors of a qwen2"),
}


@pytest.mark.parametrize(("fault", "message"), FAULTS.values(), ids=FAULTS)
def test_fault(fault, message, tmp_path):
    stored = tensors("quark")
    fault(stored)
    with pytest.raises(ValueError, match=message):
        load(write(tmp_path, stored, read_config("quark")))


def test_tensors_and_configuration_at_odds(tmp_path):
    stored, config = tensors("quark"), read_config("quark")
    asked = config.pop("quantization_config")
    with pytest.raises(ValueError, match="Expected a quantization_config that int8 weights with a weight_scale belong"):
        load(write(tmp_path, stored, config))
    floats = safetensors.numpy.load_file(DIRECTORY / "qwen2" / "model.safetensors")
    with pytest.raises(ValueError, match=r"Expected int8 weights of quark, as the quantization_config says, got none"):
        load(write(tmp_path, floats, config | {"quantization_config": asked}))
    of_bitsandbytes = safetensors.numpy.load_file(DIRECTORY.parent / "bitsandbytes" / "llama" / "model.safetensors")
    with pytest.raises(ValueError, match=r"Expected int8 weights of quark, .*, got those of bitsandbytes"):
        load(write(tmp_path, of_bitsandbytes, read_config("torchao") | {"quantization_config": asked}))
    asked = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    with pytest.raises(ValueError, match=r"Expected int8 weights of bitsandbytes, .*, got others, with weight_scale"):
        load(write(tmp_path, stored, config | {"quantization_config": asked}))
    with pytest.raises(ValueError, match=r"Expected quantization_config to be an object, got \[\]"):
        load(write(tmp_path, stored, config | {"quantization_config": []}))
    with pytest.raises(ValueError, match=r'of bitsandbytes, compressed-tensors, quark, torchao, got "gptq"'):
        load(write(tmp_path, stored, config | {"quantization_config": {"quant_method": "gptq"}}))


def test_weights_of_both_names(tmp_path):
    stored = safetensors.numpy.load_file(SAVED / "torchao" / "model.safetensors")
    stored[f"{DOWN}weight"] = np.zeros((32, 48), np.float32)
    with pytest.raises(ValueError, match=r"Expected every weight once, got 'model\.layers\.0\.mlp\.down_proj\.weight'"):
        load(write(tmp_path, stored, read_config("torchao")))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": False}, "Expected a checkpoint in floating point, got int8 of quark"),
        ({"skip": "mlp"}, "Expected a checkpoint in floating point, got int8 of quark"),
        ({"config": jint8.Config(scheme="absmax")}, "Expected a scheme that runs on int8 rows"),
        ({"config": jint8.Config.preset("rotated")}, "Expected a config without rotate for weights that are in int8"),
    ],
    ids=str,
)
def test_weights_stay_as_they_are(options, message):
    with pytest.raises(ValueError, match=message):
        load(SAVED / "quark", **options)
