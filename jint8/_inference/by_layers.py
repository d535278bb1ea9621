"""Generation on one CPU: prompts one after the other, then a token of all rows at a time, by programs of a few layers.

A decoder's layers have the same shapes, so one small program serves all of them. It compiles in a second where all
layers in one program take ten; starting several for each token costs about a fifth of a step (docs/speed.md). So
`warm`, which has the time, compiles a loop over tokens of all layers for one row, and for several where a layer is one
call of the CPU's library, with which the loop takes a second, too.

A request of any prompts runs the same few programs, because all sizes come from short lists: a prompt is padded on the
left to one of `sizes.PIECES` (a longer one goes through in pieces of the largest), rows to a power of two, and the
cache has `sizes.SLOTS` times a power of two slots. How a token is chosen, and where the padding ends, are numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jint8._inference.programs import PROGRAMS
from jint8._inference.sampling import Sampling, ended, penalized, sample, seen_in, seen_too
from jint8._inference.sizes import check_memory, empty_arrays, padded_length, pieces, rows_for, sizes
from jint8.models import _decode
from jint8.models._attention import Context, context
from jint8.models._cache import Cache, check_cache, empty_layer
from jint8.models._decoder import Block, Decoder
from jint8.models._rope import Rotary, depends_on_length

# How many layers a program has. More compile longer; fewer are started more often. A step of decoding is short beside
# starting a program, and so is a short prompt beside compiling one: the first answer waits for it.
DECODE_LAYERS = 10
PREFILL_LAYERS, LONG_PREFILL_LAYERS = {64: 1, 128: 2}, 3  # by the padded length of the prompt
CHECK_EVERY = 16  # steps between looks at whether all rows have ended, each of which waits for the steps before it
LOOP_STEPS = 32  # at most, of a start of the loop over tokens

Array: TypeAlias = Any  # of JAX or of NumPy
Angles = tuple[Rotary | None, Rotary | None]


class Step(NamedTuple):
    """Where a generation stands."""

    token: Array  # int32[b, 1]: the latest
    slot: Array  # int32: its column in the cache
    first: Array  # int32[b]: the column of each row's first token
    done: Array  # bool[b]
    key: Array  # uint32[2]: of the random numbers
    seen: Array | None = None  # bool[b, vocab]: which tokens were there, where that has a penalty


class Group(NamedTuple):
    """Layers that are one program, and their parameters as a list: to start it, nothing has to be flattened."""

    layers: range
    static: tuple[Any, ...]
    leaves: list[jax.Array]


class ByLayers:
    """A generation, in the middle of which its object is.

    Attributes:
      first: int32 `[b, 1]`, the first new token of each row.
      cache_bytes: of keys and values, in the host's memory.
    """

    def __init__(
        self,
        model: Decoder,
        params: Any,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        sampling: Sampling,
        seed: int,
        kind: str | None = None,
    ):
        """Runs the prompts (token ids, at least one each), with room for `max_tokens` more, and adds one token to each.

        `kind` is that of the cache: `"int8"`, or None for the activations' dtype.
        """
        tree = params["params"]
        self._model, self._sampling = model, sampling
        self._rest = {name: leaf for name, leaf in tree.items() if not name.startswith("layers_")}
        self._dtype = jnp.dtype(model.dtype if check_cache(kind) is None else jnp.int8)
        rows = rows_for(len(prompts))
        filled = [*prompts, *[prompts[-1]] * (rows - len(prompts))]  # a copy of a row changes nothing for the others
        length, slots = sizes(max(map(len, prompts)), max_tokens, alone=rows == 1)
        check_memory(model.config, rows, slots, self._dtype, max_tokens)
        if rows == 1:
            x, caches, _ = self._prompt(tree, prompts[0], slots)
        else:
            caches, x = self._several(tree, filled, len(prompts), length, slots)
        starts = [length - len(prompt) for prompt in filled]
        done = np.arange(rows) >= len(prompts)
        key = np.array([seed >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF], np.uint32)
        token = np.zeros((rows, 1), np.int32)
        seen = seen_in(prompts, rows, model.config.vocab_size, sampling)
        step = Step(token, np.int32(length - 1), np.asarray(starts, np.int32), done, key, seen)
        self._rows = len(prompts)
        self._next: Callable[..., Any] = PROGRAMS.get(_next, (model,), (self._rest, x, step, sampling), ())
        self._step, self._x, self._at, self._angles = self._next(self._rest, x, step, sampling)
        self._groups = groups(model, tree, DECODE_LAYERS)
        self._caches = [caches[group.layers.start : group.layers.stop] for group in self._groups]
        self._programs: list[Callable[..., Any]] = []  # of the groups, once there is a step
        self.first = np.asarray(self._step.token)[: self._rows]
        self.cache_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(caches))

    @property
    def done(self) -> bool:
        """Whether all rows have ended."""
        return bool(np.asarray(self._step.done).all())

    def advance(self, count: int) -> np.ndarray:
        """Up to `count` more tokens of each row, int32 `[b, n]`; fewer only where all rows have ended."""
        loop = self._loop(PROGRAMS.find)
        if loop is not None:
            return self._advance_in_loop(loop, count)
        tokens: list[jax.Array] = []
        if not self._programs:
            for group, caches in zip(self._groups, self._caches, strict=True):
                args = (group.leaves, self._x, self._at, self._angles, caches)
                self._programs.append(PROGRAMS.get(_layers, group.static, args, (1, 4)))
        while len(tokens) < count and not (len(tokens) % CHECK_EVERY == 0 and self.done):
            x = self._x
            for i, (program, group) in enumerate(zip(self._programs, self._groups, strict=True)):
                x, self._caches[i] = program(group.leaves, x, self._at, self._angles, self._caches[i])
            self._step, self._x, self._at, self._angles = self._next(self._rest, x, self._step, self._sampling)
            tokens.append(self._step.token)
        columns = [np.asarray(token)[: self._rows] for token in tokens]
        return np.concatenate([np.zeros((self._rows, 0), np.int32), *columns], axis=1)

    @property
    def layers_are_calls(self) -> bool:
        """Whether each layer of a step is one call of the CPU's library."""
        return all(
            _decode.fits(self._model.config, None, params, self._x, self._at, cache)
            for group, caches in zip(self._groups, self._caches, strict=True)
            for params, cache in zip(jax.tree.unflatten(group.static[-1], group.leaves), caches, strict=True)
        )

    def prepare_loop(self) -> None:
        """Compiles the loop over tokens, which `advance` of the same sizes uses from then on.

        It takes several seconds, a second where `layers_are_calls`; and up to 130 MB for 30 layers (small programs 10).
        """
        self._advance_in_loop(self._loop(PROGRAMS.get), 0)

    def _loop(self, look: Callable[..., Any]) -> Any:
        """The loop over tokens, as `look`, a method of `PROGRAMS`, finds or makes it."""
        static = tuple(group.static for group in self._groups)
        return look(_token_loop, (self._model, static), (*self._loop_arguments(), np.int32(0)), (3,))

    def _loop_arguments(self) -> tuple[Any, ...]:
        leaves = [group.leaves for group in self._groups]
        return self._rest, leaves, (self._x, self._at, self._angles, self._step), self._caches, self._sampling

    def _advance_in_loop(self, loop: Callable[..., Any], count: int) -> np.ndarray:
        """`advance` by the loop over tokens."""
        parts, left = [np.zeros((self._rows, 0), np.int32)], count
        while True:
            state, self._caches, tokens, done = loop(*self._loop_arguments(), np.int32(min(left, LOOP_STEPS)))
            self._x, self._at, self._angles, self._step = state
            parts.append(np.asarray(tokens)[: self._rows, : int(done)])
            left -= int(done)
            if not left or self.done:
                return np.concatenate(parts, axis=1)

    def _several(
        self, tree: Any, prompts: Sequence[Sequence[int]], distinct: int, length: int, slots: int
    ) -> tuple[list[Cache], np.ndarray]:
        """The cache of several rows that end in column `length`, and what comes out of the last layer for each's end.

        Prompts behind the first `distinct` ones are copies of the last of those.
        """
        empty = empty_arrays(self._model.config, len(prompts), slots, self._dtype)
        caches, lasts = [empty] * self._model.config.num_layers, []
        for index, prompt in enumerate(prompts):
            if index < distinct:
                last, row, padded = self._prompt(tree, prompt, slots)
            lasts.append(last)
            for i, cache in enumerate(caches):  # a layer at a time, so that there are never two of the whole
                args = (cache, row[i], np.int32(index), np.int32(length - padded))
                caches[i] = PROGRAMS.run(_insert, (), args, donate=(0,))
        return caches, np.concatenate(lasts)

    def _prompt(self, tree: Any, prompt: Sequence[int], slots: int) -> tuple[np.ndarray, list[Cache], int]:
        """What comes out of the last layer for a prompt's last token, `[1, 1, d]`, its cache, and its padded length."""
        padded = padded_length(len(prompt))
        tokens = np.zeros((1, padded), np.int32)
        start = padded - len(prompt)
        tokens[0, start:] = prompt
        first = np.array([start], np.int32)
        length = np.array([len(prompt)], np.int32) if depends_on_length(self._model.config) else None
        prefill = groups(self._model, tree, PREFILL_LAYERS.get(padded, LONG_PREFILL_LAYERS))
        caches: list[Any] = [None] * len(prefill)
        for begin, end in pieces(padded):
            inputs: tuple[Any, ...] = (self._rest, tokens[:, begin:end], np.int32(begin), first, length)
            x, at, angles = PROGRAMS.run(_begin, (self._model,), inputs)
            for i, group in enumerate(prefill):
                if begin == 0:
                    static = (*group.static, self._model.config, slots, self._dtype)
                    inputs = (group.leaves, x, at._replace(slot=None), angles)
                    x, caches[i] = PROGRAMS.run(_first_layers, static, inputs, donate=(1,))
                else:
                    inputs = (group.leaves, x, at, angles, caches[i])
                    x, caches[i] = PROGRAMS.run(_layers, group.static, inputs, donate=(1, 4))
        return np.asarray(x)[:, -1:], [cache for group in caches for cache in group], padded


