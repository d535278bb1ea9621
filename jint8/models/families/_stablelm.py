"""StableLM (3B, Zephyr, StableLM 2 1.6B): Llama with layer norms and a part of each head rotated."""

from __future__ import annotations

from jint8.models._config import ModelConfig
from jint8.models.families._family import Family
from jint8.models.families._fields import (
    Fields,
    activation,
    heads,
    layer_count,
    number,
    refuse,
    rope,
    rope_fields,
    size,
)
from jint8.models.families._llama import MODULES, UNUSED


def _config(config: Fields) -> ModelConfig:
    # StableLM 2 12B has both: one norm for attention and feed-forward, and a gain for each head in the norms of queries
    # and keys. The decoder has one gain for all heads.
    refuse(config, use_parallel_residual=False, qk_layernorm=False)
    dims, positions = heads(config), size(config, "max_position_embeddings", 4096)
    return ModelConfig(
        family="stablelm",
        vocab_size=size(config, "vocab_size"),
        intermediate_size=size(config, "intermediate_size"),
        num_layers=layer_count(config),
        max_positions=positions,
        norm="layer",
        norm_eps=number(config, "layer_norm_eps", 1e-5),
        activation=activation(config, "hidden_act", "silu"),
        qkv_bias=bool(config.get("use_qkv_bias", False)),
        rope=rope({"partial_rotary_factor": 0.25} | rope_fields(config), dims["head_dim"], positions),
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        **dims,
    )


FAMILIES = {"stablelm": Family(config=_config, modules=MODULES, unused=UNUSED)}
