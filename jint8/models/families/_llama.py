"""Llama (and SmolLM2) and what descends from it: Mistral, Mixtral, Qwen2 (and 2.5), Qwen3, Phi-3."""

from __future__ import annotations

from typing import Any

from jint8.models._config import ModelConfig
from jint8.models.families._family import Family
from jint8.models.families._fields import (
    MAX_EXPERTS,
    Fields,
    activation,
    heads,
    layer_count,
    layer_windows,
    number,
    rope,
    rope_fields,
    size,
)

MODULES: dict[str, str | tuple[str, ...]] = {
    "embedding": "embed_tokens",
    "layers/attention_norm": "layers.{i}.input_layernorm",
    "layers/attention/qkv": (
        "layers.{i}.self_attn.q_proj",
        "layers.{i}.self_attn.k_proj",
        "layers.{i}.self_attn.v_proj",
    ),
    "layers/attention/q_norm": "layers.{i}.self_attn.q_norm",
    "layers/attention/k_norm": "layers.{i}.self_attn.k_norm",
    "layers/attention/out": "layers.{i}.self_attn.o_proj",
    "layers/mlp_norm": "layers.{i}.post_attention_layernorm",
    "layers/mlp/gate_up": ("layers.{i}.mlp.gate_proj", "layers.{i}.mlp.up_proj"),
    "layers/mlp/down": "layers.{i}.mlp.down_proj",
    "norm": "norm",
    "lm_head": "lm_head",
}
UNUSED = ("*.rotary_emb.inv_freq",)


def llama_config(config: Fields, **choices: Any) -> ModelConfig:
    """What all of them share; `choices` are fields of `ModelConfig` that differ."""
    dims, positions = heads(config), size(config, "max_position_embeddings", 2048)
    attention_bias, mlp_bias = bool(config.get("attention_bias", False)), bool(config.get("mlp_bias", False))
    original = config.get("original_max_position_embeddings")
    shared: dict[str, Any] = {
        "family": config["model_type"],
        "vocab_size": size(config, "vocab_size"),
        "intermediate_size": size(config, "intermediate_size"),
        "num_layers": layer_count(config),
        "max_positions": positions,
        "norm_eps": number(config, "rms_norm_eps", 1e-6),
        "activation": activation(config, "hidden_act", "silu"),
        "qkv_bias": attention_bias,
        "out_bias": attention_bias,
        "mlp_bias": mlp_bias,
        "tie_embeddings": bool(config.get("tie_word_embeddings", False)),
    }
    if "rope" not in choices:
        shared["rope"] = rope(rope_fields(config), dims["head_dim"], positions, original)
    return ModelConfig(**shared | dims | choices)


def _sliding(config: Fields, **choices: Any) -> ModelConfig:
    """A window in every layer."""
    layers = layer_count(config)
    return llama_config(config, windows=layer_windows(config, layers, [True] * layers), **choices)


def _mixtral(config: Fields) -> ModelConfig:
    experts, each = size(config, "num_local_experts", 8, most=MAX_EXPERTS), size(config, "num_experts_per_tok", 2)
    if each > experts:
        raise ValueError(f"Expected num_experts_per_tok to be at most {experts}, got {each}.")
    return _sliding(config, experts=experts, experts_per_token=each)


def _qwen(config: Fields, **choices: Any) -> ModelConfig:
    """Windows only where `use_sliding_window` says so, and by default only in the upper layers."""
    layers = layer_count(config)
    lower = config.get("max_window_layers", 28)
    windows = layer_windows(config, layers, [i >= lower for i in range(layers)])
    return llama_config(config, windows=windows if config.get("use_sliding_window") else (), **choices)


FAMILIES = {
    "llama": Family(config=llama_config, modules=MODULES, unused=UNUSED),
    "mistral": Family(config=_sliding, modules=MODULES, unused=UNUSED),
    "mixtral": Family(
        config=_mixtral,
        modules=MODULES
        | {
            "layers/mlp/router": "layers.{i}.block_sparse_moe.gate",
            "layers/mlp/gate_up": (
                "layers.{i}.block_sparse_moe.experts.{e}.w1",
                "layers.{i}.block_sparse_moe.experts.{e}.w3",
            ),
            "layers/mlp/down": "layers.{i}.block_sparse_moe.experts.{e}.w2",
        },
        unused=UNUSED,
    ),
    "qwen2": Family(config=lambda c: _qwen(c, qkv_bias=True, out_bias=False), modules=MODULES, unused=UNUSED),
    "qwen3": Family(config=lambda c: _qwen(c, qk_norm=True), modules=MODULES, unused=UNUSED),
    "phi3": Family(
        config=_sliding,
        modules=MODULES
        | {
            "layers/attention/qkv": "layers.{i}.self_attn.qkv_proj",
            "layers/mlp/gate_up": "layers.{i}.mlp.gate_up_proj",
        },
        unused=UNUSED,
    ),
}
