"""OPT: learned positions from row 2 of the table on. OPT-350M projects embeddings and has norms after residuals."""

from __future__ import annotations

from jint8.models._config import ModelConfig
from jint8.models.families._family import Family
from jint8.models.families._fields import Fields, activation, heads, layer_count, refuse, size


def _config(config: Fields) -> ModelConfig:
    refuse(config, layer_norm_elementwise_affine=True)
    dims, before = heads(config), bool(config.get("do_layer_norm_before", True))
    bias = bool(config.get("enable_bias", True))
    width = size(config, "word_embed_proj_dim", dims["hidden_size"])
    return ModelConfig(
        family="opt",
        vocab_size=size(config, "vocab_size"),
        intermediate_size=size(config, "ffn_dim"),
        num_layers=layer_count(config),
        max_positions=size(config, "max_position_embeddings", 2048),
        norm="layer",
        norm_place="before" if before else "after",
        final_norm=before and not config.get("_remove_final_layer_norm", False),
        activation=activation(config, "activation_function", "relu"),
        gated=False,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bias,
        learned_positions=2,
        embedding_size=width if width != dims["hidden_size"] else 0,
        tie_embeddings=bool(config.get("tie_word_embeddings", True)),
        **dims,
    )


FAMILIES = {
    "opt": Family(
        config=_config,
        prefixes=("model.decoder.", "decoder.", ""),
        modules={
            "embedding": "embed_tokens",
            "positions": "embed_positions",
            "project_in": "project_in",
            "layers/attention_norm": "layers.{i}.self_attn_layer_norm",
            "layers/attention/qkv": (
                "layers.{i}.self_attn.q_proj",
                "layers.{i}.self_attn.k_proj",
                "layers.{i}.self_attn.v_proj",
            ),
            "layers/attention/out": "layers.{i}.self_attn.out_proj",
            "layers/mlp_norm": "layers.{i}.final_layer_norm",
            "layers/mlp/up": "layers.{i}.fc1",
            "layers/mlp/down": "layers.{i}.fc2",
            "norm": "final_layer_norm",
            "project_out": "project_out",
            "lm_head": "lm_head",
        },
    ),
}
