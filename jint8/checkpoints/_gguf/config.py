"""From GGUF metadata to the keys of a Hugging Face config.json."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jint8.checkpoints._gguf.names import Architecture

_REQUIRED = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "max_position_embeddings": "context_length",
}
_OPTIONAL = {
    "sliding_window": "attention.sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "num_local_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "use_parallel_residual": "use_parallel_residual",
}


def config_from_metadata(
    metadata: Mapping[str, Any],
    architecture: Architecture,
    *,
    path: Path,
    vocab_size: int,
    tied: bool,
    attention_bias: bool,
    mlp_bias: bool,
    rope_tensors: Mapping[str, np.ndarray],
) -> dict[str, Any]:
    """Build the model's configuration.

    Args:
        metadata: The file's metadata.
        architecture: The model's architecture.
        path: The file, for messages.
        vocab_size: Rows of the embedding.
        tied: Whether the output head is the embedding.
        attention_bias: Whether query, key and value projections have a bias.
        mlp_bias: Whether the feed-forward projections have biases.
        rope_tensors: The frequency factors that GGUF keeps as tensors, by name.

    Returns:
        A dict as in `config.json`.

    Raises:
        ValueError: If a value is missing, or the rotary scaling isn't of a known kind.
    """
    arch = metadata["general.architecture"]

    def get(key: str, default: Any = None) -> Any:
        return metadata.get(f"{arch}.{key}", default)

    config: dict[str, Any] = {"model_type": architecture.model_type}
    for name, key in _REQUIRED.items():
        if name == "rms_norm_eps" and not architecture.rms_norm:
            key = "attention.layer_norm_epsilon"
        value = get(key)
        if value is None and name == "num_key_value_heads":
            value = config["num_attention_heads"]
        if value is None:
            raise ValueError(f"{path}: Expected the metadata {arch}.{key}, got none")
        if not isinstance(value, float if name == "rms_norm_eps" else int) or not value > 0:
            raise ValueError(f"{path}: Expected a positive number as {arch}.{key}, got {value!r}")
        config[name] = value
    # Written as float32: 1e-05 reads back as 9.999999747378752e-06.
    config["rms_norm_eps"] = float(f"{config['rms_norm_eps']:.7g}")
    heads = config["num_attention_heads"]
    config["head_dim"] = get("attention.key_length", config["hidden_size"] // heads)
    rotary = get("rope.dimension_count", config["head_dim"])
    if rotary != config["head_dim"] or config["model_type"] == "gpt_neox":  # which rotates a quarter by default
        config["partial_rotary_factor"] = rotary / config["head_dim"]
    config |= {name: get(key) for name, key in _OPTIONAL.items() if get(key) is not None}
    config |= {
        "vocab_size": vocab_size,
        "hidden_act": architecture.hidden_act,
        "tie_word_embeddings": tied,
        "attention_bias": attention_bias,
        "mlp_bias": mlp_bias,
        "rope_theta": float(get("rope.freq_base", 10000.0)),
    }
    config["rope_scaling"] = _rope_scaling(get, config, rope_tensors, path)
    for name in ("bos", "eos", "padding"):
        if (token := metadata.get(f"tokenizer.ggml.{name}_token_id")) is not None:
            config[f"{'pad' if name == 'padding' else name}_token_id"] = token
    if architecture.model_type.startswith("gemma"):
        config |= _gemma(get, config)
    return {architecture.keys.get(name, name): value for name, value in config.items()}


def _gemma(get: Any, config: dict[str, Any]) -> dict[str, Any]:
    # The largest model of each generation scales by the mean head size; the files don't say so (llama.cpp too goes by
    # the number of layers: 46 of Gemma 2, 62 of Gemma 3).
    large = config["num_hidden_layers"] in (46, 62)
    scalar = config["hidden_size"] // config["num_attention_heads"] if large else config["head_dim"]
    extra: dict[str, Any] = {"hidden_activation": config["hidden_act"], "query_pre_attn_scalar": scalar}
    if config["model_type"] == "gemma3_text":
        extra["rope_local_base_freq"] = float(get("rope.freq_base_swa", 10000.0))
        extra["sliding_window_pattern"] = 6
    return extra


def _rope_scaling(
    get: Any, config: dict[str, Any], tensors: Mapping[str, np.ndarray], path: Path
) -> dict[str, Any] | None:
    if "rope_freqs.weight" in tensors:
        return _llama3_scaling(tensors["rope_freqs.weight"], config, path)
    original = get("rope.scaling.original_context_length")
    long, short = (tensors.get(f"rope_factors_{kind}.weight") for kind in ("long", "short"))
    if long is not None and short is not None:
        return {
            "rope_type": "longrope",
            "long_factor": long.tolist(),
            "short_factor": short.tolist(),
            "original_max_position_embeddings": original,
        }
    kind, factor = get("rope.scaling.type", "none"), get("rope.scaling.factor")
    if kind == "none" or factor is None:
        return None
    scaling = {"rope_type": kind, "factor": float(factor)}
    return scaling if original is None else scaling | {"original_max_position_embeddings": original}


def _llama3_scaling(factors: np.ndarray, config: dict[str, Any], path: Path) -> dict[str, Any] | None:
    """The parameters of Llama 3's scaling from the divisors of the frequencies, which is all that the file has.

    Every Llama 3.1 to 3.3 has `low_freq_factor` 1, `high_freq_factor` 4 and 8192 original positions; that these
    reproduce the divisors is checked.
    """
    factor = float(factors.max())
    if factor == 1:
        return None
    low, high, original = 1.0, 4.0, 8192
    half = len(factors)
    wavelength = 2 * math.pi * config["rope_theta"] ** (np.arange(half) / half)
    smooth = np.clip((original / wavelength - low) / (high - low), 0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if not np.allclose(factors, expected, rtol=1e-3):
        raise ValueError(f"{path}: tensor 'rope_freqs.weight': Expected Llama 3's rotary scaling, got other factors")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
