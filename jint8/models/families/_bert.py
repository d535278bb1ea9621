"""BERT, and what shares its architecture: MiniLM, BGE, E5."""

from __future__ import annotations

from jint8.models._config import ModelConfig
from jint8.models.families._family import Family
from jint8.models.families._fields import Fields, activation, heads, layer_count, number, refuse, size


def _config(config: Fields) -> ModelConfig:
    refuse(config, position_embedding_type="absolute", is_decoder=False)
    return ModelConfig(
        family="bert",
        vocab_size=size(config, "vocab_size"),
        intermediate_size=size(config, "intermediate_size"),
        num_layers=layer_count(config),
        max_positions=size(config, "max_position_embeddings", 512),
        norm="layer",
        norm_eps=number(config, "layer_norm_eps", 1e-12),
        norm_place="after",
        activation=activation(config, "hidden_act", "gelu"),
        gated=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        learned_positions=0,
        token_types=size(config, "type_vocab_size", 2),
        causal=False,
        **heads(config),
    )


_LAYER = "encoder.layer.{i}."
FAMILIES = {
    "bert": Family(
        config=_config,
        encoder=True,
        prefixes=("", "bert."),
        modules={
            "embedding": "embeddings.word_embeddings",
            "positions": "embeddings.position_embeddings",
            "token_types": "embeddings.token_type_embeddings",
            "embedding_norm": "embeddings.LayerNorm",
            "layers/attention/qkv": tuple(f"{_LAYER}attention.self.{name}" for name in ("query", "key", "value")),
            "layers/attention/out": f"{_LAYER}attention.output.dense",
            "layers/attention_norm": f"{_LAYER}attention.output.LayerNorm",
            "layers/mlp/up": f"{_LAYER}intermediate.dense",
            "layers/mlp/down": f"{_LAYER}output.dense",
            "layers/mlp_norm": f"{_LAYER}output.LayerNorm",
            "lm_head": "cls.predictions.decoder",
        },
        # Features are those of the last layer: the pooler and the head that training uses aren't needed.
        unused=("*embeddings.position_ids", "*pooler.*", "cls.*"),
    ),
}
