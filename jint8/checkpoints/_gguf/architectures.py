"""The table of GGUF architectures: what llama.cpp calls and stores differently from Hugging Face. Data only.

A new model family is one entry in `ARCHITECTURES` and one file in `jint8/models/families/`;
`tests/models/test_tables_agree.py` compares the two.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

# From the stems of llama.cpp's tensor names to those of Hugging Face's Llama, which most models took over.
_SHARED = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
}
_QKV = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj"}
_MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_NAMES = _SHARED | _QKV | _MLP
_QK_NORM = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
# Gemma norms what comes out of attention and feed-forward, too. Hugging Face calls the norm behind attention
# `post_attention_layernorm`, which in Llama is the name of the one before the feed-forward network.
_NORMS_AROUND = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_SIZES = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "max_position_embeddings": "context_length",
}
_RMS_NORM, _LAYER_NORM = "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """How llama.cpp stores one architecture. "Key" below means a key of Hugging Face's config.json.

    Attributes:
      model_type: Hugging Face's name for it.
      names: from the stem of a tensor's name to Hugging Face's; within a layer, to what follows `layer`.
      layer: what stands in front of a layer's number in Hugging Face's names.
      keys: from each key that must be set to the metadata that says it, without the architecture's name in front.
      optional: the same for keys that are set where the file has the metadata.
      constants: keys that the files don't say, because all models of the architecture share the value.
      biases: from a key to the end of a module's name (Hugging Face's): whether such a module has a bias.
      rotary: positions are rotary: `rope_theta` and `rope_scaling` are set.
      partial_rotary: `partial_rotary_factor` is always set, because the model's default isn't 1.
      rotary_pairs: rows of the query and key projections are stored so that the two halves of a rotary pair are
        neighbours; Hugging Face has them half a head apart.
      transposed: stems of weights that Hugging Face has as `[in, out]`.
      interleaved: stem of the fused projection whose rows Hugging Face has head by head: query, key, value.
      unit_norms: norm weights are stored with 1 added, which Hugging Face leaves to the model.
      experts: from the stems of stacked experts to the name of each in Hugging Face's, with `{e}` for its number.
      with_experts: the architecture of files that say they have experts; llama.cpp has one name for both.
      mean_head_layers: numbers of layers of the models that scale scores by `hidden_size / heads` instead of the size
        of a head; the files don't say so. Empty means that the model's configuration has no `query_pre_attn_scalar`.
    """

    model_type: str
    names: Mapping[str, str] = dataclasses.field(default_factory=lambda: _NAMES)
    layer: str = "model.layers."
    keys: Mapping[str, str] = dataclasses.field(default_factory=lambda: _SIZES | {"rms_norm_eps": _RMS_NORM})
    optional: Mapping[str, str] = dataclasses.field(default_factory=dict)
    constants: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"hidden_act": "silu"})
    biases: Mapping[str, str] = dataclasses.field(
        default_factory=lambda: {"attention_bias": "q_proj", "mlp_bias": "up_proj"}
    )
    rotary: bool = True
    partial_rotary: bool = False
    rotary_pairs: bool = False
    transposed: tuple[str, ...] = ()
    interleaved: str | None = None
    unit_norms: bool = False
    experts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    with_experts: Architecture | None = None
    mean_head_layers: tuple[int, ...] = ()


_WINDOW = {"sliding_window": "attention.sliding_window"}
_EXPERT = "block_sparse_moe.experts.{e}"
_MIXTRAL = Architecture(
    model_type="mixtral",
    names=_SHARED | _QKV | {"ffn_gate_inp": "block_sparse_moe.gate"},
    optional=_WINDOW | {"num_local_experts": "expert_count", "num_experts_per_tok": "expert_used_count"},
    rotary_pairs=True,
    experts={"ffn_gate_exps": f"{_EXPERT}.w1", "ffn_down_exps": f"{_EXPERT}.w2", "ffn_up_exps": f"{_EXPERT}.w3"},
)
ARCHITECTURES = {
    "llama": Architecture(model_type="llama", rotary_pairs=True, with_experts=_MIXTRAL),
    "qwen2": Architecture(model_type="qwen2", biases={}),  # which it always has
    "qwen3": Architecture(model_type="qwen3", names=_NAMES | _QK_NORM),
    "gemma2": Architecture(
        model_type="gemma2",
        names=_NAMES | _NORMS_AROUND,
        optional=_WINDOW | {
            "attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping",
        },
        constants={"hidden_activation": "gelu_pytorch_tanh"},
        unit_norms=True,
        mean_head_layers=(46,),  # Gemma 2 27B; llama.cpp, too, goes by the number of layers
    ),
    "gemma3": Architecture(
        model_type="gemma3_text",
        names=_NAMES | _QK_NORM | _NORMS_AROUND,
        optional=_WINDOW | {"rope_local_base_freq": "rope.freq_base_swa"},
        constants={"hidden_activation": "gelu_pytorch_tanh", "sliding_window_pattern": 6},
        unit_norms=True,
        mean_head_layers=(62,),  # Gemma 3 27B
    ),
    "phi3": Architecture(
        model_type="phi3",
        names=_SHARED | {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj", "ffn_down": "mlp.down_proj"},
        optional=_WINDOW,
    ),
    "gpt2": Architecture(
        model_type="gpt2",
        names={
            "token_embd": "transformer.wte", "position_embd": "transformer.wpe", "output_norm": "transformer.ln_f",
            "output": "lm_head", "attn_norm": "ln_1", "attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj",
            "ffn_norm": "ln_2", "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj",
        },
        layer="transformer.h.",
        keys={
            "n_embd": "embedding_length", "n_inner": "feed_forward_length", "n_layer": "block_count",
            "n_head": "attention.head_count", "n_positions": "context_length", "layer_norm_epsilon": _LAYER_NORM,
        },
        constants={"activation_function": "gelu_new"},
        biases={},
        rotary=False,
        transposed=("attn_qkv", "attn_output", "ffn_up", "ffn_down"),
    ),
    "bloom": Architecture(
        model_type="bloom",
        names={
            "token_embd": "transformer.word_embeddings", "token_embd_norm": "transformer.word_embeddings_layernorm",
            "output_norm": "transformer.ln_f", "output": "lm_head", "attn_norm": "input_layernorm",
            "attn_qkv": "self_attention.query_key_value", "attn_output": "self_attention.dense",
            "ffn_norm": "post_attention_layernorm", "ffn_up": "mlp.dense_h_to_4h", "ffn_down": "mlp.dense_4h_to_h",
        },
        layer="transformer.h.",
        keys={
            "hidden_size": "embedding_length", "n_layer": "block_count", "n_head": "attention.head_count",
            "layer_norm_epsilon": _LAYER_NORM,
        },
        constants={},
        biases={},
        rotary=False,
        interleaved="attn_qkv",
    ),
    "gptneox": Architecture(
        model_type="gpt_neox",
        names={
            "token_embd": "gpt_neox.embed_in", "output_norm": "gpt_neox.final_layer_norm", "output": "embed_out",
            "attn_norm": "input_layernorm", "attn_qkv": "attention.query_key_value", "attn_output": "attention.dense",
            "ffn_norm": "post_attention_layernorm", "ffn_up": "mlp.dense_h_to_4h", "ffn_down": "mlp.dense_4h_to_h",
        },
        layer="gpt_neox.layers.",
        keys=_SIZES | {"layer_norm_eps": _LAYER_NORM},
        optional={"use_parallel_residual": "use_parallel_residual"},
        constants={"hidden_act": "gelu"},
        biases={"attention_bias": "query_key_value"},
        partial_rotary=True,
        interleaved="attn_qkv",
    ),
    "stablelm": Architecture(
        model_type="stablelm",
        keys=_SIZES | {"layer_norm_eps": _LAYER_NORM},
        optional={"use_parallel_residual": "use_parallel_residual"},
        biases={"use_qkv_bias": "q_proj"},
        partial_rotary=True,
    ),
}  # fmt: skip
