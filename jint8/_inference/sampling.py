"""How the next token is chosen: a request as one value, `Sampling`, and the choice, `sample`."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jint8._core.platform import on_one_cpu

Number = jax.Array | np.number[Any]
END_TOKENS = 8  # there is room for a multiple of so many, so that models with one and with three share programs
NO_TOKEN = -1
LONGEST_BISECTION = 32  # halvings of the range of float32, after which one value is left


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen, and which tokens end a text.

    A pytree of numbers, so that one compiled program serves all requests. `Sampling.of` makes one of a request.

    Attributes:
      temperature: float32; logits are divided by it before a token is drawn. 0 takes the most likely one.
      top_k: int32; only so many most likely tokens can be drawn; 0 means all.
      top_p: float32; the most likely tokens that together hold this probability can be drawn.
      min_p: float32; only tokens that are at least this many times as likely as the most likely one can be drawn.
      penalty: float32; logits of tokens that were there before are divided by it, negative ones multiplied.
      end_tokens: int32 `[n]`: tokens after which a row is done, then `NO_TOKEN`. A row is filled with the first of
        them from there on.
      greedy: whether it is known, as part of the program, that the most likely token is taken.
    """

    temperature: Number
    top_k: Number
    top_p: Number
    min_p: Number
    penalty: Number
    end_tokens: jax.Array | np.ndarray
    greedy: bool = dataclasses.field(default=False, metadata={"static": True})

    @classmethod
    def of(
        cls,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        end_tokens: tuple[int, ...] = (),
    ) -> Self:
        """What a request asks for; see `LanguageModel.generate`. The default is greedy.

        Raises:
          TypeError: what isn't a number, or for `top_k` a whole one.
          ValueError: a number out of its range.
        """
        reals = {"temperature": temperature, "top_p": top_p, "min_p": min_p, "repetition_penalty": repetition_penalty}
        for name, value in reals.items():
            if isinstance(value, bool) or not isinstance(value, numbers.Real):
                raise TypeError(f"Expected {name} to be a number, got {value!r}.")
        top_k = whole("top_k", top_k, least=0)
        if not 0 <= temperature < math.inf:
            raise ValueError(f"Expected temperature to be finite and at least 0, got {temperature}.")
        if not 0 < top_p <= 1:
            raise ValueError(f"Expected top_p to be in (0, 1], got {top_p}.")
        if not 0 <= min_p <= 1:
            raise ValueError(f"Expected min_p to be in [0, 1], got {min_p}.")
        if not 0 < repetition_penalty < math.inf:
            raise ValueError(f"Expected repetition_penalty to be finite and above 0, got {repetition_penalty}.")
        room = -(-len(end_tokens) // END_TOKENS) * END_TOKENS or END_TOKENS
        ends = np.full(room, NO_TOKEN, np.int32)
        ends[: len(end_tokens)] = end_tokens

        def within_float32(value: float) -> np.float32:
            # A small temperature would become 0, greedy decoding; a large penalty infinite, and 0 times it NaN.
            limits = np.finfo(np.float32)
            return np.float32(min(max(value, float(limits.tiny)), float(limits.max)))

        return cls(
            temperature=within_float32(temperature) if temperature else np.float32(0),
            top_k=np.int32(min(top_k, 2**31 - 1)),
            top_p=np.float32(top_p),
            min_p=np.float32(min_p),
            penalty=within_float32(repetition_penalty),
            end_tokens=ends,
        )

    def known(self) -> Self:
        """The same with `greedy` set where it holds.

        For programs over several devices: drawing needs the probabilities of all tokens, of which each may have some,
        while for the most likely one they exchange a number each.
        """
        return dataclasses.replace(self, greedy=bool(self.temperature == 0))


def whole(name: str, value: Any, *, least: int) -> int:
    """An argument that has to be a whole number.

    Raises:
      TypeError: it isn't one.
      ValueError: it is below `least`.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"Expected {name} to be a whole number, got {value!r}.")
    if value < least:
        raise ValueError(f"Expected {name} to be at least {least}, got {value}.")
    return int(value)


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
    """Chooses a token from each row of float32 `logits[b, v]` -> int32 `[b]`.

    All ways of choosing are in the program, and a number decides which of them runs.
    """
    if sampling.greedy:
        return most_likely(logits)
    filters = (sampling.top_k > 0) | (sampling.top_p < 1) | (sampling.min_p > 0)
    way = jnp.where(sampling.temperature == 0, 0, jnp.where(filters, 2, 1))
    draw = lambda logits: jax.random.categorical(key, logits).astype(jnp.int32)

    def scaled(logits: jax.Array) -> jax.Array:
        # Of what the largest is above, so that no temperature makes several of them infinite.
        top = jnp.max(logits, axis=-1, keepdims=True)
        return (logits - jnp.where(jnp.isfinite(top), top, 0)) / sampling.temperature

    return lax.switch(
        way,
        [
            most_likely,
            lambda logits: draw(scaled(logits)),
            lambda logits: draw(filtered(scaled(logits), sampling.top_k, sampling.top_p, sampling.min_p)),
        ],
        logits,
    )


def penalized(logits: jax.Array, seen: jax.Array | None, sampling: Sampling) -> jax.Array:
    """`logits[b, v]` with the penalty on tokens that are `seen`, bool `[b, v]`; None where there is none.

    As transformers has it: `logits / penalty` where they are positive, `logits * penalty` where they aren't (Keskar et
    al., CTRL, 2019, arXiv 1909.05858, section 4.1).
    """
    if seen is None:
        return logits
    penalty = jnp.where(logits > 0, logits / sampling.penalty, logits * sampling.penalty)
    return jnp.where(seen, penalty, logits)


def seen_in(prompts: Sequence[Sequence[int]], rows: int, vocab_size: int, sampling: Sampling) -> Any:
    """Which tokens are in each prompt, bool `[rows, vocab_size]`; None without a penalty, which needs no such program.

    Rows behind the prompts are as the last of them.
    """
    if sampling.penalty == 1:
        return None
    seen = np.zeros((rows, vocab_size), bool)
    for i, row in enumerate(seen):
        row[np.asarray(prompts[min(i, len(prompts) - 1)])] = True
    return seen


def seen_too(seen: jax.Array | None, token: jax.Array) -> jax.Array | None:
    """`seen` with the tokens `token[b]`."""
    return None if seen is None else seen.at[jnp.arange(len(token)), token].set(True)


def filtered(logits: jax.Array, top_k: Number, top_p: Number, min_p: Number) -> jax.Array:
    """`logits[b, v]` with -inf for tokens that can't be drawn.

    A token stays where fewer than `top_k` tokens are more likely (all, where it is 0), where those that are, of these,
    hold less than `top_p`, and where it is at least `min_p` times as likely as the most likely one. So that one always
    stays, and equal ones stay or go together.
    """
    # How many tokens are above a value, and what they hold, falls with the value. So the least value that stays is
    # found by bisection, without sorting the vocabulary: over the integers that floats of the same order have.
    rank = _ordered(logits)
    all_of_them = jnp.where(top_k > 0, top_k, logits.shape[-1])
    least = _bisect(rank, lambda above: jnp.sum(above, axis=-1) < all_of_them)
    logits = jnp.where(rank >= least[:, None], logits, -jnp.inf)
    share = jax.nn.softmax(logits, axis=-1)
    least = _bisect(rank, lambda above: jnp.sum(jnp.where(above, share, 0), axis=-1) < top_p)
    top = jnp.max(logits, axis=-1, keepdims=True)
    likely = (logits >= top + jnp.log(min_p)) | (logits == top)
    return jnp.where(((rank >= least[:, None]) | (top_p >= 1)) & likely, logits, -jnp.inf)


def _ordered(x: jax.Array) -> jax.Array:
    """int32 in the same order as float32 `x`."""
    bits = lax.bitcast_convert_type(x + 0.0, jnp.int32)  # adding 0 makes -0 the same as 0
    return jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)


def _bisect(rank: jax.Array, allowed: Any) -> jax.Array:
    """The least integer, for each row, for which `allowed(rank > integer)` holds. It does at the row's largest rank."""
    high = jnp.max(rank, axis=-1)
    low = jnp.min(rank, axis=-1) - 1  # int32 has room below: the lowest rank is that of -inf, or of NaN

    def halve(_, bounds):
        low, high = bounds
        middle = (low >> 1) + (high >> 1) + (low & high & 1)  # without overflow
        holds = allowed(rank > middle[:, None])
        return jnp.where(holds, low, middle), jnp.where(holds, middle, high)

    # The answer stays in (low, high]: high is allowed, low is below what is looked for.
    return lax.fori_loop(0, LONGEST_BISECTION, halve, (low, high))[1]


def ended(token: jax.Array, done: jax.Array, sampling: Sampling) -> tuple[jax.Array, jax.Array]:
    """The tokens `token[b]`, with the end token in rows that are done, and which are done after them."""
    ends = sampling.end_tokens
    fill = jnp.where(ends[0] == NO_TOKEN, 0, ends[0])
    token = jnp.where(done, fill, token)
    return token, done | jnp.any(token[:, None] == ends, axis=-1)
