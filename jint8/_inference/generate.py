"""Text generation: prefill a few layers at a time, decode as one compiled function without Python per token."""

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
from jint8._inference.sampling import Knobs, Sampling, sample
from jint8.models._attention import Context, LayerCache, context, make_cache
from jint8.models._decoder import Decoder
from jint8.models._partition import batch_axis, heads_axis

CHUNK = 512  # longest part of a prompt that goes through the model at once: attention's scores grow with it
SLOTS = 128  # the cache's length is a multiple of this, so that programs are shared by requests of similar length


class State(NamedTuple):
    """Where a generation stands, between two runs of `decode`."""

    tokens: jax.Array  # int32[b, slots]: prompts, padded on the left, and what was generated
    slot: jax.Array  # int32: how many columns of tokens are filled
    first: jax.Array | None  # int32[b]: where each row's prompt begins; None where nothing is padding
    done: jax.Array  # bool[b]
    cache: list[LayerCache]
    key: jax.Array


def prefill(
    model: Decoder,
    params: Any,
    prompt: Any,
    first: jax.Array | None,
    key: jax.Array,
    cache: list[LayerCache] | None,
    slots: int,
    sampling: Sampling,
    knobs: Knobs,
    eos: tuple[int, ...],
) -> State:
    """Runs what is left of `prompt[b, s]`, and appends the first new token.

    `cache` holds the beginning of the prompt, whole chunks before its last; None means that nothing has run.
    """
    b, s = prompt.shape
    begin = 0 if cache is None else s - CHUNK
    if cache is None:
        cache = empty_cache(model, params, b, slots)
    run = forward if model.mesh is None else _apply
    slot = jnp.int32(begin) if begin else None
    logits, cache = run(model, params, prompt[:, begin:], slot, first, cache, last=True)
    return _first_token(model, prompt, first, key, cache, logits, slots, sampling, knobs, eos)


@functools.partial(jax.jit, static_argnames=("model", "slots", "sampling", "eos"), donate_argnames=("cache",))
def _first_token(model: Decoder, prompt, first, key, cache, logits, slots: int, sampling, knobs, eos) -> State:
    b, s = prompt.shape
    tokens = jnp.zeros((b, slots), jnp.int32).at[:, :s].set(prompt)
    state = State(tokens, jnp.int32(s), first, jnp.zeros(b, bool), cache, key)
    return _whole(_append(logits[:, -1], state, sampling, knobs, eos), model.mesh)


def extend(model: Decoder, params: Any, tokens: Any, slot: jax.Array | None, first: jax.Array | None, cache):
    """The cache with keys and values of `tokens[b, s]`, the first of which stands at `slot`."""
    run = forward if model.mesh is None else _apply
    return run(model, params, tokens, slot, first, cache, last=True)[1]


# On a mesh as one program each, which divides all layers alike.
prefill_at_once = jax.jit(prefill, static_argnames=("model", "slots", "sampling", "eos"), donate_argnames=("cache",))
extend_at_once = jax.jit(extend, static_argnames=("model",), donate_argnames=("cache",))


@functools.partial(jax.jit, static_argnames=("model", "sampling", "eos"), donate_argnames=("state",))
def decode(model: Decoder, params: Any, state: State, until: jax.Array, sampling, knobs, eos: tuple[int, ...]):
    """Appends tokens until `until` columns are filled or every row is done."""

    def body(state: State) -> State:
        token = lax.dynamic_slice_in_dim(state.tokens, state.slot - 1, 1, axis=1)
        logits, cache = _apply(model, params, token, state.slot - 1, state.first, state.cache)
        return _append(logits[:, -1], state._replace(cache=cache), sampling, knobs, eos)

    state = lax.while_loop(lambda s: (s.slot < until) & ~jnp.all(s.done), body, state)
    return _whole(state, model.mesh)


def empty_cache(model: Decoder, params: Any, batch: int, slots: int) -> list[LayerCache]:
    """A cache for a generation, on the devices of the model's mesh: divided by key-value heads and by batch.

    Where the devices don't divide the key-value heads, each has all of them.
    """
    mesh, sharding = model.mesh, None
    if mesh is not None:
        axes = _batch_axis(model, params, batch), heads_axis(mesh, model.config.num_kv_heads)
        sharding = NamedSharding(mesh, PartitionSpec(*axes))
    return make_cache(model.config, batch, slots, model.dtype, sharding)


