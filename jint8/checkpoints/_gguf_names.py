"""From llama.cpp's tensor names to Hugging Face's, per architecture."""

import dataclasses
import re

# Two models of one architecture differ in which of these they have, never in what a name means.
_COMMON = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_QK_NORM = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_SANDWICH_NORM = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """How llama.cpp stores one architecture.

    Attributes:
        model_type: Hugging Face's name for it.
        names: From the stem of a tensor's name to Hugging Face's.
        hidden_act: Activation function of the MLP.
        rotary_pairs: Rows of the query and key projections are stored so that the two halves of a rotary pair are
            neighbours; Hugging Face has them half a head apart.
        unit_norms: Norm weights are stored with 1 added, which Hugging Face leaves to the model.
    """

    model_type: str
    names: dict[str, str]
    hidden_act: str = "silu"
    rotary_pairs: bool = False
    unit_norms: bool = False


_GELU = "gelu_pytorch_tanh"
ARCHITECTURES = {
    "llama": Architecture(model_type="llama", names=_COMMON, rotary_pairs=True),
    "qwen2": Architecture(model_type="qwen2", names=_COMMON),
    "qwen3": Architecture(model_type="qwen3", names=_COMMON | _QK_NORM),
    "gemma2": Architecture(
        model_type="gemma2", names=_COMMON | _SANDWICH_NORM, hidden_act=_GELU, unit_norms=True
    ),
    "gemma3": Architecture(
        model_type="gemma3_text", names=_COMMON | _QK_NORM | _SANDWICH_NORM, hidden_act=_GELU, unit_norms=True
    ),
    "phi3": Architecture(
        model_type="phi3", names=_COMMON | {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
    ),
}  # fmt: skip

# Tensors that Hugging Face keeps as numbers in the configuration.
CONFIG_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


def hf_name(name: str, architecture: Architecture) -> str | None:
    """Translate a tensor's name.

    Args:
        name: llama.cpp's name, such as `blk.0.attn_q.weight`.
        architecture: The model's architecture.

    Returns:
        Hugging Face's name, or None if the architecture has no such tensor.

    Examples:
        >>> from jint8.checkpoints._gguf_names import ARCHITECTURES, hf_name
        >>> hf_name("blk.0.attn_q.weight", ARCHITECTURES["llama"])
        'model.layers.0.self_attn.q_proj.weight'
    """
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if match is None or match[2] not in architecture.names:
        return None
    layer = "" if match[1] is None else f"model.layers.{match[1]}."
    return f"{layer}{architecture.names[match[2]]}.{match[3]}"
