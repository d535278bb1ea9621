"""What a decoder looks like: one frozen dataclass, made from a Hugging Face `config.json`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and choices of a decoder-only transformer. Hashable: it is static under `jax.jit`.

    Attributes:
      family: the `model_type` of the checkpoint's configuration.
      vocab_size, hidden_size, intermediate_size, num_layers: sizes.
      num_heads, num_kv_heads, head_dim: of attention; fewer key-value heads than heads is grouped-query attention.
      norm_eps: added to the mean square before the root.
      rope_theta: base of the rotary positions.
      max_positions: longest sequence that the model was trained for.
      tie_embeddings: the output head is the embedding.
      attention_bias, mlp_bias: whether those projections have biases.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    max_positions: int = 2048
    tie_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False


FAMILIES = ("llama",)


def model_config(config: Mapping[str, Any]) -> ModelConfig:
    """The `ModelConfig` of a Hugging Face configuration.

    Args:
      config: the content of `config.json`.

    Returns:
      What `jint8.models.Decoder` takes.

    Raises:
      ValueError: an architecture or option that isn't supported, or a missing or impossible size.

    Examples:
      >>> from jint8.models import model_config
      >>> model_config({"model_type": "llama", "vocab_size": 9, "hidden_size": 8, "intermediate_size": 16,
      ...               "num_hidden_layers": 1, "num_attention_heads": 2}).head_dim
      4
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"Expected a model_type among {', '.join(FAMILIES)}, got {family!r}.")
    heads = _size(config, "num_attention_heads")
    hidden = _size(config, "hidden_size")
    kv_heads = _size(config, "num_key_value_heads", heads)
    if heads % kv_heads:
        raise ValueError(f"Expected num_key_value_heads to divide {heads} attention heads, got {kv_heads}.")
    if config.get("head_dim") is None and hidden % heads:
        raise ValueError(f"Expected num_attention_heads to divide hidden_size {hidden}, got {heads}.")
    # transformers 5 moved rope_theta into rope_parameters
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if (kind := rope.get("rope_type", rope.get("type", "default"))) != "default":
        raise ValueError(f"Expected rope_scaling of type 'default', got {kind!r}.")
    if (activation := config.get("hidden_act", "silu")) != "silu":
        raise ValueError(f"Expected hidden_act 'silu', got {activation!r}.")
    return ModelConfig(
        family=family,
        vocab_size=_size(config, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=_size(config, "intermediate_size"),
        num_layers=_size(config, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=_size(config, "head_dim", hidden // heads),
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
        max_positions=_size(config, "max_position_embeddings", 2048),
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        attention_bias=bool(config.get("attention_bias", False)),
        mlp_bias=bool(config.get("mlp_bias", False)),
    )


def _size(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"Expected {key} to be a positive integer, got {value!r}.")
    return value
