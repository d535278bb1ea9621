"""A decoder a few layers at a time, as one program that is compiled once and runs for all of them.

All layers have the same shapes, so one compiled program serves each group of layers. `Decoder.apply` under `jit` would
unroll all layers into one program, and compile for as many times longer as there are groups.
"""

from __future__ import annotations

from typing import Any

import jax

from jint8._inference.programs import PROGRAMS
from jint8.models._attention import Context, context
from jint8.models._cache import Cache
from jint8.models._decoder import Block, Decoder

# Layers of a program. More of them take longer to compile. Fewer start more programs, and each start allocates its
# temporary memory anew: with one layer per program, prefill takes a third longer.
GROUP = 6


def forward(
    model: Decoder,
    params: Any,
    tokens: jax.Array,
    slot: jax.Array | None = None,
    first: jax.Array | None = None,
    cache: list[Cache] | None = None,
    last: bool = False,
    length: jax.Array | None = None,
) -> tuple[jax.Array, list[Cache] | None]:
    """Logits and cache, as `model.apply` computes them.

    Args:
      model: the decoder.
      params: its variables.
      tokens: int `[b, s]`.
      slot: the cache's column for the first of them; None for column 0 of a cache with nothing in it.
      first: where each row's padding ends, int32 `[b]`; None where nothing is padding.
      cache: keys and values of earlier tokens, donated: use the returned one from there on. None runs without one.
      last: only the logits of the last token.
      length: `Context.length`.

    Returns:
      float32 `[b, s, vocab]` (with `last`, `[b, 1, vocab]`), and the cache with these tokens (None without one).
    """
    tree = params["params"]
    rest = {name: leaf for name, leaf in tree.items() if not name.startswith("layers_")}
    x, at, angles = PROGRAMS.run(_begin, (model,), (rest, tokens, slot, first, length))
    caches = [None] * model.config.num_layers if cache is None else cache
    new_cache: list[Any] = []
    for start in range(0, model.config.num_layers, GROUP):
        group = range(start, min(start + GROUP, model.config.num_layers))
        blocks = tuple(map(model.block, group))
        inputs = [(tree[f"layers_{i}"], angles[model.is_local(i)]) for i in group]
        args = (inputs, x, at, caches[start : group.stop])
        x, group_cache = PROGRAMS.run(_layers, (blocks,), args, donate=(1, 3))
        new_cache += group_cache
    logits = PROGRAMS.run(_end, (model, last), (rest, x, at))
    return logits, None if cache is None else new_cache


def _begin(model: Decoder, params: Any, tokens, slot, first, length) -> tuple[jax.Array, Context, Any]:
    at = context(tokens, slot, first, length)
    x, angles = model.apply({"params": params}, tokens, at, method="begin")
    return x, at, angles


def _layers(blocks: tuple[Block, ...], inputs: list[Any], x: jax.Array, at: Context, caches: list[Any]) -> Any:
    new_caches = []
    for block, (params, angles), cache in zip(blocks, inputs, caches, strict=True):
        x, cache = block.apply({"params": params}, x, at, angles, cache)
        new_caches.append(cache)
    return x, new_caches


def _end(model: Decoder, last: bool, params: Any, x: jax.Array, at: Context) -> Any:
    return model.apply({"params": params}, x, at, last, method="end")
