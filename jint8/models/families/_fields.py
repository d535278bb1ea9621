"""Fields of a Hugging Face `config.json`, checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jint8.models._config import Activation, Rope

Fields = Mapping[str, Any]

# Of rotated dimensions in a head, of layers and of experts, so that a damaged number doesn't fill the memory.
MAX_PAIRS, MAX_LAYERS, MAX_EXPERTS = 2**16, 2**12, 2**12

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu", "swish": "silu", "relu": "relu", "gelu": "gelu",
    "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh",
}  # fmt: skip


def size(config: Fields, key: str, default: int | None = None, *, most: int = 2**31 - 1) -> int:
    """A positive integer up to `most`; `default` where it is missing or null. Raises ValueError for anything else."""
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"Expected {key} to be a positive integer, got {value!r}.")
    if value > most:
        raise ValueError(f"Expected {key} to be at most {most}, got {value}.")
    return value


def layer_count(config: Fields, key: str = "num_hidden_layers") -> int:
    """The number of layers. Raises ValueError for one that no model has."""
    return size(config, key, most=MAX_LAYERS)


def number(config: Fields, key: str, default: float | None = None) -> float:
    """A finite number; `default` where it is missing or null. Raises ValueError for anything else."""
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"Expected {key} to be a number, got {value!r}.")
    return float(value)


def activation(config: Fields, key: str, default: str) -> Activation:
    """The name of an activation function, as `ModelConfig` has it. Raises ValueError for one that isn't supported."""
    name = config.get(key) or default
    if name not in _ACTIVATIONS:
        raise ValueError(f"Expected {key} to be one of {', '.join(_ACTIVATIONS)}, got {name!r}.")
    return _ACTIVATIONS[name]


def refuse(config: Fields, **expected: Any) -> None:
    """Raises ValueError where the configuration gives an option another value than the one that is supported."""
    for key, value in expected.items():
        if config.get(key, value) != value:
            raise ValueError(f"Expected {key} to be {value!r}, got {config[key]!r}.")