def groups(model: Decoder, tree: Any, most: int) -> list[Group]:
    """The layers in groups of about `most`, all alike where the number of layers and their windows allow it."""
    count = model.config.num_layers
    blocks = [model.block(i) for i in range(count)]
    period = next(p for p in range(1, count + 1) if all(blocks[i] == blocks[i % p] for i in range(count)))
    sizes = range(period, max(most, period) + 1, period)
    even = [size for size in sizes if count % size == 0]
    size = even[-1] if even and 2 * even[-1] >= most else sizes[-1]
    out = []
    for start in range(0, len(blocks), size):
        layers = range(start, min(start + size, len(blocks)))
        leaves, structure = jax.tree.flatten([tree[f"layers_{i}"] for i in layers])
        local = tuple(model.is_local(i) for i in layers)
        out.append(Group(layers, (tuple(blocks[i] for i in layers), local, structure), leaves))
    return out


def _begin(
    model: Decoder, rest: Any, tokens: Any, slot: Any, first: Any, length: Any = None
) -> tuple[jax.Array, Context, Angles]:
    """The first layer's input for `tokens[b, s]`, the first of which stands at `slot`; `length` is `Context.length`."""
    at = context(tokens, slot, first, length)
    begun: Any = model.apply({"params": rest}, tokens, at, method="begin")
    return begun[0], at, begun[1]


