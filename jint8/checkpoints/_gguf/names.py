"""From llama.cpp's tensor names to Hugging Face's."""

import re

from jint8.checkpoints._gguf.architectures import Architecture

_NAME = re.compile(r"(?:blk\.(\d+)\.)?(\w+)(?:\.(\d+))?\.(weight|bias)")  # layer, stem, expert
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
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    layer, of_tensor, expert, kind = match.groups()
    if expert is None:
        known = {**architecture.names, **architecture.experts}.get(of_tensor)
    else:  # files from before April 2024 have a tensor for each expert
        known = architecture.experts.get(f"{of_tensor}_exps", "").replace("{e}", expert) or None
    if known is None:
        return None
    return f"{'' if layer is None else f'{architecture.layer}{layer}.'}{known}.{kind}"


def stem(name: str) -> str:
    """The part of llama.cpp's name that says what a tensor is: `attn_q` of `blk.0.attn_q.weight`."""
    match = _NAME.fullmatch(name)
    return name if match is None else match[2]
