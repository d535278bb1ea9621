"""How the next token is chosen."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jint8._core.platform import on_one_cpu


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen. Static: each combination is a program of its own, its numbers are not.

    Attributes:
      greedy: the most likely token.
      top_k: among so many most likely tokens; 0 means all.
      nucleus: whether `top_p` cuts the rest of the distribution off.
    """

    greedy: bool = True
    top_k: int = 0
    nucleus: bool = False


class Knobs(NamedTuple):
    """The numbers of sampling."""

    temperature: jax.Array
    top_p: jax.Array


def most_likely(logits: jax.Array) -> jax.Array:
    """`argmax` of each row of float32 `logits[b, v]`, int32 `[b]`: the first of equal ones."""
    if not on_one_cpu():
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    # XLA's CPU backend compares pairs of value and index one by one: two plain reductions take a quarter of the time
    largest = jnp.max(logits, axis=-1, keepdims=True)
    index = lax.broadcasted_iota(jnp.float32, logits.shape, 1)  # exact: there are fewer than 2**24 tokens
    found = (logits == largest) | jnp.isnan(logits)
    return jnp.min(jnp.where(found, index, jnp.inf), axis=-1).astype(jnp.int32)


def sample(logits: jax.Array, key: jax.Array, sampling: Sampling, knobs: Knobs) -> jax.Array:
    """Chooses a token from each row of float32 `logits[b, v]` -> int32 `[b]`."""
    if sampling.greedy:
        return most_likely(logits)
    logits = logits / knobs.temperature
    if sampling.top_k == 0 and not sampling.nucleus:
        return jax.random.categorical(key, logits).astype(jnp.int32)
    # of the most likely tokens, sorted, each whose predecessors hold less than top_p stays: at least the first
    top, index = lax.top_k(logits, min(sampling.top_k or logits.shape[-1], logits.shape[-1]))
    if sampling.nucleus:
        share = jax.nn.softmax(top, axis=-1)
        before = jnp.cumsum(share, axis=-1) - share
        top = jnp.where(before < knobs.top_p, top, -jnp.inf).at[:, 0].set(top[:, 0])
    choice = jax.random.categorical(key, top)
    return jnp.take_along_axis(index, choice[:, None], axis=-1)[:, 0].astype(jnp.int32)
