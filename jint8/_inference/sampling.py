"""How the next token is chosen: a request as one value, `Sampling`, and the choice, `sample`."""

from __future__ import annotations

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jint8._core.platform import on_one_cpu

Number = jax.Array | np.float32
STATIC = {"static": True}  # a field that is part of the program: another value is another program


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen, and which tokens end a text.

    A pytree of two numbers, so that requests which differ in those alone run the same compiled program. What decides
    which operations there are is static. `Sampling.of` derives both from a request.

    Attributes:
      temperature: float32; logits are divided by it before a token is drawn. Unused where `greedy`.
      top_p: float32; the most likely tokens that together hold this probability can be drawn. Unused without `nucleus`.
      greedy: take the most likely token, and draw nothing.
      top_k: only so many most likely tokens can be drawn; 0 means all.
      nucleus: whether `top_p` is below 1. Without it, nothing has to be sorted for its sake.
      end_tokens: tokens after which a row is done. It is filled with the first of them from there on.
    """

    temperature: Number
    top_p: Number
    greedy: bool = dataclasses.field(metadata=STATIC)
    top_k: int = dataclasses.field(metadata=STATIC)
    nucleus: bool = dataclasses.field(metadata=STATIC)
    end_tokens: tuple[int, ...] = dataclasses.field(metadata=STATIC)

    @classmethod
    def of(
        cls, *, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, end_tokens: tuple[int, ...] = ()
    ) -> Self:
        """What a request asks for; see `LanguageModel.generate`. The default is greedy.

        Raises:
          ValueError: a number out of its range.
        """
        if not 0 <= temperature < float("inf"):
            raise ValueError(f"Expected temperature to be finite and at least 0, got {temperature}.")
        if top_k < 0:
            raise ValueError(f"Expected top_k to be at least 0, got {top_k}.")
        if not 0 < top_p <= 1:
            raise ValueError(f"Expected top_p to be in (0, 1], got {top_p}.")
        return cls(
            temperature=np.float32(temperature),
            top_p=np.float32(top_p),
            greedy=temperature == 0,
            top_k=top_k,
            nucleus=top_p < 1,
            end_tokens=end_tokens,
        )


def most_likely(logits: jax.Array) -> jax.Array:
    """`argmax` of each row of float32 `logits[b, v]`, int32 `[b]`: the first of equal ones."""
    if not on_one_cpu():
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    # XLA's CPU backend computes argmax by comparing pairs of value and index one by one. Two plain reductions, which it
    # vectorizes, take a quarter of the time: the maximum, then the smallest index that holds it (or holds NaN).
    largest = jnp.max(logits, axis=-1, keepdims=True)
    index = lax.broadcasted_iota(jnp.float32, logits.shape, 1)  # float32 is exact: there are fewer than 2**24 tokens
    found = (logits == largest) | jnp.isnan(logits)
    return jnp.min(jnp.where(found, index, jnp.inf), axis=-1).astype(jnp.int32)


def sample(logits: jax.Array, key: jax.Array, sampling: Sampling) -> jax.Array:
    """Chooses a token from each row of float32 `logits[b, v]` -> int32 `[b]`."""
    if sampling.greedy:
        return most_likely(logits)
    logits = logits / sampling.temperature
    if sampling.top_k == 0 and not sampling.nucleus:
        return jax.random.categorical(key, logits).astype(jnp.int32)
    top, index = lax.top_k(logits, min(sampling.top_k or logits.shape[-1], logits.shape[-1]))
    if sampling.nucleus:
        # `top` is sorted: a token stays where those before it hold less than top_p. The first one always does, also
        # where top_p is so small that it rounds to 0.
        share = jax.nn.softmax(top, axis=-1)
        before = jnp.cumsum(share, axis=-1) - share
        top = jnp.where(before < sampling.top_p, top, -jnp.inf).at[:, 0].set(top[:, 0])
    choice = jax.random.categorical(key, top)
    return jnp.take_along_axis(index, choice[:, None], axis=-1)[:, 0].astype(jnp.int32)
