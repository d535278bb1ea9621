"""Metadata of an architecture in GGUF files: read, as usual, or refused by name."""

import math

import numpy as np
import pytest
from checkpoint_files import llama_metadata, llama_tensors, write_gguf

from jint8.checkpoints import open_checkpoint

D = 16


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def config(tmp_path, rng, arch="llama", more=None, **metadata):
    tensors = llama_tensors(rng, arch=arch) | (more or {})
    said = llama_metadata(
        arch, **{f"{arch}.attention.key_length": D}, **{f"{arch}.{k}": v for k, v in metadata.items()}
    )
    return open_checkpoint(write_gguf(tmp_path / "m.gguf", tensors, said, arch=arch)).config


LINEAR = {"rope_type": "linear", "factor": 4.0}
SCALED = {
    "type and factor": ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, LINEAR),
    "factor alone": ({"rope.scaling.factor": 4.0}, LINEAR),
    "of before November 2023": ({"rope.scale_linear": 4.0}, LINEAR),
    "new key before old": ({"rope.scale_linear": 8.0, "rope.scaling.factor": 4.0}, LINEAR),
    "none": ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, None),
    "of 1": ({"rope.scaling.factor": 1.0}, None),
    "yarn": (
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64,
         "rope.scaling.yarn_beta_fast": 16.0, "rope.scaling.yarn_beta_slow": 2.0, "rope.scaling.attn_factor": 0.5},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 16.0,
         "beta_slow": 2.0, "attention_factor": 0.5 * (0.1 * math.log(4) + 1)},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("metadata", "expected"), SCALED.values(), ids=SCALED)
def test_rotary_scaling(tmp_path, rng, metadata, expected):
    assert config(tmp_path, rng, **metadata)["rope_scaling"] == expected


def test_long_and_short_factors(tmp_path, rng):
    """Phi-3's files say the factor of sines and cosines, too."""
    more = {f"rope_factors_{kind}.weight": np.full(D // 2, v, np.float32) for kind, v in (("long", 2), ("short", 1))}
    metadata = {"rope.scaling.original_context_length": 64, "rope.scaling.attn_factor": 1.25}
    scaling = config(tmp_path, rng, more=more, **metadata)["rope_scaling"]
    assert (scaling["rope_type"], scaling["attention_factor"]) == ("longrope", 1.25)


def test_a_window_of_zero_is_none(tmp_path, rng):
    assert "sliding_window" not in config(tmp_path, rng, "gemma3", **{"attention.sliding_window": 0})
    assert config(tmp_path, rng, "gemma3", **{"attention.sliding_window": 8})["sliding_window"] == 8


AS_USUAL = {
    "attention.value_length": D,
    "attention.causal": True,
    "attention.clamp_kqv": 0.0,
    "attention.scale": D**-0.5,
    "attention.sliding_window": 0,
    "expert_count": 0,
    "expert_used_count": 0,
    "logit_scale": 1.0,
    "rope.scaling.finetuned": True,
    "tensor_data_layout": "Meta AI original pth",
    "vocab_size": 32,
}


def test_as_usual(tmp_path, rng):
    assert config(tmp_path, rng, **AS_USUAL) == config(tmp_path, rng)


REFUSED = {
    "attention.value_length": 8,
    "attention.causal": False,
    "attention.clamp_kqv": 8.0,
    "attention.max_alibi_bias": 8.0,
    "attention.scale": 0.1,
    "attention.sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "embedding_scale": 12.0,
    "logit_scale": 0.0625,
    "residual_scale": 0.25,
    "rope.freq_base_swa": 10000.0,
    "rope.scaling.attn_factor": 1.19,
    "rope.scaling.yarn_log_multiplier": 0.1,
    "use_parallel_residual": True,
    "a.key.of.tomorrow": 1,
}


@pytest.mark.parametrize("key", REFUSED)
def test_refused(tmp_path, rng, key):
    with pytest.raises(ValueError, match=rf"m\.gguf: Expected .*{key}.*got {REFUSED[key]}"):
        config(tmp_path, rng, **{key: REFUSED[key]})


def test_factors_of_frequencies_beside_a_factor(tmp_path, rng):
    more = {"rope_freqs.weight": np.ones(D // 2, np.float32)}
    with pytest.raises(ValueError, match=r"no rope.scaling.factor beside rope_freqs"):
        config(tmp_path, rng, more=more, **{"rope.scaling.factor": 4.0})


def test_keys_of_others_say_nothing(tmp_path, rng):
    """General ones, and those of another prefix."""
    said = llama_metadata(**{"general.size_label": "1B", "quantize.imatrix.file": "x", "clip.anything": 1})
    assert open_checkpoint(write_gguf(tmp_path / "m.gguf", llama_tensors(rng), said)).config["hidden_size"] == 64


def test_a_tensor_for_each_expert(tmp_path, rng):
    """As Mixtral's files had them before April 2024."""
    tensors = {name: x for name, x in llama_tensors(rng).items() if "ffn_" not in name or "ffn_norm" in name}
    experts = {
        f"blk.0.ffn_{kind}.{e}.weight": rng.standard_normal(shape, np.float32)
        for e in range(2)
        for kind, shape in (("gate", (96, 64)), ("up", (96, 64)), ("down", (64, 96)))
    }
    tensors |= experts | {"blk.0.ffn_gate_inp.weight": rng.standard_normal((2, 64), np.float32)}
    said = llama_metadata(**{"llama.expert_count": 2, "llama.expert_used_count": 1})
    ckpt = open_checkpoint(write_gguf(tmp_path / "m.gguf", tensors, said))
    assert ckpt.config["model_type"] == "mixtral"
    for name, theirs in (("gate", "w1"), ("down", "w2"), ("up", "w3")):
        got = ckpt.read(f"model.layers.0.block_sparse_moe.experts.1.{theirs}.weight")
        np.testing.assert_array_equal(got, experts[f"blk.0.ffn_{name}.1.weight"])