def heads(config: Fields, *, hidden: str = "hidden_size", count: str = "num_attention_heads") -> dict[str, Any]:
    """`hidden_size`, `num_heads`, `num_kv_heads` and `head_dim` of a `ModelConfig`.

    Args:
      config: the configuration.
      hidden: its key for the width.
      count: its key for the number of heads.

    Raises:
      ValueError: one is missing or impossible, or they don't divide each other.
    """
    width, n = size(config, hidden), size(config, count)
    kv = size(config, "num_key_value_heads", n)
    if n % kv:
        raise ValueError(f"Expected num_key_value_heads to divide {n} attention heads, got {kv}.")
    if config.get("head_dim") is None and width % n:
        raise ValueError(f"Expected {count} to divide {hidden} {width}, got {n}.")
    return {
        "hidden_size": width,
        "num_heads": n,
        "num_kv_heads": kv,
        "head_dim": size(config, "head_dim", width // n),
    }


def layer_windows(config: Fields, layers: int, slides: list[bool]) -> tuple[int, ...]:
    """The window of each layer, for `ModelConfig.windows`.

    Args:
      config: the configuration.
      layers: how many there are.
      slides: which of them have a window, where the configuration's `layer_types` doesn't say so.

    Raises:
      ValueError: another number or kind of layers in `layer_types`, or an impossible `sliding_window`.
    """
    if config.get("sliding_window") is None:
        return ()
    types = config.get("layer_types")
    if types is not None:
        if len(types) != layers or not set(types) <= {"full_attention", "sliding_attention"}:
            raise ValueError(f"Expected layer_types of {layers} layers, full or sliding, got {types}.")
        slides = [kind == "sliding_attention" for kind in types]
    return tuple(size(config, "sliding_window") if slide else 0 for slide in slides) if any(slides) else ()


def rope_fields(config: Fields, layer_type: str | None = None) -> dict[str, Any]:
    """The fields that describe rotary positions, as one dict.

    transformers 5 writes `rope_parameters` (one for each type of layers where these differ: `layer_type`); transformers
    4 wrote `rope_scaling` and keys at the top level, which are taken where the new ones are missing.
    """
    new: dict[str, Any] = {**(config.get("rope_parameters") or {})}
    new = new.get(layer_type, new) if layer_type else new
    old = {key: config.get(key) for key in ("rope_theta", "partial_rotary_factor")}
    scaling: dict[str, Any] = {**(config.get("rope_scaling") or {})}
    return {k: v for k, v in (old | scaling | new).items() if v is not None}


def rope(fields: Fields, head_dim: int, max_positions: int, original: int | None = None) -> Rope:
    """Rotary positions out of `rope_fields`.

    Args:
      fields: `rope_theta`, `partial_rotary_factor`, `rope_type` and what that takes.
      head_dim: of attention.
      max_positions: `max_position_embeddings`.
      original: the length that the model was first trained for, before its context was extended; used where the fields
        have no `original_max_position_embeddings`. None means `max_positions`.

    Returns:
      What `ModelConfig.rope` takes.

    Raises:
      ValueError: an unknown type, or a missing or impossible value.

    References:
      Peng et al., YaRN, 2023, arXiv 2309.00071, sections 3.1 to 3.4 (linear, dynamic NTK, YaRN); Ding et al., LongRoPE,
      2024, arXiv 2402.13753, section 3; The Llama 3 Herd of Models, 2024, arXiv 2407.21783, section 3.4.3.
    """
    theta = number(fields, "rope_theta", 10000.0)
    half = int(head_dim * number(fields, "partial_rotary_factor", 1.0)) // 2
    if not 0 <= half <= MAX_PAIRS:
        raise ValueError(f"Expected from 0 to {MAX_PAIRS} rotated pairs of dimensions in a head, got {half}.")
    kind = fields.get("rope_type", fields.get("type", "default"))
    if kind not in _SCALINGS:
        raise ValueError(f"Expected a rope_type among {', '.join(_SCALINGS)}, got {kind!r}.")
    frequencies = theta ** (-np.arange(half, dtype=np.float64) / half)
    original = size(fields, "original_max_position_embeddings", original or max_positions)
    return _SCALINGS[kind](fields, frequencies, theta, max_positions, original)


def _default(fields: Fields, frequencies: np.ndarray, theta: float, longest: int, original: int) -> Rope:
    return Rope(frequencies=tuple(frequencies.tolist()))


def _linear(fields: Fields, frequencies: np.ndarray, theta: float, longest: int, original: int) -> Rope:
    return Rope(frequencies=tuple((frequencies / number(fields, "factor")).tolist()))


def _dynamic(fields: Fields, frequencies: np.ndarray, theta: float, longest: int, original: int) -> Rope:
    return Rope(frequencies=tuple(frequencies.tolist()), trained=longest, ntk=number(fields, "factor"))


def _llama3(fields: Fields, frequencies: np.ndarray, theta: float, longest: int, original: int) -> Rope:
    """Slow pairs turn `factor` times slower, fast ones as before, those in between by a weighted mean of both."""
    turns = original * frequencies / (2 * math.pi)  # in the original context
    low, high = number(fields, "low_freq_factor"), number(fields, "high_freq_factor")
    keep = np.clip((turns - low) / (high - low), 0, 1)
    return Rope(frequencies=tuple((frequencies * (keep + (1 - keep) / number(fields, "factor"))).tolist()))


def _yarn(fields: Fields, frequencies: np.ndarray, theta: float, longest: int, original: int) -> Rope:
    """As `_llama3`, but the weights of the mean are linear in the index of the pair; and scores are scaled up."""
    factor, half = number(fields, "factor"), len(frequencies)

    def pair(turns: float) -> float:  # the (fractional) index of the pair that turns so often in the original context
        return half * math.log(original / (turns * 2 * math.pi)) / math.log(theta)

    first, last = pair(number(fields, "beta_fast", 32)), pair(number(fields, "beta_slow", 1))
    if fields.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * half - 1)  # clipped to d - 1, not half - 1, as in the authors' code
    slow = np.clip((np.arange(half) - first) / max(last - first, 1e-3), 0, 1)
    frequencies = frequencies * (1 - slow + slow / factor)
    scale = number(fields, "attention_factor", _yarn_scale(fields, factor))
    return Rope(frequencies=tuple(frequencies.tolist()), scale=scale)


def _yarn_scale(fields: Fields, factor: float) -> float:
    """The factor of sines and cosines where the configuration gives no `attention_factor`."""

    def sharper(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0

    if fields.get("mscale") and fields.get("mscale_all_dim"):
        return sharper(number(fields, "mscale")) / sharper(number(fields, "mscale_all_dim"))
    return sharper(1.0)


def _longrope(fields: Fields, frequencies: np.ndarray, theta: float, longest: int, original: int) -> Rope:
    """Each pair has two divisors of its frequency: for sequences up to the original length, and for longer ones."""
    divided = []
    for key in ("short_factor", "long_factor"):
        factors = fields.get(key)
        if not isinstance(factors, list) or len(factors) != len(frequencies):
            raise ValueError(f"Expected {key} to be a list of {len(frequencies)} numbers, got {factors!r}.")
        divided.append(tuple((frequencies / np.asarray(factors, np.float64)).tolist()))
    stretch = number(fields, "factor", longest / original)
    scale = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
    scale = number(fields, "attention_factor", scale)
    return Rope(frequencies=divided[0], long=divided[1], trained=original, scale=scale)


_SCALINGS = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
    "su": _longrope,  # what Phi-3 called it first
}
