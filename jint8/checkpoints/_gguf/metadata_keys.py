"""Which metadata of a GGUF file says something about the model, and what is refused because jint8 wouldn't do it.

Keys of the architecture change the numbers. Each is read (`config`), or may only have the value that means "as usual",
or is refused by name: a key that llama.cpp will have tomorrow, too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jint8.checkpoints._gguf.architectures import Architecture

# Read by `config_from_metadata`, beside what the architecture's table names.
READ = {
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "block_count",
    "embedding_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.attn_factor",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.type",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
}
# They say nothing that isn't in the tensors, or that generation would need.
HARMLESS = {"context_length", "feed_forward_length", "pooling_type", "rope.scaling.finetuned", "vocab_size"}
# Values that mean "as usual" for keys that aren't read: llama.cpp's defaults.
USUAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.shared_kv_layers": (0,),
    "attention.sliding_window": (0,),
    "attention.temperature_length": (0,),
    "attn_logit_softcapping": (0.0,),
    "embedding_scale": (0.0, 1.0),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "final_logit_softcapping": (0.0,),
    "leading_dense_block_count": (0,),
    "logit_scale": (0.0, 1.0),
    "nextn_predict_layers": (0,),
    "residual_scale": (0.0, 1.0),
    "rope.scaling.alpha": (0.0, 1.0),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_ext_factor": (-1.0, 1.0),
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "tensor_data_layout": ("Meta AI original pth",),
    "use_parallel_residual": (False,),
}
ALIBI = 8.0  # the largest bias that the slopes of ALiBi are made for


def check_keys(metadata: Mapping[str, Any], architecture: Architecture, config: Mapping[str, Any], path: Path) -> None:
    """Refuse metadata of the architecture that the model wouldn't follow.

    Args:
      metadata: of the file.
      architecture: of the model.
      config: what was made of it.
      path: the file, for messages.

    Raises:
      ValueError: such a key, with its value.
    """
    arch = metadata["general.architecture"]
    tabled = {*architecture.keys.values(), *architecture.optional.values()}
    same = _same_as(architecture, config)
    for key, value in metadata.items():
        name = key.removeprefix(f"{arch}.")
        if name == key or name in READ | HARMLESS | tabled:
            continue
        accepted = same[name] if name in same else USUAL.get(name, ())
        if not any(_equal(value, usual) for usual in accepted):
            expected = " or ".join(map(repr, accepted)) or "no such key"
            raise ValueError(f"{path}: Expected {expected} as the metadata {key}, got {_shown(value)}")


def _same_as(architecture: Architecture, config: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
    """Keys that repeat what the model does anyway, with the values that do."""
    head = config["head_dim"]
    rotary = int(head * config.get("partial_rotary_factor", 1))
    scale = config.get("query_pre_attn_scalar", head) ** -0.5
    same: dict[str, tuple[Any, ...]] = {
        "attention.key_length_swa": (head,),
        "attention.value_length": (head,),
        "attention.value_length_swa": (head,),
        "attention.scale": (0.0, scale),
        "rope.dimension_count_swa": (rotary,),
    }
    if (act := config.get("hidden_act")) is not None:
        same["hidden_activation"] = (act,)
    if architecture.model_type == "bloom":
        same["attention.max_alibi_bias"] = (ALIBI,)
    if (pattern := config.get("sliding_window_pattern")) is not None:
        layers = [bool((i + 1) % pattern) for i in range(config["num_hidden_layers"])]
        same["attention.sliding_window_pattern"] = (pattern, layers)
    return same


def _equal(value: Any, usual: Any) -> bool:
    if isinstance(usual, float) and isinstance(value, int | float) and not isinstance(value, bool):
        return math.isclose(value, usual, rel_tol=1e-6)
    return type(value) is type(usual) and bool(value == usual)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 100 else f"{text[:100]}..."
