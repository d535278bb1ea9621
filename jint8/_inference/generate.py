"""Generation on GPUs and over several devices: `start` runs the prompts, `decode` appends tokens in a compiled loop.

`generation` has the loop around both, and says which models go this way; on one CPU it is that of `by_layers`.

Prompts of different lengths are padded on the left to one length, so that all of them end in the same column, and each
new token is one more column of all rows. Prefill goes through a few layers at a time (see `forward`), which compiles
fast; decoding is a compiled `while_loop` over tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jint8._core.qtensor import is_qtensor
from jint8._inference.forward import forward
from jint8._inference.sampling import Sampling, ended, penalized, sample, seen_in, seen_too
from jint8.models._attention import Context, context
from jint8.models._cache import Cache, check_cache, make_cache
from jint8.models._decoder import Decoder
from jint8.models._partition import batch_axis, heads_axis
from jint8.models._rope import depends_on_length

CHUNK = 512  # longest part of a prompt that goes through the model at once: memory of attention's scores grows with it
SLOTS = 128  # the cache's length is a multiple of this, so that requests of similar length share compiled programs


class State(NamedTuple):
    """Where a generation stands, between two runs of `decode`."""

    tokens: jax.Array  # int32[b, slots]: prompts, padded on the left, and what was generated
    slot: jax.Array  # int32: how many columns of tokens are filled
    first: jax.Array | None  # int32[b]: where each row's prompt begins; None where nothing is padding
    done: jax.Array  # bool[b]
    cache: list[Cache]
    key: jax.Array
    seen: jax.Array | None = None  # bool[b, vocab]: which tokens were there, where that has a penalty


def prefill(
    model: Decoder,
    params: Any,
    prompt: Any,
    first: jax.Array | None,
    key: jax.Array,
    cache: list[Cache] | None,
    slots: int,
    sampling: Sampling,
    kind: str | None = None,
    length: jax.Array | None = None,
    seen: jax.Array | None = None,
) -> State:
    """Runs the last chunk of `prompt[b, s]`, which may be all of it, and appends the first new token.

    `cache` holds the chunks before the last one; None means that there are none, and then one of this `kind` is made.
    `first`, `key`, `seen` and `slots` become the state's; `length` is `Context.length`.
    """
    b, s = prompt.shape
    begin = 0 if cache is None else s - CHUNK
    if cache is None:
        cache = empty_cache(model, params, b, slots, kind)
    run = forward if model.mesh is None else _apply
    slot = jnp.int32(begin) if begin else None
    logits, cache = run(model, params, prompt[:, begin:], slot, first, cache, last=True, length=length)
    return _first_token(model, prompt, first, key, cache, logits, slots, sampling, seen)


@functools.partial(jax.jit, static_argnames=("model", "slots"), donate_argnames=("cache",))
def _first_token(model: Decoder, prompt, first, key, cache, logits, slots: int, sampling: Sampling, seen) -> State:
    b, s = prompt.shape
    tokens = jnp.zeros((b, slots), jnp.int32).at[:, :s].set(prompt)
    state = State(tokens, jnp.int32(s), first, jnp.zeros(b, bool), cache, key, seen)
    return _replicated(_append(logits[:, -1], state, sampling), model.mesh)


def extend(
    model: Decoder,
    params: Any,
    tokens: Any,
    slot: jax.Array | None,
    first: jax.Array | None,
    cache: Any,
    length: jax.Array | None = None,
) -> Any:
    """The cache with keys and values of `tokens[b, s]`, the first of which stands at `slot`."""
    run = forward if model.mesh is None else _apply
    return run(model, params, tokens, slot, first, cache, last=True, length=length)[1]


# On a mesh, all layers are one program, so that XLA shards the activations of all of them alike.
prefill_at_once = jax.jit(prefill, static_argnames=("model", "slots", "kind"), donate_argnames=("cache",))
extend_at_once = jax.jit(extend, static_argnames=("model",), donate_argnames=("cache",))


@functools.partial(jax.jit, static_argnames=("model",), donate_argnames=("state",))
def decode(model: Decoder, params: Any, state: State, until: jax.Array, sampling: Sampling) -> State:
    """Appends tokens until `until` columns are filled or every row is done. Uses `state` up."""

    def body(state: State) -> State:
        token = lax.dynamic_slice_in_dim(state.tokens, state.slot - 1, 1, axis=1)
        logits, cache = _apply(model, params, token, state.slot - 1, state.first, state.cache)
        return _append(logits[:, -1], state._replace(cache=cache), sampling)

    state = lax.while_loop(lambda s: (s.slot < until) & ~jnp.all(s.done), body, state)
    return _replicated(state, model.mesh)


# What keeps programs for shapes of requests.
COMPILED: tuple[Any, ...] = (prefill_at_once, extend_at_once, _first_token, decode)


def empty_cache(model: Decoder, params: Any, batch: int, slots: int, kind: str | None = None) -> list[Cache]:
    """A cache for a generation, on the devices of the model's mesh: sharded by key-value heads and by batch.

    Where the number of key-value heads isn't a multiple of the devices', each device has all of them. `kind` is
    `"int8"`, or None for the activations' dtype.
    """
    dtype = model.dtype if check_cache(kind) is None else jnp.int8
    return make_cache(model.config, batch, slots, dtype, cache_sharding(model, params, batch))


def cache_sharding(model: Decoder, params: Any, batch: int) -> NamedSharding | None:
    """Of the arrays of `empty_cache`; None without a mesh."""
    if model.mesh is None:
        return None
    axes = _batch_axis(model, params, batch), heads_axis(model.mesh, model.config.num_kv_heads)
    return NamedSharding(model.mesh, PartitionSpec(*axes))


def _batch_axis(model: Decoder, params: Any, batch: int) -> str | None:
    """The axis of the model's mesh over which rows of a batch are sharded.

    None where an outlier in one row decides how others are multiplied (`Config.depends_on_batch`): each device would
    have to know the rows of the others.
    """
    for config in {leaf.config for leaf in jax.tree.leaves(params, is_leaf=is_qtensor) if is_qtensor(leaf)}:
        if config.depends_on_batch:
            return None
    return batch_axis(model.mesh, batch)


def _apply(model: Decoder, params, tokens, slot, first, cache, last: bool = False, length=None) -> Any:
    """Logits and cache. Where the batch is sharded, each device computes its own rows.

    `shard_map` over the batch's axis is what tells XLA that rows don't depend on each other. The model's axis isn't
    among `axis_names`: XLA shards over it as the parameters' shardings say.
    """

    def apply(params, tokens, at, cache):
        return model.apply(params, tokens, at, cache, last=last)

    at = context(tokens, slot, first, length)
    axis = _batch_axis(model, params, len(tokens))
    if axis is None:
        return apply(params, tokens, at, cache)
    whole: Any = PartitionSpec()
    rows: Any = PartitionSpec(axis)
    return jax.shard_map(
        apply,
        mesh=model.mesh,
        axis_names={axis},
        in_specs=(whole, rows, Context(whole, rows, rows, rows, rows), rows),
        out_specs=rows,
        check_vma=False,  # parameters and positions are the same on each device, which JAX can't infer here
    )(params, tokens, at, cache)


def _append(logits: jax.Array, state: State, sampling: Sampling) -> State:
    """Chooses a token of each row from `logits[b, v]` and writes it into the next column."""
    key, subkey = jax.random.split(state.key)
    chosen = sample(penalized(logits, state.seen, sampling), subkey, sampling)
    token, done = ended(chosen, state.done, sampling)
    tokens = lax.dynamic_update_slice(state.tokens, token[:, None], (jnp.int32(0), state.slot))
    seen = seen_too(state.seen, token)
    return state._replace(tokens=tokens, slot=jnp.int32(state.slot + 1), done=done, key=key, seen=seen)


def _replicated(state: State, mesh: Mesh | None) -> State:
    """The state with all but the cache replicated over the mesh, so that every process can read it."""
    if mesh is None:
        return state
    rest = state._replace(cache=[])
    return lax.with_sharding_constraint(rest, NamedSharding(mesh, PartitionSpec()))._replace(cache=state.cache)


def bucket(length: int) -> int:
    """The length that a prompt is padded to, so that few programs serve all prompts.

    The next multiple of a quarter of the largest power of two up to `length`, and of 16. So padding is less than a
    quarter of a long prompt.
    """
    step = max(16, 1 << max(0, length.bit_length() - 3))
    return -(-length // step) * step


def start(
    model: Decoder,
    params: Any,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    sampling: Sampling,
    seed: int,
    kind: str | None = None,
) -> State:
    """Prefills `prompts` (token ids, at least one each) with room for `max_tokens` more, and appends one.

    `kind` is that of the cache. The first chunk of a prompt attends to its own keys and values as they are, also where
    the cache holds them in int8; later chunks and new tokens read the cache.

    Raises:
      ValueError: an empty prompt.
    """
    if not prompts or not all(prompts):
        raise ValueError("Expected prompts of at least one token, got an empty one.")
    # pad on the left
    b, length = len(prompts), bucket(max(map(len, prompts)))
    slots = -(-(length + max_tokens) // SLOTS) * SLOTS
    padded = np.zeros((b, length), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[length - len(prompt) :] = prompt
    # all chunks but the last into the cache; the first one is the shorter, so that the last is a whole one
    run, run_part = (prefill, extend) if model.mesh is None else (prefill_at_once, extend_at_once)
    starts = np.array([length - len(prompt) for prompt in prompts], np.int32)
    first = jnp.asarray(starts) if starts.any() else None
    lengths = jnp.asarray(length - starts) if depends_on_length(model.config) else None
    cache = None
    if is_long(prompts):
        cache = empty_cache(model, params, b, slots, kind)
        for end in range(length % CHUNK or CHUNK, length, CHUNK):
            begin = max(0, end - CHUNK)
            slot = jnp.int32(begin) if begin else None
            cache = run_part(model, params, padded[:, begin:end], slot, first, cache, lengths)
    seen = seen_in(prompts, b, model.config.vocab_size, sampling)
    return run(model, params, padded, first, jax.random.key(seed), cache, slots, sampling, kind, lengths, seen)


def is_long(prompts: Sequence[Sequence[int]]) -> bool:
    """Whether the prompts go through the model in chunks."""
    return bucket(max(map(len, prompts), default=0)) > CHUNK
