"""What a model looks like: a frozen dataclass of sizes and choices. (Unlike `jint8.Config`, which is about int8.)"""

from __future__ import annotations

import dataclasses
from typing import Literal

Activation = Literal["silu", "relu", "gelu", "gelu_tanh"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary positions.

    Attributes:
      frequencies: radians per position, one for each rotated pair of a head's dimensions. With r of them the first 2 r
        dimensions are rotated, dimension i together with r + i; the others aren't.
      scale: factor of sines and cosines.
      trained: the longest sequence for which `frequencies` are used, with `long` or `ntk`.
      long: the frequencies of longer sequences (LongRoPE); empty where they are the same.
      ntk: factor of dynamic NTK scaling, which slows the frequencies of longer sequences down; 0 means not at all.
    """

    frequencies: tuple[float, ...]
    scale: float = 1.0
    trained: int = 0
    long: tuple[float, ...] = ()
    ntk: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and choices of a transformer, which decodes or encodes. Hashable: it is static under `jax.jit`.

    Attributes:
      family: the `model_type` of the checkpoint's configuration.
      vocab_size, hidden_size, intermediate_size, num_layers: sizes.
      num_heads, num_kv_heads, head_dim: of attention; fewer key-value heads than heads is grouped-query attention.
      max_positions: longest sequence that the model was trained for; with learned positions, the longest possible.
      norm: `"rms"` or `"layer"`.
      norm_eps: added to the mean square (or the variance) before the root.
      norm_offset: added to the norms' gains, which Gemma stores as their difference from 1.
      norm_bias: whether layer norms have biases.
      norm_place: `"before"` attention and feed-forward, `"after"` the residual is added, or `"around"`: before, and on
        what comes out, before the residual is added.
      final_norm: whether there is a norm before the output head.
      qk_norm: whether each head's queries and keys are normalized.
      parallel: attention and feed-forward read the same input and are added together.
      activation: of the feed-forward network.
      gated: `down(activation(gate(x)) * up(x))` rather than `down(activation(up(x)))`.
      experts, experts_per_token: how many feed-forward networks there are, and how many each token goes through; 0
        means one network for all tokens.
      qkv_bias, out_bias, mlp_bias: whether those projections have biases.
      rope: rotary positions; None where there are none.
      local_rope: rotary positions of the layers with a window; None where they are `rope`, too.
      alibi: scores fall linearly with the distance between query and key, with a slope for each head.
      learned_positions: the row of position 0 in the table of learned positions (2 in OPT, 0 elsewhere); None where
        there is no table.
      token_types: rows of BERT's table of token types, of which the encoder adds the first to every token; 0 means no
        table.
      causal: a query doesn't see the keys that come after it.
      windows: for each layer, how many of the latest keys a query sees; 0 means all.
      attention_scale: factor of the scores; None means `head_dim ** -0.5`.
      attention_softcap, logit_softcap: `cap * tanh(x / cap)` on scores, and on logits; 0 means none.
      embedding_scale: factor of the embeddings.
      embedding_size: of the embeddings and of what the output head reads, where projections lie between these and
        `hidden_size`; 0 where they are the same.
      embedding_norm: whether embeddings are normalized.
      tie_embeddings: the output head is the embedding.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int = 2048
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    norm_offset: float = 0.0
    norm_bias: bool = True
    norm_place: Literal["before", "after", "around"] = "before"
    final_norm: bool = True
    qk_norm: bool = False
    parallel: bool = False
    activation: Activation = "silu"
    gated: bool = True
    experts: int = 0
    experts_per_token: int = 0
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    rope: Rope | None = None
    local_rope: Rope | None = None
    alibi: bool = False
    learned_positions: int | None = None
    token_types: int = 0
    causal: bool = True
    windows: tuple[int, ...] = ()
    attention_scale: float | None = None
    attention_softcap: float = 0.0
    logit_softcap: float = 0.0
    embedding_scale: float = 1.0
    embedding_size: int = 0
    embedding_norm: bool = False
    tie_embeddings: bool = False
