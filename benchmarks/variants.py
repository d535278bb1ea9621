"""Variants of SmolLM2 that compute the same function in floating point, and are harder to quantize.

By `jint8.analysis.inject_outliers`: in `planted` six feature dimensions, drawn at random, are 64 times larger; in `own`
six of which one is the model's own largest; in `broad` half of all dimensions 8 times, as some families have.

In `permuted` the channels of the residual stream, of the MLPs and within each head's values are in another, random
order: the file's weights are in blocks of four bits already, which groups of four bits would otherwise hit by luck.
`permuted own` is that of `own`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jint8.analysis import inject_outliers
from jint8.models._fused import row_order

PLANTED = (23, 154, 177, 292, 364, 485)
OWN = (17, 101, 200, 333, 404, 555)  # 17 is SmolLM2's own outlier feature
HUGGINGFACE_NORMS = {
    "input_layernorm": ("q_proj", "k_proj", "v_proj"),
    "post_attention_layernorm": ("gate_proj", "up_proj"),
}
VARIANTS: dict[str, tuple[Sequence[int], float]] = {  # outlier feature dimensions, and how many times larger
    "plain": ((), 1.0),
    "planted": (PLANTED, 64.0),
    "own": (OWN, 64.0),
    "broad": (range(0, 576, 2), 8.0),
    "permuted": ((), 1.0),
    "permuted own": (OWN, 64.0),
}


def planted(params: Any, variant: str, config: Any = None) -> Any:
    dimensions, factor = VARIANTS[variant]
    params = inject_outliers(params, dimensions, factor) if dimensions else params
    return permuted(params, config) if variant.startswith("permuted") else params


def permuted(params: Any, config: Any) -> Any:
    """The parameters of a Llama with its channels in a random order: the same function."""
    rng = np.random.default_rng(0)
    stream, head, heads = rng.permutation(config.hidden_size), config.head_dim, config.num_kv_heads
    group = config.num_heads // heads  # query heads to one head of values

    def in_order(module: str, rows: np.ndarray) -> np.ndarray:
        """Rows of stacked projections as the model interleaves them: `fused[result] == stacked[rows][order]`."""
        order = row_order(module, config)
        return np.argsort(order)[rows[order]]

    def layer(of: Any) -> Any:
        hidden = rng.permutation(config.intermediate_size)
        values = np.stack([rng.permutation(head) for _ in range(heads)])
        others = np.arange((config.num_heads + heads) * head)  # rows before those of the values
        start = len(others) + head * np.arange(heads)[:, None]
        rows = in_order("attention/qkv", np.concatenate([others, (start + values).reshape(-1)]))
        columns = np.concatenate([head * h + values[h // group] for h in range(config.num_heads)])
        pairs = in_order("mlp/gate_up", np.concatenate([hidden, config.intermediate_size + hidden]))
        attention, mlp = of["attention"], of["mlp"]
        return {
            "attention_norm": {"scale": of["attention_norm"]["scale"][stream]},
            "attention": {
                "qkv": {"weight": attention["qkv"]["weight"][rows][:, stream]},
                "out": {"weight": attention["out"]["weight"][stream][:, columns]},
            },
            "mlp_norm": {"scale": of["mlp_norm"]["scale"][stream]},
            "mlp": {
                "gate_up": {"weight": mlp["gate_up"]["weight"][pairs][:, stream]},
                "down": {"weight": mlp["down"]["weight"][stream][:, hidden]},
            },
        }

    top = {"embedding": params["embedding"][:, stream], "norm": {"scale": params["norm"]["scale"][stream]}}
    return top | {name: layer(of) for name, of in params.items() if name.startswith("layers_")}


def planted_by_names(arrays: dict[str, np.ndarray], variant: str, config: Any) -> dict[str, np.ndarray]:
    """The same of a Llama's arrays under Hugging Face's names, where weights are [n, k]."""
    if VARIANTS[variant][0]:
        tree = {name.replace(".", "/"): array for name, array in arrays.items()}
        found = inject_outliers(tree, *VARIANTS[variant], norms=HUGGINGFACE_NORMS, plan=dict.fromkeys(tree, (1,)))
        arrays = {name: np.asarray(found[name.replace(".", "/")]) for name in arrays}
    return permuted_by_names(arrays, config) if variant.startswith("permuted") else arrays


def permuted_by_names(arrays: dict[str, np.ndarray], config: Any) -> dict[str, np.ndarray]:
    """`permuted` of a Llama's arrays under Hugging Face's names, in an order of their own."""
    rng = np.random.default_rng(0)
    stream, head, heads = rng.permutation(config.hidden_size), config.head_dim, config.num_kv_heads
    out = dict(arrays)
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        out[name] = arrays[name][..., stream]
    for i in range(config.num_layers):
        hidden = rng.permutation(config.intermediate_size)
        values = np.stack([rng.permutation(head) for _ in range(heads)]) + head * np.arange(heads)[:, None]
        own = [head * h + values[h * heads // config.num_heads] % head for h in range(config.num_heads)]
        columns, rows = np.concatenate(own), values.reshape(-1)
        orders: dict[str, tuple[Any, ...]] = {
            "input_layernorm": (stream,),
            "post_attention_layernorm": (stream,),
            "self_attn.q_proj": (slice(None), stream),
            "self_attn.k_proj": (slice(None), stream),
            "self_attn.v_proj": (rows, stream),
            "self_attn.o_proj": (stream, columns),
            "mlp.gate_proj": (hidden, stream),
            "mlp.up_proj": (hidden, stream),
            "mlp.down_proj": (stream, hidden),
        }
        for module, order in orders.items():
            name = f"model.layers.{i}.{module}.weight"
            out[name] = arrays[name][order[0]] if len(order) == 1 else arrays[name][order[0]][:, order[1]]
    return out
