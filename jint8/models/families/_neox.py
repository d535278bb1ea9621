"""GPT-NeoX and Pythia: a part of each head is rotated, attention and feed-forward read the same input."""

from __future__ import annotations

from jint8.models._config import ModelConfig
from jint8.models.families._family import HEADS, Family
from jint8.models.families._fields import Fields, activation, heads, layer_count, number, rope, rope_fields, size


def _config(config: Fields) -> ModelConfig:
    dims, positions = heads(config), size(config, "max_position_embeddings", 2048)
    old = {"rope_theta": config.get("rotary_emb_base"), "partial_rotary_factor": config.get("rotary_pct", 0.25)}
    bias = bool(config.get("attention_bias", True))
    return ModelConfig(
        family="gpt_neox",
        vocab_size=size(config, "vocab_size"),
        intermediate_size=size(config, "intermediate_size"),
        num_layers=layer_count(config),
        max_positions=positions,
        norm="layer",
        norm_eps=number(config, "layer_norm_eps", 1e-5),
        parallel=bool(config.get("use_parallel_residual", True)),
        activation=activation(config, "hidden_act", "gelu"),
        gated=False,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=True,
        rope=rope(old | rope_fields(config), dims["head_dim"], positions),
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        **dims,
    )


FAMILIES = {
    "gpt_neox": Family(
        config=_config,
        prefixes=("gpt_neox.", ""),
        modules={
            "embedding": "embed_in",
            "layers/attention_norm": "layers.{i}.input_layernorm",
            "layers/attention/qkv": "layers.{i}.attention.query_key_value",
            "layers/attention/out": "layers.{i}.attention.dense",
            "layers/mlp_norm": "layers.{i}.post_attention_layernorm",
            "layers/mlp/up": "layers.{i}.mlp.dense_h_to_4h",
            "layers/mlp/down": "layers.{i}.mlp.dense_4h_to_h",
            "norm": "final_layer_norm",
            "lm_head": "embed_out",
        },
        layouts={"layers/attention/qkv": HEADS},
        unused=("*.attention.bias", "*.attention.masked_bias", "*.rotary_emb.inv_freq"),
    ),
}
