"""Logits at every position of sequences, with or without a cache."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jint8._inference.forward import forward
from jint8._inference.generate import empty_cache
from jint8.models import Decoder


def logits(model: Decoder, params: Any, tokens: jax.Array, kind: str | None = None) -> jax.Array:
    """float32 `[b, s, vocab]` of `tokens[b, s]`, without padding.

    With a `kind` of cache, keys and values are written to one, and every token reads those of all tokens up to itself
    from there, as if it had been the latest one in decoding.
    """
    # On a mesh all layers are one program, so that XLA shards the activations of all of them alike.
    run = forward if model.mesh is None else _at_once
    if kind is None:
        return run(model, params, tokens)[0]
    b, s = tokens.shape
    cache = empty_cache(model, params, b, s, kind)
    # A slot that isn't known when the program is compiled makes attention read the cache, also where the slot is 0.
    return run(model, params, tokens, jnp.int32(0), None, cache)[0]


_at_once = jax.jit(forward, static_argnames=("model",))
