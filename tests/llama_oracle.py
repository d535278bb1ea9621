"""A Llama decoder in float64 NumPy, straight from the tensors of a checkpoint; shares no code with the library."""

from __future__ import annotations

import numpy as np


def logits(read, config: dict, tokens: np.ndarray, rope=None, project=None) -> np.ndarray:
    """float64 `[s, vocab]` of `tokens[s]`; `read(name)` gives a tensor by its Hugging Face name.

    `rope(s)` gives rotary frequencies and the factor of sines and cosines for a sequence of s tokens.
    `project(x, name)` is what a layer's projection makes of `x[s, k]`, instead of its product with `NAME.weight`.
    """
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    hidden = config["hidden_size"]
    d = config.get("head_dim") or hidden // heads
    s = len(tokens)

    def get(name):
        return np.asarray(read(name), np.float64)

    def norm(x, name):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + config["rms_norm_eps"]) * get(name)

    def rotate(x):  # (s, heads, d)
        frequencies, scale = config["rope_theta"] ** (-np.arange(0, d, 2) / d), 1
        if rope is not None:
            frequencies, scale = rope(s)
        turn = scale * np.exp(1j * np.arange(s)[:, None] * frequencies)[:, None]
        z = (x[..., : d // 2] + 1j * x[..., d // 2 :]) * turn
        return np.concatenate([z.real, z.imag], -1)

    if project is None:
        project = lambda x, name: x @ get(f"{name}.weight").T
    embedding = get("model.embed_tokens.weight")
    x = embedding[tokens]
    hidden_from_future = np.triu(np.full((s, s), -np.inf), 1)
    for i in range(config["num_hidden_layers"]):
        p = f"model.layers.{i}."
        h = norm(x, p + "input_layernorm.weight")
        q, k, v = (
            project(h, f"{p}self_attn.{name}_proj").reshape(s, n, d)
            for name, n in (("q", heads), ("k", kv_heads), ("v", kv_heads))
        )
        q, k = rotate(q), rotate(k)
        out = np.empty((s, heads, d))
        for head in range(heads):
            shared = head * kv_heads // heads
            scores = q[:, head] @ k[:, shared].T / np.sqrt(d) + hidden_from_future
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            out[:, head] = weights / weights.sum(-1, keepdims=True) @ v[:, shared]
        x = x + project(out.reshape(s, heads * d), p + "self_attn.o_proj")
        h = norm(x, p + "post_attention_layernorm.weight")
        gate = project(h, p + "mlp.gate_proj")
        up = project(h, p + "mlp.up_proj")
        x = x + project(gate / (1 + np.exp(-gate)) * up, p + "mlp.down_proj")
    x = norm(x, "model.norm.weight")
    head = embedding if config.get("tie_word_embeddings") else get("lm_head.weight")
    return x @ head.T
