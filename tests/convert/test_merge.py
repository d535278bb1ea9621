"""DoRA, `modules_to_save` and merging, against PEFT's arithmetic in float64 NumPy."""

import json

import jax
import llama_oracle
import numpy as np
import pytest
import safetensors.numpy
from checkpoint_files import write_directory
from tiny_model import CONFIG, VOCAB, llama_weights

import jint8

WEIGHTS = llama_weights(9, outliers=False)
TOKENS = np.random.default_rng(0).integers(3, VOCAB, (1, 9))
RNG = np.random.default_rng(4)
RANK, ALPHA = 4, 8
Q, V, DOWN = (f"model.layers.{i}" for i in ("0.self_attn.q_proj", "1.self_attn.v_proj", "1.mlp.down_proj"))
FACTORS = {
    name: (RNG.normal(0, 0.2, (RANK, w.shape[1])).astype(np.float32), RNG.normal(0, 0.2, (len(w), RANK)).astype("f"))
    for name in (Q, V, DOWN)
    for w in (WEIGHTS[f"{name}.weight"],)
}
MAGNITUDES = {
    name: (np.linalg.norm(WEIGHTS[f"{name}.weight"], axis=1) * RNG.uniform(0.5, 2, len(b))).astype(np.float32)
    for name, (_, b) in FACTORS.items()
}
SAVED = {
    "lm_head.weight": RNG.normal(0, 0.3, (VOCAB, 32)).astype(np.float32),
    "model.layers.0.mlp.down_proj.weight": RNG.normal(0, 0.3, (32, 48)).astype(np.float32),
    "model.norm.weight": RNG.uniform(0.5, 1.5, 32).astype(np.float32),
}
PREFIX = "base_model.model."


def adapter(path, *, dora=False, saved=False, **changes):
    path.mkdir()
    tensors = {}
    for name, (a, b) in FACTORS.items():
        tensors |= {f"{PREFIX}{name}.lora_A.weight": a, f"{PREFIX}{name}.lora_B.weight": b}
        if dora:
            tensors[f"{PREFIX}{name}.lora_magnitude_vector"] = MAGNITUDES[name]
    if saved:
        tensors |= {PREFIX + name: value for name, value in SAVED.items()}
    tensors = {name: value for name, value in (tensors | changes).items() if value is not None}
    safetensors.numpy.save_file(tensors, path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "use_dora": dora, "bias": "none"}
    config["modules_to_save"] = ["lm_head", "down_proj", "norm"] if saved else None
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def changed(*, dora=False, saved=False):
    """The weights that PEFT computes with, in float64."""
    weights = {name: w.astype(np.float64) for name, w in WEIGHTS.items()}
    for name, (a, b) in FACTORS.items():
        w = weights[f"{name}.weight"] + ALPHA / RANK * b.astype(np.float64) @ a
        if dora:
            w *= (MAGNITUDES[name] / np.linalg.norm(w, axis=1))[:, None]
        weights[f"{name}.weight"] = w
    return weights | (SAVED if saved else {})


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    config = CONFIG | {"vocab_size": VOCAB, "tie_word_embeddings": False}
    return write_directory(tmp_path_factory.mktemp("base") / "model", {"model.safetensors": WEIGHTS}, config=config)


def error(model, weights):
    want = llama_oracle.logits(weights.__getitem__, CONFIG, TOKENS[0])
    return np.linalg.norm(np.asarray(model.logits(TOKENS))[0] - want) / np.linalg.norm(want)


KINDS = {"lora": {}, "dora": {"dora": True}, "saved": {"saved": True}, "all": {"dora": True, "saved": True}}


@pytest.mark.first_case
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_logits(kind, directory, tmp_path):
    path, want = adapter(tmp_path / "adapter", **kind), changed(**kind)
    model = jint8.load(directory, quantize=False, dtype="float32", adapter=path)
    assert error(model, want) < 1e-5
    assert error(model, WEIGHTS) > 0.1
    assert error(jint8.load(directory, dtype="float32", adapter=path), want) < 0.05
    mesh = jax.make_mesh((1,), ("model",))
    assert error(jint8.load(directory, quantize=False, dtype="float32", adapter=path, mesh=mesh), want) < 1e-5
    merged, errors = jint8.merge_adapter(model)
    assert error(merged, want) < 1e-5
    assert len(errors) == 3
    assert max(errors.values()) < 1e-7
    assert "lora_a" not in str(jax.tree.structure(merged.params))


def test_dora_rounds_nothing(directory, tmp_path):
    plain = jint8.load(directory, adapter=adapter(tmp_path / "lora"))
    dora = jint8.load(directory, adapter=adapter(tmp_path / "dora", dora=True))
    a, b = (model.params["layers_1"]["mlp"]["down"]["weight"] for model in (plain, dora))
    np.testing.assert_array_equal(a.q, b.q)
    assert (np.asarray(a.scale) != np.asarray(b.scale)).any()


