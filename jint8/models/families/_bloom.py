"""BLOOM: ALiBi, a norm on the embeddings, and query, key and value of each head next to each other."""

from __future__ import annotations

from jint8.models._config import ModelConfig
from jint8.models.families._family import HEADS, Family
from jint8.models.families._fields import Fields, heads, layer_count, number, refuse, size


def _config(config: Fields) -> ModelConfig:
    refuse(config, apply_residual_connection_post_layernorm=False)
    # n_embed and num_attention_heads are the names in the first checkpoints
    config = {"hidden_size": config.get("n_embed"), "n_head": config.get("num_attention_heads")} | dict(config)
    dims = heads(config, count="n_head")
    return ModelConfig(
        family="bloom",
        vocab_size=size(config, "vocab_size"),
        intermediate_size=4 * dims["hidden_size"],
        num_layers=layer_count(config, "n_layer"),
        norm="layer",
        norm_eps=number(config, "layer_norm_epsilon", 1e-5),
        activation="gelu_tanh",
        gated=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        alibi=True,
        embedding_norm=True,
        tie_embeddings=bool(config.get("tie_word_embeddings", True)),
        **dims,
    )


FAMILIES = {
    "bloom": Family(
        config=_config,
        prefixes=("transformer.", ""),
        modules={
            "embedding": "word_embeddings",
            "embedding_norm": "word_embeddings_layernorm",
            "layers/attention_norm": "h.{i}.input_layernorm",
            "layers/attention/qkv": "h.{i}.self_attention.query_key_value",
            "layers/attention/out": "h.{i}.self_attention.dense",
            "layers/mlp_norm": "h.{i}.post_attention_layernorm",
            "layers/mlp/up": "h.{i}.mlp.dense_h_to_4h",
            "layers/mlp/down": "h.{i}.mlp.dense_4h_to_h",
            "norm": "ln_f",
            "lm_head": "lm_head",
        },
        layouts={"layers/attention/qkv": HEADS},
    ),
}
