"""Configurations and tensor names as older versions of transformers wrote them, and what isn't supported."""

import json

import jax
import numpy as np
import pytest
from family_files import DIRECTORY, config, rewrite

import jint8
from jint8.models import model_config


def renamed(**changes):
    """Keys with other values, or without them (None)."""
    return lambda c: {k: v for k, v in (c | changes).items() if v is not None}


def old_llama3(c):
    rope = dict(c["rope_parameters"])
    return renamed(rope_parameters=None, rope_theta=rope.pop("rope_theta"), rope_scaling=rope)(c)


def old_phi3(c):
    rope = dict(c["rope_parameters"])
    scaling = {"type": "su", "short_factor": rope["short_factor"], "long_factor": rope["long_factor"]}
    change = renamed(rope_parameters=None, rope_theta=10000.0, rope_scaling=scaling, partial_rotary_factor=0.75)
    return change(c | {"original_max_position_embeddings": 16})


def old_bloom(c):
    return renamed(hidden_size=None, n_embed=c["hidden_size"], n_head=None, num_attention_heads=c["n_head"])(c)


def with_images(c):
    return {"model_type": "gemma3", "text_config": c, "vision_config": {}}


OLD = {
    "llama3": ("llama3_scaling", old_llama3),
    "gemma2": ("gemma2", renamed(rope_parameters=None, layer_types=None)),
    "gemma3": (
        "gemma3",
        renamed(
            rope_parameters=None, layer_types=None, sliding_window_pattern=3, rope_theta=1e6,
            rope_local_base_freq=10000.0, rope_scaling={"rope_type": "linear", "factor": 8.0},
        ),
    ),
    "gemma3_with_images": ("gemma3", with_images),
    "gpt_neox": ("gpt_neox", renamed(rope_parameters=None, rotary_pct=0.5, rotary_emb_base=10000)),
    "phi3_su": ("phi3_longrope", old_phi3),
    "qwen2_upper_layers": ("qwen2_sliding", renamed(layer_types=None)),
    "bloom": ("bloom", old_bloom),
    "stablelm": ("stablelm", renamed(rope_parameters=None, rope_theta=10000, partial_rotary_factor=0.5)),
    "opt": ("opt", renamed(word_embed_proj_dim=None, tie_word_embeddings=None)),
    "gpt2": ("gpt2", renamed(n_inner=None, tie_word_embeddings=None, activation_function=None)),
}  # fmt: skip


@pytest.mark.parametrize(("name", "change"), OLD.values(), ids=OLD)
def test_old_keys(name, change):
    assert model_config(change(config(name))) == model_config(config(name))