def merging(name, config, of_weight, of_model, **options):
    return pytest.param(config, of_weight, of_model, id=name, **options)


SLOW = {"marks": pytest.mark.slow}
IN_FOUR = {"scheme": "int4", "group": 16}


@pytest.mark.first_case
@pytest.mark.parametrize(
    ("config", "of_weight", "of_model"),
    [
        merging("paper", jint8.Config(), 0.02, 0.06),
        merging("vector-zp", jint8.Config(scheme="vector-zp"), 0.02, 0.06, **SLOW),
        merging("static", jint8.Config.preset("static"), 0.02, 0.06, **SLOW),
        merging("rotated", jint8.Config.preset("rotated"), 0.02, 0.06),
        merging("best", jint8.Config.preset("best"), 0.02, 0.06, **SLOW),
        merging("four bits oc", jint8.Config(**IN_FOUR, grouping="oc"), 0.12, 0.5),
        merging("four bits ic", jint8.Config(**IN_FOUR | {"scheme": "int4-a8"}, grouping="ic"), 0.12, 0.5),
        merging("four bits rotated", jint8.Config(**IN_FOUR, rotate=16, outliers="static"), 0.12, 0.5, **SLOW),
    ],
)
def test_merged(config, of_weight, of_model, directory, tmp_path):
    model = jint8.load(directory, config=config, dtype="float32", adapter=adapter(tmp_path / "adapter", dora=True))
    node = model.params["layers_1"]["mlp"]["down"]
    base = np.asarray(jint8.dequantize(node["weight"]), np.float64)
    want = base + np.asarray(node["lora_b"], np.float64) @ np.asarray(node["lora_a"], np.float64)
    merged, errors = jint8.merge_adapter(model)
    new = merged.params["layers_1"]["mlp"]["down"]["weight"]
    got = np.asarray(jint8.dequantize(new), np.float64)
    distance = np.linalg.norm(got - want) / np.linalg.norm(want)
    np.testing.assert_allclose(errors["layers_1/mlp/down/weight"], distance, rtol=1e-3)
    assert distance < of_weight
    assert jax.tree.structure(new) == jax.tree.structure(node["weight"])
    assert error(merged, changed(dora=True)) < of_model
    jint8.save(tmp_path / "saved", merged)
    np.testing.assert_array_equal(jint8.load(tmp_path / "saved").logits(TOKENS), merged.logits(TOKENS))


FAULTS = {
    "no magnitude": ({"dora": True, f"{PREFIX}{V}.lora_magnitude_vector": None}, "v_proj': Expected a lora_magnitude"),
    "a magnitude": ({f"{PREFIX}{V}.lora_magnitude_vector": MAGNITUDES[V]}, "v_proj': Expected no lora_magnitude"),
    "its shape": ({"dora": True, f"{PREFIX}{V}.lora_magnitude_vector": MAGNITUDES[V][1:]}, r"shape \(16,\), got \(15,"),
    "its sign": ({"dora": True, f"{PREFIX}{V}.lora_magnitude_vector": -MAGNITUDES[V]}, "to be positive and finite"),
    "saved unasked": ({f"{PREFIX}lm_head.weight": SAVED["lm_head.weight"]}, "'base_model.model.lm_head.weight'"),
    "saved shape": (
        {"saved": True, f"{PREFIX}lm_head.weight": SAVED["lm_head.weight"][1:]}, "lm_head.weight': Expected shape"
    ),
    "saved nothing": (
        {"saved": True, f"{PREFIX}model.norm.weight": None}, "Expected a tensor of 'norm', which is in modules_to_save"
    ),
    "saved in part": (
        {"saved": True, f"{PREFIX}{Q}.weight": WEIGHTS[f"{Q}.weight"]}, "q_proj.weight': Expected all of .*v_proj"
    ),
    "saved NaN": (
        {"saved": True, f"{PREFIX}model.norm.weight": np.full(32, np.nan, "f")}, "norm.weight': Expected finite"
    ),
}  # fmt: skip


@pytest.mark.first_case
@pytest.mark.parametrize(("changes", "message"), FAULTS.values(), ids=FAULTS)
def test_faults(changes, message, directory, tmp_path):
    path = adapter(tmp_path / "adapter", **changes)
    with pytest.raises(ValueError, match=message):
        jint8.load(directory, adapter=path)


def test_a_second_adapter(directory, tmp_path):
    path = adapter(tmp_path / "adapter")
    jint8.save(tmp_path / "saved", jint8.load(directory, adapter=path))
    with pytest.raises(ValueError, match="Expected a model without an adapter, got one that has factors already"):
        jint8.load(tmp_path / "saved", adapter=path)


def test_nothing_to_merge(directory):
    with pytest.raises(ValueError, match="Expected a model with an adapter, got one without"):
        jint8.merge_adapter(jint8.load(directory))