def _layers(
    blocks: tuple[Block, ...], local: tuple[bool, ...], structure: Any, leaves: Any, x, at: Context, angles, caches
) -> tuple[jax.Array, list[Cache | None]]:
    """What comes out of a few layers for `x[b, s, d]`, and their caches."""
    params = jax.tree.unflatten(structure, leaves)
    out: list[Any] = []
    for i, block in enumerate(blocks):
        x, cache = block.apply({"params": params[i]}, x, at, angles[local[i]], caches[i])
        out.append(cache)
    return x, out


def _first_layers(blocks, local, structure, config, slots: int, dtype, leaves, x, at: Context, angles):
    """The same of a prompt's beginning, with new caches of so many slots."""
    caches = [empty_layer(config, len(x), slots, dtype) for _ in blocks]
    return _layers(blocks, local, structure, leaves, x, at, angles, caches)


def _insert(cache: Any, row: Any, index: jax.Array, move: jax.Array) -> Cache:
    """A layer's cache with one row's, whose columns `move` to end where those of all rows do."""
    return cache.with_row(row, index, move)


def _next(model: Decoder, rest: Any, x: jax.Array, step: Step, sampling: Sampling) -> Any:
    """The token that follows from `x[b, 1, d]`, which came out of the last layer, and its input of the first layer."""
    at = context(step.token, step.slot, step.first)
    logits: Any = model.apply({"params": rest}, x, at, True, method="end")
    key, subkey = jax.random.split(jax.random.wrap_key_data(step.key, impl="threefry2x32"))
    chosen = sample(penalized(logits[:, -1], step.seen, sampling), subkey, sampling)
    token, done = ended(chosen, step.done, sampling)
    seen = seen_too(step.seen, token)
    step = Step(token[:, None], step.slot + 1, step.first, done, jax.random.key_data(key), seen)
    return step, *_begin(model, rest, step.token, step.slot, step.first)


def _token_loop(model: Decoder, static: Any, rest: Any, leaves: Any, state: Any, caches: Any, sampling, count) -> Any:
    """Up to `count` steps of all layers: the state and caches after them, their tokens, and how many there are.

    Fewer than `count` where all rows have ended.
    """

    def body(carry: Any) -> Any:
        done, (x, at, angles, step), caches, tokens = carry
        caches = list(caches)
        for i, (blocks, local, structure) in enumerate(static):
            x, caches[i] = _layers(blocks, local, structure, leaves[i], x, at, angles, caches[i])
        step, x, at, angles = _next(model, rest, x, step, sampling)
        tokens = lax.dynamic_update_slice(tokens, step.token, (jnp.int32(0), done))
        return done + 1, (x, at, angles, step), caches, tokens

    def goes_on(carry: Any) -> jax.Array:
        return (carry[0] < count) & ~jnp.all(carry[1][3].done)

    tokens = jnp.zeros((len(state[3].token), LOOP_STEPS), jnp.int32)
    done, state, caches, tokens = lax.while_loop(goes_on, body, (jnp.int32(0), state, caches, tokens))
    return state, caches, tokens, done