BAD = {
    "unknown": (lambda c: {"model_type": "mamba"}, "Expected a model_type among bloom, .*, qwen3.*, got 'mamba'"),
    "no_type": (lambda c: {}, "got None"),
    "heads": (renamed(num_attention_heads=5, num_key_value_heads=5, head_dim=None), "to divide hidden_size 32, got 5"),
    "key_value_heads": (renamed(num_key_value_heads=3), "to divide 4 attention heads, got 3"),
    "size": (renamed(hidden_size="32"), "Expected hidden_size to be a positive integer, got '32'"),
    "missing_size": (renamed(vocab_size=None), "Expected vocab_size to be a positive integer, got None"),
    "eps": (renamed(rms_norm_eps=float("nan")), "Expected rms_norm_eps to be a number, got nan"),
    "activation": (renamed(hidden_act="xielu"), "Expected hidden_act to be one of silu, .* got 'xielu'"),
    "rope": (renamed(rope_parameters={"rope_type": "mrope"}), "rope_type among default, .* got 'mrope'"),
    "rope_factor": (renamed(rope_parameters={"rope_type": "linear"}), "Expected factor to be a number, got None"),
    "longrope": (
        renamed(rope_parameters={"rope_type": "longrope", "short_factor": [1.0]}), "short_factor to be a list of 4",
    ),
    "layer_types": (
        renamed(model_type="mistral", sliding_window=4, layer_types=["chunked_attention"]), "layer_types of 2 layers",
    ),
    "experts": (renamed(model_type="mixtral", num_experts_per_tok=9), "num_experts_per_tok to be at most 8, got 9"),
    "bloom": (
        lambda c: config("bloom") | {"apply_residual_connection_post_layernorm": True},
        "apply_residual_connection_post_layernorm to be False, got True",
    ),
    "gpt2": (lambda c: config("gpt2") | {"scale_attn_weights": False}, "scale_attn_weights to be True, got False"),
    "stablelm_12b": (lambda c: config("stablelm") | {"qk_layernorm": True}, "qk_layernorm to be False, got True"),
    "stablelm_parallel": (
        lambda c: config("stablelm") | {"use_parallel_residual": True}, "use_parallel_residual to be False, got True",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_not_supported(change, message):
    with pytest.raises(ValueError, match=message):
        model_config(change(config("llama")))


LARGEST = "Expected {} to be at most 3072, the size of the largest tensor, got 1000000000"
BEYOND = {
    "layers": ("llama", {"num_hidden_layers": 4000}, "Expected at most 21 layers, the number of tensors, got 4000"),
    "vocabulary": ("llama", {"vocab_size": 10**9}, LARGEST.format("vocab_size")),
    "width": ("phi3", {"intermediate_size": 10**9}, LARGEST.format("intermediate_size")),
    "heads": ("llama", {"num_attention_heads": 10**9, "num_key_value_heads": 1}, "Expected heads times head_dim to be"),
    "positions": ("opt", {"max_position_embeddings": 10**9}, LARGEST.format("learned positions")),
}


@pytest.mark.parametrize(("name", "changes", "message"), BEYOND.values(), ids=BEYOND)
def test_sizes_beyond_the_tensors(name, changes, message, tmp_path):
    """Nothing as large as they say is made."""
    (tmp_path / "config.json").write_text(json.dumps(config(name) | changes))
    (tmp_path / "model.safetensors").write_bytes((DIRECTORY / name / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match=message) as e:
        jint8.load(tmp_path)
    assert str(tmp_path) in str(e.value)


MASK = np.ones((1, 1, 8, 8), np.float32)
NAMES = {
    "gpt2_base": ("gpt2", "transformer.", "", {"h.0.attn.bias": MASK, "h.1.attn.masked_bias": MASK}),
    "bloom_base": ("bloom", "transformer.", "", {}),
    "opt_base": ("opt", "model.decoder.", "decoder.", {}),
    "neox_buffers": ("gpt_neox", "", "", {"gpt_neox.layers.0.attention.rotary_emb.inv_freq": MASK}),
    "gemma3_with_images": (
        "gemma3", "model.", "language_model.model.", {"vision_tower.x": MASK, "multi_modal_projector.y": MASK},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("name", "old", "new", "more"), NAMES.values(), ids=NAMES)
def test_names(name, old, new, more, tmp_path):
    path = rewrite(name, tmp_path, lambda tensor: tensor.replace(old, new, 1), **more)
    got, want = (jint8.load(p, quantize=False).params for p in (path, DIRECTORY / name))
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_wrong_shapes_of_transposed_weights(tmp_path):
    name = "transformer.h.0.mlp.c_fc.weight"
    path = rewrite("gpt2", tmp_path, **{name: np.zeros((31, 128), np.float32)})
    with pytest.raises(ValueError, match=rf"{name}': Expected shape \(32, n\), got \(31, 128\)"):
        jint8.load(path)


def test_the_router_stays_in_floating_point():
    path = DIRECTORY / "mixtral"
    mlp = jint8.load(path).params["layers_0"]["mlp"]
    assert mlp["gate_up"]["weight"].q.shape == (4, 64, 32)
    assert not isinstance(mlp["router"]["weight"], jint8.QTensor)
    included = jint8.load(path, include="router").params["layers_0"]["mlp"]
    assert isinstance(included["router"]["weight"], jint8.QTensor)


def test_table_of_positions_ends():
    model = jint8.load(DIRECTORY / "gpt2", quantize=False)
    with pytest.raises(ValueError, match="at most 48 tokens, which this model has positions for, got 49"):
        model.logits(np.zeros((1, 49), int))
    with pytest.raises(ValueError, match="at most 48 tokens, which this model has positions for, got 49"):
        model.generate_tokens([[1, 2], [1]], max_tokens=47)
