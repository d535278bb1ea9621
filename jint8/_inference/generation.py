"""Tokens that follow prompts, by the way that suits the devices; and programs for them, compiled ahead."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from jint8._inference import generate as at_once
from jint8._inference.by_layers import ByLayers
from jint8._inference.programs import LIMIT, PROGRAMS, give_back
from jint8._inference.sampling import Sampling
from jint8._inference.sizes import is_long, padded_length, reachable, rows_for
from jint8.models._decoder import Decoder
from jint8.models._rope import depends_on_length, same_until

LARGE = 64 * 2**20  # bytes of a cache whose memory goes back to the system when the generation ends


class AtOnce:
    """A generation whose steps are a loop on the device, with the methods of `ByLayers`."""

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
        """As `ByLayers`."""
        for program in at_once.COMPILED:
            if program._cache_size() > LIMIT:  # their shapes are the requests' own, so that no memory is wasted
                program.clear_cache()
        self._model, self._params, self._sampling = model, params, sampling.known()
        self._state = at_once.start(model, params, prompts, max_tokens, self._sampling, seed, kind)
        self._filled = int(self._state.slot)
        self.first = _on_host(self._state.tokens[:, self._filled - 1 : self._filled])
        self.cache_bytes = 0  # of the host's memory

    @property
    def done(self) -> bool:
        """Whether all rows have ended."""
        return bool(_on_host(self._state.done).all())

    def advance(self, count: int) -> np.ndarray:
        """Up to `count` more tokens of each row, int32 `[b, n]`; fewer only where all rows have ended."""
        before = self._filled
        until = jnp.int32(before + count)
        self._state = at_once.decode(self._model, self._params, self._state, until, self._sampling)
        self._filled = int(self._state.slot)
        return _on_host(self._state.tokens[:, before : self._filled])


def generate(
    model: Decoder,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    every: int,
    **options: Any,
) -> Iterator[np.ndarray]:
    """Yields the tokens that follow `prompts`, int32 `[b, n]`: first one of each row, then up to `every` at a time.

    `options` are `sampling`, `seed` and `kind`, as in `ByLayers`.
    """
    if depends_on_length(model.config):
        yield from _rebuilding(model, params, prompts, max_tokens, every, options)
    else:
        yield from _generate(model, params, prompts, max_tokens, every, options)


def _rebuilding(
    model: Decoder,
    params: Any,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    every: int,
    options: dict[str, Any],
) -> Iterator[np.ndarray]:
    """`generate` where rotary frequencies depend on the length of a row.

    When they change, so do keys and values of all earlier tokens, in all layers: what a layer reads was computed from
    keys that were rotated otherwise. So the cache is made anew, by a generation whose prompts are the rows so far.
    """
    seed, end_tokens = options["seed"], options["sampling"].end_tokens
    rows, going = [list(map(int, prompt)) for prompt in prompts], list(range(len(prompts)))
    left = max_tokens
    while left and going:
        limits = [(same_until(model.config, len(rows[i])), len(rows[i])) for i in going]
        # The tokens that a generation gives: one from its prompts, and one for each step at which no row's change.
        count = min([left, *(1 + limit - length for limit, length in limits if limit is not None)])
        changes = options | {"seed": seed}
        for block in _generate(model, params, [rows[i] for i in going], count, every, changes):
            tokens = np.full((len(rows), block.shape[1]), max(int(end_tokens[0]), 0), np.int32)
            tokens[going] = block
            yield tokens
            left -= block.shape[1]
            for i in range(len(rows)):
                rows[i] += tokens[i].tolist()
        ended = [bool(np.isin(rows[i][len(prompts[i]) :], end_tokens).any()) for i in going]
        going = [i for i, end in zip(going, ended, strict=True) if not end]
        # Another seed for each, since a generation begins its random numbers from it.
        seed = int(np.random.SeedSequence([options["seed"] % 2**64, left]).generate_state(1)[0])


def _generate(
    model: Decoder,
    params: Any,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    every: int,
    options: dict[str, Any],
) -> Iterator[np.ndarray]:
    """`generate` with one cache."""
    way = ByLayers if runs_by_layers(model, params) else AtOnce
    before = PROGRAMS.made
    generation = way(model, params, prompts, max_tokens=max_tokens, **options)
    large = generation.cache_bytes > LARGE
    try:
        yield generation.first
        left = max_tokens - 1
        while left and not generation.done:
            tokens = generation.advance(min(every, left))
            left -= tokens.shape[1]
            yield tokens
    finally:
        del generation
        if large or PROGRAMS.made > before:
            give_back()


def runs_by_layers(model: Decoder, params: Any) -> bool:
    """Whether a model's layers run as programs of a few: on a CPU, where compiling is what takes long.

    A GPU's time goes by faster than Python starts programs, and over several devices XLA has to see all layers to shard
    them alike.
    """
    devices = {device for leaf in jax.tree.leaves(params)[:1] for device in leaf.devices()}
    return model.mesh is None and len(devices) == 1 and devices.pop().platform == "cpu"


def warm(
    model: Decoder,
    single: Any,
    several: Any,
    *,
    batch: int,
    prompt: int,
    max_tokens: int,
    kind: str | None,
    end_tokens: tuple[int, ...],
) -> None:
    """Compiles what requests up to these sizes run, by running it once.

    `single` are the parameters for one short prompt, `several` those for several and for long ones.
    """
    way = ByLayers if runs_by_layers(model, single) else AtOnce

    def run(params: Any, rows: int, length: int, room: int, temperature: float = 0.0) -> ByLayers | AtOnce:
        prompts, sampling = [[0] * length] * rows, Sampling.of(temperature=temperature, end_tokens=end_tokens)
        return way(model, params, prompts, max_tokens=room, sampling=sampling, seed=0, kind=kind)

    if way is AtOnce:
        params = several if batch > 1 or is_long([[0] * prompt]) else single
        for temperature in (0.0, 1.0):
            run(params, batch, prompt, max_tokens, temperature).advance(1)
        return
    with PROGRAMS.keeping():
        for slots, length, alone in reachable(prompt, max_tokens):
            params, room = several if is_long([[0] * length]) else single, slots - padded_length(length)
            if alone:
                one: Any = run(params, 1, length, room)
                one.prepare_loop()
            if batch > 1:
                run(several, 1, length, room)
        rows = 2
        while batch > 1 and rows <= rows_for(batch):
            for slots in sorted({slots for slots, _, _ in reachable(prompt, max_tokens)}):
                some: Any = run(several, rows, 1, slots - 1)
                if some.layers_are_calls:
                    some.prepare_loop()
                else:
                    some.advance(1)
            rows *= 2
    give_back()


def _on_host(x: jax.Array) -> np.ndarray:
    """The values of an array, wherever they are: with devices in several processes, a part may be in each."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return multihost_utils.process_allgather(x, tiled=True)
