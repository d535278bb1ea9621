"""From llama.cpp's tensor names to Hugging Face's."""

import re

from jint8.checkpoints._gguf.architectures import Architecture

# Tensors whose values a Hugging Face config.json has as lists of numbers: they aren't parameters.
CONFIG_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


def hf_name(name: str, architecture: Architecture) -> str | None:
    """Translate a tensor's name.

    Args:
      name: llama.cpp's name, such as `blk.0.attn_q.weight`.
      architecture: the file's.

    Returns:
      Hugging Face's name, or None if the architecture has no such tensor.

    Examples:
      >>> from jint8.checkpoints._gguf.architectures import ARCHITECTURES
      >>> from jint8.checkpoints._gguf.names import hf_name
      >>> hf_name("blk.0.attn_q.weight", ARCHITECTURES["llama"])
      'model.layers.0.self_attn.q_proj.weight'
    """
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    names = {**architecture.names, **architecture.experts}
    if match is None or match[2] not in names:
        return None
    layer = "" if match[1] is None else f"{architecture.layer}{match[1]}."
    return f"{layer}{names[match[2]]}.{match[3]}"


def stem(name: str) -> str:
    """The part of llama.cpp's name that says what a tensor is: `attn_q` of `blk.0.attn_q.weight`."""
    return name.split(".")[-2] if "." in name else name
