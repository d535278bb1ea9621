"""Which tensors of a Hugging Face checkpoint make up which parameter of the decoder."""

from __future__ import annotations

from jint8.models._config import ModelConfig


def sources(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """From the path of each parameter to the tensors that it is made of, one above the other.

    Args:
      config: of the model.

    Returns:
      Paths such as `"layers_0/attention/qkv/weight"`, in the order of the layers.
    """
    names: dict[str, tuple[str, ...]] = {"embedding": ("model.embed_tokens.weight",)}
    for i in range(config.num_layers):
        ours, theirs = f"layers_{i}", f"model.layers.{i}"
        linears = {
            "attention/qkv": (("q_proj", "k_proj", "v_proj"), "self_attn", config.attention_bias),
            "attention/out": (("o_proj",), "self_attn", config.attention_bias),
            "mlp/gate_up": (("gate_proj", "up_proj"), "mlp", config.mlp_bias),
            "mlp/down": (("down_proj",), "mlp", config.mlp_bias),
        }
        names[f"{ours}/attention_norm/scale"] = (f"{theirs}.input_layernorm.weight",)
        names[f"{ours}/mlp_norm/scale"] = (f"{theirs}.post_attention_layernorm.weight",)
        for path, (parts, module, has_bias) in linears.items():
            for leaf in ("weight", "bias") if has_bias else ("weight",):
                names[f"{ours}/{path}/{leaf}"] = tuple(f"{theirs}.{module}.{part}.{leaf}" for part in parts)
    names["norm/scale"] = ("model.norm.weight",)
    if not config.tie_embeddings:
        names["lm_head/weight"] = ("lm_head.weight",)
    return names


def ignored(name: str, config: ModelConfig) -> bool:
    """Whether a tensor of a checkpoint may be left unread: buffers, and the copy of a tied head."""
    return name.endswith(".rotary_emb.inv_freq") or (config.tie_embeddings and name == "lm_head.weight")
