"""From GGUF metadata to the keys of a Hugging Face config.json."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jint8.checkpoints._gguf.architectures import Architecture
from jint8.checkpoints._gguf.metadata_keys import check_keys


def config_from_metadata(
    metadata: Mapping[str, Any],
    architecture: Architecture,
    *,
    path: Path,
    vocab_size: int,
    tied: bool,
    tensors: Collection[str],
    rope_tensors: Mapping[str, np.ndarray],
) -> dict[str, Any]:
    """Build the model's configuration.

    Args:
      metadata: of the file.
      architecture: of the model.
      path: the file, for messages.
      vocab_size: rows of the embedding.
      tied: whether the output head is the embedding.
      tensors: Hugging Face's names of the tensors that the file has.
      rope_tensors: the frequency factors that GGUF keeps as tensors, by name.

    Returns:
      A dict as in `config.json`.

    Raises:
      ValueError: a value is missing or impossible, the rotary scaling isn't of a known kind, or metadata of the
        architecture isn't understood.
    """
    arch = metadata["general.architecture"]

    def get(key: str, default: Any = None) -> Any:
        return metadata.get(f"{arch}.{key}", default)

    def positive(key: str, default: int | None = None) -> Any:
        value = get(key, default)
        if value is None:
            raise ValueError(f"{path}: Expected the metadata {arch}.{key}, got none")
        if not isinstance(value, float if key.endswith("epsilon") else int) or not value > 0:
            raise ValueError(f"{path}: Expected a positive number as {arch}.{key}, got {value!r}")
        # float32 in the file: 1e-05 reads back as 9.999999747378752e-06
        return float(f"{value:.7g}") if isinstance(value, float) else value

    width, heads = positive("embedding_length"), positive("attention.head_count")
    head_dim = positive("attention.key_length", width // heads)
    config: dict[str, Any] = {
        "model_type": architecture.model_type,
        "vocab_size": vocab_size,
        "num_key_value_heads": positive("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "tie_word_embeddings": tied,
        **architecture.constants,
    }
    config |= {name: positive(key) for name, key in architecture.keys.items()}
    said = {name: get(key) for name, key in architecture.optional.items()}
    # A window or a cap of 0 is none: Phi-4's files say so.
    config |= {name: value for name, value in said.items() if value or value is False}
    for name, module in architecture.biases.items():
        config[name] = any(tensor.endswith(f"{module}.bias") for tensor in tensors)
    if architecture.rotary:
        config["rope_theta"] = float(get("rope.freq_base", 10000.0))
        config["rope_scaling"] = _rope_scaling(get, config, rope_tensors, path)
        rotary = get("rope.dimension_count", head_dim)
        if rotary != head_dim or architecture.partial_rotary:
            config["partial_rotary_factor"] = _factor(rotary, head_dim)
    if architecture.mean_head_layers:
        mean = get("block_count") in architecture.mean_head_layers
        config["query_pre_attn_scalar"] = width // heads if mean else head_dim
    check_keys(metadata, architecture, config, path)
    for name in ("bos", "eos", "padding"):
        if (token := metadata.get(f"tokenizer.ggml.{name}_token_id")) is not None:
            config[f"{'pad' if name == 'padding' else name}_token_id"] = token
    return config


def _factor(rotary: int, head_dim: int) -> float:
    """The `partial_rotary_factor` of which `int(head_dim * factor)` is `rotary`: 30 / 44 * 44 is 29.999999999999996."""
    factor = rotary / head_dim
    return factor if int(head_dim * factor) == rotary else math.nextafter(factor, math.inf)


def _rope_scaling(
    get: Callable[..., Any], config: dict[str, Any], tensors: Mapping[str, np.ndarray], path: Path
) -> dict[str, Any] | None:
    """As llama.cpp reads it: a factor without a type is linear, and files from 2023 may have another key for it."""
    factor = get("rope.scaling.factor", get("rope.scale_linear", 0.0))
    kind = get("rope.scaling.type", "linear")
    attention = get("rope.scaling.attn_factor")
    original = get("rope.scaling.original_context_length")
    long, short = (tensors.get(f"rope_factors_{kind}.weight") for kind in ("long", "short"))
    scaling: dict[str, Any] | None = None
    if "rope_freqs.weight" in tensors:
        if kind != "none" and factor not in (0.0, 1.0):
            raise ValueError(f"{path}: Expected no rope.scaling.factor beside rope_freqs.weight, got {factor}")
        scaling = _llama3_scaling(tensors["rope_freqs.weight"], config, path)
    elif long is not None and short is not None:
        scaling = {"rope_type": "longrope", "long_factor": long.tolist(), "short_factor": short.tolist()}
        if attention is not None:
            scaling["attention_factor"] = float(attention)
    elif kind != "none" and factor not in (0.0, 1.0):
        scaling = {"rope_type": kind, "factor": float(factor)}
        betas = {name: get(f"rope.scaling.yarn_{name}") for name in ("beta_fast", "beta_slow")}
        scaling |= {name: float(value) for name, value in betas.items() if value is not None and kind == "yarn"}
        if kind == "yarn" and attention is not None:
            scaling["attention_factor"] = float(attention) * (0.1 * math.log(factor) + 1)
    if attention not in (None, 1.0) and (scaling is None or "attention_factor" not in scaling):
        raise ValueError(f"{path}: Expected 1 as rope.scaling.attn_factor with this rotary scaling, got {attention}")
    if scaling is not None and original is not None and scaling["rope_type"] != "llama3":
        scaling["original_max_position_embeddings"] = original
    return scaling


def _llama3_scaling(factors: np.ndarray, config: dict[str, Any], path: Path) -> dict[str, Any] | None:
    """The parameters of Llama 3's scaling, computed back from the divisors of the frequencies.

    The file has only the divisors. Every Llama 3.1 to 3.3 has `low_freq_factor` 1, `high_freq_factor` 4 and 8192
    original positions, and its slowest frequency is divided by `factor`; that these give the divisors is checked.
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