def _batch_axis(model: Decoder, params: Any, batch: int) -> str | None:
    """The axis of the model's mesh over which rows of a batch are divided: none where they depend on each other."""
    for config in {leaf.config for leaf in jax.tree.leaves(params, is_leaf=is_qtensor) if is_qtensor(leaf)}:
        if config.depends_on_batch:
            return None
    return batch_axis(model.mesh, batch)


def _apply(model: Decoder, params, tokens, slot, first, cache, last: bool = False) -> Any:
    """Logits and cache; where the batch is divided, of each part of it without a look at the others."""

    def apply(params, tokens, at, cache):
        return model.apply(params, tokens, at, cache, last=last)

    at = context(tokens, slot, first)
    axis = _batch_axis(model, params, len(tokens))
    if axis is None:
        return apply(params, tokens, at, cache)
    whole: Any = PartitionSpec()
    rows: Any = PartitionSpec(axis)
    return jax.shard_map(
        apply,
        mesh=model.mesh,
        axis_names={axis},
        in_specs=(whole, rows, Context(whole, rows, rows, rows), rows),
        out_specs=rows,
        check_vma=False,  # parameters and positions are the same everywhere
    )(params, tokens, at, cache)


def _append(logits, state: State, sampling, knobs, eos) -> State:
    key, subkey = jax.random.split(state.key)
    token = sample(logits, subkey, sampling, knobs)
    end = eos[0] if eos else 0
    token = jnp.where(state.done, end, token)
    done = state.done | jnp.isin(token, jnp.asarray(eos, jnp.int32)) if eos else state.done
    tokens = lax.dynamic_update_slice(state.tokens, token[:, None], (jnp.int32(0), state.slot))
    return state._replace(tokens=tokens, slot=jnp.int32(state.slot + 1), done=done, key=key)


def _whole(state: State, mesh: Mesh | None) -> State:
    """The state with all but the cache whole on each device of the mesh, so that every process can read it."""
    if mesh is None:
        return state
    rest = state._replace(cache=[])
    return lax.with_sharding_constraint(rest, NamedSharding(mesh, PartitionSpec()))._replace(cache=state.cache)


def bucket(length: int) -> int:
    """The length that a prompt is padded to: at most a quarter more (or 16), so that few programs serve all prompts."""
    step = max(16, 1 << max(0, length.bit_length() - 3))
    return -(-length // step) * step


def start(
    model: Decoder, params: Any, prompts: list[list[int]], max_tokens: int, sampling, knobs, eos, seed: int
) -> State:
    """Prefills `prompts` (token ids, each with at least one) with room for `max_tokens` more.

    Raises:
      ValueError: an empty prompt.
    """
    if not prompts or not all(prompts):
        raise ValueError("Expected prompts of at least one token, got an empty one.")
    b, length = len(prompts), bucket(max(map(len, prompts)))
    slots = -(-(length + max_tokens) // SLOTS) * SLOTS
    padded = np.zeros((b, length), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[length - len(prompt) :] = prompt
    run, run_part = (prefill, extend) if model.mesh is None else (prefill_at_once, extend_at_once)
    starts = np.array([length - len(prompt) for prompt in prompts], np.int32)
    first = jnp.asarray(starts) if starts.any() else None
    cache = None
    if is_long(prompts):
        cache = empty_cache(model, params, b, slots)
        for end in range(length % CHUNK or CHUNK, length, CHUNK):
            begin = max(0, end - CHUNK)
            slot = jnp.int32(begin) if begin else None
            cache = run_part(model, params, padded[:, begin:end], slot, first, cache)
    return run(model, params, padded, first, jax.random.key(seed), cache, slots, sampling, knobs, eos)


def is_long(prompts: Sequence[Sequence[int]]) -> bool:
    """Whether the prompts go through the model in chunks."""
    return bucket(max(map(len, prompts), default=0)) > CHUNK
