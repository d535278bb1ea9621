"""Gemma 2 and 3: norms before and after attention and feed-forward, gains stored minus 1, scaled embeddings."""

from __future__ import annotations

import math
from typing import Any

from jint8.models._config import ModelConfig
from jint8.models.families._family import Family
from jint8.models.families._fields import (
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
from jint8.models.families._llama import MODULES, UNUSED, llama_config

# The config.json of a multimodal checkpoint leaves out keys that have the default value of transformers: these.
_GEMMA3_DEFAULTS = {"vocab_size": 262208, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256}


def _gemma(config: Fields, **choices: Any) -> ModelConfig:
    hidden = size(config, "hidden_size")
    shared: dict[str, Any] = {
        "norm_offset": 1.0,
        "norm_place": "around",
        "activation": activation(config, "hidden_activation", "gelu_pytorch_tanh"),
        "attention_scale": number(config, "query_pre_attn_scalar", 256) ** -0.5,
        "attention_softcap": number(config, "attn_logit_softcapping", 0),
        "logit_softcap": number(config, "final_logit_softcapping", 0),
        "embedding_scale": math.sqrt(hidden),
        "tie_embeddings": bool(config.get("tie_word_embeddings", True)),
    }
    return llama_config(config, **shared | choices)


def _gemma2(config: Fields) -> ModelConfig:
    """A window in every other layer, the first included."""
    layers = layer_count(config)
    capped = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    windows = layer_windows(config, layers, [i % 2 == 0 for i in range(layers)])
    return _gemma(capped | dict(config), windows=windows)


def _gemma3(config: Fields) -> ModelConfig:
    """A window in all but every sixth layer; layers with one have rotary positions of their own, without scaling."""
    config = _GEMMA3_DEFAULTS | dict(config)
    layers, positions = layer_count(config), size(config, "max_position_embeddings", 131072)
    period = size(config, "sliding_window_pattern", 6)
    head_dim = heads(config)["head_dim"]
    local = {"rope_theta": number(config, "rope_local_base_freq", 10000.0)}
    if config.get("rope_parameters"):
        local = rope_fields(config, "sliding_attention")
    everywhere = {"rope_theta": 1e6} | rope_fields(config, "full_attention")
    return _gemma(
        {"sliding_window": 4096} | dict(config),
        qk_norm=True,
        max_positions=positions,
        windows=layer_windows(config, layers, [(i + 1) % period != 0 for i in range(layers)]),
        rope=rope(everywhere, head_dim, positions),
        local_rope=rope(local, head_dim, positions),
    )


_MODULES = MODULES | {
    "layers/attention_out_norm": "layers.{i}.post_attention_layernorm",
    "layers/mlp_norm": "layers.{i}.pre_feedforward_layernorm",
    "layers/mlp_out_norm": "layers.{i}.post_feedforward_layernorm",
}
FAMILIES = {
    "gemma2": Family(config=_gemma2, modules=_MODULES, unused=UNUSED),
    "gemma3_text": Family(
        config=_gemma3,
        modules=_MODULES,
        prefixes=("model.", "", "model.language_model.", "language_model.model."),
        unused=(*UNUSED, "*vision_tower.*", "*multi_modal_projector.*"),
    ),
}
