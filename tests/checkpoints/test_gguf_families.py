"""The families' fixtures written as GGUF, by the gguf package and its names, give the same models."""

import dataclasses

import gguf
import jax
import numpy as np
import pytest
import safetensors.numpy
from family_files import DIRECTORY, config

import jint8
from jint8.checkpoints._gguf.architectures import ARCHITECTURES

# name -> (llama.cpp's architecture, what differs in the ModelConfig because GGUF doesn't say it)
FAMILIES = {
    "llama_linear_biases": ("llama", set()),
    "mixtral": ("llama", set()),
    "qwen2": ("qwen2", set()),
    "qwen3": ("qwen3", set()),
    "gemma2": ("gemma2", {"attention_scale"}),
    "gemma3": ("gemma3", {"attention_scale", "windows"}),
    "phi3": ("phi3", set()),
    "gpt2": ("gpt2", set()),
    "bloom": ("bloom", set()),
    "gpt_neox": ("gptneox", set()),
    "stablelm": ("stablelm", set()),
}


def pairs(x, heads):
    """llama.cpp's order of rotary pairs: neighbours."""
    return x.reshape(heads, 2, -1, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def stacked(x, heads):
    """All queries, all keys, all values, of rows that are interleaved head by head."""
    return x.reshape(heads, 3, -1, *x.shape[1:]).swapaxes(0, 1).reshape(x.shape)


def converted(c, tensors):
    """The values as llama.cpp's converter stores them, by Hugging Face's names."""
    heads = c.get("num_attention_heads") or c.get("n_head")
    experts = {}
    for name, x in tensors.items():
        x = x.astype(np.float32)
        kind = c["model_type"]
        if kind in ("llama", "mixtral") and ("q_proj" in name or "k_proj" in name):
            x = pairs(x, heads if "q_proj" in name else c["num_key_value_heads"])
        if kind.startswith("gemma") and name.endswith("norm.weight"):
            x = x + 1
        if "query_key_value" in name:
            x = stacked(x, heads)
        if kind == "gpt2" and ".c_" in name and x.ndim == 2:
            x = x.T
        if ".experts." in name:
            at, rest = name.split(".experts.")
            experts.setdefault(f"{at}.experts.{rest.partition('.')[2]}", []).append(x)
        else:
            yield name, x
    for name, rows in experts.items():
        yield name, np.stack(rows)


def write(path, name):
    arch, c = FAMILIES[name][0], config(name)
    c = {"num_hidden_layers": c.get("n_layer"), "hidden_size": c.get("n_embd"), "max_position_embeddings": 64} | c
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(c["num_hidden_layers"])
    writer.add_embedding_length(c["hidden_size"])
    writer.add_feed_forward_length(c.get("intermediate_size") or 4 * c["hidden_size"])
    heads = c.get("num_attention_heads") or c["n_head"]
    writer.add_head_count(heads)
    writer.add_head_count_kv(c.get("num_key_value_heads", heads))
    writer.add_context_length(c.get("n_positions") or c["max_position_embeddings"])
    if "rms_norm_eps" in c:
        writer.add_layer_norm_rms_eps(c["rms_norm_eps"])
    else:
        writer.add_layer_norm_eps(c.get("layer_norm_eps") or c["layer_norm_epsilon"])
    if c.get("head_dim"):
        writer.add_key_length(c["head_dim"])
    if c.get("sliding_window"):
        writer.add_sliding_window(c["sliding_window"])
    rope = c.get("rope_parameters", {})
    rope = rope.get("full_attention", rope)
    writer.add_rope_freq_base(rope.get("rope_theta", 10000.0))
    if "factor" in rope:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if "partial_rotary_factor" in rope:
        writer.add_rope_dimension_count(int(c["hidden_size"] / heads * rope["partial_rotary_factor"]))
    if "use_parallel_residual" in c:
        writer.add_parallel_residual(c["use_parallel_residual"])
    if name == "mixtral":
        writer.add_expert_count(c["num_local_experts"])
        writer.add_expert_used_count(c["num_experts_per_tok"])
    if name == "gemma2":
        writer.add_attn_logit_softcapping(c["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(c["final_logit_softcapping"])
    kind = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == arch)
    names = gguf.get_tensor_name_map(kind, c["num_hidden_layers"])
    tensors = safetensors.numpy.load_file(DIRECTORY / name / "model.safetensors")
    for theirs, x in converted(c, tensors):
        theirs = theirs.removeprefix("transformer.") if name == "bloom" else theirs
        writer.add_tensor(names.get_name(theirs, try_suffixes=(".weight", ".bias")), np.ascontiguousarray(x))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_every_architecture_is_tested():
    assert {arch for arch, _ in FAMILIES.values()} == set(ARCHITECTURES)


@pytest.mark.first_case
@pytest.mark.parametrize("name", FAMILIES)
def test_same_model(name, tmp_path):
    got = jint8.load(write(tmp_path / "model.gguf", name), quantize=False, dtype="float32")
    want = jint8.load(DIRECTORY / name, quantize=False, dtype="float32")
    same = {field: getattr(got.config, field) for field in FAMILIES[name][1]}
    assert got.config == dataclasses.replace(want.config, **same)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), got.params, want.params)


def test_experts_of_a_wrong_rank(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_expert_count(4)
    writer.add_tensor("blk.0.ffn_up_exps.weight", np.zeros((4, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"ffn_up_exps\.weight': Expected experts of shape \(e, n, k\), got \(4, 8\)"):
        jint8.load(tmp_path / "model.gguf")
