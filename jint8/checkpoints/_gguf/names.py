"""From llama.cpp's tensor names to Hugging Face's, per architecture."""

import dataclasses
import re
from collections.abc import Mapping

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
        names: From the stem of a tensor's name to Hugging Face's; within a layer, to what follows `layer`.
        layer: What stands in front of a layer's number in Hugging Face's names.
        hidden_act: Activation function of the MLP.
        keys: From the configuration's usual keys to those of this architecture, where they differ.
        rms_norm: Norms are RMS norms.
        transposed: Stems of weights that Hugging Face has as `[in, out]`.
        interleaved: Stem of the fused projection whose rows Hugging Face has head by head: query, key, value.
        experts: From the stems of stacked experts to the name of each in Hugging Face's, with `{e}` for its number.
        rotary_pairs: Rows of the query and key projections are stored so that the two halves of a rotary pair are
            neighbours; Hugging Face has them half a head apart.
        unit_norms: Norm weights are stored with 1 added, which Hugging Face leaves to the model.
    """

    model_type: str
    names: dict[str, str]
    layer: str = "model.layers."
    hidden_act: str = "silu"
    keys: Mapping[str, str] = dataclasses.field(default_factory=dict)
    rms_norm: bool = True
    transposed: tuple[str, ...] = ()
    interleaved: str | None = None
    experts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    rotary_pairs: bool = False
    unit_norms: bool = False


_GELU = "gelu_pytorch_tanh"
_EXPERT = "block_sparse_moe.experts.{e}"
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
    "gpt2": Architecture(
        model_type="gpt2",
        names={
            "token_embd": "transformer.wte", "position_embd": "transformer.wpe", "output_norm": "transformer.ln_f",
            "output": "lm_head", "attn_norm": "ln_1", "attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj",
            "ffn_norm": "ln_2", "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj",
        },
        layer="transformer.h.",
        hidden_act="gelu_new",
        keys={
            "hidden_act": "activation_function", "hidden_size": "n_embd", "intermediate_size": "n_inner",
            "num_hidden_layers": "n_layer", "num_attention_heads": "n_head", "max_position_embeddings": "n_positions",
            "rms_norm_eps": "layer_norm_epsilon",
        },
        rms_norm=False,
        transposed=("attn_qkv", "attn_output", "ffn_up", "ffn_down"),
    ),
    "bloom": Architecture(
        model_type="bloom",
        names={
            "token_embd": "transformer.word_embeddings", "token_embd_norm": "transformer.word_embeddings_layernorm",
            "output_norm": "transformer.ln_f", "output": "lm_head", "attn_norm": "input_layernorm",
            "attn_qkv": "self_attention.query_key_value", "attn_output": "self_attention.dense",
            "ffn_norm": "post_attention_layernorm", "ffn_up": "mlp.dense_h_to_4h", "ffn_down": "mlp.dense_4h_to_h",
        },
        layer="transformer.h.",
        keys={
            "num_hidden_layers": "n_layer", "num_attention_heads": "n_head", "rms_norm_eps": "layer_norm_epsilon",
        },
        rms_norm=False,
        interleaved="attn_qkv",
    ),
    "gptneox": Architecture(
        model_type="gpt_neox",
        names={
            "token_embd": "gpt_neox.embed_in", "output_norm": "gpt_neox.final_layer_norm", "output": "embed_out",
            "attn_norm": "input_layernorm", "attn_qkv": "attention.query_key_value", "attn_output": "attention.dense",
            "ffn_norm": "post_attention_layernorm", "ffn_up": "mlp.dense_h_to_4h", "ffn_down": "mlp.dense_4h_to_h",
        },
        layer="gpt_neox.layers.",
        hidden_act="gelu",
        keys={"rms_norm_eps": "layer_norm_eps"},
        rms_norm=False,
        interleaved="attn_qkv",
    ),
}  # fmt: skip

# llama.cpp's name for it is llama, too.
MIXTRAL = Architecture(
    model_type="mixtral",
    names=_COMMON | {"ffn_gate_inp": "block_sparse_moe.gate"},
    rotary_pairs=True,
    experts={"ffn_gate_exps": f"{_EXPERT}.w1", "ffn_down_exps": f"{_EXPERT}.w2", "ffn_up_exps": f"{_EXPERT}.w3"},
)

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
        >>> from jint8.checkpoints._gguf.names import ARCHITECTURES, hf_name
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
