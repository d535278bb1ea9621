"""GPT-2: learned positions, and weights stored as `[in, out]`."""

from __future__ import annotations

from jint8.models._config import ModelConfig
from jint8.models.families._family import COLUMNS, Family
from jint8.models.families._fields import Fields, activation, heads, layer_count, number, refuse, size


def _config(config: Fields) -> ModelConfig:
    refuse(config, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    dims = heads(config, hidden="n_embd", count="n_head")
    return ModelConfig(
        family="gpt2",
        vocab_size=size(config, "vocab_size"),
        intermediate_size=size(config, "n_inner", 4 * dims["hidden_size"]),
        num_layers=layer_count(config, "n_layer"),
        max_positions=size(config, "n_positions", 1024),
        norm="layer",
        norm_eps=number(config, "layer_norm_epsilon", 1e-5),
        activation=activation(config, "activation_function", "gelu_new"),
        gated=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        learned_positions=0,
        tie_embeddings=bool(config.get("tie_word_embeddings", True)),
        **dims,
    )


FAMILIES = {
    "gpt2": Family(
        config=_config,
        prefixes=("transformer.", ""),
        modules={
            "embedding": "wte",
            "positions": "wpe",
            "layers/attention_norm": "h.{i}.ln_1",
            "layers/attention/qkv": "h.{i}.attn.c_attn",
            "layers/attention/out": "h.{i}.attn.c_proj",
            "layers/mlp_norm": "h.{i}.ln_2",
            "layers/mlp/up": "h.{i}.mlp.c_fc",
            "layers/mlp/down": "h.{i}.mlp.c_proj",
            "norm": "ln_f",
            "lm_head": "lm_head",
        },
        layouts=dict.fromkeys(
            ("layers/attention/qkv", "layers/attention/out", "layers/mlp/up", "layers/mlp/down"), COLUMNS
        ),
        unused=("*.attn.bias", "*.attn.masked_bias"),
    ),
}
